//! The functional core of the agent: [`plan`](plan::plan) is a pure function from what the cluster says
//! ([`world::World`]) and what the maps hold ([`observed::Observed`]) to ordered, idempotent
//! [`observed::Action`]s and the [`problem::Problem`]s of the input.
//!
//! ```text
//! World ── desired ──> fronts ─┐
//! Observed ────────────────────┼─ ids ─ blocks ─ maglev ─ slots ──> actions, views, problems
//! now ─────────────────────────┘
//! ```
//! [`plan::Planner`] is the same function with a memory of what it found in order.
#![forbid(unsafe_code)]

pub mod alloc;
pub mod announce;
pub mod apply;
pub mod blocks;
pub mod desired;
pub mod ids;
mod job;
pub mod maglev;
pub mod observed;
pub mod plan;
pub mod problem;
mod ranges;
mod reverse;
pub mod slots;
pub mod unproven;
pub mod view;
pub mod world;
