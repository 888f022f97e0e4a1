//! The API over TCP: off unless asked for, on the loopback unless asked for elsewhere in so many words, and then with a token.

use std::fs::Permissions;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::Instant;

use tests::bed::Folder;
use tests::client;
use tests::failure::fails;
use tests::prometheus::get;
use tests::vm::{PATIENCE, Process};

const SECRET: &str = "b25seSB0aGlzIHRlc3Qga25vd3MgaXQ=";

fn token_file(folder: &Folder, name: &str, mode: u32) -> PathBuf {
    let path = folder.write(name, format!("{SECRET}\n"));
    std::fs::set_permissions(&path, Permissions::from_mode(mode)).expect("it is ours");
    path
}

/// A port that was free just now.
fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr());
    listener.expect("a free port").port()
}

/// Waits until the API is served over both.
fn await_served(server: &Process, socket: &Path, address: SocketAddr) {
    let begun = Instant::now();
    while client::request(socket, "GET", "/", None).is_err() || TcpStream::connect(address).is_err() {
        assert!(begun.elapsed() < PATIENCE, "{}", server.stderr());
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}

#[test]
fn beyond_the_loopback_it_is_served_only_where_that_is_asked_for_and_with_a_token() {
    let folder = Folder::new();
    let text = |path: &Path| path.display().to_string();
    let socket = text(&folder.join("s"));
    let good = text(&token_file(&folder, "good", 0o600));
    let open = text(&token_file(&folder, "open", 0o644));
    let link = folder.join("link");
    symlink(&good, &link).expect("a link");
    let (link, missing) = (text(&link), text(&folder.join("missing")));
    let usage: [(&[&str], &[&str]); 4] = [
        (
            &["--api-listen", "0.0.0.0:0", "--api-listen-anywhere"],
            &["--api-token-file"],
        ),
        (&["--api-listen-anywhere", "--api-token-file", &good], &["--api-listen"]),
        (&["--api-token-file", &good], &["--api-listen"]),
        (&["--no-api", "--api-listen", "127.0.0.1:0"], &["--no-api"]),
    ];
    let failed: [(&[&str], &[&str]); 5] = [
        (
            &["--api-listen", "0.0.0.0:0"],
            &["0.0.0.0:0", "--api-listen-anywhere", "--api-token-file"],
        ),
        (
            &["--api-listen", "0.0.0.0:0", "--api-token-file", &good],
            &["0.0.0.0:0", "--api-listen-anywhere"],
        ),
        (
            &["--api-listen", "127.0.0.1:0", "--api-token-file", &open],
            &[&open, "0644", "chmod 600"],
        ),
        (
            &["--api-listen", "127.0.0.1:0", "--api-token-file", &link],
            &[&link, "symbolic link"],
        ),
        (
            &["--api-listen", "127.0.0.1:0", "--api-token-file", &missing],
            &[&missing, "No such file"],
        ),
    ];
    for (status, table) in [(2, &usage[..]), (1, &failed[..])] {
        for (arguments, says) in table {
            let all = [&["--api-sock", &socket], *arguments].concat();
            fails(&all, status, says);
            assert!(!Path::new(&socket).exists(), "{arguments:?} left its socket");
        }
    }
}

#[test]
fn with_a_token_who_brings_it_is_served_over_tcp_and_the_unix_socket_needs_none() {
    let folder = Folder::new();
    let (socket, log) = (folder.join("s"), folder.join("log"));
    let token = token_file(&folder, "token", 0o600);
    let port = free_port();
    let anywhere = format!("0.0.0.0:{port}");
    let path = |path: &Path| path.display().to_string();
    let server = Process::chronovisor([
        "--api-sock".to_owned(),
        path(&socket),
        "--api-listen-anywhere".into(),
        "--api-listen".into(),
        anywhere,
        "--api-token-file".into(),
        path(&token),
        "--log-path".into(),
        path(&log),
        "--level=Trace".into(),
    ]);
    let address = SocketAddr::from(([127, 0, 0, 1], port));
    await_served(&server, &socket, address);
    let mode = socket.metadata().expect("it is there").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    assert_eq!(
        client::request(&socket, "GET", "/version", None)
            .expect("the API")
            .status,
        200
    );
    let bearer = |token: &str| format!("Authorization: Bearer {token}\r\n");
    for (brought, status) in [
        (bearer(SECRET), "200"),
        (String::new(), "401"),
        (bearer(&SECRET[1..]), "401"),
        (bearer("x"), "401"),
        (format!("Authorization: Basic {SECRET}\r\n"), "401"),
    ] {
        for path in ["/version", "/ui", "/metrics", "/nothing"] {
            let answer = get(address, path, &brought).expect("an answer");
            let expected = if status == "200" && path == "/nothing" {
                "400"
            } else {
                status
            };
            assert!(
                answer.starts_with(&format!("HTTP/1.0 {expected} ")),
                "{brought} {path}: {answer}"
            );
            let challenged = answer.to_ascii_lowercase().contains("\r\nwww-authenticate: bearer\r\n");
            assert_eq!(challenged, expected == "401", "{answer}");
        }
    }
    let said = std::fs::read_to_string(&log).expect("a log") + &server.stderr();
    assert!(said.contains("401"), "{said}");
    assert!(!said.contains(&SECRET[..8]), "the token is in the log: {said}");
}
