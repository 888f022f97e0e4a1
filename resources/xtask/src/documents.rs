//! What the documents in `docs/` claim of the project and can be looked up, is.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// What stands between each two backquotes of a row's last cell.
fn named(row: &str) -> impl Iterator<Item = &str> {
    let cell = row.trim_end_matches('|').rsplit('|').next().unwrap_or_default();
    cell.split('`').skip(1).step_by(2)
}

/// The names of all functions in the Rust files below `folder`.
fn functions(folder: &Path, found: &mut BTreeSet<String>) {
    for entry in fs::read_dir(folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display())) {
        let path = entry.unwrap().path();
        if path.is_dir() {
            functions(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = fs::read_to_string(&path).unwrap();
            let name = |rest: &str| rest.split(['(', '<']).next().map(str::to_owned);
            found.extend(text.split("fn ").skip(1).filter_map(name));
        }
    }
}

#[test]
fn each_test_that_the_threat_model_names_is_there() {
    let mut known = BTreeSet::new();
    for room in ["accounting", "api", "fuzz", "seccomp", "tests", "vcpu", "vmm"] {
        for folder in ["src", "tests"].map(|name| root().join(room).join(name)) {
            if folder.is_dir() {
                functions(&folder, &mut known);
            }
        }
    }
    let targets = fs::read_to_string(root().join("fuzz/src/lib.rs")).unwrap();
    let model = fs::read_to_string(root().join("docs/threat-model.md")).unwrap();
    let mut names = 0;
    for row in model.lines().filter(|line| line.starts_with("| ")) {
        for name in named(row) {
            let is_target = row.contains(&format!("fuzz: `{name}`")) && targets.contains(&format!("\"{name}\""));
            assert!(is_target || known.contains(name), "no test is called {name}");
            names += 1;
        }
    }
    assert!(names > 50, "{names}");
}

#[test]
fn each_chapter_is_in_the_book_and_each_of_the_books_is_there() {
    let docs = root().join("docs");
    let summary = fs::read_to_string(docs.join("SUMMARY.md")).unwrap();
    let listed: BTreeSet<&str> = summary
        .split("](")
        .skip(1)
        .filter_map(|rest| rest.split(')').next())
        .collect();
    for chapter in &listed {
        assert!(docs.join(chapter).is_file(), "{chapter} is listed and not there");
    }
    for entry in fs::read_dir(&docs).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        let is_chapter = name.ends_with(".md") && name != "SUMMARY.md";
        assert!(!is_chapter || listed.contains(&*name), "{name} is there and not listed");
    }
}
