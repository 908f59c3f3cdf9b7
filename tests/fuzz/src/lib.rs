//! What the fuzz targets share: bytes as decisions, the maps in memory, laws about what was planned.

pub mod chance;
pub mod laws;
pub mod maps;
#[path = "../../../purelb-agent/plan/tests/allocation/model.rs"]
pub mod model;
pub mod objects;
#[path = "../../../purelb-agent/plan/tests/allocation/sidecar.rs"]
pub mod sidecar;
pub mod world;
