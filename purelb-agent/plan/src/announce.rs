//! Which addresses this node announces, and how: `kube-lb0` on every node for remote ones; for a local one PureLB's
//! election, and the protocol that makes its winner the only node that answers.
//!
//! ```text
//! Leases ──── lease ── peers (who lives, asserts, yielded) ─┐
//! wants, endpoints, own subnets ── election ────────────────┼─ owner ──> hold, withdraw, fence, writes of Leases
//! answers to own writes, time ──────────────────────────────┘
//! Services' annotations ── slots (who says that it announces)
//! ```
//! The election says who should answer; nodes may see it differently for any time. [`owner`] decides by what is proven.

pub mod election;
pub mod lease;
pub mod local;
pub mod owner;
pub mod peers;
pub mod remote;
pub mod slots;
