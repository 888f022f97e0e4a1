//! microVMs that come and go, and that are paused and resumed, over and over: they hold no more afterwards than before, and
//! leave nothing behind. `tests/kvm_churn.rs` asserts it of a few rounds, `cargo xtask churn` tells it of fifty.

use std::process;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::flat::{Guest, Program};
use crate::footprint::{Footprint, Host};
use crate::vm::Vm;

/// How many there are at a time.
pub const MICROVMS: usize = 24;

/// Rounds until a process has brought into being what it keeps: pages of the program that were never run before, each thread's share
/// of the allocator. 3,000 more add nothing to that.
const WARM: usize = 50;

/// How long after its client a server may keep a connection.
const CLOSED: Duration = Duration::from_secs(1);

/// What was counted before and after so many rounds.
#[derive(Clone, Debug)]
pub struct Rounds<T> {
    /// How many.
    pub rounds: usize,
    /// After the first rounds.
    pub first: Vec<T>,
    /// After the last one.
    pub last: Vec<T>,
    /// Readings that were held to the laws.
    pub readings: usize,
}

/// [`MICROVMS`] processes, each paused and resumed so many times; what each has at the begin and at the end. They are read
/// at each step, and each reading is held to the laws.
///
/// # Errors
/// One is gone.
///
/// # Panics
/// When one does not start, or breaks a law.
pub fn pauses(rounds: usize) -> Result<Rounds<Footprint>> {
    let mut vms: Vec<Vm> = (0..MICROVMS).map(flat).collect();
    let mut readings = 0;
    let mut all_around = |vms: &mut [Vm]| {
        for state in ["Paused", "Resumed"] {
            for vm in vms.iter_mut() {
                readings += vm.readings().len();
                let answer = vm.ask("PATCH", "/vm", Some(&json!({ "state": state }).to_string()));
                assert_eq!(answer.status, 204, "{}", answer.fault());
                readings += vm.readings().len();
            }
        }
    };
    let look = |vms: &[Vm]| {
        // What we have closed, those who served it close a little later.
        sleep(CLOSED);
        vms.iter()
            .map(|vm| Footprint::of(vm.process.id()))
            .collect::<Result<_>>()
    };
    (0..rounds.min(WARM)).for_each(|_| all_around(&mut vms));
    let first = look(&vms)?;
    (0..rounds).for_each(|_| all_around(&mut vms));
    Ok(Rounds {
        rounds,
        first,
        last: look(&vms)?,
        readings,
    })
}

/// [`MICROVMS`] processes, started, paused, resumed, read, ended by SIGTERM twice: so many times. What the host has at the
/// begin and at the end.
///
/// # Errors
/// Something is left: a socket, or a status that is not that of an end by request.
///
/// # Panics
/// When one does not start, or breaks a law.
pub fn starts(rounds: usize) -> Result<Rounds<Host>> {
    let mut readings = 0;
    let mut all_around = || -> Result<()> {
        let mut vms: Vec<Vm> = (0..MICROVMS).map(flat).collect();
        for state in ["Paused", "Resumed"] {
            for vm in &mut vms {
                readings += vm.readings().len();
                let answer = vm.ask("PATCH", "/vm", Some(&json!({ "state": state }).to_string()));
                assert_eq!(answer.status, 204, "{}", answer.fault());
            }
        }
        for vm in &mut vms {
            readings += vm.readings().len();
            // The guest has no driver for the key that the first one presses.
            vm.process.signal(Signal::TERM);
            vm.process.signal(Signal::TERM);
            let (status, _, stderr) = vm.process.wait();
            ensure!(status.code() == Some(143), "{status}: {stderr}");
            ensure!(!vm.socket().exists(), "{} is left", vm.socket().display());
        }
        Ok(())
    };
    all_around()?;
    let first = vec![Host::look()?];
    for _ in 0..rounds {
        all_around()?;
    }
    Ok(Rounds {
        rounds,
        first,
        last: vec![Host::look()?],
        readings,
    })
}

/// [`MICROVMS`] guests of this process: made, resumed, paused, resumed, dropped, so many times. What the process has at the
/// begin and at the end.
///
/// # Errors
/// What KVM refuses.
///
/// # Panics
/// When a law is broken.
pub fn in_one_process(rounds: usize) -> Result<Rounds<Footprint>> {
    let mut readings = 0;
    let mut all_around = || -> Result<()> {
        let guests: Vec<Guest> = (0..MICROVMS)
            .map(|_| Guest::new(&Program::halt(), None))
            .collect::<Result<_>>()?;
        let mut last: Vec<_> = guests.iter().map(Guest::read).collect();
        for step in [vcpu::Vcpu::resume, vcpu::Vcpu::pause, vcpu::Vcpu::resume] {
            for (guest, last) in guests.iter().zip(&mut last) {
                step(&guest.vcpu);
                let now = guest.read();
                accounting::laws::check_pair(last, &now).map_err(anyhow::Error::msg)?;
                *last = now;
                readings += 1;
            }
        }
        Ok(())
    };
    let look = || Footprint::of(process::id()).context("ourselves");
    all_around()?;
    let first = vec![look()?];
    for _ in 0..rounds {
        all_around()?;
    }
    Ok(Rounds {
        rounds,
        first,
        last: vec![look()?],
        readings,
    })
}

impl Rounds<Footprint> {
    /// As a row tells it: sums over all processes.
    #[must_use]
    pub fn json(&self, what: &str) -> Value {
        let sum = |all: &[Footprint]| {
            let sum = all.iter().copied().reduce(|a, b| Footprint {
                descriptors: a.descriptors + b.descriptors,
                threads: a.threads + b.threads,
                resident_kib: a.resident_kib + b.resident_kib,
            });
            sum.as_ref().map(Footprint::json)
        };
        json!({
            "what": what, "rounds": self.rounds, "readings": self.readings,
            "first": sum(&self.first), "last": sum(&self.last),
        })
    }
}

impl Rounds<Host> {
    /// As a row tells it.
    #[must_use]
    pub fn json(&self, what: &str) -> Value {
        json!({
            "what": what, "rounds": self.rounds, "readings": self.readings,
            "first": self.first[0].json(), "last": self.last[0].json(),
        })
    }
}

/// One in eight computes and exits without end; the others have halted.
fn flat(index: usize) -> Vm {
    if index.is_multiple_of(8) {
        Vm::flat(&Program::by_turns(), [])
    } else {
        Vm::flat(&Program::halt(), [])
    }
}
