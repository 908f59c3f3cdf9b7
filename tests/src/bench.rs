//! The benchmark's parts: figures of packets (`cases`, `wrapper`, `rounds`), of the agent on a big
//! folder (`system`, `folder`,
//! `pins`), forwarding beside other ways (`live`), agent and allocator on a
//! real API server (`cluster`), local addresses (`announce`), and the table that all end in (`report`).

pub mod announce;
pub mod cases;
pub mod cluster;
pub mod folder;
pub mod live;
pub mod pins;
pub mod report;
pub mod rounds;
pub mod system;
pub mod wrapper;
