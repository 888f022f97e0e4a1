//! What is on the screen, and what becomes of it when a reading comes, a key is pressed or time passes. Nothing here reads a
//! clock, a socket or a terminal: whoever calls says what happened, and when.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use accounting::Reading;
use accounting::reading::Mode;

use super::keys::Command;
use crate::figures::Grown;

/// The intervals to choose from, in milliseconds.
const INTERVALS_MS: [u64; 9] = [100, 200, 500, 1_000, 2_000, 5_000, 10_000, 30_000, 60_000];

/// How many shares of guest time are kept of a vCPU: more than a trend is wide.
const TREND: usize = 64;

/// A microVM that has not answered for this long, and for two intervals, is said to be silent.
const SILENCE: Duration = Duration::from_secs(2);

/// How long one that has ended is still shown, so that its last figures can be read.
const FAREWELL: Duration = Duration::from_secs(5);

/// What happened to a microVM's socket.
#[derive(Clone, Debug)]
pub enum Answer {
    /// It answered.
    Readings {
        /// Its `--id`.
        id: String,
        /// One for each vCPU; none before the start.
        readings: Vec<Reading>,
    },
    /// It did not, and this is why.
    Nothing(String),
}

/// How a microVM is doing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Health {
    /// Nothing was heard of it yet.
    New,
    /// It answers.
    Well,
    /// It has not answered for some time.
    Silent(Duration),
    /// Why its last answer was none.
    Failed(String),
    /// Its socket has gone.
    Ended,
}

/// A microVM.
#[derive(Clone, Debug)]
pub struct Vm {
    /// Its socket.
    pub socket: PathBuf,
    /// What it is called.
    pub name: String,
    /// Its vCPUs, by their index.
    pub vcpus: Vec<Vcpu>,
    answered: Option<Instant>,
    failed: Option<String>,
    gone: Option<Instant>,
}

/// A vCPU.
#[derive(Clone, Debug)]
pub struct Vcpu {
    /// Its last reading.
    pub reading: Reading,
    /// What its figures grew by since the reading before that, or since its first stamp.
    pub grown: Grown,
    /// Whether `grown` is since its first stamp.
    pub from_start: bool,
    /// Its guest's share of each interval in per cent, the last one last.
    pub trend: VecDeque<u8>,
}

impl Vcpu {
    fn new(reading: Reading) -> Self {
        Self {
            grown: Grown::between(None, &reading),
            reading,
            from_start: true,
            trend: VecDeque::new(),
        }
    }

    fn see(&mut self, reading: Reading) {
        if reading.tid != self.reading.tid || reading.elapsed_ns < self.reading.elapsed_ns {
            // Another microVM, at the same socket.
            *self = Self::new(reading);
            return;
        }
        self.grown = Grown::between(Some(&self.reading), &reading);
        self.from_start = false;
        self.reading = reading;
        let share = self.grown.mode_ns(Mode::Guest) * 100 / self.grown.elapsed_ns().max(1);
        self.trend.push_back(u8::try_from(share).unwrap_or(100));
        if self.trend.len() > TREND {
            self.trend.pop_front();
        }
    }
}

impl Vm {
    fn new(socket: &Path) -> Self {
        let name = socket.file_stem().unwrap_or(socket.as_os_str());
        Self {
            socket: socket.to_owned(),
            name: name.to_string_lossy().into_owned(),
            vcpus: Vec::new(),
            answered: None,
            failed: None,
            gone: None,
        }
    }

    fn answer(&mut self, answer: Answer, now: Instant) {
        match answer {
            Answer::Readings { id, readings } => {
                if id != crate::cli::DEFAULT_ID {
                    self.name = id;
                }
                let mut before = std::mem::take(&mut self.vcpus).into_iter();
                let vcpu = |reading: Reading| match before.find(|vcpu| vcpu.reading.index == reading.index) {
                    None => Vcpu::new(reading),
                    Some(mut vcpu) => {
                        vcpu.see(reading);
                        vcpu
                    }
                };
                self.vcpus = readings.into_iter().map(vcpu).collect();
                (self.answered, self.failed, self.gone) = (Some(now), None, None);
            }
            Answer::Nothing(why) => self.failed = Some(why),
        }
    }

    fn rows(&self) -> Vec<Row<'_>> {
        match &self.vcpus[..] {
            [] => vec![Row { vm: self, vcpu: None }],
            vcpus => vcpus
                .iter()
                .map(|vcpu| Row {
                    vm: self,
                    vcpu: Some(vcpu),
                })
                .collect(),
        }
    }

    /// How it is doing, when asked every `interval`.
    #[must_use]
    pub fn health(&self, interval: Duration, now: Instant) -> Health {
        match (&self.gone, &self.failed, self.answered) {
            (Some(_), ..) => Health::Ended,
            (None, Some(why), _) => Health::Failed(why.clone()),
            (None, None, None) => Health::New,
            (None, None, Some(at)) => {
                let silent = now.saturating_duration_since(at);
                if silent < SILENCE.max(2 * interval) {
                    Health::Well
                } else {
                    Health::Silent(silent)
                }
            }
        }
    }
}

/// What rows are sorted by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Sort {
    /// By microVM and vCPU, upwards.
    #[default]
    Name,
    /// By the share of guest time, downwards; and so on.
    Guest,
    /// VMM and host kernel.
    Host,
    /// Waiting for a CPU.
    Waiting,
    /// Exits a second.
    Exits,
}

impl Sort {
    /// All of them, in the order in which they are gone through.
    pub const ALL: [Self; 5] = [Self::Name, Self::Guest, Self::Host, Self::Waiting, Self::Exits];

    /// What the title says.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Name => "name",
            Self::Guest => "guest",
            Self::Host => "host",
            Self::Waiting => "wait",
            Self::Exits => "exits",
        }
    }

    const fn other(self, by: usize) -> Self {
        Self::ALL[(self as usize + by) % Self::ALL.len()]
    }
}

/// One row: a vCPU, or a microVM that has none.
#[derive(Clone, Copy, Debug)]
pub struct Row<'a> {
    /// Whose it is.
    pub vm: &'a Vm,
    /// `None` where there is none to show.
    pub vcpu: Option<&'a Vcpu>,
}

impl Row<'_> {
    /// What it is found by when the rows have changed.
    fn key(&self) -> Key {
        (self.vm.socket.clone(), self.vcpu.map(|vcpu| vcpu.reading.index))
    }

    /// A millionth of the time, or exits a second; a microVM without vCPUs is last.
    fn rank(&self, sort: Sort) -> Option<u64> {
        let grown = &self.vcpu?.grown;
        let ns = match sort {
            Sort::Name => 0,
            Sort::Guest => grown.mode_ns(Mode::Guest),
            Sort::Host => grown.mode_ns(Mode::HostUser) + grown.mode_ns(Mode::HostKernel),
            Sort::Waiting => grown.mode_ns(Mode::Waiting),
            Sort::Exits => grown.exits,
        };
        // Intervals are not all of the same length.
        let rank = u128::from(ns) * 1_000_000_000 / u128::from(grown.elapsed_ns().max(1));
        Some(u64::try_from(rank).unwrap_or(u64::MAX))
    }
}

type Key = (PathBuf, Option<u32>);

fn intervals() -> impl DoubleEndedIterator<Item = Duration> {
    INTERVALS_MS.into_iter().map(Duration::from_millis)
}

/// All of it.
#[derive(Clone, Debug)]
pub struct State {
    /// In the order of their sockets.
    vms: Vec<Vm>,
    /// Where microVMs are looked for, in words.
    pub places: String,
    /// What cannot be looked at.
    pub unreadable: Option<String>,
    /// How often readings are made.
    pub interval: Duration,
    /// What rows are sorted by.
    pub sort: Sort,
    /// The other way round.
    pub inverted: bool,
    /// Whether what comes is not shown.
    pub frozen: bool,
    /// Whether the keys are shown.
    pub help: bool,
    /// Whether the user has had enough.
    pub over: bool,
    chosen: Option<Key>,
    /// The row that the screen begins with, and how many there are on it.
    first: usize,
    rows: usize,
}

impl State {
    /// No microVM yet.
    #[must_use]
    pub fn new(places: String, interval: Duration) -> Self {
        Self {
            vms: Vec::new(),
            places,
            unreadable: None,
            interval,
            sort: Sort::default(),
            inverted: false,
            frozen: false,
            help: false,
            over: false,
            chosen: None,
            first: 0,
            rows: 1,
        }
    }

    /// The microVMs, in the order of their sockets.
    #[must_use]
    pub fn vms(&self) -> &[Vm] {
        &self.vms
    }

    /// These are the sockets that there are.
    pub fn found(&mut self, sockets: &[PathBuf], now: Instant) {
        for vm in &mut self.vms {
            if sockets.contains(&vm.socket) {
                vm.gone = None;
            } else {
                vm.gone.get_or_insert(now);
            }
        }
        for socket in sockets {
            if let Err(at) = self.vms.binary_search_by(|vm| vm.socket.cmp(socket)) {
                self.vms.insert(at, Vm::new(socket));
            }
        }
    }

    /// This is what `socket` answered.
    pub fn answer(&mut self, socket: &Path, answer: Answer, now: Instant) {
        let Some(vm) = self.vms.iter_mut().find(|vm| vm.socket == socket) else {
            return;
        };
        match answer {
            // The figures stand still, and yet it is not silent.
            Answer::Readings { .. } if self.frozen => vm.answered = Some(now),
            answer => vm.answer(answer, now),
        }
    }

    /// Time has passed.
    pub fn pass(&mut self, now: Instant) {
        let is_over = |gone: Instant| now.saturating_duration_since(gone) >= FAREWELL;
        self.vms.retain(|vm| !vm.gone.is_some_and(is_over));
    }

    /// The rows, in their order.
    #[must_use]
    pub fn rows(&self) -> Vec<Row<'_>> {
        let mut rows: Vec<_> = self.vms.iter().flat_map(Vm::rows).collect();
        match self.sort {
            // As they are: equal names stay apart by their sockets.
            Sort::Name => rows.sort_by(|a, b| a.vm.name.cmp(&b.vm.name)),
            sort => rows.sort_by_key(|row| std::cmp::Reverse(row.rank(sort))),
        }
        if self.inverted {
            rows.reverse();
        }
        rows
    }

    /// Which of the rows is the chosen one; the first where that has gone.
    #[must_use]
    pub fn chosen(&self, rows: &[Row<'_>]) -> usize {
        let chosen = self.chosen.as_ref();
        let at = chosen.and_then(|chosen| rows.iter().position(|row| row.key() == *chosen));
        at.unwrap_or(0)
    }

    /// The first row to show where `rows` fit, such that the chosen one is among them.
    pub fn scroll(&mut self, rows: usize) -> usize {
        let all = self.rows();
        let (chosen, count) = (self.chosen(&all), all.len());
        self.rows = rows.max(1);
        self.first = self
            .first
            .min(count.saturating_sub(self.rows))
            .clamp((chosen + 1).saturating_sub(self.rows), chosen);
        self.first
    }

    /// Does what a key asks for.
    pub fn obey(&mut self, command: Command) {
        match command {
            Command::Quit => self.over = true,
            // Whatever it is, it takes the help away first.
            _ if self.help => self.help = false,
            Command::Help => self.help = true,
            Command::Up => self.choose(|at, _| at.saturating_sub(1)),
            Command::Down => self.choose(|at, _| at + 1),
            Command::PageUp => self.choose(|at, page| at.saturating_sub(page)),
            Command::PageDown => self.choose(|at, page| at + page),
            Command::First => self.choose(|_, _| 0),
            Command::Last => self.choose(|_, _| usize::MAX),
            Command::Sort(sort) => self.sort = sort,
            Command::NextSort => self.sort = self.sort.other(1),
            Command::PreviousSort => self.sort = self.sort.other(Sort::ALL.len() - 1),
            Command::Invert => self.inverted = !self.inverted,
            Command::Freeze => self.frozen = !self.frozen,
            Command::Slower => {
                let longer = intervals().find(|&other| other > self.interval);
                self.interval = longer.unwrap_or(self.interval);
            }
            Command::Faster => {
                let shorter = intervals().rfind(|&other| other < self.interval);
                self.interval = shorter.unwrap_or(self.interval);
            }
            Command::Suspend | Command::Redraw => {}
        }
    }

    fn choose(&mut self, other: impl FnOnce(usize, usize) -> usize) {
        let rows = self.rows();
        let at = other(self.chosen(&rows), self.rows).min(rows.len().saturating_sub(1));
        self.chosen = rows.get(at).map(Row::key);
    }
}

#[cfg(test)]
mod tests;
