//! The contract between the kernel side (`purelb-ebpf`) and the user side (`purelb-agent`).
//!
//! Everything both sides must agree on lives here and only here: the layout of the maps
//! ([`table`]), how a packet is read ([`parse`]), which slot it falls into ([`hash`]), what is
//! done with it ([`decide`]), who may ask for a VIP on the link ([`neighbour`]), how an answer gets back ([`reply`]) and why
//! ([`verdict`]). The kernel, `purelb-agent explain`, and the property tests run this very code; only the [`decide::Tables`] behind it differs.
//!
//! Byte order: addresses are bytes as on the wire; ports and every other integer are host order.
//! Time: `tick` is `jiffies64 >> 8` (1.024 s at HZ=250), see [`table::TICK_SHIFT`].
#![cfg_attr(not(feature = "user"), no_std)]

pub mod csum;
pub mod decide;
pub mod hash;
pub mod neighbour;
pub mod parse;
#[cfg(feature = "user")]
mod pod;
pub mod reply;
pub mod table;
pub mod verdict;

/// Layout version of all pinned maps, stored in `CONFIG.schema`; a change of any type in
/// [`table`] changes it.
pub const SCHEMA: u32 = 2;
