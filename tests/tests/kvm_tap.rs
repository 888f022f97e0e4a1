//! A tap that is made by being attached to, as the host sees it: from the interface's configuration on.

use std::process::Command;

use tests::bed::{self, Folder};
use tests::client;
use tests::flat::{Program, elf};
use tests::network;
use tests::require_bed;
use tests::vm::{PATIENCE, Process};

fn ip(arguments: &str) -> Result<String, String> {
    let output = Command::new("ip").args(arguments.split(' ')).output();
    let output = output.map_err(|error| format!("ip: {error}"))?;
    let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    if output.status.success() { Ok(said) } else { Err(said) }
}

#[test]
fn what_the_host_gives_a_tap_between_its_configuration_and_the_start_is_there_while_the_guest_runs() {
    require_bed!(kvm);
    tests::require_no_jail!("making a tap takes a capability that a jail has not");
    // This thread is left there: there is no other test in this program.
    if let Err(why) = network::own().and_then(|()| ip("link show").map(drop)) {
        return bed::skipped("kvm", &why);
    }
    let folder = Folder::new();
    let kernel = folder
        .write("flat", elf(&Program::reset_by_key()))
        .display()
        .to_string();
    let socket = folder.join("api.sock");
    let mut process = Process::chronovisor(["--api-sock".as_ref(), socket.as_os_str()]);
    let begun = std::time::Instant::now();
    while client::request(&socket, "GET", "/", None).is_err() {
        assert!(begun.elapsed() < PATIENCE, "no answer; stderr:\n{}", process.stderr());
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    let put = |path: &str, body: &str| {
        let response = client::request(&socket, "PUT", path, Some(body)).expect("it answers");
        assert_eq!(response.status, 204, "{path}: {response:?}");
    };
    put("/boot-source", &format!(r#"{{"kernel_image_path": "{kernel}"}}"#));
    put(
        "/network-interfaces/eth0",
        r#"{"iface_id": "eth0", "host_dev_name": "tap0"}"#,
    );
    ip("address add 10.9.8.1/24 dev tap0").expect("the tap is there");
    ip("link set dev tap0 up").expect("it is still");
    put("/actions", r#"{"action_type": "InstanceStart"}"#);
    let tap = ip("address show dev tap0").expect("it is while the guest runs");
    assert!(tap.contains("10.9.8.1/24") && tap.contains("LOWER_UP"), "{tap}");
    put("/actions", r#"{"action_type": "SendCtrlAltDel"}"#);
    assert_eq!(process.wait().0.code(), Some(0), "{}", process.stderr());
    ip("link show dev tap0").expect_err("it goes with its microVM");
}
