use std::sync::Mutex;
use std::sync::atomic::Ordering;

use super::*;
use crate::devices::virtio::Shared;
use crate::devices::virtio::hostile::{self, Dice};
use crate::devices::virtio::testing::{BUFFERS, Buffer, Driver, MEMORY_MIB, STATUS, for_driver, from_driver};

const PAGE_U64: u64 = PAGE as u64;
/// Where the driver keeps what it says; the pages it does without begin a MiB behind.
const SAYS: u64 = BUFFERS;
const PAGES: u64 = BUFFERS + (1 << 20);

fn all() -> config::Balloon {
    config::Balloon {
        amount_mib: 1,
        deflate_on_oom: true,
        // Longer than any test.
        stats_polling_interval_s: 3600,
        free_page_hinting: true,
        free_page_reporting: true,
    }
}

struct Setup {
    balloon: Arc<Mutex<Balloon>>,
    driver: Driver,
}

impl Setup {
    fn new() -> Self {
        Self::with(&all(), u64::MAX)
    }

    fn with(config: &config::Balloon, features: u64) -> Self {
        let balloon = Arc::new(Mutex::new(Balloon::new(config).unwrap()));
        let mut driver = Driver::start(balloon.clone(), features);
        driver.turn(10);
        Self { balloon, driver }
    }

    fn ask<T>(&self, request: impl FnOnce(&mut Balloon) -> T) -> T {
        request(&mut self.balloon.lock().unwrap())
    }

    fn metric(&self, which: impl Fn(&BalloonMetrics) -> &AtomicU64) -> u64 {
        self.ask(|balloon| which(balloon.metrics()).load(Ordering::Relaxed))
    }

    /// Puts a chain in and has it answered.
    fn put(&mut self, queue: usize, chain: &[Buffer]) {
        let head = self.driver.put(queue, chain);
        self.driver.notify(queue);
        self.driver.turn(10);
        assert_eq!(self.driver.used(queue), [(head.into(), 0)], "{chain:?}");
        assert!(!self.driver.needs_reset());
    }

    fn say(&self, words: &[u32]) -> Buffer {
        let bytes: Vec<_> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        self.driver.write(SAYS, &bytes);
        from_driver(SAYS, u32::try_from(bytes.len()).unwrap())
    }

    /// Fills eight pages.
    fn fill(&self) {
        self.driver.write(PAGES, &vec![0xa5; 8 * PAGE]);
    }

    /// Which of the eight pages are empty.
    fn empty(&self) -> Vec<u64> {
        let empty = |page: &u64| {
            let bytes = self.driver.read(PAGES + page * PAGE_U64, PAGE);
            let first = bytes[0];
            assert!(
                bytes.iter().all(|&byte| byte == first),
                "page {page} is half given back"
            );
            first == 0
        };
        (0..8).filter(empty).collect()
    }
}

/// The number of the `page`th of the eight.
fn number(page: u32) -> u32 {
    u32::try_from(PAGES / PAGE_U64).unwrap() + page
}

#[test]
fn pages_put_in_are_given_back_to_the_host_and_no_others() {
    let end = u32::try_from((MEMORY_MIB << 20) / PAGE).unwrap();
    let table = [
        (vec![number(3)], vec![3]),
        (vec![number(2), number(1), number(0)], vec![0, 1, 2]),
        (vec![number(7), number(5), number(7), number(5)], vec![5, 7]),
        (vec![], vec![]),
        // Outside of memory: just so, far, and as far as can be said.
        (vec![end, 0x000c_0000, u32::MAX, number(6)], vec![6]),
    ];
    let mut setup = Setup::new();
    for (numbers, expected) in table {
        setup.fill();
        let says = setup.say(&numbers);
        setup.put(0, &[says]);
        assert_eq!(setup.empty(), expected, "{numbers:?}");
        assert!(setup.driver.interrupted());
    }
    assert_eq!(setup.metric(|metrics| &metrics.inflate_count), 5);
    assert_eq!(setup.metric(|metrics| &metrics.event_fails), 0);
}

#[test]
fn half_a_page_number_and_more_of_them_than_linux_puts_in_are_left_out() {
    let mut setup = Setup::new();
    setup.fill();
    let mut numbers = vec![number(0); 255];
    numbers.extend([number(1), number(2)]);
    let says = setup.say(&numbers);
    setup.put(0, &[says]);
    assert_eq!(setup.empty(), [0, 1]);
    let says = setup.say(&[number(3), number(4)]);
    setup.put(0, &[from_driver(says.at, 7)]);
    assert_eq!(setup.empty(), [0, 1, 3]);
    // What the device is to write says nothing.
    setup.put(0, &[for_driver(says.at, 8)]);
    assert_eq!(setup.empty(), [0, 1, 3]);
}

#[test]
fn pages_taken_out_are_only_answered() {
    let mut setup = Setup::new();
    setup.fill();
    let says = setup.say(&[number(0)]);
    setup.put(1, &[says]);
    assert_eq!(setup.empty(), [0; 0]);
    assert_eq!(setup.metric(|metrics| &metrics.deflate_count), 1);
}

#[test]
fn a_full_queue_is_served_in_turns() {
    let mut setup = Setup::new();
    let says = setup.say(&[number(0); 256]);
    for _ in 0..256 {
        setup.driver.put(0, &[says]);
    }
    setup.driver.notify(0);
    // 2048 pages a turn are 8 chains; the last turn finds the queue empty.
    assert_eq!(setup.driver.turn(1000), 256 / 8 + 1);
    assert_eq!(setup.driver.used(0).len(), 256);
}

#[test]
fn reported_pages_are_given_back_before_the_driver_gets_them() {
    let mut setup = Setup::new();
    setup.fill();
    let pieces = [
        for_driver(PAGES, 2 * 4096),
        for_driver(PAGES + 4 * PAGE_U64 + 1, 2 * 4096),
        for_driver(PAGES + 7 * PAGE_U64, 4096),
    ];
    setup.put(4, &pieces);
    assert_eq!(setup.empty(), [0, 1, 5, 7]);
    assert_eq!(setup.metric(|metrics| &metrics.free_page_report_count), 3);
    assert_eq!(setup.metric(|metrics| &metrics.free_page_report_freed), 4 * PAGE_U64);
}

#[test]
fn hinted_pages_are_given_back_in_a_run_and_not_outside_of_one() {
    let mut setup = Setup::new();
    let pages = |page: u64| [for_driver(PAGES + page * PAGE_U64, 4096)];
    let command_id = |setup: &Setup| u32::from_le_bytes(setup.driver.config(8));
    setup.fill();
    setup.put(3, &pages(0));
    assert_eq!(setup.empty(), [0; 0], "no run");

    setup
        .ask(|balloon| balloon.start_hinting(HintingStart::default()))
        .unwrap();
    assert!(setup.driver.interrupted());
    assert_eq!(command_id(&setup), 2);
    setup.put(3, &pages(1));
    assert_eq!(setup.empty(), [0; 0], "no answer");
    let says = setup.say(&[2]);
    setup.put(3, &[says]);
    setup.put(3, &pages(2));
    // Four bytes to write are pages, if few; only what is to be read is a command.
    setup.put(3, &[for_driver(PAGES, 4)]);
    setup.put(3, &pages(3));
    assert_eq!(setup.empty(), [2, 3]);
    let status = setup.ask(|balloon| balloon.hinting_status()).unwrap();
    assert_eq!((status.host_cmd, status.guest_cmd), (2, Some(2)));

    let says = setup.say(&[0]);
    setup.put(3, &[says]);
    assert_eq!(command_id(&setup), 1, "done by itself");
    setup.put(3, &pages(4));
    assert_eq!(setup.empty(), [2, 3], "the run is over");

    let by_request = HintingStart {
        acknowledge_on_stop: false,
    };
    setup.ask(|balloon| balloon.start_hinting(by_request)).unwrap();
    let says = setup.say(&[3]);
    setup.put(3, &[says]);
    let says = setup.say(&[0]);
    setup.put(3, &[says]);
    assert_eq!(command_id(&setup), 3, "not done before the request");
    setup.ask(Balloon::stop_hinting).unwrap();
    let status = setup.ask(|balloon| balloon.hinting_status()).unwrap();
    assert_eq!(
        serde_json::to_value(status).unwrap(),
        serde_json::json!({ "host_cmd": 1, "guest_cmd": 0 })
    );
    assert_eq!(setup.metric(|metrics| &metrics.free_page_hint_freed), 2 * PAGE_U64);
}

fn stat(tag: u16, value: u64) -> Vec<u8> {
    [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat()
}

#[test]
fn statistics_are_asked_for_at_each_interval_and_kept() {
    let mut setup = Setup::new();
    let tell = |setup: &mut Setup, bytes: &[u8]| {
        setup.driver.write(SAYS, bytes);
        let chain = [from_driver(SAYS, u32::try_from(bytes.len()).unwrap())];
        let head = setup.driver.put(2, &chain);
        setup.driver.notify(2);
        setup.driver.turn(10);
        head
    };
    let first = tell(&mut setup, &[stat(0, 7), stat(99, 1), stat(4, 1 << 33)].concat());
    assert_eq!(setup.driver.used(2), [], "the chain stays until the interval is over");
    let stats = setup.ask(|balloon| balloon.stats()).unwrap();
    let expected = serde_json::json!({
        "target_pages": 256, "actual_pages": 0, "target_mib": 1, "actual_mib": 0,
        "swap_in": 7, "free_memory": 1u64 << 33,
    });
    assert_eq!(serde_json::to_value(stats).unwrap(), expected);
    assert_eq!(setup.metric(|metrics| &metrics.stats_update_fails), 1, "tag 99");

    // A change of the interval asks at once, and then at each.
    setup.ask(|balloon| balloon.update_stats_interval(1)).unwrap();
    assert_eq!(setup.driver.used(2), [(first.into(), 0)]);
    let second = tell(&mut setup, &stat(0, 8));
    while setup.driver.used(2) != [(second.into(), 0)] {
        assert!(
            setup.driver.turn_for(1, Duration::from_secs(60)) > 0,
            "the timer never came"
        );
    }
    setup.ask(|balloon| balloon.update_stats_interval(3600)).unwrap();
    let every: Vec<_> = (0..16).flat_map(|tag| stat(tag, u64::from(tag) + 100)).collect();
    tell(&mut setup, &every);
    setup.driver.transport.write(0x104, &300u32.to_le_bytes());
    let stats = setup.ask(|balloon| balloon.stats()).unwrap();
    let expected = serde_json::json!({
        "target_pages": 256, "actual_pages": 300, "target_mib": 1, "actual_mib": 1,
        "swap_in": 100, "swap_out": 101, "major_faults": 102, "minor_faults": 103, "free_memory": 104,
        "total_memory": 105, "available_memory": 106, "disk_caches": 107, "hugetlb_allocations": 108,
        "hugetlb_failures": 109, "oom_kill": 110, "alloc_stall": 111, "async_scan": 112, "direct_scan": 113,
        "async_reclaim": 114, "direct_reclaim": 115,
    });
    assert_eq!(serde_json::to_value(stats).unwrap(), expected);

    // One more than there should be: the one before goes back. Too long, or cut short: kept, and not made sense of.
    let fails = setup.metric(|metrics| &metrics.stats_update_fails);
    tell(&mut setup, &stat(0, 1)[..9]);
    tell(&mut setup, &[0; 2561]);
    assert_eq!(setup.driver.used(2).len(), 2);
    assert_eq!(setup.metric(|metrics| &metrics.stats_update_fails), fails + 2);
    assert_eq!(setup.ask(|balloon| balloon.stats()).unwrap().guest.swap_in, Some(100));
}

#[test]
fn what_is_asked_of_a_balloon_without_is_refused_in_firecrackers_words() {
    let bare = config::Balloon {
        stats_polling_interval_s: 0,
        free_page_hinting: false,
        free_page_reporting: false,
        ..all()
    };
    let words = |error: BalloonError| error.to_string();
    let setup = Setup::with(&bare, u64::MAX);
    assert_eq!(setup.ask(|balloon| balloon.config()), bare);
    assert_eq!(
        words(setup.ask(|balloon| balloon.stats().unwrap_err())),
        "Received stats query when stats are disabled."
    );
    assert_eq!(
        words(setup.ask(|balloon| balloon.update_stats_interval(1).unwrap_err())),
        "Statistics cannot be enabled/disabled after activation."
    );
    setup.ask(|balloon| balloon.update_stats_interval(0)).unwrap();
    let refused = [
        setup.ask(|balloon| balloon.start_hinting(HintingStart::default()).unwrap_err()),
        setup.ask(|balloon| balloon.stop_hinting().unwrap_err()),
        setup.ask(|balloon| balloon.hinting_status().unwrap_err()),
    ];
    for error in refused {
        assert_eq!(words(error), "Attempting to use hinting when not enabled");
    }
    let setup = Setup::new();
    assert!(setup.ask(|balloon| balloon.update_stats_interval(0)).is_err());
    assert_eq!(
        words(setup.ask(|balloon| balloon.update_amount(17).unwrap_err())),
        "Requested memory should be less than 17MiB"
    );
    let too_much = config::Balloon {
        amount_mib: u32::MAX,
        ..all()
    };
    assert_eq!(
        words(Balloon::new(&too_much).unwrap_err()),
        "Requested memory should be less than 16777215MiB"
    );
    let mut inactive = Balloon::new(&all()).unwrap();
    for refused in [
        inactive.update_amount(1).unwrap_err(),
        inactive.stop_hinting().unwrap_err(),
    ] {
        assert_eq!(words(refused), "Device not activated yet.");
    }
}

#[test]
fn a_new_amount_is_told_to_the_driver() {
    let setup = Setup::new();
    setup.driver.interrupted();
    let generation = setup.driver.get(0xfc);
    setup.ask(|balloon| balloon.update_amount(16)).unwrap();
    assert!(setup.driver.interrupted());
    assert_eq!(setup.driver.get(0x60) & 2, 2);
    assert_ne!(setup.driver.get(0xfc), generation);
    assert_eq!(u32::from_le_bytes(setup.driver.config(0)), 16 * 256);
    assert_eq!(setup.ask(|balloon| balloon.config()).amount_mib, 16);
    // Only `actual` is the driver's to write.
    for offset in [0, 8, 3, 5, 12] {
        setup.driver.transport.write(0x100 + offset, &[0xff; 4]);
    }
    setup.driver.transport.write(0x104, &[1, 2]);
    assert_eq!(setup.driver.config::<12>(0)[..8], [0, 16, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn queues_of_features_that_were_not_taken_are_left_out() {
    use Role::{Deflate, Hinting, Inflate, Reporting, Stats};
    let table = [
        (0, vec![Inflate, Deflate]),
        (F_STATS_VQ, vec![Inflate, Deflate, Stats]),
        (F_REPORTING, vec![Inflate, Deflate, Reporting]),
        (
            F_FREE_PAGE_HINT | F_REPORTING,
            vec![Inflate, Deflate, Hinting, Reporting],
        ),
        (u64::MAX, vec![Inflate, Deflate, Stats, Hinting, Reporting]),
    ];
    for (features, expected) in table {
        assert_eq!(roles(features), expected);
    }
    let mut setup = Setup::with(&all(), F_REPORTING);
    setup.fill();
    setup.put(2, &[for_driver(PAGES, 4096)]);
    assert_eq!(setup.empty(), [0]);
}

#[test]
fn a_reset_forgets_the_driver_and_keeps_the_amount() {
    let mut setup = Setup::new();
    setup.driver.transport.write(0x104, &[1, 0, 0, 0]);
    setup.ask(|balloon| balloon.update_amount(8)).unwrap();
    setup.driver.write(SAYS, &stat(0, 7));
    setup.driver.put(2, &[from_driver(SAYS, 10)]);
    setup.driver.notify(2);
    setup.driver.turn(10);
    setup.driver.set(STATUS, 0);
    assert_eq!(setup.driver.config::<12>(0), [0, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    let stats = setup.ask(|balloon| balloon.stats()).unwrap();
    assert_eq!((stats.actual_pages, stats.guest.swap_in), (0, None));
    setup.driver.set_up(u64::MAX);
    setup.ask(|balloon| balloon.update_stats_interval(2)).unwrap();
    assert_eq!(
        setup.driver.used(2),
        [],
        "nothing of the last driver's is given to this one"
    );
}

/// Somebody who asks the balloon for all that there is to ask for, all the time.
struct Asked(Arc<Mutex<Balloon>>);

impl hostile::World for Asked {
    fn make(&mut self) -> Shared {
        self.0 = Arc::new(Mutex::new(Balloon::new(&all()).unwrap()));
        self.0.clone()
    }

    fn meanwhile(&mut self, dice: &mut Dice) {
        let mut balloon = self.0.lock().unwrap();
        let number = dice.pick(&[0, 1, 2, 3, 4, 5, 4096, u32::MAX]);
        // Refused where its driver is not ready, or the guest has less.
        match dice.below(6) {
            0 | 1 => drop(balloon.update_amount(number)),
            // Each is another interval: the guest is asked now.
            2 => balloon
                .update_stats_interval(1 + u16::try_from(dice.below(9000)).unwrap())
                .unwrap(),
            3 => {
                let acknowledge_on_stop = dice.once_in(2);
                drop(balloon.start_hinting(HintingStart { acknowledge_on_stop }));
            }
            4 => drop(balloon.stop_hinting()),
            _ => {
                let target = balloon.stats().unwrap().target_mib;
                assert_eq!(balloon.config().amount_mib, target);
                drop(balloon.hinting_status());
            }
        }
    }
}

#[test]
fn a_hostile_driver_harms_nobody_whatever_is_asked_of_the_balloon_meanwhile() {
    let asked = || Asked(Arc::new(Mutex::new(Balloon::new(&all()).unwrap())));
    hostile::survives(asked());
    hostile::survives_registers(asked());
}
