//! The exporter over 200 sockets, some of which hang, drip or talk nonsense: the others are on every page, and its memory stays
//! what it is.
//!
//! Made-up microVMs answer, so that it needs no /dev/kvm. Ten seconds of it are part of the tests; a minute is had by
//!
//! ```text
//! CHRONOVISOR_EXPORTER_SECONDS=60 cargo xtask test --bed anywhere exporter_over_200
//! ```

use std::process::Command;
use std::time::{Duration, Instant};

use tests::bed::{self, Folder};
use tests::fleet::{Fleet, SILENT, TEXT, WELL, value};
use tests::prometheus::{Exporter, SHIPPED};

#[test]
fn an_exporter_over_200_sockets_has_all_that_answer_on_its_page_and_its_memory_stays_flat() {
    let fleet = Fleet::serve();
    let exporter = Exporter::start([fleet.flag(), "--timeout=5000".to_owned()]);

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
    let settled = &resident[resident.len() / 5..];
    let (first, last) = settled.split_at(settled.len() / 2);
    let median = |part: &[u64]| {
        let mut part = part.to_vec();
        part.sort_unstable();
        part[part.len() / 2]
    };
    // How many of the answers are there when a page is written differs, so scrapes differ by themselves, and halves are compared by
    // their medians. Were one answer of 140 kept at each scrape, the medians would be half as many answers apart as there are
    // scrapes: half of that is allowed, and never more than one hundredth.
    let kept = (TEXT.len() as u64 / 1024) * settled.len() as u64 / 2;
    let (first, last) = (median(first), median(last));
    println!("medians of halves: {first} and {last} KiB; one answer a scrape would be {kept} KiB");
    assert!(last <= first + (kept / 2).min(first / 100), "{resident:?}");
    let most = |part: &[u64]| part.iter().max().copied().expect("a scrape");
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
