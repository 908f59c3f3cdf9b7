//! Hands the eBPF object to the crate: `include_bytes!(concat!(env!("OUT_DIR"), "/purelb-ebpf.o"))`.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::{env, fs};

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-env-changed=PURELB_EBPF_OBJECT");
    let object = match env::var_os("PURELB_EBPF_OBJECT") {
        Some(path) => PathBuf::from(path),
        None => Path::new(&env::var("CARGO_MANIFEST_DIR")?).join("../target/purelb-ebpf.o"),
    };
    println!("cargo::rerun-if-changed={}", object.display());

    // Without the object the agent still compiles, for editors and unit tests, and refuses to start.
    let bytes = fs::read(&object).unwrap_or_else(|error| {
        println!("cargo::warning={}: {error}; run `cargo xtask build-ebpf`", object.display());
        Vec::new()
    });
    fs::write(Path::new(&env::var("OUT_DIR")?).join("purelb-ebpf.o"), bytes)?;
    Ok(())
}
