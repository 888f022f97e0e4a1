//! Relocations packed (RELR, glibc 2.36 or later): a third of the program's read-only pages would be a table that is read once,
//! at the start, and resident from then on.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-link-arg-bins=-Wl,-z,pack-relative-relocs");
}
