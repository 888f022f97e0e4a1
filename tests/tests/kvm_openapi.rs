//! The API held against its own document: schemathesis asks, over loopback TCP, what `/openapi.json` says can be asked, and a good
//! deal that it says cannot; each answer is as the document says, before the start of a guest and while one runs.
//!
//! `cargo xtask test` installs schemathesis and openapi-spec-validator. tests/openapi/ has how it is to ask, what it must not make
//! much of, with the reasons, and the root in which the program runs, where nothing of the machine is.

use std::path::Path;
use std::process::Command;

use serde_json::json;
use tests::bed::{self, Folder};
use tests::flat::{Program, elf};
use tests::python;
use tests::require_bed;
use tests::vm::Process;

const OPENAPI: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/openapi");
/// The environment that both are in.
const ENVIRONMENT: &str = "schemathesis";

/// Ends the calling test, in one line that is counted, unless there is schemathesis.
macro_rules! require_schemathesis {
    () => {
        require_bed!(kvm);
        if let Err(why) = python::of(ENVIRONMENT) {
            bed::skipped("kvm", &why);
            return;
        }
    };
}

/// What `arguments` of the environment's `program` are run by.
fn command(program: &str) -> std::path::PathBuf {
    python::of(ENVIRONMENT).expect("looked for").with_file_name(program)
}

/// Has schemathesis ask a program that has `files` in its root.
fn ask(files: &Path) {
    let here = Folder::new();
    let mut command_line = Command::new("unshare");
    // Whatever is left running ends with it.
    command_line.args(["--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]);
    command_line.args(["sh", &format!("{OPENAPI}/root.sh")]);
    command_line.args([&bed::file("chronovisor"), files, &command("st")]);
    command_line.args(["--config-file", &format!("{OPENAPI}/schemathesis.toml"), "--no-color"]);
    command_line.args(["run", "--wait-for-schema=10", "http://127.0.0.1:8080/openapi.json"]);
    // What it keeps of its own.
    command_line.current_dir(here.path());
    command_line
        .env("SCHEMATHESIS_HOOKS", "hooks")
        .env("PYTHONPATH", OPENAPI);
    // Nothing is written beside the sources.
    command_line.env("PYTHONDONTWRITEBYTECODE", "1");
    let (status, stdout, stderr) = Process::spawn(command_line).wait();
    assert!(status.success(), "{status}; stdout:\n{stdout}\nstderr:\n{stderr}");
}

#[test]
fn the_document_is_valid_openapi() {
    require_schemathesis!();
    let document = format!("{OPENAPI}/../../resources/openapi.json");
    let mut command_line = Command::new(command("openapi-spec-validator"));
    command_line.args(["--errors", "all", &document]);
    let (status, stdout, stderr) = Process::spawn(command_line).wait();
    assert!(status.success(), "{status}; stdout:\n{stdout}\nstderr:\n{stderr}");
}

#[test]
fn before_the_start_each_answer_is_as_the_document_says() {
    tests::require_no_jail!("it is in a root of its own already, in which no jail can be made");
    require_schemathesis!();
    let files = Folder::new();
    files.write("kernel", elf(&Program::halt()));
    ask(files.path());
}

#[test]
fn while_a_guest_runs_each_answer_is_as_the_document_says() {
    tests::require_no_jail!("it is in a root of its own already, in which no jail can be made");
    require_schemathesis!();
    let files = Folder::new();
    // One that Ctrl-Alt-Del has no effect on: schemathesis presses it.
    files.write("kernel", elf(&Program::spin_forever()));
    files.write("data", vec![0; 1 << 20]);
    let config = json!({
        "boot-source": { "kernel_image_path": "/kernel" },
        "machine-config": { "vcpu_count": 1, "mem_size_mib": 128 },
        "drives": [{ "drive_id": "data", "is_root_device": false, "path_on_host": "/data" }],
        "balloon": {
            "amount_mib": 0, "deflate_on_oom": false, "stats_polling_interval_s": 1, "free_page_hinting": true,
        },
    });
    files.write("config.json", config.to_string());
    ask(files.path());
}
