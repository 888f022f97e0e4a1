//! Which host CPU each vCPU gets: the choice only, made before any thread exists.
//!
//! A vCPU's time can be told exactly where nothing but the vCPU runs and no tick samples it, so the automatic choice
//! takes `nohz_full` CPUs first, then isolated ones, then what is left, and says so where that is less than was hoped
//! for. An explicit list is obeyed or refused, never amended. Two vCPUs are never given one CPU.

use std::collections::BTreeSet;
use std::fmt;

use accounting::host::{HostCpus, cpu_list};

/// Which host CPUs the vCPUs get. Not part of Firecracker's configuration: `run --pin`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Pinning {
    /// nohz_full CPUs first, then isolated ones, then any, with a warning; left unpinned (with a warning) if there are
    /// fewer CPUs than vCPUs.
    #[default]
    Auto,
    /// vCPU i to the i-th; each different.
    Cpus(Vec<u32>),
    /// Not pinned at all.
    None,
}

/// What was chosen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    /// For each vCPU its host CPU, or `None` to leave it to the scheduler.
    pub cpus: Vec<Option<u32>>,
    /// What the user should know; for the caller to log.
    pub warnings: Vec<Warning>,
}

/// An automatic choice that is less than it could be.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Warning {
    /// The CPU is isolated, but its tick goes on.
    Ticks {
        /// The vCPU.
        vcpu: u32,
        /// Its host CPU.
        cpu: u32,
        /// The CPU that could be tickless for it.
        tickless: Option<u32>,
    },
    /// The CPU is like any other: its tick goes on, and other tasks may run there.
    Shared {
        /// The vCPU.
        vcpu: u32,
        /// Its host CPU.
        cpu: u32,
        /// The CPU that could be tickless and isolated for it.
        tickless: Option<u32>,
    },
    /// There are more vCPUs than CPUs, so none is pinned.
    TooFew {
        /// How many vCPUs.
        vcpus: usize,
        /// How many CPUs this process may use.
        cpus: usize,
    },
}

/// CPU 0, the boot CPU, keeps the host's time and so its tick (Documentation/timers/no_hz.rst).
const TIMEKEEPER: u32 = 0;
const NO_OTHER: &str = "CPU 0 keeps the host's time and its tick, and no other is left for it: use fewer vCPUs, or a \
                        host with more CPUs";

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ticks { vcpu, cpu, tickless } => {
                write!(
                    f,
                    "vCPU {vcpu} is pinned to host CPU {cpu}, which is isolated but not nohz_full: its time is known \
                     less exactly; "
                )?;
                match tickless {
                    Some(cpu) => write!(f, "boot the host with nohz_full={cpu}"),
                    None => f.write_str(NO_OTHER),
                }
            }
            Self::Shared { vcpu, cpu, tickless } => {
                write!(
                    f,
                    "vCPU {vcpu} is pinned to host CPU {cpu}, which is neither nohz_full nor isolated: other tasks \
                     may run there, and its time is known less exactly; "
                )?;
                match tickless {
                    Some(cpu) => write!(f, "boot the host with nohz_full={cpu} isolcpus={cpu}"),
                    None => f.write_str(NO_OTHER),
                }
            }
            Self::TooFew { vcpus, cpus } => write!(
                f,
                "{vcpus} vCPUs but only {cpus} host CPUs: none is pinned; ask for at most {cpus} vCPUs \
                 to have each on a CPU of its own"
            ),
        }
    }
}

/// Why an explicit list was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PinError {
    /// No such CPU.
    #[error(
        "cannot pin to host CPU {cpu}: there is no such CPU; this host has {}",
        ranges(present)
    )]
    Absent {
        /// The CPU asked for.
        cpu: u32,
        /// Those there are.
        present: BTreeSet<u32>,
    },
    /// The CPU is there but switched off.
    #[error("cannot pin to host CPU {cpu}: it is offline; write 1 to /sys/devices/system/cpu/cpu{cpu}/online first")]
    Offline {
        /// The CPU asked for.
        cpu: u32,
    },
    /// A cpuset or affinity keeps this process off it.
    #[error(
        "cannot pin to host CPU {cpu}: this process may only use {}; widen its cpuset or affinity",
        ranges(allowed)
    )]
    NotAllowed {
        /// The CPU asked for.
        cpu: u32,
        /// Those it may use.
        allowed: BTreeSet<u32>,
    },
    /// Two vCPUs would share it.
    #[error("cannot pin to host CPU {cpu} twice: give each vCPU a CPU of its own")]
    Twice {
        /// The CPU asked for.
        cpu: u32,
    },
    /// Not one CPU for each vCPU.
    #[error("cannot pin {vcpus} vCPUs to {cpus} host CPUs: give one host CPU for each vCPU")]
    Count {
        /// How many vCPUs.
        vcpus: usize,
        /// How many CPUs were given.
        cpus: usize,
    },
}

/// Chooses a host CPU for each of `vcpus` vCPUs.
///
/// # Errors
/// When [`Pinning::Cpus`] cannot be obeyed; see [`PinError`]. The first CPU at fault is named.
pub fn choose(host: &HostCpus, pinning: &Pinning, vcpus: usize) -> Result<Choice, PinError> {
    match pinning {
        Pinning::None => Ok(unpinned(vcpus, vec![])),
        Pinning::Cpus(cpus) => {
            check(host, cpus, vcpus)?;
            Ok(Choice {
                cpus: cpus.iter().copied().map(Some).collect(),
                warnings: vec![],
            })
        }
        Pinning::Auto => Ok(auto(host, 0, vcpus)),
    }
}

fn unpinned(vcpus: usize, warnings: Vec<Warning>) -> Choice {
    Choice {
        cpus: vec![None; vcpus],
        warnings,
    }
}

/// Chooses a host CPU for `vcpu` as [`Pinning::Auto`] does, none of `taken`; `None` where none is left. Beside it, what the
/// user should know.
#[must_use]
pub fn choose_one(host: &HostCpus, taken: &BTreeSet<u32>, vcpu: u32) -> Option<(u32, Option<Warning>)> {
    let mut left = host.clone();
    left.allowed.retain(|cpu| !taken.contains(cpu));
    let Choice { cpus, warnings } = auto(&left, vcpu, 1);
    let cpu = cpus.into_iter().flatten().next()?;
    Some((cpu, warnings.into_iter().next()))
}

/// Whether a vCPU can be pinned to `cpu`.
///
/// # Errors
/// Why not.
pub fn check_one(host: &HostCpus, cpu: u32) -> Result<(), PinError> {
    if !host.present.contains(&cpu) {
        let present = host.present.clone();
        return Err(PinError::Absent { cpu, present });
    }
    if !host.online.contains(&cpu) {
        return Err(PinError::Offline { cpu });
    }
    if !host.allowed.contains(&cpu) {
        let allowed = host.allowed.clone();
        return Err(PinError::NotAllowed { cpu, allowed });
    }
    Ok(())
}

fn check(host: &HostCpus, cpus: &[u32], vcpus: usize) -> Result<(), PinError> {
    let mut taken = BTreeSet::new();
    for &cpu in cpus {
        check_one(host, cpu)?;
        if !taken.insert(cpu) {
            return Err(PinError::Twice { cpu });
        }
    }
    if cpus.len() != vcpus {
        return Err(PinError::Count {
            vcpus,
            cpus: cpus.len(),
        });
    }
    Ok(())
}

/// For `vcpus` vCPUs from number `first` on.
fn auto(host: &HostCpus, first: u32, vcpus: usize) -> Choice {
    // The kernel leaves isolated CPUs out of every affinity; a CPU that is missing from ours for another reason was
    // taken from us on purpose, with taskset perhaps.
    let ours = |cpu: &u32| host.affinity.contains(cpu) || host.isolated.contains(cpu);
    let mut usable: Vec<u32> = host.online.intersection(&host.allowed).copied().filter(ours).collect();
    if usable.len() < vcpus {
        let cpus = usable.len();
        return unpinned(vcpus, vec![Warning::TooFew { vcpus, cpus }]);
    }
    // A stable sort: within a kind, the lowest number first.
    usable.sort_by_key(|&cpu| (!host.is_nohz_full(cpu), !host.isolated.contains(&cpu)));
    let spare = usable[vcpus..].iter().copied().find(|&cpu| cpu != TIMEKEEPER);
    usable.truncate(vcpus);
    let warning = |(vcpu, &cpu): (u32, &u32)| match (host.is_nohz_full(cpu), host.isolated.contains(&cpu)) {
        (true, _) => None,
        (false, isolated) => {
            let tickless = if cpu == TIMEKEEPER { spare } else { Some(cpu) };
            Some(if isolated {
                Warning::Ticks { vcpu, cpu, tickless }
            } else {
                Warning::Shared { vcpu, cpu, tickless }
            })
        }
    };
    let warnings = (first..).zip(&usable).filter_map(warning).collect();
    Choice {
        cpus: usable.into_iter().map(Some).collect(),
        warnings,
    }
}

/// `0-3,8`, as Linux writes CPU lists; for a sentence.
fn ranges(cpus: &BTreeSet<u32>) -> String {
    if cpus.is_empty() { "none".into() } else { cpu_list(cpus) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Eight CPUs: 2 and 3 nohz_full and isolated, 5 isolated, 6 offline, 7 forbidden.
    fn host() -> HostCpus {
        HostCpus {
            present: (0..8).collect(),
            online: [0, 1, 2, 3, 4, 5, 7].into(),
            nohz_full: Some([2, 3].into()),
            isolated: [2, 3, 5].into(),
            allowed: (0..7).collect(),
            affinity: [0, 1, 4].into(),
        }
    }

    fn auto_choice(vcpus: usize) -> (Vec<Option<u32>>, Vec<Warning>) {
        let choice = choose(&host(), &Pinning::Auto, vcpus).expect("auto never fails");
        (choice.cpus, choice.warnings)
    }

    #[test]
    fn auto_takes_nohz_full_then_isolated_then_any_and_warns_of_what_is_less() {
        assert_eq!(auto_choice(2), (vec![Some(2), Some(3)], vec![]));
        assert_eq!(
            auto_choice(3),
            (
                vec![Some(2), Some(3), Some(5)],
                vec![Warning::Ticks {
                    vcpu: 2,
                    cpu: 5,
                    tickless: Some(5)
                }]
            )
        );
        let (cpus, warnings) = auto_choice(5);
        assert_eq!(cpus, [2, 3, 5, 0, 1].map(Some));
        assert_eq!(
            warnings[1..],
            [(3, 0, Some(4)), (4, 1, Some(1))].map(|(vcpu, cpu, tickless)| Warning::Shared { vcpu, cpu, tickless })
        );
    }

    #[test]
    fn nobody_is_told_to_make_the_cpu_tickless_that_keeps_the_time() {
        let line = |tickless| {
            let warning = Warning::Shared {
                vcpu: 0,
                cpu: 0,
                tickless,
            };
            warning.to_string()
        };
        let [other, none] = [Some(1), None].map(line);
        assert!(other.ends_with("boot the host with nohz_full=1 isolcpus=1"), "{other}");
        assert!(none.ends_with("use fewer vCPUs, or a host with more CPUs"), "{none}");
    }

    #[test]
    fn one_alone_is_given_the_best_of_what_the_others_leave() {
        let one = |taken: &[u32]| choose_one(&host(), &taken.iter().copied().collect(), 7);
        assert_eq!(one(&[]), Some((2, None)));
        let (cpu, warning) = one(&[2, 3]).expect("CPU 5");
        let line = warning.expect("its tick goes on").to_string();
        assert!(cpu == 5 && line.starts_with("vCPU 7 is pinned to host CPU 5"), "{line}");
        assert_eq!(one(&[0, 1, 2, 3, 4, 5]), None);
    }

    #[test]
    fn auto_with_fewer_cpus_than_vcpus_pins_none_and_says_so() {
        assert_eq!(
            auto_choice(7),
            (vec![None; 7], vec![Warning::TooFew { vcpus: 7, cpus: 6 }])
        );
    }

    #[test]
    fn auto_keeps_out_of_what_taskset_took_away() {
        let host = HostCpus {
            affinity: [1].into(),
            ..host()
        };
        assert_eq!(choose(&host, &Pinning::Auto, 4).unwrap().cpus, [2, 3, 5, 1].map(Some));
    }

    #[test]
    fn a_kernel_without_nohz_full_still_gets_its_isolated_cpus_used() {
        let host = HostCpus {
            nohz_full: None,
            ..host()
        };
        assert_eq!(choose(&host, &Pinning::Auto, 1).unwrap().cpus, [Some(2)]);
    }

    #[test]
    fn an_explicit_list_is_obeyed_in_its_order_without_a_word() {
        let choice = choose(&host(), &Pinning::Cpus(vec![4, 2]), 2).unwrap();
        assert_eq!(
            choice,
            Choice {
                cpus: vec![Some(4), Some(2)],
                warnings: vec![]
            }
        );
    }

    #[test]
    fn each_way_a_list_can_be_wrong_has_its_own_line_that_names_the_cpu() {
        let line = |cpus: &[u32], n| {
            choose(&host(), &Pinning::Cpus(cpus.to_vec()), n)
                .unwrap_err()
                .to_string()
        };
        assert_eq!(
            line(&[1, 9], 2),
            "cannot pin to host CPU 9: there is no such CPU; this host has 0-7"
        );
        assert_eq!(
            line(&[6], 1),
            "cannot pin to host CPU 6: it is offline; write 1 to /sys/devices/system/cpu/cpu6/online first"
        );
        assert_eq!(
            line(&[7], 1),
            "cannot pin to host CPU 7: this process may only use 0-6; widen its cpuset or affinity"
        );
        assert_eq!(
            line(&[2, 2], 2),
            "cannot pin to host CPU 2 twice: give each vCPU a CPU of its own"
        );
        assert_eq!(
            line(&[2, 3], 1),
            "cannot pin 1 vCPUs to 2 host CPUs: give one host CPU for each vCPU"
        );
        assert_eq!(
            line(&[], 1),
            "cannot pin 1 vCPUs to 0 host CPUs: give one host CPU for each vCPU"
        );
    }

    #[test]
    fn unpinned_is_unpinned() {
        assert_eq!(choose(&host(), &Pinning::None, 2).unwrap().cpus, [None, None]);
    }

    #[test]
    fn cpu_lists_are_written_as_linux_writes_them() {
        assert_eq!(ranges(&[0, 1, 2, 4, 6, 7].into()), "0-2,4,6-7");
        assert_eq!(ranges(&[].into()), "none");
    }
}
