//! The functional core of the agent: [`plan`] is a pure function from what the cluster says
//! ([`world::World`]) and what the maps hold ([`observed::Observed`]) to ordered, idempotent
//! [`observed::Action`]s and the [`problem::Problem`]s of the input.
#![forbid(unsafe_code)]

pub mod observed;
pub mod problem;
pub mod world;
