//! Scrapes of sockets that are what sockets can be: microVMs, and things that are not.

use std::path::PathBuf;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};

use super::*;
use crate::scratch::Scratch;

const GOLDEN: &str = include_str!("../prometheus/golden.txt");

/// What answers at a socket.
#[derive(Clone, Copy)]
enum Answers {
    /// With this, and closes.
    With(&'static str),
    /// As a microVM.
    Well,
    /// It accepts, and says nothing.
    Never,
    /// With a head, and then a byte of the body at a time.
    Drop,
    /// Without an end.
    Endlessly,
}

async fn serve_one(mut stream: UnixStream, answers: Answers) {
    let mut request = [0; 512];
    let _ = stream.read(&mut request).await;
    let head = "HTTP/1.1 200 OK\r\n";
    let _ = match answers {
        Answers::With(text) => stream.write_all(text.as_bytes()).await,
        Answers::Well => {
            let length = GOLDEN.len();
            let text = format!("{head}Content-Length: {length}\r\n\r\n{GOLDEN}");
            stream.write_all(text.as_bytes()).await
        }
        Answers::Never => std::future::pending().await,
        Answers::Drop => {
            let _ = stream
                .write_all(format!("{head}Content-Length: 1000\r\n\r\n").as_bytes())
                .await;
            loop {
                tokio::time::sleep(Duration::from_millis(20)).await;
                if stream.write_all(b"#").await.is_err() {
                    return;
                }
            }
        }
        Answers::Endlessly => {
            let _ = stream.write_all(format!("{head}\r\n").as_bytes()).await;
            while stream.write_all(&[b'#'; 1 << 16]).await.is_ok() {}
            Ok(())
        }
    };
}

fn open(path: PathBuf, answers: Answers) {
    let listener = UnixListener::bind(path).unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(serve_one(stream, answers));
        }
    });
}

fn rounds(scratch: &Scratch, timeout: Duration) -> Rounds {
    let pattern = scratch.path("*.socket").to_str().unwrap().parse().unwrap();
    Rounds::new(Fleet::new(vec![pattern]), timeout, Duration::from_secs(60))
}

/// The value of the sample that starts so.
fn value<'a>(page: &'a str, start: &str) -> Option<&'a str> {
    let line = page.lines().find(|line| line.starts_with(start))?;
    Some(line.rsplit_once(' ').unwrap().1)
}

fn up(page: &str, scratch: &Scratch, name: &str) -> Option<bool> {
    let path = scratch.path(name);
    let start = format!("chronovisor_up{{socket=\"{}\"}}", path.display());
    value(page, &start).map(|value| value == "1")
}

/// No wall time is asserted: that the page is there at all, with hung sockets beside the good ones, is what is promised.
#[tokio::test]
async fn a_microvm_is_on_the_page_whatever_the_sockets_beside_it_do() {
    let scratch = Scratch::new();
    let of_another_program = [
        ("closes", Answers::With("")),
        ("speaks_first", Answers::With("SSH-2.0-OpenSSH_9.2\r\n")),
        (
            "refuses",
            Answers::With("HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n"),
        ),
        (
            "is_another",
            Answers::With("HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhttp_up 1"),
        ),
        (
            "breaks_off",
            Answers::With("HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nht"),
        ),
        (
            "is_no_text",
            Answers::With("HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n\r"),
        ),
        ("endless", Answers::Endlessly),
    ];
    for (name, answers) in of_another_program {
        open(scratch.path(format!("{name}.socket")), answers);
    }
    open(scratch.path("good.socket"), Answers::Well);
    open(scratch.path("hangs.socket"), Answers::Never);
    open(scratch.path("drops.socket"), Answers::Drop);
    drop(std::os::unix::net::UnixListener::bind(scratch.path("stale.socket")).unwrap());
    // Its line of connections is full: one waits, and nobody accepts.
    let full = std::os::unix::net::UnixListener::bind(scratch.path("full.socket")).unwrap();
    rustix::net::listen(&full, 0).unwrap();
    let _waits = std::os::unix::net::UnixStream::connect(scratch.path("full.socket")).unwrap();

    let rounds = rounds(&scratch, Duration::from_secs(2));
    let page = rounds.page(None).await.unwrap();
    assert_eq!(up(&page, &scratch, "good.socket"), Some(true), "{page}");
    for name in ["hangs", "drops", "stale", "full"] {
        assert_eq!(
            up(&page, &scratch, &format!("{name}.socket")),
            Some(false),
            "{name}: {page}"
        );
    }
    for (name, _) in of_another_program {
        assert_eq!(up(&page, &scratch, &format!("{name}.socket")), None, "{name}: {page}");
    }
    let own = |family: &str| {
        value(&page, &format!("chronovisor_exporter_{family}"))
            .unwrap()
            .to_owned()
    };
    assert_eq!(own("sockets{state=\"up\"}"), "1");
    assert_eq!(own("sockets{state=\"down\"}"), "4");
    assert_eq!(own("sockets{state=\"foreign\"}"), "7");
    assert_eq!(own("failures_total{reason=\"timeout\"}"), "3");
    assert_eq!(own("failures_total{reason=\"refused\"}"), "1");
    assert_eq!(own("failures_total{reason=\"too_long\"}"), "1");
    assert_eq!(page.matches("# TYPE chronovisor_vcpu_seconds_total counter").count(), 1);
}

#[tokio::test]
async fn one_that_comes_is_on_the_next_page_and_one_that_goes_is_down() {
    let scratch = Scratch::new();
    let rounds = rounds(&scratch, Duration::from_secs(5));
    let page = rounds.page(None).await.unwrap();
    assert_eq!(value(&page, "chronovisor_exporter_sockets{state=\"up\"}"), Some("0"));
    open(scratch.path("a.socket"), Answers::Well);
    assert_eq!(up(&rounds.page(None).await.unwrap(), &scratch, "a.socket"), Some(true));
    std::fs::remove_file(scratch.path("a.socket")).unwrap();
    let page = rounds.page(None).await.unwrap();
    assert_eq!(up(&page, &scratch, "a.socket"), Some(false), "{page}");
    assert_eq!(value(&page, "chronovisor_exporter_sockets{state=\"gone\"}"), Some("1"));
    assert!(
        value(&page, "chronovisor_vcpu_seconds_total").is_none(),
        "old figures are not told as new ones"
    );
}

#[tokio::test]
async fn scrapes_beyond_the_turns_there_are_give_up_in_time() {
    let scratch = Scratch::new();
    open(scratch.path("hangs.socket"), Answers::Never);
    let rounds = rounds(&scratch, Duration::from_millis(500));
    let (one, two, three) = tokio::join!(
        rounds.page(None),
        rounds.page(None),
        rounds.page(Some(Duration::from_millis(50)))
    );
    assert!(one.is_ok() && two.is_ok() && three.is_err());
}

/// Sends `request` to an exporter without microVMs; gives all that comes back.
async fn ask(request: &str) -> String {
    let scratch = Scratch::new();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let stopped = async { drop(stopped.await) };
    let served = tokio::spawn(serve::serve(
        listener,
        Arc::new(rounds(&scratch, Duration::from_secs(5))),
        stopped,
    ));
    let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    drop(stop);
    served.await.unwrap();
    answer
}

#[tokio::test]
async fn the_page_has_its_content_type_and_other_paths_and_methods_are_told_where_it_is() {
    let page = ask("GET /metrics HTTP/1.1\r\nHost: h\r\nX-Prometheus-Scrape-Timeout-Seconds: 10.5\r\n\r\n").await;
    assert!(page.starts_with("HTTP/1.1 200 OK\r\n"), "{page}");
    assert!(
        page.contains("content-type: text/plain; version=0.0.4; charset=utf-8\r\n"),
        "{page}"
    );
    assert!(page.contains("\nprocess_open_fds "), "{page}");
    let table = [
        ("GET / HTTP/1.1\r\nHost: h\r\n\r\n", "200", "href=\"/metrics\""),
        ("GET /-/healthy HTTP/1.1\r\nHost: h\r\n\r\n", "200", "OK"),
        ("GET /vcpus HTTP/1.1\r\nHost: h\r\n\r\n", "404", "/metrics"),
        (
            "PUT /metrics HTTP/1.1\r\nHost: h\r\nContent-Length: 0\r\n\r\n",
            "405",
            "allow: GET",
        ),
        ("nonsense\r\n\r\n", "400", ""),
    ];
    for (request, status, says) in table {
        let answer = ask(request).await;
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status} ")) && answer.contains(says),
            "{request}: {answer}"
        );
    }
}

#[test]
fn the_command_line_has_defaults_and_names_what_is_wrong_in_it() {
    use clap::Parser;
    let parse = |line: &str| crate::cli::Cli::try_parse_from(line.split_whitespace());
    let Ok(Some(crate::cli::Command::Exporter(args))) = parse("chronovisor exporter").map(|cli| cli.command) else {
        panic!("the exporter");
    };
    assert!(args.listen.ip().is_loopback() && args.sockets.is_empty());
    let dir = std::env::temp_dir();
    assert!(
        parse(&format!(
            "chronovisor exporter --sockets {} --sockets /run/*.sock",
            dir.display()
        ))
        .is_ok()
    );
    for (line, names) in [
        ("chronovisor exporter --listen here", "--listen"),
        ("chronovisor exporter --timeout 0", "--timeout"),
        ("chronovisor exporter --timeout 60001", "--timeout"),
        ("chronovisor exporter --sockets /run/[", "--sockets"),
        ("chronovisor exporter --forget -1", "-1"),
        ("chronovisor exporter --api-sock /s", "--api-sock"),
    ] {
        let said = parse(line).expect_err(line).to_string();
        assert!(said.contains(names), "{line}: {said}");
    }
}
