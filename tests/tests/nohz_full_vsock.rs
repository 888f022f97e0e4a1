//! The socket device with Linux's driver: streams by the host and by the guest, whole in both directions.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use serde_json::{Value, json};
use tests::bed::Folder;
use tests::require_bed;
use tests::vm::{PATIENCE, Vm};

const TOTAL: usize = 4 << 20;

fn device(socket: &Path) -> Value {
    json!({ "vsock": { "guest_cid": 3, "uds_path": socket } })
}

/// A stream to the guest's port 52, that the guest has taken.
fn connect(socket: &Path) -> (UnixStream, BufReader<UnixStream>) {
    let mut stream = UnixStream::connect(socket).expect("the device's socket");
    stream.set_read_timeout(Some(PATIENCE)).expect("a time");
    stream.write_all(b"CONNECT 52\n").expect("it reads");
    let mut reader = BufReader::new(stream.try_clone().expect("a second handle"));
    let mut line = String::new();
    reader.read_line(&mut line).expect("an answer");
    assert!(line.starts_with("OK "), "{line}");
    (stream, reader)
}

/// Sends back what comes until the guest ends the stream, and returns it.
fn echo(mut stream: UnixStream) -> Vec<u8> {
    stream.set_read_timeout(Some(PATIENCE)).expect("a time");
    let (mut came, mut piece) = (Vec::new(), vec![0; 10_000]);
    loop {
        let len = stream.read(&mut piece).expect("the guest writes");
        if len == 0 {
            return came;
        }
        came.extend_from_slice(&piece[..len]);
        stream.write_all(&piece[..len]).expect("the guest reads");
    }
}

/// As the guest sums (FNV-1a).
fn fnv(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |sum, &byte| {
        (sum ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
    })
}

#[test]
fn a_stream_by_the_host_reaches_the_guests_port_and_comes_back_unchanged() {
    require_bed!(nohz_full);
    let folder = Folder::new();
    let socket = folder.join("v.sock");
    let mut vm = Vm::serve_debian("vsock-echo:52,poweroff", device(&socket));
    vm.process.wait_for("chronovisor guest: vsock-echo 52: listening");
    let (mut stream, mut reader) = connect(&socket);

    let sent: Vec<u8> = (0..TOTAL).map(|at| (at * 31 + at / 251).to_le_bytes()[0]).collect();
    let came = std::thread::scope(|scope| {
        scope.spawn(|| {
            stream.write_all(&sent).expect("the guest reads");
            stream.shutdown(Shutdown::Write).expect("an end");
        });
        let mut came = Vec::new();
        reader.read_to_end(&mut came).expect("the guest writes");
        came
    });
    assert!(came == sent, "{} bytes came back of {TOTAL}", came.len());
    let (status, output, stderr) = vm.process.wait();
    assert_eq!(status.code(), Some(0), "{stderr}");
    let said = format!("vsock-echo 52: {TOTAL} bytes, {:016x}", fnv(&sent));
    assert!(output.contains(&said), "{said}: {output}");
    assert!(!socket.exists(), "the socket goes with the guest");
}

#[test]
fn a_stream_by_the_guest_reaches_the_hosts_port_and_comes_back_unchanged() {
    require_bed!(nohz_full);
    let folder = Folder::new();
    let socket = folder.join("v.sock");
    let listener = UnixListener::bind(folder.join("v.sock_77")).expect("a socket");
    let mut vm = Vm::serve_debian("vsock-send:77,poweroff", device(&socket));
    let (stream, _) = listener.accept().expect("the guest connects");
    let came = echo(stream);
    let (status, output, stderr) = vm.process.wait();
    assert_eq!(status.code(), Some(0), "{stderr}");
    let sum = fnv(&came);
    let said = format!("vsock-send 77: {TOTAL} bytes, {sum:016x}; back {TOTAL} bytes, {sum:016x}");
    assert!(output.contains(&said), "{said}: {output}");
}

#[test]
fn pauses_in_the_middle_of_a_transfer_lose_nothing_of_it() {
    require_bed!(nohz_full);
    /// There and back, of which there are four pauses in the emulated host.
    const LONG: usize = 4 * TOTAL;
    let folder = Folder::new();
    let socket = folder.join("v.sock");
    // It stays until the last pause is over.
    let plan = "vsock-echo:52,vsock-send:77,sleep:5000,poweroff";
    let listener = UnixListener::bind(folder.join("v.sock_77")).expect("a socket");
    let mut vm = Vm::serve_debian(plan, device(&socket));
    vm.process.wait_for("chronovisor guest: vsock-echo 52: listening");
    let transfers = std::thread::spawn(move || {
        let sent: Vec<u8> = (0..LONG).map(|at| (at * 31 + at / 251).to_le_bytes()[0]).collect();
        let (mut stream, mut reader) = connect(&socket);
        let echoed = std::thread::scope(|scope| {
            scope.spawn(|| {
                stream.write_all(&sent).expect("the guest reads");
                stream.shutdown(Shutdown::Write).expect("an end");
            });
            let mut came = Vec::new();
            reader.read_to_end(&mut came).expect("the guest writes");
            came
        });
        assert!(echoed == sent, "{} bytes came back of {LONG}", echoed.len());
        let (stream, _) = listener.accept().expect("the guest connects");
        (fnv(&sent), fnv(&echo(stream)))
    });
    vm.pause_while(|| !transfers.is_finished());
    let (echoed, sent) = transfers.join().expect("both transfers end");
    let (status, output, stderr) = vm.process.wait();
    assert_eq!(status.code(), Some(0), "{stderr}");
    for said in [
        format!("vsock-echo 52: {LONG} bytes, {echoed:016x}"),
        format!("vsock-send 77: {TOTAL} bytes, {sent:016x}; back {TOTAL} bytes, {sent:016x}"),
    ] {
        assert!(output.contains(&said), "{said}: {output}");
    }
}

#[test]
fn a_guest_that_connects_where_nobody_listens_is_refused() {
    require_bed!(nohz_full);
    let folder = Folder::new();
    let mut vm = Vm::serve_debian("vsock-send:78,poweroff", device(&folder.join("v.sock")));
    vm.process
        .wait_for("chronovisor guest: vsock-send 78: failed: Connection reset by peer");
    assert_eq!(vm.process.wait().0.code(), Some(0));
}

#[test]
fn a_path_that_is_taken_stops_the_start_and_stays() {
    require_bed!(nohz_full);
    let folder = Folder::new();
    let socket = folder.write("v.sock", "precious");
    let mut config = device(&socket);
    config["boot-source"] = json!({ "kernel_image_path": tests::bed::file("vmlinux") });
    let file = folder.write("config.json", config.to_string());
    let arguments = ["--no-api".as_ref(), "--config-file".as_ref(), file.as_os_str()];
    let (status, _, said) = tests::vm::Process::chronovisor(arguments).wait();
    assert!(!status.success());
    assert!(said.contains("v.sock: this file exists and is not a socket"), "{said}");
    assert_eq!(std::fs::read_to_string(&socket).expect("it is there"), "precious");
}

/// The kernel is read when the devices are there.
#[test]
fn a_start_that_fails_behind_the_device_leaves_no_socket() {
    require_bed!(nohz_full);
    let folder = Folder::new();
    let socket = folder.join("v.sock");
    let mut config = device(&socket);
    config["boot-source"] = json!({ "kernel_image_path": folder.write("kernel", [0x5a; 8192]) });
    let file = folder.write("config.json", config.to_string());
    let arguments = ["--no-api".as_ref(), "--config-file".as_ref(), file.as_os_str()];
    let (status, _, said) = tests::vm::Process::chronovisor(arguments).wait();
    assert!(!status.success());
    assert!(said.contains("kernel") && !said.contains("vsock"), "{said}");
    assert_eq!(folder.names(), ["config.json", "kernel"]);
}

#[test]
fn a_signal_that_ends_the_guest_takes_the_socket_along_and_ends_streams() {
    require_bed!(nohz_full);
    let folder = Folder::new();
    let socket = folder.join("v.sock");
    let mut vm = Vm::serve_debian("vsock-echo:52,poweroff", device(&socket));
    vm.process.wait_for("chronovisor guest: vsock-echo 52: listening");
    let (_stream, mut reader) = connect(&socket);
    vm.process.signal(rustix::process::Signal::TERM);
    let mut rest = Vec::new();
    reader.read_to_end(&mut rest).expect("an end of file");
    assert_eq!(rest, b"");
    vm.process.wait();
    assert!(!socket.exists(), "the socket goes with the process");
}
