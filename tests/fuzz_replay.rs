//! Replays the fuzz targets' committed corpus: what a fuzzer once found interesting stays tested.

#[path = "fuzz/targets/mod.rs"]
mod targets;

use std::fs;
use std::path::Path;

macro_rules! replay {
    ($($target:ident)*) => { $(
        #[test]
        fn $target() {
            replay(stringify!($target));
        }
    )* };
}

replay! { packet batch datagrams frames }
#[cfg(feature = "agent")]
replay! { annotations objects cni }

fn replay(target: &str) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus").join(target);
    let mut files: Vec<_> = fs::read_dir(&folder)
        .unwrap_or_else(|error| panic!("no corpus in {}: {error}", folder.display()))
        .map(|entry| entry.expect("a folder's entry").path())
        .collect();
    files.sort();
    assert!(!files.is_empty(), "{} is empty", folder.display());
    for file in &files {
        let data = fs::read(file).expect("a corpus file");
        // The name is printed only when the target panics.
        println!("{}", file.display());
        targets::run(target, &data);
    }
}

#[test]
fn every_target_is_replayed() {
    let mut names: Vec<_> = targets::TARGETS.iter().map(|(name, _)| *name).collect();
    names.retain(|name| {
        !["packet", "batch", "datagrams", "frames", "annotations", "objects", "cni"].contains(name)
    });
    assert!(names.is_empty(), "not in replay! above: {names:?}");
}

#[test]
fn valid_traffic_gets_through_the_fuzzed_mesh() {
    targets::assert_alive();
}
