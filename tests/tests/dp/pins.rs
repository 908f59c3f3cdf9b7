//! Pins as an agent finds and leaves them: those of a version without a fence and with fewer reasons are taken over.

use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use aya::EbpfLoader;
use aya::maps::{Array, Map, MapData};
use purelb_agent::bpf::{self, Fence};
use purelb_common::table;
use purelb_tests::leftovers;
use purelb_tests::world::OBJECT;

/// A folder of pins, which goes with it.
struct Root(std::path::PathBuf);

impl Drop for Root {
    fn drop(&mut self) {
        let _ = bpf::remove(&self.0);
    }
}

fn entries(pin: &Path) -> Result<u32> {
    Ok(MapData::from_pin(pin)?.info()?.max_entries())
}

#[test]
fn of_an_older_version() -> Result<()> {
    let object =
        std::env::var(OBJECT).unwrap_or(concat!(env!("CARGO_MANIFEST_DIR"), "/../target/purelb-ebpf.o").into());
    let object = std::fs::read(&object).with_context(|| format!("read {object}"))?;
    let root = Root(Path::new("/sys/fs/bpf").join(leftovers::next_prefix()?));
    let (reasons, fence) = (root.0.join("REASONS"), root.0.join("FENCE"));
    drop(bpf::load(&root.0, &object)?);
    let full = entries(&reasons)?;
    std::fs::remove_file(&fence)?;
    std::fs::remove_file(&reasons)?;
    drop(EbpfLoader::new().map_max_entries("REASONS", full - 2).map_pin_path("REASONS", &reasons).load(&object)?);
    ensure!(entries(&reasons)? == full - 2, "the older map is not there");

    let programs = bpf::load(&root.0, &object)?;
    ensure!(entries(&reasons)? == full, "reasons that came since are counted nowhere");
    ensure!(programs.maps().reasons()?.len() == full as usize);
    let writer = Fence::open(&root.0)?;
    ensure!(writer.get()? == (0, 0), "nobody wrote it");
    writer.set(5, u64::MAX)?;
    let seen = Array::<_, table::Fence>::try_from(Map::from_map_data(MapData::from_pin(&fence)?)?)?.get(&0, 0)?;
    ensure!(seen == table::Fence { until: 5, over: u64::MAX }, "{seen:?}");
    // The next agent finds both.
    drop(programs);
    drop(bpf::load(&root.0, &object)?);
    ensure!(Fence::open(&root.0)?.get()? == (5, u64::MAX) && entries(&reasons)? == full);
    Ok(())
}
