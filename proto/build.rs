//! Generates the gRPC code with protox, so that no protoc is needed.

use prost::Message as _;
use std::path::PathBuf;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = ["admin", "cluster", "host", "map", "monitor_peer", "osd", "status"]
        .map(|f| format!("gabion/v1/{f}.proto"));
    for f in &files {
        println!("cargo:rerun-if-changed=proto/{f}");
    }
    let descriptors = protox::compile(&files, ["proto"])?;
    let out = PathBuf::from(std::env::var("OUT_DIR")?).join("gabion_descriptor.bin");
    std::fs::write(&out, descriptors.encode_to_vec())?;
    tonic_prost_build::configure().compile_fds(descriptors)?;
    Ok(())
}
