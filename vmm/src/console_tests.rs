use super::*;
use event_manager::{EventManager, SubscriberOps};
use std::sync::Mutex;
use std::thread;

use crate::devices::ring::CAPACITY;

type Loop = EventManager<Arc<Mutex<ConsoleIo>>>;

fn console(input: Option<OwnedFd>, output: OwnedFd) -> (Loop, Arc<OutputRing>, Arc<SerialPort>) {
    let ring = Arc::new(OutputRing::new().unwrap());
    let serial = Arc::new(SerialPort::new(Arc::clone(&ring)).unwrap());
    let io = ConsoleIo::new(
        Console::Files { input, output },
        Arc::clone(&ring),
        Arc::clone(&serial),
        Redirect::default(),
    )
    .unwrap();
    let mut events = Loop::new().unwrap();
    events.add_subscriber(Arc::new(Mutex::new(io)));
    (events, ring, serial)
}

/// Runs the loop until it has nothing to do. How many times it had.
fn settle(events: &mut Loop) -> usize {
    (0..).find(|_| events.run_with_timeout(20).unwrap() == 0).unwrap()
}

fn typed(serial: &SerialPort) -> Vec<u8> {
    std::iter::from_fn(|| (serial.read(5) & 1 != 0).then(|| serial.read(0))).collect()
}

#[test]
fn output_arrives_whole_and_in_order_through_a_pipe_that_fills() {
    let (read, write) = std::io::pipe().unwrap();
    let (mut events, ring, _serial) = console(None, write.into());
    let sent: Vec<u8> = (0..CAPACITY * 3).map(|n| u8::try_from(n % 251).unwrap()).collect();
    let expected = sent.clone();
    // More than pipe and ring hold: the writer waits, as a vCPU would.
    let vcpu = thread::spawn(move || {
        for byte in sent {
            ring.wait_for_room();
            ring.push(byte);
        }
    });
    settle(&mut events);
    assert!(!vcpu.is_finished(), "nobody reads: the vCPU is blocked");
    let reader = thread::spawn(move || {
        let mut read = read;
        let mut heard = vec![0; expected.len()];
        read.read_exact(&mut heard).unwrap();
        assert!(heard == expected);
    });
    while !reader.is_finished() {
        events.run_with_timeout(20).unwrap();
    }
    reader.join().unwrap();
    vcpu.join().unwrap();
}

#[test]
fn a_reader_who_does_not_read_never_holds_the_loop() {
    let (_read, write) = std::io::pipe().unwrap();
    let flags = |fd: &dyn AsFd| rustix::fs::fcntl_getfl(fd.as_fd()).unwrap();
    let shared = write.try_clone().unwrap();
    let (mut events, ring, _serial) = console(None, write.into());
    (0..CAPACITY).for_each(|_| ring.push(b'x'));
    settle(&mut events);
    (0..CAPACITY).for_each(|_| ring.push(b'x'));
    assert!(settle(&mut events) <= 2, "a full pipe is waited for, not polled");
    assert!(
        !flags(&shared).contains(OFlags::NONBLOCK),
        "the descriptor we share is as it was"
    );
}

#[test]
fn a_reader_who_is_gone_costs_the_output_and_nothing_else() {
    let (read, write) = std::io::pipe().unwrap();
    drop(read);
    let (mut events, ring, _serial) = console(None, write.into());
    for _ in 0..3 {
        (0..CAPACITY).for_each(|_| ring.push(b'x'));
        settle(&mut events);
        assert_eq!(ring.take(&mut Vec::new()), 0);
    }
}

#[test]
fn typing_waits_for_a_guest_with_room_and_loses_nothing() {
    let (read, mut write) = std::io::pipe().unwrap();
    let (mut events, _ring, serial) = console(Some(read.into()), std::io::pipe().unwrap().1.into());
    let sent: Vec<u8> = (0..1000).map(|n| u8::try_from(n % 251).unwrap()).collect();
    write.write_all(&sent).unwrap();
    assert_eq!((settle(&mut events), typed(&serial)), (0, vec![]), "no guest, no input");
    serial.open_input();
    let mut heard = Vec::new();
    while heard.len() < sent.len() {
        assert!(settle(&mut events) <= 10, "a full FIFO is waited for, not polled");
        heard.extend(typed(&serial));
    }
    assert_eq!(heard, sent);
    write.write_all(b"more").unwrap();
    settle(&mut events);
    assert_eq!(typed(&serial), b"more");
}

#[test]
fn a_typist_who_types_nothing_never_holds_the_loop() {
    let (read, _write) = std::io::pipe().unwrap();
    let (mut events, _ring, serial) = console(Some(read.into()), std::io::pipe().unwrap().1.into());
    let (done, is_done) = std::sync::mpsc::channel();
    // The guest says that it has room, and the loop looks for input.
    serial.open_input();
    thread::spawn(move || {
        settle(&mut events);
        let _ = done.send(());
    });
    is_done
        .recv_timeout(Duration::from_secs(30))
        .expect("the loop waits for the typist");
}

#[test]
fn the_end_of_input_does_not_spin_the_loop() {
    let (read, mut write) = std::io::pipe().unwrap();
    let (mut events, _ring, serial) = console(Some(read.into()), std::io::pipe().unwrap().1.into());
    serial.open_input();
    write.write_all(b"bye").unwrap();
    drop(write);
    assert!(settle(&mut events) <= 5);
    assert_eq!(typed(&serial), b"bye");
    assert!(settle(&mut events) <= 5);
    assert_eq!(settle(&mut events), 0);
}

#[test]
fn input_and_output_may_be_regular_files() {
    let script = crate::testing::TempFile::new(&[b'k'; 500]);
    let log = crate::testing::TempFile::new(b"kept ");
    let output = File::options().append(true).open(log.path()).unwrap();
    let (mut events, ring, serial) = console(Some(File::open(script.path()).unwrap().into()), output.into());
    serial.open_input();
    let mut heard = Vec::new();
    for _ in 0..20 {
        assert!(settle(&mut events) <= 10);
        heard.extend(typed(&serial));
    }
    assert_eq!(heard, [b'k'; 500]);
    b"words".iter().for_each(|&byte| ring.push(byte));
    settle(&mut events);
    assert_eq!(std::fs::read(log.path()).unwrap(), b"kept words");
}

#[test]
fn last_words_wait_for_a_reader_but_not_for_ever() {
    let (mut read, write) = std::io::pipe().unwrap();
    let ring = Arc::new(OutputRing::new().unwrap());
    let serial = Arc::new(SerialPort::new(Arc::clone(&ring)).unwrap());
    let mut io = ConsoleIo::new(
        Console::Files {
            input: None,
            output: write.into(),
        },
        Arc::clone(&ring),
        serial,
        Redirect::default(),
    )
    .unwrap();
    (0..CAPACITY * 2).for_each(|_| ring.push(b'x'));
    let begin = Instant::now();
    io.last_words();
    // That it came back shows the other half.
    assert!(begin.elapsed() >= LAST_WORDS, "{:?}", begin.elapsed());
    let reader = thread::spawn(move || {
        let mut all = Vec::new();
        read.read_to_end(&mut all).unwrap();
        all.len()
    });
    io.last_words();
    drop(io);
    assert_eq!(reader.join().unwrap(), CAPACITY * 2);
}

#[test]
fn a_guest_that_never_stops_talking_does_not_hold_the_loop() {
    let (mut events, ring, _serial) = console(None, File::options().write(true).open("/dev/null").unwrap().into());
    let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let vcpu = thread::spawn({
        let stop = Arc::clone(&stop);
        move || {
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                ring.wait_for_room();
                ring.push(b'x');
            }
        }
    });
    for _ in 0..100 {
        events.run_with_timeout(1000).unwrap();
    }
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    // It may be waiting for room.
    settle(&mut events);
    vcpu.join().unwrap();
}

#[test]
fn output_goes_where_the_machine_says_and_what_exceeds_its_limit_is_lost() {
    let file = crate::testing::TempFile::new(b"");
    let serial: Serial = serde_json::from_value(serde_json::json!({
        "serial_out_path": file.path(), "rate_limiter": { "size": 128, "refill_time": 3_600_000 }
    }))
    .unwrap();
    let ring = Arc::new(OutputRing::new().unwrap());
    let port = Arc::new(SerialPort::new(Arc::clone(&ring)).unwrap());
    let redirect = Redirect::default();
    let mut io = ConsoleIo::new(Console::None, Arc::clone(&ring), port, Arc::clone(&redirect)).unwrap();
    *redirect.lock().unwrap() = Some(Output::open(&serial).unwrap());
    (0..200).for_each(|byte| ring.push(byte));
    assert!(!io.write(), "nothing is left to be written");
    // The bucket holds two pieces of 64 bytes, and an hour is longer than this test.
    assert_eq!(std::fs::read(file.path()).unwrap(), (0..128).collect::<Vec<u8>>());
}

#[test]
fn a_fifo_that_nobody_reads_loses_output_and_holds_nobody_up() {
    let file = crate::testing::TempFile::new(b"");
    std::fs::remove_file(file.path()).unwrap();
    rustix::fs::mkfifoat(rustix::fs::CWD, file.path(), Mode::RUSR | Mode::WUSR).unwrap();
    let serial = Serial {
        serial_out_path: Some(file.path().to_owned()),
        rate_limiter: None,
    };
    let ring = Arc::new(OutputRing::new().unwrap());
    let port = Arc::new(SerialPort::new(Arc::clone(&ring)).unwrap());
    let redirect = Redirect::default();
    let mut io = ConsoleIo::new(Console::None, Arc::clone(&ring), port, Arc::clone(&redirect)).unwrap();
    *redirect.lock().unwrap() = Some(Output::open(&serial).unwrap());
    // A pipe holds 64 KiB unless told otherwise (pipe(7)).
    for _ in 0..4 {
        (0..60_000).for_each(|_| ring.push(b'x'));
        assert!(!io.write());
    }
}
