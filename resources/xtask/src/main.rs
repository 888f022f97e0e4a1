//! `cargo xtask`: sets up, builds and tries everything.
fn main() {}
