//! The agent and the allocator on a real Kubernetes control plane, which most of these tests share.

mod allocator;
mod burst;
mod chaos;
mod crds;
mod deaf;
mod external;
mod external_chaos;
mod faults;
mod hazards;
mod hostile;
mod limits;
mod local;
mod network;
mod node;
mod policy;
mod scenario;
mod upgrade;
