//! The page: what all sockets answered as one text, and the exporter's own metrics.
//!
//! Each family is written once, with the samples of all sockets under it; a sample keeps its text and gains a label `socket` in
//! front of its others. So the figures stay what the microVM wrote, digit for digit.

use std::time::{Duration, Instant, SystemTime};

use super::memory::{Asked, Memory, Standing};
use super::parse::{self, Metrics};
use super::process;
use crate::prometheus::text::{self, Family, Kind, Label, Seconds, Text};
use crate::prometheus::vcpus::FAMILIES;

/// The label that tells microVMs apart: two of them may have the same id.
pub(super) const SOCKET: &str = "socket";

const fn gauge(name: &'static str, help: &'static str) -> Family {
    let kind = Kind::Gauge;
    Family { name, kind, help }
}

const fn counter(name: &'static str, help: &'static str) -> Family {
    let kind = Kind::Counter;
    Family { name, kind, help }
}

const UP: Family = gauge(
    "chronovisor_up",
    "1 if the microVM's figures are in this scrape, 0 if it did not answer in time, or has gone.",
);
const AGE: Family = gauge(
    "chronovisor_last_good_scrape_age_seconds",
    "Time since the microVM last answered; not there if it never has.",
);
const TOOK: Family = gauge(
    "chronovisor_scrape_duration_seconds",
    "How long the microVM took to answer, or the exporter to give up.",
);
const BUILD: Family = gauge(
    "chronovisor_exporter_build_info",
    "Which program the exporter is; always 1.",
);
const SOCKETS: Family = gauge(
    "chronovisor_exporter_sockets",
    "Sockets by how they stand: up, down, gone, or foreign, where another program than a microVM answers.",
);
const UNREADABLE: Family = gauge(
    "chronovisor_exporter_unreadable_directories",
    "Directories in which the exporter may not look for sockets.",
);
const FAILURES: Family = counter(
    "chronovisor_exporter_failures_total",
    "Sockets without an answer, or with one that is no microVM's, by reason.",
);
const SCRAPES: Family = counter(
    "chronovisor_exporter_scrapes_total",
    "Scrapes of all sockets, this one included.",
);
const SCRAPE: Family = gauge(
    "chronovisor_exporter_scrape_duration_seconds",
    "How long this scrape of all sockets took.",
);

/// What is the exporter's to say.
#[derive(Clone, Copy, Debug)]
pub(super) struct Own {
    pub unreadable: usize,
    pub scrapes: u64,
    pub took: Duration,
    pub begun: SystemTime,
}

/// Whether a family is the exporter's, which no microVM may have.
pub(super) fn is_own(name: &str) -> bool {
    name.starts_with("chronovisor_exporter_") || [UP, AGE, TOOK].iter().any(|family| family.name == name)
}

/// A family as all microVMs have it.
struct Merged<'a> {
    name: &'a str,
    kind: Kind,
    help: &'a str,
    /// Of each socket that has it: the label, as text, and the samples.
    parts: Vec<(&'a str, &'a str)>,
}

/// The text.
pub(super) fn write(memory: &Memory, asked: &[Asked<Metrics>], own: &Own) -> String {
    let labels: Vec<String> = asked.iter().map(|one| text::label(SOCKET, &one.socket)).collect();
    let good = || {
        let both = asked.iter().zip(&labels);
        both.filter_map(|(one, label)| Some((one.answer.as_ref().ok()?, label.as_str())))
    };
    // Half of a line, and the label: what is shorter grows once.
    let room = good().map(|(metrics, label)| metrics.size() + metrics.size() / 80 * label.len());
    let mut text = Text::with_capacity(room.sum::<usize>() + (4 << 10) + asked.len() * 3 * 160);
    write_own(&mut text, memory, own);
    for family in merge(good()) {
        text.begin(family.name, family.kind.name(), family.help);
        for (label, samples) in family.parts {
            for (name, rest) in parse::cut(samples) {
                let (open, rest) = match rest.strip_prefix('{') {
                    Some(rest) => (",", rest),
                    None => ("}", rest),
                };
                for part in [name, "{", label, open, rest] {
                    text.raw(part);
                }
            }
        }
    }
    text.finish()
}

/// The families in the order in which this program writes its own; those it does not know follow. One of these that two
/// microVMs take for different types is the first one's: the format has one TYPE for a name.
fn merge<'a>(good: impl Iterator<Item = (&'a Metrics, &'a str)>) -> Vec<Merged<'a>> {
    let known = |family: &Family| Merged {
        name: family.name,
        kind: family.kind,
        help: family.help,
        parts: Vec::new(),
    };
    let mut merged: Vec<Merged> = FAMILIES.iter().map(known).collect();
    for (metrics, label) in good {
        for family in metrics.families() {
            let part = (label, family.samples);
            match merged.iter_mut().find(|known| known.name == family.name) {
                Some(known) if known.kind == family.kind => known.parts.push(part),
                Some(known) => tracing::debug!("{label}: left out: its {} is of another type", known.name),
                None => merged.push(Merged {
                    name: family.name,
                    kind: family.kind,
                    help: family.help,
                    parts: vec![part],
                }),
            }
        }
    }
    merged.retain(|family| !family.parts.is_empty());
    merged
}

fn write_own(text: &mut Text, memory: &Memory, own: &Own) {
    let now = Instant::now();
    // A socket that was never a microVM's is counted, and else not spoken of.
    let microvms = || {
        memory
            .sockets()
            .filter(|(_, known)| known.standing != Standing::Foreign)
    };
    text.family(&UP);
    for (socket, known) in microvms() {
        let up = u8::from(known.standing == Standing::Up);
        text.sample(UP.name, "", &[(SOCKET, &socket)], up);
    }
    text.family(&AGE);
    for (socket, known) in microvms() {
        if let Some(good) = known.good {
            let age = match known.standing {
                Standing::Up => Duration::ZERO,
                _ => now.saturating_duration_since(good),
            };
            text.sample(AGE.name, "", &[(SOCKET, &socket)], seconds(age));
        }
    }
    text.family(&TOOK);
    for (socket, known) in microvms().filter(|(_, known)| known.standing != Standing::Gone) {
        text.sample(TOOK.name, "", &[(SOCKET, &socket)], seconds(known.took));
    }
    text.family(&BUILD);
    text.sample(BUILD.name, "", &[("version", &env!("CARGO_PKG_VERSION"))], 1);
    text.family(&SOCKETS);
    for standing in Standing::ALL {
        let count = memory.sockets().filter(|(_, known)| known.standing == standing).count();
        text.sample(SOCKETS.name, "", &[("state", &standing.name())], count);
    }
    one(text, &UNREADABLE, own.unreadable);
    text.family(&FAILURES);
    for (reason, count) in memory.failures() {
        let labels: [Label; 1] = [("reason", &reason)];
        text.sample(FAILURES.name, "", &labels, count);
    }
    one(text, &SCRAPES, own.scrapes);
    one(text, &SCRAPE, seconds(own.took));
    process::write(text, own.begun);
}

/// A family of one sample.
pub(super) fn one(text: &mut Text, family: &Family, value: impl std::fmt::Display) {
    text.family(family);
    text.sample(family.name, "", &[], value);
}

pub(super) fn seconds(time: Duration) -> Seconds {
    Seconds(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::super::scrape::Failure;
    use super::*;

    const GOLDEN: &str = include_str!("../prometheus/golden.txt");

    fn asked(socket: &str, answer: Result<&str, Failure>) -> Asked<Metrics> {
        Asked {
            socket: socket.to_owned(),
            took: Duration::from_millis(1),
            answer: answer.map(|text| Metrics::parse(text.to_owned()).unwrap()),
        }
    }

    fn page(asked: &[Asked<Metrics>]) -> String {
        let mut memory = Memory::new(Duration::from_secs(60));
        memory.note(Instant::now(), asked);
        let own = Own {
            unreadable: 0,
            scrapes: 1,
            took: Duration::from_millis(2),
            begun: SystemTime::UNIX_EPOCH,
        };
        write(&memory, asked, &own)
    }

    #[test]
    fn two_microvms_of_one_id_are_told_apart_and_their_families_are_one() {
        let text = page(&[
            asked("/run/a\"\\.socket", Ok(GOLDEN)),
            asked("/run/b.socket", Ok(GOLDEN)),
        ]);
        for family in FAMILIES {
            let head = format!(
                "# HELP {} {}\n# TYPE {} {}\n",
                family.name,
                family.help,
                family.name,
                family.kind.name()
            );
            assert_eq!(text.matches(&head).count(), 1, "{head}");
            assert_eq!(text.matches(&format!("# TYPE {} ", family.name)).count(), 1, "{head}");
        }
        let [a, b] = [r#"/run/a\"\\.socket"#, "/run/b.socket"];
        let both = format!(
            "counter\nchronovisor_vcpu_gtime_seconds_total{{socket=\"{a}\",id=\"vm-1\",vcpu=\"0\"}} 4.890000000\n\
             chronovisor_vcpu_gtime_seconds_total{{socket=\"{b}\",id=\"vm-1\",vcpu=\"0\"}} 4.890000000\n# HELP"
        );
        assert!(text.contains(&both), "{text}");
        let samples = |text: &str| text.lines().filter(|line| line.contains("vm-1")).count();
        assert_eq!(samples(&text), 2 * samples(GOLDEN));
    }

    #[test]
    fn nothing_of_a_socket_is_lost_but_its_label_is_added() {
        let text = page(&[asked("/s", Ok(GOLDEN))]);
        let without = text.replace("socket=\"/s\",", "");
        let begin = without.find("# HELP chronovisor_build_info").unwrap();
        assert_eq!(&without[begin..], GOLDEN);
        let bare = "# HELP chronovisor_build_info B.\n# TYPE chronovisor_build_info gauge\nchronovisor_build_info 1\n";
        assert!(page(&[asked("/s", Ok(bare))]).ends_with("\nchronovisor_build_info{socket=\"/s\"} 1\n"));
    }

    #[test]
    fn who_does_not_answer_is_down_and_who_is_another_program_is_only_counted() {
        let teapot = Failure::Status(hyper::StatusCode::IM_A_TEAPOT);
        let text = page(&[
            asked("/bad", Err(Failure::Timeout)),
            asked("/good", Ok(GOLDEN)),
            asked("/other", Err(teapot)),
        ]);
        for line in [
            "chronovisor_up{socket=\"/bad\"} 0",
            "chronovisor_up{socket=\"/good\"} 1",
            "chronovisor_last_good_scrape_age_seconds{socket=\"/good\"} 0",
            "chronovisor_exporter_sockets{state=\"foreign\"} 1",
            "chronovisor_exporter_failures_total{reason=\"timeout\"} 1",
            "chronovisor_exporter_failures_total{reason=\"status\"} 1",
        ] {
            assert!(text.lines().any(|is| is == line), "{line}:\n{text}");
        }
        assert!(
            !text.contains("/other") && !text.contains("age_seconds{socket=\"/bad\"}"),
            "{text}"
        );
    }

    #[test]
    fn of_a_family_that_is_not_known_here_the_first_type_counts() {
        let with = |kind: &str| {
            format!("{GOLDEN}# HELP chronovisor_new N.\n# TYPE chronovisor_new {kind}\nchronovisor_new 1\n")
        };
        let text = page(&[asked("/a", Ok(&with("gauge"))), asked("/b", Ok(&with("counter")))]);
        assert!(
            text.ends_with("# TYPE chronovisor_new gauge\nchronovisor_new{socket=\"/a\"} 1\n"),
            "{text}"
        );
    }

    #[test]
    fn a_machine_without_microvms_has_a_page_too() {
        let text = page(&[]);
        assert!(
            text.contains("chronovisor_exporter_sockets{state=\"up\"} 0\n"),
            "{text}"
        );
        assert!(text.lines().all(|line| !line.contains("socket=")), "{text}");
    }
}
