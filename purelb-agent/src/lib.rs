//! The node agent: a source fills a [`purelb_plan::world::World`], the plan says what to write, the
//! shells write it.

pub mod allocator;
pub mod announcer;
pub mod args;
pub mod bpf;
pub mod cluster;
pub mod commands;
pub mod host;
pub mod http;
pub mod keeper;
pub mod lock;
pub mod log;
pub mod metrics;
pub mod net;
pub mod pulse;
pub mod run;
pub mod snapshot;
pub mod source;
