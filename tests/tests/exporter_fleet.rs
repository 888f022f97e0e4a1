//! The exporter over 200 sockets, some of which hang, drip or talk nonsense: the others are on every page, and its memory stays
//! what it is.
//!
//! Made-up microVMs answer, so that it needs no /dev/kvm. Ten seconds of it are part of the tests; a minute is had by
//!
//! ```text
//! CHRONOVISOR_EXPORTER_SECONDS=60 cargo xtask test --bed anywhere exporter_over_200
//! ```

use std::path::PathBuf;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use tests::bed::{self, Folder};
use tests::prometheus::{Exporter, SHIPPED};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};

/// One vCPU's metrics.
const TEXT: &str = include_str!("../../api/src/prometheus/golden.txt");

/// What a socket does with who connects.
#[derive(Clone, Copy, PartialEq)]
enum Does {
    /// Answers as a microVM.
    Well,
    /// Nothing.
    Hang,
    /// Sends its answer a byte at a time.
    Drip,
    /// Sends what is no answer.
    Babble,
}

/// Of each ten sockets: seven are microVMs.
const TEN: [Does; 10] = [
    Does::Well,
    Does::Well,
    Does::Hang,
    Does::Well,
    Does::Well,
    Does::Babble,
    Does::Well,
    Does::Drip,
    Does::Well,
    Does::Well,
];
const SOCKETS: usize = 200;
const WELL: usize = SOCKETS / TEN.len() * 7;
const SILENT: usize = SOCKETS / TEN.len() * 2;

async fn answer(mut stream: UnixStream, does: Does) {
    let mut request = [0; 512];
    let _ = stream.read(&mut request).await;
    let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{TEXT}", TEXT.len());
    match does {
        Does::Well => {
            let _ = stream.write_all(answer.as_bytes()).await;
        }
        // Until the exporter has had enough.
        Does::Hang => {
            let _ = stream.read(&mut request).await;
        }
        Does::Drip => {
            for byte in answer.as_bytes().chunks(1) {
                if stream.write_all(byte).await.is_err() {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
        Does::Babble => {
            let _ = stream.write_all(&[0xff; 20_000]).await;
        }
    }
}

/// Serves all sockets, on a thread of its own that ends with the test.
fn serve(paths: Vec<(PathBuf, Does)>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.expect("a runtime");
    let bound: Vec<_> = {
        let _in_runtime = runtime.enter();
        let bind = |(path, does)| (UnixListener::bind(path).expect("a socket"), does);
        paths.into_iter().map(bind).collect()
    };
    thread::spawn(move || {
        runtime.block_on(async {
            for (listener, does) in bound {
                tokio::spawn(async move {
                    while let Ok((stream, _)) = listener.accept().await {
                        tokio::spawn(answer(stream, does));
                    }
                });
            }
            std::future::pending::<()>().await;
        });
    });
}

/// The value of the sample that starts so.
fn value(page: &str, start: &str) -> u64 {
    let line = page.lines().find(|line| line.starts_with(start));
    let value = line
        .and_then(|line| line.rsplit_once(' '))
        .and_then(|(_, value)| value.parse().ok());
    value.unwrap_or_else(|| panic!("{start}:\n{page}"))
}

#[test]
fn an_exporter_over_200_sockets_has_all_that_answer_on_its_page_and_its_memory_stays_flat() {
    let folder = Folder::new();
    let path = |n: usize| (folder.join(&format!("{n:03}.socket")), TEN[n % TEN.len()]);
    serve((0..SOCKETS).map(path).collect());
    let exporter = Exporter::start([
        format!("--sockets={}", folder.join("*.socket").display()),
        "--timeout=5000".to_owned(),
    ]);

    // With time for a machine that is busy: the silent ones use all of it up, the others are there all the same.
    for _ in 0..2 {
        let page = exporter.page("");
        assert_eq!(value(&page, "chronovisor_exporter_sockets{state=\"up\"}"), WELL as u64);
        assert_eq!(
            value(&page, "chronovisor_exporter_sockets{state=\"down\"}"),
            SILENT as u64
        );
        assert_eq!(page.matches("\nchronovisor_vcpu_elapsed_seconds_total{").count(), WELL);
        assert_eq!(page.matches("# TYPE ").count(), page.matches("# HELP ").count());
        assert_eq!(page.matches("# TYPE chronovisor_vcpu_seconds_total ").count(), 1);
    }

    // And then as fast as Prometheus's patience lets it: each scrape gives up a fifth of a second before that.
    let seconds = std::env::var("CHRONOVISOR_EXPORTER_SECONDS").map_or(10, |text| text.parse().expect("seconds"));
    let (begun, mut resident, mut descriptors) = (Instant::now(), Vec::new(), Vec::new());
    while begun.elapsed() < Duration::from_secs(seconds) {
        let page = exporter.page("X-Prometheus-Scrape-Timeout-Seconds: 0.3\r\n");
        resident.push(value(&page, "process_resident_memory_bytes") / 1024);
        descriptors.push(value(&page, "process_open_fds"));
    }
    println!("resident KiB, scrape by scrape: {resident:?}");
    println!("descriptors: {descriptors:?}");
    let (first, last) = resident.split_at(resident.len() / 2);
    let most = |part: &[u64]| part.iter().max().copied().expect("a scrape");
    // A page and what it is made of are some 4 MiB here, and how many of the answers are there when a page is written differs: one
    // page's worth is what two halves may differ by. Were the answers of each scrape kept, the second half would have ten times that
    // in ten seconds.
    let page = 4 << 10;
    assert!(most(last) <= most(first) + page, "{resident:?}");
    assert!(most(&descriptors) <= 32, "connections are left open: {descriptors:?}");
}

#[test]
fn systemd_has_nothing_to_say_against_the_exporters_unit() {
    let shipped = format!("{SHIPPED}/systemd/chronovisor-exporter.service");
    let unit = std::fs::read_to_string(&shipped).unwrap_or_else(|e| panic!("{shipped}: {e}"));
    let installed = "/usr/local/bin/chronovisor";
    assert!(unit.contains(&format!("\nExecStart={installed} exporter\n")), "{unit}");
    let folder = Folder::new();
    let here = bed::file("chronovisor");
    let path = folder.write(
        "chronovisor-exporter.service",
        unit.replace(installed, &here.display().to_string()),
    );
    match Command::new("systemd-analyze").arg("verify").arg(path).output() {
        Ok(output) => {
            let said = String::from_utf8_lossy(&output.stderr);
            assert!(
                output.status.success() && !said.contains("chronovisor-exporter"),
                "{said}"
            );
        }
        Err(error) => bed::skipped("anywhere", &format!("systemd-analyze: {error}")),
    }
}
