//! Every path and method: what is answered, in which state, to which body. The rows are in `table.txt`, which says how to read
//! them; the rules they meet are the real lifecycle's. That no route is without rows is held against `list.rs`, of which the
//! router is made.

use std::collections::BTreeSet;

use axum::Router;
use serde_json::Value;
use vmm::RunState;

use super::list::{OFFERED, REFUSED};
use super::tests::{request_of, router_in};

const TABLE: &str = include_str!("table.txt");

/// The PUT of a path.
type Put = (&'static str, &'static str);

const ONE_VCPU: Put = ("/machine-config", r#"{"vcpu_count": 1, "mem_size_mib": 128}"#);
const KERNEL: Put = ("/boot-source", r#"{"kernel_image_path": "/vmlinux"}"#);
const BARE_BALLOON: Put = ("/balloon", r#"{"amount_mib": 16, "deflate_on_oom": false}"#);

/// What most microVMs are configured as.
const CONFIGURED: [Put; 6] = [
    KERNEL,
    (
        "/drives/rootfs",
        r#"{"drive_id": "rootfs", "is_root_device": true, "path_on_host": "/rootfs"}"#,
    ),
    (
        "/drives/data",
        r#"{"drive_id": "data", "is_root_device": false, "path_on_host": "/data"}"#,
    ),
    (
        "/network-interfaces/eth0",
        r#"{"iface_id": "eth0", "host_dev_name": "tap0", "guest_mac": "06:00:ac:10:00:02"}"#,
    ),
    ("/vsock", r#"{"guest_cid": 3, "uds_path": "v.sock"}"#),
    (
        "/balloon",
        r#"{"amount_mib": 16, "deflate_on_oom": false, "stats_polling_interval_s": 1, "free_page_hinting": true}"#,
    ),
];

/// What there can be one of, or what can be changed once it is there.
const MORE: [Put; 3] = [
    ("/mmds", r#"{"latest": {"meta-data": {"ami-id": "ami-1"}}}"#),
    ("/logger", r#"{"log_path": "log"}"#),
    ("/metrics", r#"{"metrics_path": "/dev/null"}"#),
];

/// How the microVM of a row comes to be what the row's letter says: what is put, and the state it is in then.
fn way_to(letter: char) -> (Vec<Put>, RunState) {
    match letter {
        'N' => (CONFIGURED.to_vec(), RunState::NotStarted),
        'R' => (CONFIGURED.to_vec(), RunState::Running),
        'P' => (CONFIGURED.to_vec(), RunState::Paused),
        'M' => ([&CONFIGURED[..], &MORE].concat(), RunState::NotStarted),
        'E' => (vec![], RunState::NotStarted),
        'K' => (vec![KERNEL, ONE_VCPU], RunState::Running),
        'B' => (vec![KERNEL, BARE_BALLOON], RunState::Running),
        other => panic!("{other} is no state"),
    }
}

/// One line of the table.
#[derive(Debug)]
pub(super) struct Row<'a> {
    pub kind: &'a str,
    pub states: &'a str,
    pub method: &'a str,
    pub path: &'a str,
    pub body: String,
    pub status: u16,
    pub answer: String,
}

pub(super) fn row(line: &str) -> Row<'_> {
    let malformed = || panic!("not a row: {line}");
    let (request, answer) = line.split_once(" => ").unwrap_or_else(malformed);
    let mut words = request.split_whitespace();
    let mut word = || words.next().unwrap_or_else(|| panic!("not a row: {line}"));
    let (kind, states, method, path) = (word(), word(), word(), word());
    let body = request.split_once(path).map_or("", |(_, body)| body.trim());
    let body = repeated(body);
    let (status, answer) = answer.split_once(' ').unwrap_or((answer, ""));
    Row {
        kind,
        states,
        method,
        path,
        body,
        status: status.parse().unwrap_or_else(|_| panic!("not a row: {line}")),
        answer: answer
            .replace(
                "@JSON",
                "An error occurred when deserializing the json body of a request:",
            )
            .replace(
                "@AFTER",
                "The requested operation is not supported after starting the microVM.",
            )
            .replace(
                "@BEFORE",
                "The requested operation is not supported before starting the microVM.",
            ),
    }
}

/// With `ababab` for `@(3 ab)`.
fn repeated(body: &str) -> String {
    let Some((before, rest)) = body.split_once("@(") else {
        return body.to_owned();
    };
    let parts = rest.split_once(')').and_then(|(inside, after)| {
        let (times, text) = inside.split_once(' ')?;
        Some((text.repeat(times.parse().ok()?), after))
    });
    let (text, after) = parts.unwrap_or_else(|| panic!("not a repetition: {body}"));
    format!("{before}{text}{}", repeated(after))
}

/// The lines that are neither empty nor a remark.
pub(super) fn lines() -> impl Iterator<Item = &'static str> {
    TABLE.lines().filter(|line| !line.is_empty() && !line.starts_with('#'))
}

/// A microVM as the row's letter says, made over the API.
async fn microvm(letter: char) -> Router {
    let (puts, state) = way_to(letter);
    let router = router_in(RunState::NotStarted);
    for (path, body) in puts {
        let (status, answer) = request_of(&router, "PUT", path, body).await;
        assert_eq!(status, 204, "PUT {path}: {answer}");
    }
    if state != RunState::NotStarted {
        request_of(&router, "PUT", "/actions", r#"{"action_type": "InstanceStart"}"#).await;
    }
    if state == RunState::Paused {
        request_of(&router, "PATCH", "/vm", r#"{"state": "Paused"}"#).await;
    }
    let (_, info) = request_of(&router, "GET", "/", "").await;
    assert_eq!(info["state"], serde_json::to_value(state).unwrap());
    router
}

/// What was answered, in the words of the table, which `expected` chooses.
fn told(status: u16, answer: &Value, expected: &str) -> String {
    match answer {
        Value::Null => String::new(),
        Value::Object(object) if status >= 400 && object.len() == 1 => answer["fault_message"]
            .as_str()
            .unwrap_or("no fault_message")
            .to_owned(),
        Value::Object(object) if expected.starts_with("@KEYS") => {
            let mut keys: Vec<_> = object.keys().map(String::as_str).collect();
            // In the order of the row, as far as they are in it.
            keys.sort_by_key(|key| expected.split(' ').position(|word| word == *key));
            format!("@KEYS {}", keys.join(" "))
        }
        Value::Array(list) if expected.starts_with("@LIST") => format!("@LIST {}", list.len()),
        other => other.to_string(),
    }
}

#[tokio::test]
async fn every_request_is_answered_as_the_table_says() {
    let mut wrong = Vec::new();
    for line in lines().filter(|line| !line.starts_with("== ")) {
        let row = row(line);
        let expected = match serde_json::from_str::<Value>(&row.answer) {
            Ok(value) if row.status == 200 => value.to_string(),
            _ => row.answer.clone(),
        };
        for letter in row.states.chars() {
            let router = microvm(letter).await;
            let (status, answer) = request_of(&router, row.method, row.path, &row.body).await;
            let said = told(status, &answer, &expected);
            if (status, &said) != (row.status, &expected) {
                wrong.push(format!("{letter} {line}\n    was {status} {said}"));
            }
        }
    }
    assert!(
        wrong.is_empty(),
        "{} rows are wrong:\n{}",
        wrong.len(),
        wrong.join("\n")
    );
}

/// Whether `path` is one of those that `pattern` stands for.
pub(super) fn fits(pattern: &str, path: &str) -> bool {
    let (pattern, path): (Vec<_>, Vec<_>) = (pattern.split('/').collect(), path.split('/').collect());
    let mut parts = pattern.iter().zip(&path);
    pattern.len() == path.len() && parts.all(|(of, is)| of == is || (of.starts_with('{') && !is.is_empty()))
}

/// A heading, and the kinds of the rows that follow it.
struct Section {
    /// `METHOD path`, or `any other`.
    of: &'static str,
    /// Kinds that it says there are.
    promised: BTreeSet<&'static str>,
    /// Kinds that it says there cannot be.
    excused: BTreeSet<&'static str>,
    kinds: BTreeSet<&'static str>,
}

fn sections() -> Vec<Section> {
    let mut sections: Vec<Section> = Vec::new();
    for line in lines() {
        let Some(head) = line.strip_prefix("== ") else {
            let row = row(line);
            let section = sections.last_mut().expect("a heading comes first");
            let (method, path) = section.of.split_once(' ').expect("method and path");
            if method != "any" {
                let here = row.path.split('?').next().unwrap_or_default();
                assert!(
                    row.method == method && fits(path, here),
                    "{line}: not of {}",
                    section.of
                );
            }
            section.kinds.insert(row.kind);
            continue;
        };
        let malformed = || panic!("not a heading: {line}");
        let (of, kinds) = head.split_once(": ").unwrap_or_else(malformed);
        let (promised, excused) = kinds.split_once(" | no ").unwrap_or((kinds, ""));
        let (excused, reason) = excused.split_once(" (").unwrap_or((excused, ""));
        assert_eq!(excused.is_empty(), reason.is_empty(), "{line}: without a reason");
        sections.push(Section {
            of,
            promised: promised.split_whitespace().collect(),
            excused: excused.split_whitespace().collect(),
            kinds: BTreeSet::new(),
        });
    }
    sections
}

/// The kinds of rows that a route must have, or say why it has not.
fn kinds_of(method: &str, path: &str) -> BTreeSet<&'static str> {
    let mut kinds: BTreeSet<_> = match method {
        "GET" => ["good", "state", "body"].into(),
        _ => [
            "good", "missing", "unknown", "type", "range", "state", "empty", "syntax",
        ]
        .into(),
    };
    if path.contains('{') {
        kinds.insert("id");
    }
    kinds
}

#[test]
fn each_route_has_a_row_of_each_kind_there_can_be() {
    let sections = sections();
    for section in &sections {
        assert_eq!(section.kinds, section.promised, "{}", section.of);
        let both: Vec<_> = section.promised.intersection(&section.excused).collect();
        assert!(both.is_empty(), "{}: {both:?} both are there and cannot be", section.of);
    }
    let named = |(method, path): &(&str, &str)| format!("{method} {path}");
    let routes: BTreeSet<_> = OFFERED.iter().chain(REFUSED).map(named).collect();
    let headings: BTreeSet<_> = sections.iter().map(|section| section.of.to_owned()).collect();
    let none: Vec<_> = routes.difference(&headings).collect();
    assert!(none.is_empty(), "routes of list.rs without rows in table.txt: {none:?}");
    let gone: Vec<_> = headings.difference(&routes).collect();
    assert_eq!(gone, ["any other"], "headings of table.txt without a route in list.rs");
    for route in OFFERED {
        let name = named(route);
        let section = sections.iter().find(|section| section.of == name).expect("found above");
        let lacking: Vec<_> = kinds_of(route.0, route.1)
            .into_iter()
            .filter(|kind| !section.promised.contains(kind) && !section.excused.contains(kind))
            .collect();
        assert!(lacking.is_empty(), "{name}: no row, and no word why, of {lacking:?}");
    }
}

#[tokio::test]
async fn a_method_that_a_path_does_not_have_is_refused() {
    let router = microvm('R').await;
    let all: BTreeSet<_> = OFFERED.iter().chain(REFUSED).collect();
    let paths: BTreeSet<_> = all.iter().map(|(_, path)| *path).collect();
    for path in paths {
        let first = path.split('/').nth(1).unwrap_or_default();
        // Whatever is in braces may be anything.
        let asked = path.replace(['{', '}'], "");
        for method in [
            "GET", "PUT", "PATCH", "POST", "DELETE", "HEAD", "OPTIONS", "TRACE", "LIST",
        ] {
            let there = all.iter().any(|(of, is)| *of == method && fits(is, &asked));
            if there {
                continue;
            }
            let body = if matches!(method, "PUT" | "PATCH") { "{}" } else { "" };
            let (status, answer) = request_of(&router, method, &asked, body).await;
            let says = match method {
                "GET" | "PUT" | "PATCH" => format!("Invalid request method and/or path: {method} {first}."),
                // The body of the one to HEAD is left out by the server (RFC 9110, 9.3.2).
                _ => "Invalid HTTP Method: Unsupported HTTP method.".to_owned(),
            };
            assert_eq!(
                (status, answer["fault_message"].as_str()),
                (400, Some(says.as_str())),
                "{method} {asked}"
            );
        }
    }
}
