//! A real Prometheus scrapes two microVMs through the exporter, with the configuration, the rules and the dashboard that we ship.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::Value;
use tests::bed::Folder;
use tests::flat::Program;
use tests::prometheus::{Exporter, Prometheus, SHIPPED, promtool};
use tests::vm::{PATIENCE, Process, Vm};
use tests::{require_bed, require_prometheus};

/// Fails unless promtool is content, and has nothing to remark.
fn assert_content(arguments: &[&str], text: &str) {
    let output = promtool(arguments, text);
    let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {said}\n{text}");
    if text.is_empty() {
        return;
    }
    assert_eq!(said, "", "{arguments:?}");
}

#[test]
fn promtool_is_content_with_the_configuration_and_the_rules_that_we_ship() {
    require_bed!(kvm);
    require_prometheus!();
    let file = |name: &str| format!("{SHIPPED}/prometheus/{name}");
    assert_content(&["check", "config", &file("prometheus.yml")], "");
    assert_content(&["check", "rules", &file("recording.yml"), &file("alerts.yml")], "");
    assert_content(&["test", "rules", &file("tests.yml")], "");
}

/// The expressions of the dashboard's panels, and of its variables, as Grafana would send them with everything chosen.
fn dashboard() -> Vec<String> {
    let path = Path::new(SHIPPED).join("grafana/chronovisor.json");
    let text = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let dashboard: Value = serde_json::from_str(&text).expect("JSON");
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let mut expressions = Vec::new();
    for panel in list(&dashboard["panels"]) {
        for target in list(&panel["targets"]) {
            expressions.push(target["expr"].as_str().expect("an expression").to_owned());
        }
    }
    for variable in list(&dashboard["templating"]["list"]) {
        if variable["type"] == "query" {
            let query = variable["definition"].as_str().expect("a query");
            let inner = query
                .strip_prefix("label_values(")
                .and_then(|rest| rest.strip_suffix(')'));
            let (metric, label) = inner.and_then(|inner| inner.rsplit_once(", ")).expect(query);
            expressions.push(format!("count by ({label}) ({metric})"));
        }
    }
    assert!(expressions.len() > 20, "{expressions:#?}");
    let chosen = |expression: String| {
        let expression = expression
            .replace("$__rate_interval_ms", "20000")
            .replace("$__rate_interval", "20s")
            .replace("$instance", ".*")
            .replace("$id", "one|two")
            .replace("$vcpu", ".*");
        assert!(!expression.contains('$'), "{expression}");
        expression
    };
    expressions.into_iter().map(chosen).collect()
}

#[test]
fn prometheus_sees_all_time_of_two_microvms_and_each_query_of_the_dashboard_has_data() {
    require_bed!(kvm);
    require_prometheus!();
    // Both exit now and then. The second CPU of the other one is never started by its guest.
    let one = Vm::flat(&Program::reset_by_key(), ["--id=one", "--pin=none"]);
    let two = Vm::flat(&Program::reset_by_key(), ["--id=two", "--pin=none", "--cpus=2"]);
    let sockets = [&one, &two].map(|vm| format!("--sockets={}", vm.socket().display()));
    let mut exporter = Exporter::start(sockets);
    let page = exporter.page("");
    assert_content(&["check", "metrics"], &page);
    let of_vcpus = |page: &str| page.matches("chronovisor_vcpu_elapsed_seconds_total{").count();
    assert_eq!(of_vcpus(&page), 3, "{page}");

    let prometheus = Prometheus::scraping(exporter.address);
    // A scrape each second: 31 of them are 30 s.
    prometheus.wait_for("count_over_time(chronovisor_up[2m]) >= 31");

    // A reading is later than the time that Prometheus gives it, by no more than its scrape has taken in all. So a rate over 20 s is off by no
    // more than a twentieth of the longest scrape: less than 0.5 % unless one has taken 0.1 s, which is told by Prometheus itself.
    let longest = prometheus.query("max_over_time(scrape_duration_seconds[40s])");
    let longest = longest.iter().map(|scrape| scrape.value).fold(0.0, f64::max);
    let tolerance = (longest / 20.0).max(0.005);
    for (which, aggregate) in [("least", "min"), ("most", "max")] {
        let sums =
            format!("{aggregate}_over_time((sum by (id, vcpu) (rate(chronovisor_vcpu_seconds_total[20s])))[10s:1s])");
        let sums = prometheus.query(&sums);
        let mut vcpus: Vec<_> = sums
            .iter()
            .map(|sum| (&*sum.labels["id"], &*sum.labels["vcpu"]))
            .collect();
        vcpus.sort_unstable();
        assert_eq!(vcpus, [("one", "0"), ("two", "0"), ("two", "1")]);
        for sum in &sums {
            println!(
                "{} vCPU {}: the modes' rates sum to {:.5} at {which}; the longest scrape took {longest:.3} s",
                sum.labels["id"], sum.labels["vcpu"], sum.value
            );
            assert!(
                (sum.value - 1.0).abs() < tolerance,
                "{which}: {sum:?}, longest scrape {longest} s"
            );
        }
    }
    // Prometheus has floats: seven of them were added up, each of some 100 s and right to 2^-47 of them.
    let apart = "abs(sum without (mode) (chronovisor_vcpu_seconds_total) - chronovisor_vcpu_elapsed_seconds_total)";
    for apart in prometheus.query(apart) {
        assert!(apart.value < 1e-9, "{apart:?}");
    }
    // Each of the rules has something to say of these, but for the width that is no news by source oncpu.
    for share in [
        "ready_share:rate1m",
        "host_overhead_share:rate1m",
        "guest_share:rate1m",
        "guest_seconds:width",
    ] {
        assert_eq!(
            prometheus.wait_for(&format!("vcpu:chronovisor_{share}")).len(),
            3,
            "{share}"
        );
    }
    assert_eq!(prometheus.query("microvm:chronovisor_cpus_used:rate1m").len(), 2);

    let expressions = dashboard();
    for expression in &expressions {
        let samples = prometheus.query(expression);
        let any = samples.iter().any(|sample| sample.value.is_finite());
        assert!(any, "{expression}: {samples:?}");
    }
    println!("{} queries of the dashboard have data", expressions.len());

    // One that is killed leaves its socket, and is marked; the other one is not held up.
    one.process.signal(Signal::KILL);
    let down = prometheus.wait_for("chronovisor_up == 0");
    assert_eq!(down[0].labels["socket"], one.socket().display().to_string());
    assert!(
        !prometheus
            .query("chronovisor_last_good_scrape_age_seconds > 0")
            .is_empty()
    );
    assert_eq!(of_vcpus(&exporter.page("")), 2);

    exporter.process.signal(Signal::TERM);
    let (status, _, stderr) = exporter.process.wait();
    assert!(status.success(), "{status}: {stderr}");
}

/// `GET /metrics` at a microVM's socket, a line of whose head is given too.
fn metrics(socket: &Path) -> String {
    let mut stream = UnixStream::connect(socket).expect("a microVM");
    stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").expect("it reads");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("it answers");
    let (head, text) = answer.split_once("\r\n\r\n").expect("HTTP");
    assert!(
        head.contains("content-type: text/plain; version=0.0.4; charset=utf-8"),
        "{head}"
    );
    text.to_owned()
}

#[test]
fn promtool_is_content_with_a_microvms_own_metrics_before_the_start_and_after() {
    require_bed!(kvm);
    require_prometheus!();
    let folder = Folder::new();
    let socket = folder.join("s");
    let server = Process::chronovisor(["--api-sock".as_ref(), socket.as_os_str(), "--id=not-started".as_ref()]);
    let begun = Instant::now();
    while UnixStream::connect(&socket).is_err() {
        assert!(begun.elapsed() < PATIENCE, "{}", server.stderr());
        std::thread::sleep(Duration::from_millis(5));
    }
    let text = metrics(&socket);
    assert!(text.ends_with("chronovisor_vcpus{id=\"not-started\"} 0\n"), "{text}");
    assert_content(&["check", "metrics"], &text);

    let vm = Vm::flat(&Program::reset_by_key(), ["--id=runs", "--pin=none", "--cpus=2"]);
    let text = metrics(vm.socket());
    assert!(text.contains("chronovisor_vcpus{id=\"runs\"} 2\n"), "{text}");
    assert_content(&["check", "metrics"], &text);
}
