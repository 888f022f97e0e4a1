//! A Linux guest's network: a tap in a network namespace of the test's own, with the host at its other end.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::Command;
use std::time::{Duration, Instant};

use accounting::reading::Modes;
use rustix::thread::{UnshareFlags, unshare_unsafe};
use serde_json::{Value, json};
use tests::bed::Folder;
use tests::require_bed;
use tests::thread_io::bytes_moved_by;
use tests::vm::{PATIENCE, Vm, grown};

const TAP: &str = "tap0";
/// Of one transfer, as the guest has it.
const TOTAL: usize = 64 << 20;
const PIECE: usize = 64 << 10;
const MIB: u64 = 1 << 20;

/// Runs `test` in a network namespace of its own; threads and programs that it starts are in there too.
fn in_own_network(test: impl FnOnce() + Send) {
    let ended = std::thread::scope(|scope| {
        let test = || {
            // SAFETY: a new network namespace takes nothing from the thread that memory or descriptors rely on.
            #[expect(unsafe_code, reason = "unshare can take away what a thread shares")]
            unsafe { unshare_unsafe(UnshareFlags::NEWNET) }.expect("root in the emulated host");
            test();
        };
        scope.spawn(test).join()
    });
    if let Err(panic) = ended {
        std::panic::resume_unwind(panic);
    }
}

fn busybox(line: &str) -> String {
    let output = Command::new("busybox").args(line.split(' ')).output().expect("busybox");
    let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(output.status.success(), "{line}: {said}");
    said
}

/// A guest on [`TAP`], whose host's end is up.
fn guest(what: &str, interface: Value, more: Value) -> Vm {
    guest_with(what, interface, more, [])
}

/// Likewise, by a `chronovisor` with more flags.
fn guest_with<'a>(what: &str, interface: Value, more: Value, flags: impl IntoIterator<Item = &'a str>) -> Vm {
    let mut config = json!({ "iface_id": "eth0", "host_dev_name": TAP, "guest_mac": "06:00:ac:10:00:02" });
    config
        .as_object_mut()
        .expect("an object")
        .extend(interface.as_object().expect("an object").clone());
    let mut sections = json!({ "network-interfaces": [config] });
    sections
        .as_object_mut()
        .expect("an object")
        .extend(more.as_object().expect("an object").clone());
    let vm = Vm::serve_debian_with(what, sections, flags);
    busybox("ip link set lo up");
    busybox(&format!("ip addr add 172.16.0.1/30 dev {TAP}"));
    busybox(&format!("ip link set {TAP} up"));
    vm
}

/// As the guest sums: FNV-1a over words of 64 bits.
fn add(sum: u64, piece: &[u8]) -> u64 {
    piece.chunks_exact(8).fold(sum, |sum, word| {
        (sum ^ u64::from_le_bytes(word.try_into().expect("8 bytes"))).wrapping_mul(0x100_0000_01b3)
    })
}

const SUM: u64 = 0xcbf2_9ce4_8422_2325;

/// Bytes that came from the guest, and bytes that went to it, as the tap counts them: whole frames.
fn counts() -> (u64, u64) {
    let table = std::fs::read_to_string("/proc/thread-self/net/dev").expect("the interfaces");
    let line = table
        .lines()
        .find_map(|line| line.trim().strip_prefix(&format!("{TAP}:")));
    let counts = line.unwrap_or_else(|| panic!("no {TAP} in {table}"));
    let counts: Vec<u64> = counts
        .split_whitespace()
        .filter_map(|count| count.parse().ok())
        .collect();
    // Eight columns for each direction, bytes first.
    (counts[0], counts[8])
}

fn from_guest() -> u64 {
    counts().0
}

fn to_guest() -> u64 {
    counts().1
}

/// What `bytes` grow by in a second, over `time`.
fn rate(bytes: fn() -> u64, time: Duration) -> f64 {
    let (begun, before) = (Instant::now(), bytes());
    std::thread::sleep(time);
    (bytes() - before) as f64 / begun.elapsed().as_secs_f64()
}

#[test]
fn pings_come_back_and_64_mib_of_tcp_arrive_unchanged_in_both_directions() {
    require_bed!(nohz_full);
    tests::require_no_jail!("the microVM makes its tap, which takes a capability that a jail has not");
    in_own_network(|| {
        let mut vm = guest("net-up,net-receive:5001,net-send:5002,poweroff", json!({}), json!({}));
        vm.process.wait_for("chronovisor guest: net-receive 5001: listening");
        let said = busybox("ping -c 3 -W 10 172.16.0.2");
        assert!(said.contains(" 0% packet loss"), "{said}");

        let first = vm.readings();
        let process = vm.process.id();
        let moved = first.iter().map(|vcpu| bytes_moved_by(process, vcpu.tid));
        let moved: Vec<_> = moved.collect();
        let listener = TcpListener::bind("172.16.0.1:5002").expect("a port");
        let mut stream = TcpStream::connect("172.16.0.2:5001").expect("the guest listens");
        let (mut sum, mut piece) = (SUM, vec![0; PIECE]);
        for number in 0..(TOTAL / PIECE) as u64 {
            for (at, word) in (0u64..).zip(piece.chunks_exact_mut(8)) {
                word.copy_from_slice(&(number << 32 | at).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes());
            }
            sum = add(sum, &piece);
            stream.write_all(&piece).expect("the guest reads");
        }
        vm.process
            .wait_for(&format!("net-receive 5001: {TOTAL} bytes, {sum:016x}"));

        let (mut stream, _) = listener.accept().expect("the guest connects");
        stream.set_read_timeout(Some(PATIENCE)).expect("a time");
        let mut sum = SUM;
        for _ in 0..TOTAL / PIECE {
            stream.read_exact(&mut piece).expect("the guest writes");
            sum = add(sum, &piece);
        }
        let last = vm.readings();
        vm.process
            .wait_for(&format!("net-send 5002: {TOTAL} bytes, {sum:016x}"));
        for ((first, last), before) in first.iter().zip(&last).zip(moved) {
            let Modes { host_user_ns, .. } = grown(first, last);
            let share = host_user_ns as f64 / (last.elapsed_ns - first.elapsed_ns) as f64;
            let moved = bytes_moved_by(process, last.tid) - before;
            println!(
                "vCPU {}: host_user has a share of {share:.4}, moved {moved} bytes",
                last.index
            );
            // A frame carried on a vCPU thread would be host_user, host_kernel where the tap copies it, and bytes moved by that
            // thread. Its own are eventfds' for the console, 8 bytes a time: a hundredth of one transfer is far more.
            assert!(share < 0.02, "{:?}", grown(first, last));
            assert!(moved < TOTAL as u64 / 100, "vCPU {} moved {moved} bytes", last.index);
        }
        assert_eq!(vm.process.wait().0.code(), Some(0));
    });
}

/// And its interface has the MTU that it was given; and what the service did is in the metrics.
#[test]
fn metadata_of_a_file_up_to_a_limit_is_told_to_a_guest_that_has_a_token() {
    require_bed!(nohz_full);
    tests::require_no_jail!("the microVM makes its tap, which takes a capability that a jail has not");
    in_own_network(|| {
        let folder = Folder::new();
        let document = json!({ "latest": { "meta-data": { "instance-id": "i-4242" } } }).to_string();
        let metadata = folder.write("metadata", &document).display().to_string();
        let lines = folder.join("metrics");
        let limit = document.len().to_string();
        let flags = [
            ["--metadata", &metadata],
            ["--mmds-size-limit", &limit],
            ["--metrics-path", lines.to_str().expect("a path of the test's own")],
        ];
        let mmds = json!({ "mmds-config": { "network_interfaces": ["eth0"], "version": "V2" } });
        let plan = "net-up,metadata,sleep:60000";
        let mut vm = guest_with(plan, json!({ "mtu": 1400 }), mmds, flags.concat());
        let said = vm
            .process
            .wait_for("chronovisor guest: metadata: 401 without a token, \"i-4242\" with one");
        assert!(said.contains("net-up: up, with an MTU of 1400"), "{said}");

        // The first is of the start, when nothing had been counted.
        let line = vm.metrics(&lines).pop().expect("a line");
        let mmds = |counter: &str| {
            line["mmds"][counter]
                .as_u64()
                .unwrap_or_else(|| panic!("{counter}: {line}"))
        };
        // Two GETs, of which one had a token, and a PUT, each by a connection of its own.
        assert_eq!((mmds("rx_no_token"), mmds("rx_invalid_token")), (1, 0));
        assert_eq!(mmds("connections_created"), 3);
        assert!(
            mmds("rx_accepted") >= mmds("rx_count") && mmds("rx_count") > 0,
            "{line}"
        );
        assert!(mmds("tx_bytes") > mmds("tx_frames") && mmds("tx_frames") > 0, "{line}");
        assert!(line["vmm"]["device_events"].as_u64() > Some(0), "{line}");
        assert!(line["net_eth0"]["tx_packets_count"].as_u64() > Some(0), "{line}");

        // What just fits is replaced, and what does not is refused.
        let other = document.replace("i-4242", "i-4243");
        assert_eq!(vm.ask("PUT", "/mmds", Some(&other)).status, 204);
        let larger = document.replace("i-4242", "i-42424");
        assert_eq!(vm.ask("PUT", "/mmds", Some(&larger)).status, 413);
        assert_eq!(vm.ask("GET", "/mmds", None).body.to_string(), other);
    });
}

#[test]
fn metadata_of_version_1_is_told_to_a_guest_without_a_token() {
    require_bed!(nohz_full);
    tests::require_no_jail!("the microVM makes its tap, which takes a capability that a jail has not");
    in_own_network(|| {
        let folder = Folder::new();
        let document = json!({ "latest": { "meta-data": { "instance-id": "i-1" } } }).to_string();
        let metadata = folder.write("metadata", document).display().to_string();
        // Version 1 is that of a configuration without one.
        let mmds = json!({ "mmds-config": { "network_interfaces": ["eth0"] } });
        let plan = "net-up,metadata,poweroff";
        let mut vm = guest_with(plan, json!({}), mmds, ["--metadata", &metadata]);
        vm.process
            .wait_for("chronovisor guest: metadata: 200 \"i-1\" without a token, \"i-1\" with one");
        assert_eq!(vm.process.wait().0.code(), Some(0));
    });
}

#[test]
fn a_limited_interface_sends_at_its_rate_within_5_percent_over_10_s_and_a_patch_changes_it() {
    require_bed!(nohz_full);
    tests::require_no_jail!("the microVM makes its tap, which takes a capability that a jail has not");
    in_own_network(|| {
        let limit = |rate: u64| json!({ "bandwidth": { "size": rate / 10, "refill_time": 100 } });
        let limited = json!({ "tx_rate_limiter": limit(MIB) });
        let vm = guest("net-up,net-flood:60000,poweroff", limited, json!({}));
        let listener = TcpListener::bind("172.16.0.1:5003").expect("a port");
        let (mut stream, _) = listener.accept().expect("the guest connects");
        std::thread::spawn(move || {
            let mut piece = vec![0; PIECE];
            while stream.read(&mut piece).is_ok_and(|len| len > 0) {}
        });
        // Past the bucket's first filling and TCP's first round trips.
        std::thread::sleep(Duration::from_secs(1));
        let share = rate(from_guest, Duration::from_secs(10)) / MIB as f64;
        println!("{share:.3} of the limit");
        assert!((0.95..=1.05).contains(&share), "{share} of the limit");

        let update = json!({ "iface_id": "eth0", "tx_rate_limiter": limit(2 * MIB) });
        let answer = vm.ask("PATCH", "/network-interfaces/eth0", Some(&update.to_string()));
        assert_eq!(answer.status, 204, "{}", answer.fault());
        std::thread::sleep(Duration::from_secs(1));
        let share = rate(from_guest, Duration::from_secs(5)) / (2 * MIB) as f64;
        println!("{share:.3} of the new limit");
        // Half as long: what one frame of 64 KiB more or less makes is twice as much.
        assert!((0.9..=1.1).contains(&share), "{share} of the new limit");
    });
}

#[test]
fn a_limited_interface_receives_at_its_rate_within_5_percent_over_10_s() {
    require_bed!(nohz_full);
    tests::require_no_jail!("the microVM makes its tap, which takes a capability that a jail has not");
    in_own_network(|| {
        let limited = json!({ "rx_rate_limiter": { "bandwidth": { "size": MIB / 10, "refill_time": 100 } } });
        let mut vm = guest("net-up,net-receive:5001,poweroff", limited, json!({}));
        vm.process.wait_for("chronovisor guest: net-receive 5001: listening");
        let mut stream = TcpStream::connect("172.16.0.2:5001").expect("the guest listens");
        std::thread::spawn(move || {
            let piece = vec![0; PIECE];
            // More than there is time for: it ends with the guest.
            while stream.write_all(&piece).is_ok() {}
        });
        std::thread::sleep(Duration::from_secs(1));
        let share = rate(to_guest, Duration::from_secs(10)) / MIB as f64;
        println!("{share:.3} of the limit");
        assert!((0.95..=1.05).contains(&share), "{share} of the limit");
    });
}

#[test]
fn pauses_in_the_middle_of_a_transfer_lose_nothing_of_it() {
    require_bed!(nohz_full);
    tests::require_no_jail!("the microVM makes its tap, which takes a capability that a jail has not");
    in_own_network(|| {
        // It stays until the host has read the last of it, and the last pause is over.
        let plan = "net-up,net-receive:5001,net-send:5002,sleep:5000,poweroff";
        let mut vm = guest(plan, json!({}), json!({}));
        vm.process.wait_for("chronovisor guest: net-receive 5001: listening");
        let listener = TcpListener::bind("172.16.0.1:5002").expect("a port");
        let mut stream = TcpStream::connect("172.16.0.2:5001").expect("the guest listens");
        let transfers = std::thread::spawn(move || {
            let (mut there, mut back, mut piece) = (SUM, SUM, vec![0; PIECE]);
            for number in 0..TOTAL / PIECE {
                piece.fill(number.to_le_bytes()[0]);
                there = add(there, &piece);
                stream.write_all(&piece).expect("the guest reads");
            }
            let (mut stream, _) = listener.accept().expect("the guest connects");
            stream.set_read_timeout(Some(PATIENCE)).expect("a time");
            for _ in 0..TOTAL / PIECE {
                stream.read_exact(&mut piece).expect("the guest writes");
                back = add(back, &piece);
            }
            (there, back)
        });
        vm.pause_while(|| !transfers.is_finished());
        let (there, back) = transfers.join().expect("both transfers end");
        let (status, output, stderr) = vm.process.wait();
        assert_eq!(status.code(), Some(0), "{stderr}");
        for said in [
            format!("net-receive 5001: {TOTAL} bytes, {there:016x}"),
            format!("net-send 5002: {TOTAL} bytes, {back:016x}"),
        ] {
            assert!(output.contains(&said), "{said}: {output}");
        }
    });
}

#[test]
fn a_tap_that_vanishes_under_traffic_does_not_stop_the_guest() {
    require_bed!(nohz_full);
    tests::require_no_jail!("the microVM makes its tap, which takes a capability that a jail has not");
    in_own_network(|| {
        let mut vm = guest("net-up,net-flood:3000,poweroff", json!({}), json!({}));
        let listener = TcpListener::bind("172.16.0.1:5003").expect("a port");
        let (mut stream, _) = listener.accept().expect("the guest connects");
        let mut piece = vec![0; PIECE];
        stream.read_exact(&mut piece).expect("traffic");
        busybox(&format!("ip link del {TAP}"));
        let first = vm.reading();
        vm.wait_until("time goes on", |vm| vm.reading().modes.guest_ns > first.modes.guest_ns);
        let (status, output, stderr) = vm.process.wait();
        assert_eq!(status.code(), Some(0), "{output}\n{stderr}");
        assert!(stderr.contains("tap tap0 is gone"), "{stderr}");
    });
}
