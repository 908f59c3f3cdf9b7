//! Metrics: PureLB's by its names, and those of the data path beside them.

mod allocation;
mod datapath;

pub use allocation::Allocation;
pub use datapath::DataPath;
