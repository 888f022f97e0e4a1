//! Real taps, each test in a network namespace of its own thread: nothing of the machine's is touched. Where that is not permitted,
//! or there are no taps, the tests are skipped, and say so.

use std::process::Command;
use std::sync::{Arc, Mutex};

use event_manager::{EventManager, SubscriberOps};

use super::spec::HEADER_LEN;
use super::*;
use crate::Action;
use crate::devices::virtio::testing::{BUFFERS, Driver, for_driver, from_driver};

/// Runs `test` in a new network namespace.
fn in_namespace(test: impl FnOnce() + Send + 'static) {
    let name = std::thread::current().name().unwrap_or("?").to_owned();
    let thread = std::thread::Builder::new().name(name.clone()).spawn(move || {
        // SAFETY: of what a thread shares with others this only takes its network away.
        #[expect(unsafe_code, reason = "unshare")]
        let unshared = unsafe { libc::unshare(libc::CLONE_NEWNET) };
        let why = if unshared < 0 {
            format!("no network namespace: {}", std::io::Error::last_os_error())
        } else if let Err(error) = std::fs::OpenOptions::new().read(true).write(true).open("/dev/net/tun") {
            format!("/dev/net/tun: {error}")
        } else if Command::new("ip").arg("link").output().is_err() {
            "no ip command".to_owned()
        } else {
            return test();
        };
        println!("SKIPPED tap: {name}: {why}");
    });
    if let Err(panic) = thread.unwrap().join() {
        std::panic::resume_unwind(panic);
    }
}

/// In this thread's namespace: the child inherits it.
fn ip(arguments: &str) {
    let output = Command::new("ip").args(arguments.split(' ')).output().unwrap();
    assert!(output.status.success(), "ip {arguments}: {output:?}");
}

fn config(tap: &str) -> NetworkInterface {
    serde_json::from_value(serde_json::json!({ "iface_id": "eth0", "host_dev_name": tap })).unwrap()
}

fn net(tap: &str) -> Result<Net, NetError> {
    Net::new(&config(tap), &Taps::default())
}

fn refusal(tap: &str) -> String {
    net(tap).unwrap_err().to_string()
}

#[test]
fn a_tap_that_is_not_to_be_had_is_refused_in_words() {
    in_namespace(|| {
        let long = "sixteen-letters-";
        let expected = format!("interface eth0: {long:?} cannot be a tap's name: those have 1 to 15 bytes");
        assert_eq!(refusal(long), expected);
        assert!(refusal("").contains("1 to 15 bytes"));
        let _first = net("tap-of-15-bytes").unwrap();
        let busy = refusal("tap-of-15-bytes");
        assert!(
            busy.starts_with("interface eth0: cannot attach to tap tap-of-15-bytes: Device or resource busy")
                && busy.ends_with("it is in use: give each interface a tap of its own"),
            "{busy}"
        );
        let loopback = refusal("lo");
        assert!(
            loopback.ends_with("name a tap with a single queue, as ip tuntap add makes it"),
            "{loopback}"
        );
    });
}

/// A driver of a tap's, with what it takes to talk to the host: the tap is up, the host is 10.9.8.1 there.
struct Attached {
    net: Arc<Mutex<Net>>,
    driver: Driver,
}

impl Attached {
    fn new(features: u64) -> Self {
        let net = Arc::new(Mutex::new(self::net("tap0").unwrap()));
        ip("link set dev tap0 up");
        ip("address add 10.9.8.1/24 dev tap0");
        let mut driver = Driver::start(net.clone(), features);
        for place in 0..100 {
            driver.put(RX, &[for_driver(BUFFERS + 0x1_0000 + place * 1536, 1536)]);
        }
        driver.turn(20);
        Self { net, driver }
    }

    /// Asks for the host's address by ARP, as 10.9.8.2.
    fn ask(&mut self) {
        let mac = [6, 0, 0, 0, 0, 2];
        let mut frame = vec![0; HEADER_LEN];
        frame.extend([[0xff; 6], mac].concat());
        // Ethernet and IPv4, request (RFC 826).
        frame.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
        frame.extend(mac);
        frame.extend([10, 9, 8, 2, 0, 0, 0, 0, 0, 0, 10, 9, 8, 1]);
        self.driver.write(BUFFERS, &frame);
        self.driver
            .put(TX, &[from_driver(BUFFERS, u32::try_from(frame.len()).unwrap())]);
        self.driver.notify(TX);
    }
}

#[test]
fn the_host_answers_through_the_tap() {
    in_namespace(|| {
        let mut guest = Attached::new(u64::MAX);
        guest.ask();
        let mut received = Vec::new();
        while !received
            .iter()
            .any(|frame: &Vec<u8>| frame[HEADER_LEN + 12..][..2] == [8, 6])
        {
            assert!(guest.driver.turn_for(1, std::time::Duration::from_secs(60)) > 0);
            for (head, len) in guest.driver.used(RX) {
                // The driver's chains are single descriptors, in order.
                let at = BUFFERS + 0x1_0000 + u64::from(head) * 1536;
                received.push(guest.driver.read(at, len.try_into().unwrap()));
            }
        }
        let answer = received.last().unwrap();
        // A reply, of the host's address, one buffer long. It may have others in front: the host's kernel talks by itself.
        assert_eq!(
            (&answer[10..12], &answer[HEADER_LEN + 20..][..2]),
            (&[1, 0][..], &[0, 2][..])
        );
        assert_eq!(answer[HEADER_LEN + 28..][..4], [10, 9, 8, 1]);
    });
}

/// Whether the host may leave checksums, and segmentation of TCP, to what stands behind tap0 (linux/ethtool.h).
fn offloads_of_tap0() -> (bool, bool) {
    #[repr(C)]
    struct Value {
        command: u32,
        data: u32,
    }
    let socket = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
    let get = |command| {
        let mut value = Value { command, data: 0 };
        // SAFETY: an ifreq is numbers and bytes: zeros are one. SIOCETHTOOL takes one that points to a command's structure, which
        // for these two is a number, and writes that.
        #[expect(unsafe_code, reason = "ethtool's ioctl")]
        let done = unsafe {
            let mut request: libc::ifreq = std::mem::zeroed();
            for (to, from) in request.ifr_name.iter_mut().zip(b"tap0") {
                *to = libc::c_char::from_ne_bytes([*from]);
            }
            request.ifr_ifru.ifru_data = (&raw mut value).cast();
            libc::ioctl(socket.as_raw_fd(), 0x8946, &raw mut request)
        };
        assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
        value.data != 0
    };
    const TX_CHECKSUMS: u32 = 0x16;
    const TSO: u32 = 0x1e;
    (get(TX_CHECKSUMS), get(TSO))
}

#[test]
fn the_tap_has_the_offloads_that_the_driver_took() {
    in_namespace(|| {
        for (features, offloads) in [
            (u64::MAX, (true, true)),
            (0, (false, false)),
            (F_GUEST_CSUM, (true, false)),
            // There is no segmentation without checksums.
            (F_GUEST_TSO4, (false, false)),
        ] {
            let _guest = Attached::new(features);
            assert_eq!(offloads_of_tap0(), offloads, "{features:#x}");
        }
    });
}

#[test]
fn a_tap_that_is_deleted_leaves_a_quiet_device() {
    in_namespace(|| {
        let mut guest = Attached::new(u64::MAX);
        let mut manager = EventManager::new().unwrap();
        manager.add_subscriber(Arc::new(Mutex::new(guest.driver.transport.events())));
        let mut turn = || {
            let mut events = 0;
            while manager.run_with_timeout(0).unwrap() > 0 {
                events += 1;
                assert!(events < 50, "the device is never done");
            }
        };
        guest.ask();
        turn();
        ip("link delete dev tap0");
        for _ in 0..3 {
            guest.ask();
            turn();
        }
        assert_eq!(guest.driver.used(TX).len(), 4);
        assert!(!guest.driver.needs_reset() && guest.net.lock().unwrap().gone);
        assert_eq!(guest.net.lock().unwrap().metrics().tx_fails.load(Ordering::Relaxed), 3);
    });
}

#[test]
fn a_tap_that_is_down_loses_frames_and_serves_when_it_is_up() {
    in_namespace(|| {
        let mut guest = Attached::new(u64::MAX);
        ip("link set dev tap0 down");
        guest.ask();
        guest.driver.turn(20);
        let fails = guest.net.lock().unwrap().metrics().tx_fails.load(Ordering::Relaxed);
        ip("link set dev tap0 up");
        guest.ask();
        guest.driver.turn(20);
        let net = guest.net.lock().unwrap();
        let sent = net.metrics().tx_packets_count.load(Ordering::Relaxed);
        assert_eq!((fails, sent, net.gone), (1, 1, false));
        assert_eq!(net.metrics().tx_fails.load(Ordering::Relaxed), 1);
    });
}

/// Whether there is an interface `name` on the host, with the address 10.9.8.1.
fn has_address(name: &str) -> bool {
    let output = Command::new("ip")
        .args(["address", "show", "dev", name])
        .output()
        .unwrap();
    String::from_utf8_lossy(&output.stdout).contains("inet 10.9.8.1/24")
}

fn exists(name: &str) -> bool {
    Command::new("ip")
        .args(["link", "show", "dev", name])
        .output()
        .unwrap()
        .status
        .success()
}

#[test]
fn what_the_host_gives_a_tap_before_the_start_is_there_after_it() {
    in_namespace(|| {
        let mut taps = Taps::default();
        taps.hold(&config("tap0")).unwrap();
        ip("address add 10.9.8.1/24 dev tap0");
        // Configured once more, with other limits, say.
        taps.hold(&config("tap0")).unwrap();
        assert!(has_address("tap0"), "configured twice");
        drop(Net::new(&config("tap0"), &taps).unwrap());
        assert!(has_address("tap0"), "a start that failed");
        let net = Net::new(&config("tap0"), &taps).unwrap();
        drop(taps);
        assert!(has_address("tap0"), "a start");
        drop(net);
        assert!(!exists("tap0"));
    });
}

#[test]
fn an_interface_lets_go_of_its_tap_when_it_has_another_and_not_when_that_is_refused() {
    in_namespace(|| {
        let mut taps = Taps::default();
        taps.hold(&config("tap0")).unwrap();
        let mtu = NetworkInterface {
            mtu: Some(67),
            ..config("tap1")
        };
        assert!(taps.hold(&mtu).is_err() && taps.hold(&config("lo")).is_err());
        assert!(exists("tap0") && !exists("tap1"));
        taps.hold(&config("tap1")).unwrap();
        assert!(!exists("tap0") && exists("tap1"));
    });
}

#[test]
fn a_tap_that_was_deleted_and_made_again_before_the_start_is_the_new_one() {
    in_namespace(|| {
        let mut taps = Taps::default();
        taps.hold(&config("tap0")).unwrap();
        ip("link delete dev tap0");
        ip("tuntap add dev tap0 mode tap");
        let net = Net::new(&config("tap0"), &taps).unwrap();
        assert!(net.tap.is_there());
        ip("link delete dev tap0");
        assert!(!net.tap.is_there());
    });
}

#[test]
fn a_microvm_that_ends_before_its_start_leaves_no_tap() {
    in_namespace(|| {
        let (vmm, handle) = crate::Vmm::spawn(crate::Options {
            id: "test".into(),
            console: crate::Console::Files {
                input: None,
                output: std::fs::File::create("/dev/null").unwrap().into(),
            },
            gtime_source: accounting::GtimeSource::Auto,
            log: crate::log::LogSink::default(),
            mmds_limit_bytes: crate::mmds::data::DEFAULT_LIMIT_BYTES,
        })
        .unwrap();
        handle.request(Action::PutInterface(config("tap0"))).unwrap();
        ip("address add 10.9.8.1/24 dev tap0");
        handle.request(Action::Start).unwrap_err();
        assert!(has_address("tap0"));
        handle.request(Action::Stop).unwrap();
        assert_eq!(vmm.join(), crate::End::Stopped);
        assert!(!exists("tap0"));
    });
}
