//! Firecracker's clients from the Python registry, unchanged: pointed at our binary, each starts a guest by its own API, reads
//! it back and stops it, and gains `/vcpus`.
//!
//! `cargo xtask test` installs them; tests/clients/ has a driver for each, which prints what came of it as JSON, the host in
//! which it does (its own mounts and network), and what stands in for what a test machine lacks around it.

use std::process::Command;

use accounting::Reading;
use accounting::laws;
use accounting::reading::VcpuState;
use serde_json::{Value, json};
use tests::bed::{self, Folder};
use tests::flat::{Program, elf};
use tests::python;
use tests::require_bed;
use tests::vm::Process;

const SCRIPTS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/clients");

/// What keeps `client` from being driven here.
fn lacking(client: &str) -> Result<(), String> {
    python::of(client)?;
    match std::fs::metadata("/dev/net/tun") {
        Ok(_) => Ok(()),
        Err(error) => Err(format!("/dev/net/tun: {error}")),
    }
}

/// Runs `driver` with what `client` needs, and gives what came of it.
fn drive(client: &str, driver: &str) -> Value {
    let folder = Folder::new();
    let kernel = folder.write("flat", elf(&Program::reset_by_key()));
    let disk = folder.write("disk.ext4", vec![0; 1 << 20]);
    let python = python::of(client).expect("looked for");

    let mut command = Command::new("unshare");
    // Whatever the driver leaves running ends with it.
    command.args(["--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]);
    command.args(["sh", &format!("{SCRIPTS}/host.sh")]);
    command.arg(bed::file("chronovisor")).arg(python);
    // Nothing is written beside the sources.
    command.args(["-B", &format!("{SCRIPTS}/{driver}.py")]);
    command.args([kernel, disk, folder.path().to_owned()]);
    let (status, stdout, stderr) = Process::spawn(command).wait();
    assert!(status.success(), "{status}; stdout:\n{stdout}\nstderr:\n{stderr}");
    let last = stdout.lines().last().unwrap_or_default();
    serde_json::from_str(last).unwrap_or_else(|e| panic!("{e}; stdout:\n{stdout}\nstderr:\n{stderr}"))
}

/// Ends the calling test, in one line that is counted, unless `client` can be driven here.
macro_rules! require_client {
    ($client:literal) => {
        require_bed!(kvm);
        tests::require_no_jail!("these clients know of no jail, and where their files are");
        if let Err(why) = lacking($client) {
            bed::skipped("kvm", &why);
            return;
        }
    };
}

/// Two readings of a guest that ran between them.
fn assert_ran(readings: &Value) {
    let readings: [Reading; 2] = serde_json::from_value(readings.clone()).expect("two readings");
    let [first, second] = &readings;
    assert_eq!(laws::check_pair(first, second), Ok(()));
    // Each of the guest's exits is a look for a key, after so many turns of its loop.
    assert!(second.exits.total > first.exits.total, "{readings:#?}");
    assert!(second.gtime_bounds_ns.upper > 0, "{readings:#?}");
}

/// Nothing is left of the guest's link, whose name starts with `tap`, beside those that the host had.
fn assert_unplugged(left: &Value, tap: &str) {
    let links = left["links"].as_str().expect("ip's words");
    assert!(links.contains("uplink") && !links.contains(tap), "{links}");
}

/// `create`, `config`, `status`, `list`, `pause`, `resume`, `delete`: as firecracker-python and its fork have them.
fn firecracker_python(client: &str, interface: &str) {
    let came = drive(client, "firecracker_python");
    let id = came["id"].as_str().expect("an id");
    assert_eq!(came["created"], format!("VMM {id} created"));
    assert_eq!(came["status"], format!("VMM {id} is running"));
    assert_eq!(came["listed"][0]["name"], "driven", "{came:#}");
    assert_eq!(came["address"], "172.16.0.2", "read from the boot arguments");

    let config = &came["config"];
    let boot_args = config["boot-source"]["boot_args"].as_str().expect("boot arguments");
    assert!(
        boot_args.starts_with("console=ttyS0 reboot=k pci=off panic=1 ip=172.16.0.2::172.16.0.1:"),
        "{boot_args}"
    );
    assert_eq!(config["machine-config"]["vcpu_count"], 1, "{config:#}");
    assert_eq!(config["machine-config"]["mem_size_mib"], 128, "{config:#}");
    let drive = &config["drives"][0];
    assert_eq!(
        (&drive["drive_id"], &drive["is_root_device"]),
        (&json!("rootfs"), &json!(true)),
        "{config:#}"
    );
    assert_eq!(
        drive["path_on_host"],
        format!("/var/lib/firecracker/{id}/rootfs/disk.ext4")
    );
    let net = &config["network-interfaces"][0];
    assert_eq!(
        (&net["iface_id"], &net["host_dev_name"]),
        (&json!(interface), &json!(format!("tap_{id}"))),
        "{config:#}"
    );
    assert_eq!(config["vsock"]["guest_cid"], 7, "{config:#}");
    assert_eq!(
        config["mmds-config"]["network_interfaces"],
        json!([interface]),
        "{config:#}"
    );

    assert_eq!(came["state"], "Running");
    assert_ran(&came["running"]);
    assert_eq!(came["paused"]["state"], "Paused");
    let paused: Vec<Reading> = serde_json::from_value(came["paused"]["vcpus"].clone()).expect("readings");
    assert_eq!(paused.iter().map(|r| r.state).collect::<Vec<_>>(), [VcpuState::Paused]);
    assert_eq!(came["resumed"]["state"], "Running");
    assert_ran(&came["resumed"]["running"]);

    assert_eq!(came["deleted"], format!("VMM {id} is deleted"));
    // SIGTERM ended it, in order or by its guest's leave; SIGKILL, for which the client is ready after 2 s, would read -9.
    assert!([0, 143].map(Value::from).contains(&came["exit_status"]), "{came:#}");
    assert_eq!(
        (&came["left"]["listed"], &came["left"]["files"]),
        (&json!([]), &json!([])),
        "{came:#}"
    );
    assert_unplugged(&came["left"], "tap_");
}

#[test]
fn firecracker_python_starts_a_guest_reads_it_back_and_stops_it() {
    require_client!("firecracker-python");
    // The guest's interface is named as the host's default route's.
    firecracker_python("firecracker-python", "uplink");
}

#[test]
fn hysn_firecracker_python_starts_a_guest_reads_it_back_and_stops_it() {
    require_client!("hysn-firecracker-python");
    firecracker_python("hysn-firecracker-python", "eth0");
}

#[test]
fn microheart_starts_a_guest_reads_it_back_and_stops_it() {
    require_client!("microheart");
    let came = drive("microheart", "microheart_vm");
    assert!(came["seconds"].is_number(), "none if it had not started: {came:#}");
    assert_eq!(
        (&came["config"]["vcpu_count"], &came["config"]["mem_size_mib"]),
        (&json!(1), &json!(128)),
        "{came:#}"
    );
    assert_ran(&came["running"]);
    assert!(came["console"].as_str().expect("text").contains("up"), "{came:#}");
    assert_eq!(
        (&came["exit_status"], &came["still_running"]),
        (&json!(0), &json!(false)),
        "{came:#}"
    );
    assert_eq!(came["left"]["files"], json!([]));
    assert_unplugged(&came["left"], "mh0");
}
