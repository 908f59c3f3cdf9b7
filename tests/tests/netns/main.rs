//! The agent in a lab of network namespaces, with real traffic.

mod change;
mod commands;
mod flows;
mod handover;
mod hazards;
mod host;
mod input;
mod leftovers;
mod links;
mod local;
mod neighbour;
mod policy;
mod remote;
mod restart;
mod routing;
mod silence;
mod standalone;
mod states;
mod storms;
mod traffic;
mod uplinks;
mod wire;
