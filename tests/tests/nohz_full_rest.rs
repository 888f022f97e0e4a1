//! Firecracker's API over a guest that runs: what is configured is had, what is changed is changed, and how it is asked to end.

use std::fs::{self, File};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::{Value, json};
use tests::bed::Folder;
use tests::require_bed;
use tests::vm::{Process, Vm, debian_arguments};

fn image(folder: &Folder, name: &str) -> std::path::PathBuf {
    let path = folder.join(name);
    let made = File::create(&path).and_then(|file| file.set_len(8 << 20));
    made.expect("an image");
    path
}

fn patch(vm: &Vm, path: &str, body: &Value) -> (u16, String) {
    let answer = vm.ask("PATCH", path, Some(&body.to_string()));
    (
        answer.status,
        if answer.status < 400 {
            String::new()
        } else {
            answer.fault().to_owned()
        },
    )
}

#[test]
fn a_configuration_file_has_all_its_sections_and_the_api_changes_what_it_may() {
    require_bed!(nohz_full);
    let folder = Folder::new();
    let [serial, log, metrics] = ["serial", "log", "metrics"].map(|name| folder.join(name));
    let (disk, other) = (image(&folder, "disk"), image(&folder, "other"));
    let mut vm = Vm::serve_debian(
        "disk-verify:1000,sleep:60000",
        json!({
            "drives": [{ "drive_id": "disk", "path_on_host": disk, "is_root_device": false }],
            "balloon": { "amount_mib": 0, "deflate_on_oom": true, "stats_polling_interval_s": 1 },
            "entropy": {},
            "serial": { "serial_out_path": serial },
            "logger": { "log_path": log, "level": "Info", "show_level": true },
            "metrics": { "metrics_path": metrics },
        }),
    );
    vm.wait_until("the guest has used its disk", |_| {
        fs::read_to_string(&serial).is_ok_and(|text| text.contains("chronovisor guest: sleep"))
    });
    assert_eq!(vm.process.stdout(), "", "the guest's output goes to its file alone");

    let config = vm.ask("GET", "/vm/config", None).body;
    assert_eq!(config["drives"][0]["path_on_host"], json!(disk));
    assert_eq!(
        (&config["balloon"]["amount_mib"], &config["entropy"]),
        (&json!(0), &json!({ "rate_limiter": null }))
    );

    assert_eq!(
        patch(
            &vm,
            "/drives/disk",
            &json!({ "drive_id": "disk", "path_on_host": other })
        )
        .0,
        204
    );
    assert_eq!(
        vm.ask("GET", "/vm/config", None).body["drives"][0]["path_on_host"],
        json!(other)
    );
    let limit = json!({ "drive_id": "disk", "rate_limiter": { "ops": { "size": 10, "refill_time": 100 } } });
    assert_eq!(patch(&vm, "/drives/disk", &limit).0, 204);
    let (status, fault) = patch(
        &vm,
        "/drives/disk",
        &json!({ "drive_id": "disk", "path_on_host": "/nowhere" }),
    );
    assert!(
        status == 400 && fault.contains("Unable to patch the block device"),
        "{fault}"
    );

    // Nobody has loaded the balloon's driver.
    let (status, fault) = patch(&vm, "/balloon", &json!({ "amount_mib": 16 }));
    assert_eq!(
        (status, &*fault),
        (400, "Balloon update error: Balloon: Device not activated yet.")
    );
    assert_eq!(vm.ask("GET", "/balloon/statistics", None).body["target_mib"], 0);

    let flush = vm.ask("PUT", "/actions", Some(r#"{"action_type": "FlushMetrics"}"#));
    assert_eq!(flush.status, 204, "{}", flush.fault());
    let text = fs::read_to_string(&metrics).expect("metrics");
    let lines: Vec<Value> = text
        .lines()
        .map(|line| serde_json::from_str(line).expect("JSON"))
        .collect();
    let [first, second] = &lines[..] else {
        panic!("a line at the start, and one on request: {text}")
    };
    assert_eq!(first["block"]["write_count"], 0);
    assert!(second["block"]["write_count"].as_u64() > Some(0), "{second}");
    assert_eq!(second["block"], second["block_disk"]);
    assert_eq!(second["patch_api_requests"]["drive_count"], 3);
    assert_eq!(second["patch_api_requests"]["drive_fails"], 1);
    // Only who makes a jail says when it began.
    let untold = second["api_server"]["process_startup_time_us"] == 0;
    assert_eq!(untold, !tests::bed::jailed(), "{second}");
    assert!(second["vcpu"]["exit_io"].as_u64() > Some(0), "{second}");

    let text = fs::read_to_string(&log).expect("a log");
    assert!(
        text.contains("[anonymous-instance:api:INFO] PATCH /balloon: 400: Balloon update error"),
        "{text}"
    );
}

#[test]
fn entropy_and_the_serial_port_are_limited_to_their_rates_within_5_percent_over_10_s() {
    require_bed!(nohz_full);
    const ENTROPY: u64 = 2 << 10;
    const SERIAL: u64 = 1 << 10;
    let folder = Folder::new();
    let [serial, lines] = ["serial", "metrics"].map(|name| folder.join(name));
    // What a bucket of a second holds makes good for what a busy host holds the guest up.
    let per_second = |rate: u64| json!({ "size": rate, "refill_time": 1000 });
    let sections = json!({
        "entropy": { "rate_limiter": { "bandwidth": per_second(ENTROPY) } },
        "serial": { "serial_out_path": serial, "rate_limiter": per_second(SERIAL) },
        "metrics": { "metrics_path": lines },
    });
    // Both for longer than is measured.
    let mut vm = Vm::serve_debian("chatter:600000,hwrng:16777216", sections);
    let written = || std::fs::metadata(&serial).map_or(0, |file| file.len());
    // Both buckets have to be empty first: more has come than they held, and more is asked for.
    vm.wait_until("output, and a wait for randomness", |vm| {
        std::thread::sleep(Duration::from_millis(500));
        let waits = |line: &Value| line["entropy"]["entropy_rate_limiter_throttled"].as_u64() > Some(0);
        written() > 2 * SERIAL && vm.metrics(&lines).iter().any(waits)
    });
    let (begun, before) = (Instant::now(), written());
    let entropy = vm.rate(&lines, "/entropy/entropy_bytes", Duration::from_secs(10)) / ENTROPY as f64;
    let serial = (written() - before) as f64 / begun.elapsed().as_secs_f64() / SERIAL as f64;
    println!("of the limits: entropy {entropy:.3}, serial port {serial:.3}");
    for share in [entropy, serial] {
        assert!(
            (0.95..=1.05).contains(&share),
            "entropy {entropy}, serial port {serial}"
        );
    }
}

#[test]
fn sigterm_asks_the_guest_which_may_end_itself() {
    require_bed!(nohz_full);
    let mut vm = Vm::debian("sleep:60000", []);
    vm.process.wait_for("chronovisor guest: sleep");
    vm.process.signal(Signal::TERM);
    let (status, _, stderr) = vm.process.wait();
    assert_eq!(status.code(), Some(0), "{stderr}");
    assert!(
        stderr.contains("the guest is asked to shut down") && stderr.contains("shut down, as SIGTERM asked it to"),
        "{stderr}"
    );
}

#[test]
fn a_paused_guest_cannot_hear_sigterm_and_is_ended_by_it() {
    require_bed!(nohz_full);
    let mut vm = Vm::debian("sleep:60000", []);
    vm.process.wait_for("chronovisor guest: sleep");
    assert_eq!(patch(&vm, "/vm", &json!({ "state": "Paused" })).0, 204);
    vm.process.signal(Signal::TERM);
    let (status, _, stderr) = vm.process.wait();
    assert_eq!(status.code(), Some(128 + 15), "{stderr}");
    assert!(!stderr.contains("the guest is asked"), "{stderr}");
}

#[test]
fn the_first_disk_of_run_is_the_root_unless_the_command_line_has_one() {
    require_bed!(nohz_full);
    let folder = Folder::new();
    let disks = ["a", "b"].map(|name| image(&folder, name).display().to_string());
    let socket = folder.join("api.sock").display().to_string();
    let mut arguments = vec!["run".to_owned()];
    arguments.extend(debian_arguments("sleep:60000"));
    let read_only = format!("{}:ro", disks[1]);
    let more = [
        "--disk",
        &disks[0],
        "--disk",
        &read_only,
        "--rng",
        "--api-sock",
        &socket,
    ];
    arguments.extend(more.map(String::from));
    let mut process = Process::chronovisor(&arguments);
    process.wait_for("chronovisor guest: sleep");
    let config = tests::client::request(std::path::Path::new(&socket), "GET", "/vm/config", None);
    let drives = config.expect("it serves").body["drives"].clone();
    let shown = |index: usize| {
        let drive = &drives[index];
        (
            drive["drive_id"].clone(),
            drive["is_root_device"].clone(),
            drive["is_read_only"].clone(),
        )
    };
    assert_eq!(shown(0), (json!("vda"), json!(true), json!(false)));
    assert_eq!(shown(1), (json!("vdb"), json!(false), json!(true)));
}
