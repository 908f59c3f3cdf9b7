//! Client and server of `proto/ipam.proto`; protox needs no protoc on the machine.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = protox::compile(["proto/ipam.proto"], ["proto"])?;
    tonic_prost_build::configure().build_transport(false).compile_fds(files)?;
    println!("cargo::rerun-if-changed=proto/ipam.proto");
    Ok(())
}
