//! Compiles the status API's protobuf with a compiler written in Rust, so that no `protoc` is needed.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    #[cfg(feature = "agent")]
    {
        let files = protox::compile(["proto/warren/v1/status.proto"], ["proto"])?;
        tonic_prost_build::configure()
            .build_transport(true)
            // `--json` prints the messages as they are.
            .type_attribute(".", "#[derive(::serde::Serialize)]")
            .compile_fds(files)?;
    }
    Ok(())
}
