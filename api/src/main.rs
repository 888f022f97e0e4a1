//! The `chronovisor` binary: all of it is in the library, where it can be tested.

fn main() -> std::process::ExitCode {
    api::main()
}
