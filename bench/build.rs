//! Which build of Warren is measured, as far as the results of another machine's reader need to know.

/// What the scripts say of it (`bench/shipped`): `deploy/build-static`, or `WARREN=NAME` without its folders.
const VARIABLE: &str = "BENCH_BUILD";
/// What is shipped.
pub const SHIPPED: &str = "deploy/build-static";

/// What is measured here: [`SHIPPED`], `WARREN=NAME`, or `cargo` where cargo has started us without the scripts.
pub fn measured() -> String {
    let given = |path: String| format!("WARREN={}", path.rsplit('/').next().unwrap_or_default());
    let said = std::env::var(VARIABLE).or_else(|_| std::env::var("WARREN").map(given));
    said.unwrap_or_else(|_| "cargo".to_owned())
}

/// What a person types in front of the command for the same build.
pub fn prefix(build: &str) -> String {
    if build.starts_with("WARREN=") { format!("{build} ") } else { String::new() }
}
