//! The lab that netns tests and the demo share: client, router, nodes and pods out of network
//! namespaces, with a real agent on every node and real servers and clients around it; and a real Kubernetes
//! control plane (`cluster`).

pub mod agent;
pub mod answers;
pub mod bench;
pub mod capture;
pub mod case;
pub mod clients;
pub mod cluster;
pub mod lab;
pub mod lan;
pub mod leftovers;
pub mod load;
pub mod manifests;
pub mod matrix;
pub mod neighbour;
pub mod netns;
pub mod packet;
pub mod process;
pub mod purelb;
pub mod random;
pub mod routing;
pub mod scenario;
pub mod servers;
pub mod sidecar;
pub mod sys;
pub mod vm;
pub mod world;
