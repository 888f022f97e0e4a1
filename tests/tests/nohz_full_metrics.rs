//! `GET /metrics` on a tickless CPU, in the emulated `nohz_full` host: the alert and the dashboard see the tick stop, run and stop.
//!
//! No Prometheus is there: the selectors of the expressions that we ship are held against what is scraped.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use accounting::host::{CpuSet, run_on};
use serde_json::Value;
use tests::flat::Program;
use tests::over::SetWhenDropped;
use tests::require_bed;
use tests::vm::{PATIENCE, Vm};

const METRIC: &str = "chronovisor_host_cpu{";
/// What the alert is of.
const RULES: &str = include_str!("../../resources/prometheus/alerts.yml");
/// What the dashboard is of.
const DASHBOARD: &str = include_str!("../../resources/grafana/chronovisor.json");

/// The labels between the metric's braces in `text`, all of them equal to something.
fn labels(text: &str) -> Vec<(String, String)> {
    let (_, rest) = text.split_once(METRIC).expect(text);
    let inner = rest.split_once('}').expect(text).0;
    let one = |label: &str| {
        let (name, value) = label.trim().split_once('=').expect(label);
        (name.to_owned(), value.to_owned())
    };
    inner.split(',').map(one).collect()
}

/// What an expression asks of the labels, but for what who looks at the dashboard has chosen.
fn asked(expression: &str) -> Vec<(String, String)> {
    let mut labels = labels(expression);
    labels.retain(|(_, value)| !value.starts_with('~'));
    assert!(labels.len() == 2, "{expression}");
    labels
}

/// The alert's expression and the dashboard's that count the CPUs whose tick runs.
fn expressions() -> Vec<String> {
    let alert = RULES.lines().find(|line| line.contains(METRIC)).expect("an alert");
    let dashboard: Value = serde_json::from_str(DASHBOARD).expect("JSON");
    let panels = dashboard["panels"].as_array().expect("panels").iter();
    let targets = panels.flat_map(|panel| panel["targets"].as_array().into_iter().flatten());
    let all = targets.filter_map(|target| target["expr"].as_str());
    let counts = all.filter(|expression| expression.contains(METRIC) && expression.contains("tick_stopped"));
    let counts: Vec<_> = counts.map(str::to_owned).collect();
    assert_eq!(counts.len(), 1, "{counts:?}");
    [vec![alert.to_owned()], counts].concat()
}

/// The sample of the vCPU's host CPU.
fn scraped(socket: &Path) -> String {
    let mut stream = UnixStream::connect(socket).expect("a microVM");
    stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").expect("it reads");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("it answers");
    let sample = answer.lines().find(|line| line.starts_with(METRIC)).expect(&answer);
    assert!(sample.ends_with("} 1"), "both compare with 1, or count: {sample}");
    sample.to_owned()
}

/// Scrapes until each expression has the sample, or until none has.
fn await_seen(vm: &Vm, are: bool) -> String {
    let (expressions, begun) = (expressions(), Instant::now());
    loop {
        let sample = scraped(vm.socket());
        let has = labels(&sample);
        let sees = |expression: &String| asked(expression).iter().all(|label| has.contains(label));
        // What is not known is neither.
        if !sample.contains(r#"tick_stopped="unknown""#) && expressions.iter().all(|e| sees(e) == are) {
            return sample;
        }
        assert!(begun.elapsed() < PATIENCE, "never so: {are}: {sample} {expressions:?}");
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
}

#[test]
fn the_alert_and_the_dashboard_see_a_tick_that_runs_while_it_does() {
    require_bed!(nohz_full);
    let vm = Vm::flat(&Program::spin_forever(), ["--pin", "1"]);
    let stopped = await_seen(&vm, false);
    assert!(
        stopped.contains(r#"nohz_full="true",isolated="true",tick_stopped="true""#),
        "{stopped}"
    );
    let done = AtomicBool::new(false);
    let runs = std::thread::scope(|scope| {
        scope.spawn(|| {
            run_on(&CpuSet::from([1])).expect("the CPU is there");
            while !done.load(Ordering::Relaxed) {
                std::hint::spin_loop();
            }
        });
        let _done = SetWhenDropped(&done);
        await_seen(&vm, true)
    });
    assert!(runs.contains(r#"cpu="1",vcpu="0""#), "{runs}");
    println!("{stopped}\n{runs}\n{}", await_seen(&vm, false));
}
