//! purelb.io/v2: ServiceGroup and LBNodeAgent as PureLB has them, with our additions, all of which are optional.
//! Doc comments here are the descriptions that `kubectl explain` prints.
//!
//! `cargo xtask codegen` writes the CustomResourceDefinitions of [`crds`] to `deploy/crds`.
#![forbid(unsafe_code)]

pub mod crds;
pub mod node_agent;
pub mod service_group;
