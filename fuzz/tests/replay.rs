//! Inputs that are kept, each given to its target once: seeds, the corpus, and whatever has broken it before.
//!
//! An input that breaks its target fails its test, which names the file.

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use fuzz::{TARGETS, named};

/// The folders that hold inputs, one a target in each.
const KINDS: [&str; 3] = ["seeds", "corpus", "regressions"];

fn inputs(kind: &str, target: &str) -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(kind).join(target);
    let Ok(entries) = fs::read_dir(folder) else {
        return Vec::new();
    };
    let mut inputs: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    inputs.sort();
    inputs
}

fn replay(target: &str) {
    let run = named(target).expect("a target").run;
    let mut broken = Vec::new();
    let mut count = 0;
    for input in KINDS.iter().flat_map(|kind| inputs(kind, target)) {
        let bytes = fs::read(&input).unwrap();
        if catch_unwind(AssertUnwindSafe(|| run(&bytes))).is_err() {
            broken.push(input);
        }
        count += 1;
    }
    assert!(broken.is_empty(), "{target} is broken by {broken:#?}");
    assert!(count > 0, "no input of {target} is kept");
    println!("{count} inputs");
    // What nobody ever saw: that there are no bytes at all, and that there are only some.
    run(&[]);
    (0..=255).for_each(|byte| run(&[byte]));
}

macro_rules! tests {
    ($($target:ident => $name:ident;)+) => {
        $(#[test]
        fn $name() {
            replay(stringify!($target));
        })+

        #[test]
        fn each_target_has_its_test_and_no_input_is_nobodys() {
            let tested = [$(stringify!($target)),+];
            assert_eq!(TARGETS.iter().map(|target| target.name).collect::<Vec<_>>(), tested);
            for kind in KINDS {
                for folder in inputs(kind, "") {
                    let name = folder.file_name().unwrap().to_str().unwrap();
                    assert!(tested.contains(&name), "{}: of no target", folder.display());
                }
            }
        }
    };
}

tests! {
    loaders => no_kept_kernel_breaks_the_loaders;
    virtio => no_kept_driver_breaks_a_device;
    vsock => no_kept_packets_break_the_socket_device;
    mmds => no_kept_frames_break_the_metadata_service;
    ports => no_kept_access_breaks_a_port;
    http => no_kept_request_breaks_the_api;
    config_file => no_kept_file_breaks_its_reader;
    stats => no_kept_text_breaks_a_parser;
}
