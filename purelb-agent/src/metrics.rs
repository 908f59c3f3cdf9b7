//! Metrics: PureLB's by its names, and those of the data path beside them.

mod allocation;
mod announcing;
mod datapath;
mod rpcs;

pub use allocation::Allocation;
pub use announcing::{Announced, Announcing};
pub use datapath::DataPath;
pub use rpcs::Rpcs;
