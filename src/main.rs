//! The `warren` binary: everything is in the library.

fn main() {}
