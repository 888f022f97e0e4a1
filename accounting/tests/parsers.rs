//! Every parser of what the kernel says, given anything: it never panics, and what it accepts says what it says by the
//! slowest reading there is.

use std::fs::File;
use std::io::Write;

use accounting::host::{CpuSet, parse_cpu_list};
use accounting::probe::{KvmCounters, KvmStats, parse_schedstat, parse_stat};
use proptest::prelude::*;
use rustix::fs::{MemfdFlags, memfd_create};

/// Texts of a running kernel, each of its own shape.
const STAT: [&str; 2] = [
    "4242 (vcpu0) R 1 4242 4242 0 -1 4194368 93 0 0 0 12 34 0 0 20 0 5 0 100 5000000 300 18446744073709551615 1 1 0 0 0 \
     0 0 4096 0 0 0 0 17 3 0 0 0 489 0 0 0 0 0 0 0 0 0\n",
    "17 (a) b (c) S 2 0 0 0 -1 69238880 0 0 0 0 0 8 0 0 20 0 1 0 7 0 0 18446744073709551615 0 0 0 0 0 0 0 2147483647 0 \
     0 0 0 17 1 0 0 0 0 0 0 0 0 0 0 0 0 0\n",
];
const SCHEDSTAT: [&str; 2] = ["374195 77 3\n", "18446744073709551615 18446744073709551615 9\n"];
const CPU_LIST: [&str; 5] = ["0-3,8\n", "0\n", "\n", "(null)\n", "1,3,5-7,64-127\n"];

/// What a byte is replaced by: what such texts are made of, or anything.
fn any_byte() -> impl Strategy<Value = u8> {
    prop_oneof![proptest::sample::select(&b"0123456789 -,)(\n+x"[..]), any::<u8>()]
}

/// One of `texts` after a few bytes of it were replaced, removed, put in, or it was cut.
fn spoilt<const N: usize>(texts: [&'static str; N]) -> impl Strategy<Value = Vec<u8>> {
    let change = (any::<prop::sample::Index>(), 0..4, any_byte());
    let changes = proptest::collection::vec(change, 0..6);
    (proptest::sample::select(texts.to_vec()), changes).prop_map(|(text, changes)| {
        let mut text = text.as_bytes().to_vec();
        for (at, what, byte) in changes {
            let at = at.index(text.len() + 1);
            match what {
                0 => text.insert(at, byte),
                1 if at < text.len() => text[at] = byte,
                2 if at < text.len() => drop(text.remove(at)),
                _ => text.truncate(at),
            }
        }
        text
    })
}

fn text_or_anything<const N: usize>(texts: [&'static str; N]) -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![4 => spoilt(texts), 1 => proptest::collection::vec(any_byte(), 0..400)]
}

/// The `n`th word of `text`, from 1; only one that has its end.
fn word(text: &[u8], n: usize) -> Option<String> {
    let end = text.iter().rposition(u8::is_ascii_whitespace)?;
    let words = text[..end]
        .split(u8::is_ascii_whitespace)
        .filter(|word| !word.is_empty());
    words.map(|word| String::from_utf8_lossy(word).into_owned()).nth(n - 1)
}

/// What `figure` reads as: leading zeros are the only other way to write it.
fn same(figure: u64, text: Option<String>) -> bool {
    text.is_some_and(|text| {
        let bare = text.trim_start_matches('0');
        !text.is_empty() && figure.to_string() == if bare.is_empty() { "0" } else { bare }
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4_000))]

    #[test]
    fn a_stat_that_is_accepted_says_so(text in text_or_anything(STAT)) {
        if let Ok(stat) = parse_stat(&text) {
            let name_end = text.iter().rposition(|&b| b == b')').expect("else it is refused");
            // What follows the name is field 3.
            let field = |n: usize| word(&text[name_end + 1..], n - 2);
            prop_assert_eq!(field(3), Some(char::from(stat.state).to_string()));
            prop_assert!(same(stat.processor.into(), field(39)));
            prop_assert!(same(stat.guest_time_clk, field(43)));
        }
    }

    #[test]
    fn a_schedstat_that_is_accepted_says_so(text in text_or_anything(SCHEDSTAT)) {
        if let Ok(run_delay) = parse_schedstat(&text) {
            prop_assert!(same(run_delay, word(&text, 2)));
        }
    }

    #[test]
    fn what_the_kernel_writes_is_read_back(
        state in proptest::sample::select(&b"RSDTtXZPI"[..]), figures in any::<(u32, u64, u64)>(), name in "[^\0]{0,15}",
    ) {
        let (cpu, guest, delay) = figures;
        let zeros = "0 ".repeat(35);
        let text = format!("7 ({name}) {} {zeros}{cpu} 0 0 0 {guest} 0\n", char::from(state));
        let stat = parse_stat(text.as_bytes()).expect("well-formed");
        prop_assert_eq!((stat.state, stat.processor, stat.guest_time_clk), (state, cpu, guest));
        prop_assert_eq!(parse_schedstat(format!("{guest} {delay} {cpu}\n").as_bytes()), Ok(delay));
    }

    #[test]
    fn a_cpu_list_that_is_accepted_says_so(text in text_or_anything(CPU_LIST)) {
        let text = String::from_utf8_lossy(&text);
        if let Ok(set) = parse_cpu_list(&text) {
            // Every number in the text is in the set, and what is in the set is a number in it or between two.
            let numbers: CpuSet = text.split(|c: char| !c.is_ascii_digit()).filter_map(|n| n.parse().ok()).collect();
            prop_assert!(numbers.is_subset(&set), "{:?} of {:?}", set, text);
            prop_assert_eq!((numbers.first(), numbers.last()), (set.first(), set.last()));
            prop_assert!(text.contains('-') || numbers == set);
        }
    }

    #[test]
    fn a_cpu_list_is_read_back(set in proptest::collection::btree_set(0u32..300, 0..40)) {
        // As the kernel prints it: ranges where there are any (lib/bitmap.c, bitmap_print_list).
        let mut ranges: Vec<(u32, u32)> = Vec::new();
        for &cpu in &set {
            match ranges.last_mut() {
                Some((_, last)) if *last + 1 == cpu => *last = cpu,
                _ => ranges.push((cpu, cpu)),
            }
        }
        let range = |(first, last): (u32, u32)| if first == last { first.to_string() } else { format!("{first}-{last}") };
        let text = ranges.into_iter().map(range).collect::<Vec<_>>().join(",") + "\n";
        prop_assert_eq!(parse_cpu_list(&text), Ok(set));
    }

    #[test]
    fn statistics_that_are_anything_are_read_or_refused(
        bytes in prop_oneof![
            proptest::collection::vec(any::<u8>(), 0..300),
            (any_statistics(), proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8)).prop_map(
                |(statistics, spoils)| {
                    let mut bytes = file_of(&statistics);
                    for (at, byte) in spoils {
                        let at = at.index(bytes.len());
                        bytes[at] = byte;
                    }
                    bytes
                }),
            (any_statistics(), any::<prop::sample::Index>()).prop_map(|(statistics, at)| {
                let mut bytes = file_of(&statistics);
                bytes.truncate(at.index(bytes.len()));
                bytes
            }),
        ],
    ) {
        // No claim on the figures: a spoilt figure is a figure. That neither call panics is the test.
        let _ = KvmStats::open(memory(&bytes)).and_then(|mut stats| stats.read());
    }

    #[test]
    fn statistics_are_read_back_wherever_they_are(statistics in any_statistics()) {
        let value = |name: &str| statistics.iter().find(|s| s.name == name).map(|s| s.value);
        let (success, fail) = (value("halt_poll_success_ns"), value("halt_poll_fail_ns"));
        let expected = KvmCounters {
            halt_wait_ns: value("halt_wait_ns"),
            halt_poll_ns: success.or(fail).map(|_| success.unwrap_or(0).saturating_add(fail.unwrap_or(0))),
            blocking: value("blocking").map(|v| v != 0),
        };
        let mut stats = KvmStats::open(memory(&file_of(&statistics))).expect("well-formed");
        let read = stats.read().expect("well-formed");
        prop_assert_eq!(
            (read.halt_wait_ns, read.halt_poll_ns, read.blocking),
            (expected.halt_wait_ns, expected.halt_poll_ns, expected.blocking)
        );
    }
}

#[derive(Clone, Debug)]
struct Statistic {
    name: &'static str,
    value: u64,
}

/// Some of the statistics a kernel may have, in any order.
fn any_statistics() -> impl Strategy<Value = Vec<Statistic>> {
    const NAMES: [&str; 6] = [
        "exits",
        "halt_poll_success_ns",
        "halt_wait_ns",
        "blocking",
        "halt_poll_fail_ns",
        "halt_wait_hist",
    ];
    let names = proptest::sample::subsequence(NAMES.to_vec(), 0..=NAMES.len()).prop_shuffle();
    (names, any::<[u64; NAMES.len()]>()).prop_map(|(names, values)| {
        names
            .into_iter()
            .zip(values)
            .map(|(name, value)| Statistic { name, value })
            .collect()
    })
}

/// The file `KVM_GET_STATS_FD` would give (Documentation/virt/kvm/api.rst, section 4.133).
fn file_of(statistics: &[Statistic]) -> Vec<u8> {
    const NAME: u32 = 48;
    let count = u32::try_from(statistics.len()).expect("few");
    let (header, descriptor) = (24, 16 + NAME);
    let (descriptors_at, data_at) = (header + NAME, header + NAME + count * descriptor);
    let mut bytes = Vec::new();
    for word in [0, NAME, count, header, descriptors_at, data_at] {
        bytes.extend(word.to_ne_bytes());
    }
    bytes.resize(descriptors_at as usize, b'i');
    for (i, statistic) in (0u32..).zip(statistics) {
        // Seconds to the power of ten -9, or no unit.
        let (flags, exponent) = if statistic.name.ends_with("_ns") {
            (2u32 << 4, -9i16)
        } else {
            (0, 0)
        };
        bytes.extend(flags.to_ne_bytes());
        bytes.extend(exponent.to_ne_bytes());
        bytes.extend(1u16.to_ne_bytes());
        bytes.extend((8 * i).to_ne_bytes());
        bytes.extend(0u32.to_ne_bytes());
        let mut name = statistic.name.as_bytes().to_vec();
        name.resize(NAME as usize, 0);
        bytes.extend(name);
    }
    bytes.extend(statistics.iter().flat_map(|statistic| statistic.value.to_ne_bytes()));
    bytes
}

/// A file of these bytes that is nowhere.
fn memory(bytes: &[u8]) -> File {
    let mut file = File::from(memfd_create("statistics", MemfdFlags::CLOEXEC).expect("memory"));
    file.write_all(bytes).expect("memory");
    file
}
