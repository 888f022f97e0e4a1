//! Every path and method: what is answered, in which state, to which body. The rows are in `table.txt`, which says how to read
//! them; the rules they meet are the real lifecycle's.

use std::collections::BTreeSet;

use serde_json::Value;
use vmm::RunState;

use super::tests::{request_of, router_in};

const TABLE: &str = include_str!("table.txt");

/// What the microVM of every row is configured as, before it is in the row's state.
const CONFIGURED: [(&str, &str); 6] = [
    ("/boot-source", r#"{"kernel_image_path": "/vmlinux"}"#),
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

/// One line of the table.
#[derive(Debug)]
struct Row<'a> {
    kind: &'a str,
    states: &'a str,
    method: &'a str,
    path: &'a str,
    body: &'a str,
    status: u16,
    answer: String,
}

fn row(line: &str) -> Row<'_> {
    let malformed = || panic!("not a row: {line}");
    let (request, answer) = line.split_once(" => ").unwrap_or_else(malformed);
    let mut words = request.split_whitespace();
    let mut word = || words.next().unwrap_or_else(|| panic!("not a row: {line}"));
    let (kind, states, method, path) = (word(), word(), word(), word());
    let body = request.split_once(path).map_or("", |(_, body)| body.trim());
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

fn state(letter: char) -> RunState {
    match letter {
        'N' => RunState::NotStarted,
        'R' => RunState::Running,
        'P' => RunState::Paused,
        other => panic!("{other} is no state"),
    }
}

/// The lines that are neither empty nor a remark.
fn lines() -> impl Iterator<Item = &'static str> {
    TABLE.lines().filter(|line| !line.is_empty() && !line.starts_with('#'))
}

#[tokio::test]
async fn every_request_is_answered_as_the_table_says() {
    let mut wrong = Vec::new();
    for line in lines().filter(|line| !line.starts_with("== ")) {
        let row = row(line);
        for letter in row.states.chars() {
            let router = router_in(RunState::NotStarted);
            for (path, body) in CONFIGURED {
                let (status, answer) = request_of(&router, "PUT", path, body).await;
                assert_eq!(status, 204, "PUT {path}: {answer}");
            }
            if letter != 'N' {
                request_of(&router, "PUT", "/actions", r#"{"action_type": "InstanceStart"}"#).await;
            }
            if letter == 'P' {
                request_of(&router, "PATCH", "/vm", r#"{"state": "Paused"}"#).await;
            }
            let (_, info) = request_of(&router, "GET", "/", "").await;
            assert_eq!(info["state"], serde_json::to_value(state(letter)).unwrap());
            let (status, answer) = request_of(&router, row.method, row.path, row.body).await;
            let said = match &answer {
                Value::Null => String::new(),
                Value::Object(object) if status >= 400 && object.len() == 1 => answer["fault_message"]
                    .as_str()
                    .unwrap_or("no fault_message")
                    .to_owned(),
                other => other.to_string(),
            };
            let expected = match serde_json::from_str::<Value>(&row.answer) {
                Ok(value) if status == 200 => value.to_string(),
                _ => row.answer.clone(),
            };
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

#[test]
fn each_path_and_method_has_a_row_of_each_kind_that_it_promises() {
    let mut promised: Option<(&str, BTreeSet<&str>)> = None;
    let mut kinds = BTreeSet::new();
    for line in lines().chain(["== "]) {
        let Some(head) = line.strip_prefix("== ") else {
            let row = row(line);
            let heading = promised.as_ref().expect("a heading comes first").0;
            let (method, path) = heading.split_once(' ').expect("method and path");
            if method != "any" {
                let fits = path
                    .split('/')
                    .zip(row.path.split('/'))
                    .all(|(of, is)| of.starts_with('{') || of == is);
                assert!(row.method == method && fits, "{line}: not of {heading}");
            }
            kinds.insert(row.kind);
            continue;
        };
        if let Some((heading, promised)) = promised.take() {
            assert_eq!(kinds, promised, "{heading}");
        }
        kinds.clear();
        if let Some((heading, list)) = head.split_once(": ") {
            promised = Some((heading, list.split_whitespace().collect()));
        }
    }
}
