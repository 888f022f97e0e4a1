//! The `chronovisor` binary.
fn main() {}
