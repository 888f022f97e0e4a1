//! Compiles the policy that ships, so that no start of a microVM has to.

use std::fmt::Write;
use std::path::Path;
use std::{env, fs};

#[path = "src/compile.rs"]
mod compile;

const POLICY: &str = "../resources/seccomp/x86_64.json";

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=src/compile.rs");
    println!("cargo::rerun-if-changed={POLICY}");
    let json = fs::read(POLICY).unwrap_or_else(|error| panic!("{POLICY}: {error}"));
    let programs = compile::compile(&json).unwrap_or_else(|error| panic!("{POLICY}: {error}"));
    let mut source = String::new();
    for role in compile::ROLES {
        let program = programs.get(role).unwrap_or_else(|| panic!("{POLICY}: no {role}"));
        let name = role.to_uppercase();
        write!(source, "static {name}: [sock_filter; {}] = [", program.len()).expect("a string takes it");
        for instruction in program {
            write!(source, "{instruction:?},").expect("a string takes it");
        }
        source.push_str("];\n");
    }
    let out = env::var_os("OUT_DIR").expect("cargo says where");
    fs::write(Path::new(&out).join("programs.rs"), source).expect("cargo's own folder can be written to");
}
