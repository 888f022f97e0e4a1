//! Which host CPU a vCPU of a machine that runs is put on: `PUT /vcpus/{index}/affinity`.
//!
//! ```text
//!   decide: the request, the host's CPUs as they are now, where the vCPUs are ──► where they will be, or why not
//!   put:    all others leave the CPU ──► the vCPU gets it ──► unpinned vCPUs leave it too
//! ```
//!
//! The rules are those of the start (`vcpu::pin`): no two vCPUs are given one CPU, and what cannot be had is refused, not
//! amended. A vCPU is put by its thread id, in the guest or held; it is not taken out of the guest for it.

use std::io;

use accounting::host::{CpuSet, HostCpus, cpu_list};
use serde::de::{Unexpected, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use vcpu::Vcpu;
use vcpu::pin::{self, PinError, Warning};

/// The body of the request, and of its answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Affinity {
    /// Where it is to be.
    pub cpu: Place,
}

/// Where a vCPU is to be, in the words of `run --pin`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// On this host CPU, alone of all vCPUs.
    Cpu(u32),
    /// On the best CPU that no other vCPU is pinned to: `nohz_full` first, then isolated, then any.
    Auto,
    /// Wherever the scheduler puts it, but for the CPUs that other vCPUs are pinned to.
    None,
}

#[cfg(feature = "schema")]
impl schemars::JsonSchema for Place {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Place".into()
    }

    fn json_schema(generator: &mut schemars::SchemaGenerator) -> schemars::Schema {
        let number = generator.subschema_for::<u32>();
        schemars::json_schema!({ "anyOf": [number, { "type": "string", "enum": ["auto", "none"] }] })
    }
}

impl Serialize for Place {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Cpu(cpu) => to.serialize_u32(*cpu),
            Self::Auto => to.serialize_str("auto"),
            Self::None => to.serialize_str("none"),
        }
    }
}

impl<'de> Deserialize<'de> for Place {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Words;
        impl Visitor<'_> for Words {
            type Value = Place;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a host CPU's number, \"auto\" or \"none\"")
            }
            fn visit_u64<E: serde::de::Error>(self, cpu: u64) -> Result<Place, E> {
                let number = u32::try_from(cpu).map(Place::Cpu);
                number.map_err(|_| E::invalid_value(Unexpected::Unsigned(cpu), &self))
            }
            fn visit_str<E: serde::de::Error>(self, word: &str) -> Result<Place, E> {
                match word {
                    "auto" => Ok(Place::Auto),
                    "none" => Ok(Place::None),
                    _ => Err(E::invalid_value(Unexpected::Str(word), &self)),
                }
            }
        }
        from.deserialize_any(Words)
    }
}

/// Why a vCPU stays where it is.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AffinityError {
    /// No such vCPU.
    #[error("cannot move vCPU {index}: this microVM has {vcpus}, numbered from 0")]
    NoVcpu {
        /// The one asked for.
        index: u32,
        /// How many there are.
        vcpus: usize,
    },
    /// The CPU cannot be had.
    #[error(transparent)]
    Pin(#[from] PinError),
    /// Another vCPU has it.
    #[error(
        "cannot pin vCPU {index} to host CPU {cpu}: vCPU {holder} is pinned to it; move that one first, or name another CPU"
    )]
    Taken {
        /// The vCPU.
        index: u32,
        /// The CPU asked for.
        cpu: u32,
        /// Who has it.
        holder: u32,
    },
    /// Nothing is left for `auto`.
    #[error(
        "cannot pin vCPU {index}: the other vCPUs are pinned to all host CPUs that this process may use, {allowed}; unpin one of them first"
    )]
    NoneLeft {
        /// The vCPU.
        index: u32,
        /// Those it may use, as the kernel lists them.
        allowed: String,
    },
    /// The host's CPUs could not be read, or the system refused.
    #[error("cannot move vCPU {index}: {what}: {source}")]
    Host {
        /// The vCPU.
        index: u32,
        /// What was being done.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
}

/// Where each vCPU is pinned, by index; `None` is not at all.
type Pins = Vec<Option<u32>>;

/// Where the vCPUs will be once `index` has been put on `place`.
fn decide(host: &HostCpus, pins: &Pins, index: u32, place: Place) -> Result<(Pins, Option<Warning>), AffinityError> {
    let at = usize::try_from(index).unwrap_or(usize::MAX);
    let vcpus = pins.len();
    if at >= vcpus {
        return Err(AffinityError::NoVcpu { index, vcpus });
    }
    let others = || (0..).zip(pins).filter(|&(other, _)| other != index);
    let (cpu, warning) = match place {
        Place::None => (None, None),
        Place::Cpu(cpu) => {
            pin::check_one(host, cpu)?;
            if let Some((holder, _)) = others().find(|(_, pin)| **pin == Some(cpu)) {
                return Err(AffinityError::Taken { index, cpu, holder });
            }
            (Some(cpu), None)
        }
        Place::Auto => {
            let taken: CpuSet = others().filter_map(|(_, pin)| *pin).collect();
            let chosen = pin::choose_one(host, &taken, index);
            let (cpu, warning) = chosen.ok_or_else(|| AffinityError::NoneLeft {
                index,
                allowed: cpu_list(&host.allowed),
            })?;
            (Some(cpu), warning)
        }
    };
    let mut pins = pins.clone();
    pins[at] = cpu;
    Ok((pins, warning))
}

fn pinned(pins: &Pins) -> CpuSet {
    pins.iter().flatten().copied().collect()
}

/// Where vCPUs that are not pinned may run: the process's affinity, less what others are pinned to, if that leaves any.
fn loose(host: &HostCpus, pins: &Pins) -> CpuSet {
    let left: CpuSet = host.affinity.difference(&pinned(pins)).copied().collect();
    if left.is_empty() { host.affinity.clone() } else { left }
}

/// Puts vCPU `index` on `place`. `host` is as it was before any thread was confined to some CPUs; `confine` does that to everything
/// but vCPUs.
///
/// # Errors
/// See [`AffinityError`]; then all is where it was.
pub(crate) fn put(
    host: &HostCpus,
    vcpus: &[Vcpu],
    index: u32,
    place: Place,
    confine: impl Fn(&CpuSet) -> io::Result<()>,
) -> Result<Option<Warning>, AffinityError> {
    let failed = |what| move |source| AffinityError::Host { index, what, source };
    // CPUs come and go; the affinity read now would be the VMM thread's own.
    let host = HostCpus {
        affinity: host.affinity.clone(),
        ..HostCpus::read().map_err(failed("this host's CPUs cannot be read"))?
    };
    let before: Pins = vcpus.iter().map(|vcpu| vcpu.account().pinned()).collect();
    let (after, warning) = decide(&host, &before, index, place)?;
    let vcpu = |index: u32| vcpus.get(usize::try_from(index).unwrap_or(usize::MAX));
    let Some(moved) = vcpu(index) else {
        return Err(AffinityError::NoVcpu {
            index,
            vcpus: vcpus.len(),
        });
    };
    let keep_off = |pins| confine(&host.housekeeping(&pinned(pins)));
    if let Err(source) = keep_off(&after) {
        // Some of them may have left.
        let _ = keep_off(&before);
        return Err(failed("the other threads cannot leave its CPU")(source));
    }
    let loose = loose(&host, &after);
    let put = match after.iter().zip(0..).find(|&(_, at)| at == index) {
        Some((&Some(cpu), _)) => moved.pin(cpu),
        _ => moved.unpin(&loose),
    };
    if let Err(source) = put {
        let _ = keep_off(&before);
        return Err(failed("its thread cannot be moved")(source));
    }
    for (other, _) in (0..)
        .zip(&after)
        .filter(|&(other, pin)| other != index && pin.is_none())
    {
        // One that has ended runs nowhere.
        let _ = vcpu(other).map(|other| other.unpin(&loose));
    }
    Ok(warning)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Six CPUs: 2 and 3 nohz_full and isolated, 4 offline, 5 forbidden.
    fn host() -> HostCpus {
        HostCpus {
            present: (0..6).collect(),
            online: [0, 1, 2, 3, 5].into(),
            nohz_full: Some([2, 3].into()),
            isolated: [2, 3].into(),
            allowed: (0..4).collect(),
            affinity: [0, 1].into(),
        }
    }

    fn pins_after(pins: &[Option<u32>], index: u32, place: Place) -> Pins {
        decide(&host(), &pins.to_vec(), index, place).expect("it can be had").0
    }

    #[test]
    fn a_vcpu_is_put_where_it_is_asked_for_and_no_other_is_moved() {
        let pins = [Some(2), None];
        assert_eq!(pins_after(&pins, 0, Place::Cpu(3)), [Some(3), None]);
        assert_eq!(pins_after(&pins, 0, Place::Cpu(2)), pins, "where it is already");
        assert_eq!(pins_after(&pins, 1, Place::Cpu(0)), [Some(2), Some(0)]);
        assert_eq!(pins_after(&pins, 0, Place::None), [None, None]);
        assert_eq!(
            pins_after(&pins, 1, Place::Auto),
            [Some(2), Some(3)],
            "the best that is left"
        );
        assert_eq!(pins_after(&pins, 0, Place::Auto), pins, "there is none better");
    }

    #[test]
    fn what_cannot_be_had_is_refused_with_what_to_do() {
        let pins = vec![Some(2), Some(3), Some(0), Some(1)];
        for (index, place, says) in [
            (
                0,
                Place::Cpu(9),
                "cannot pin to host CPU 9: there is no such CPU; this host has 0-5",
            ),
            (0, Place::Cpu(4), "cannot pin to host CPU 4: it is offline; write 1 to"),
            (
                0,
                Place::Cpu(5),
                "cannot pin to host CPU 5: this process may only use 0-3; widen",
            ),
            (
                0,
                Place::Cpu(3),
                "cannot pin vCPU 0 to host CPU 3: vCPU 1 is pinned to it; move that one first",
            ),
            (
                4,
                Place::None,
                "cannot move vCPU 4: this microVM has 4, numbered from 0",
            ),
        ] {
            let refusal = decide(&host(), &pins, index, place).expect_err(says).to_string();
            assert!(refusal.starts_with(says), "{refusal}");
        }
        let five = [pins, vec![None]].concat();
        let refusal = decide(&host(), &five, 4, Place::Auto)
            .expect_err("none is left")
            .to_string();
        assert!(
            refusal.contains("all host CPUs that this process may use, 0-3; unpin one"),
            "{refusal}"
        );
    }

    #[test]
    fn who_is_not_pinned_keeps_off_those_who_are_as_long_as_there_is_room() {
        assert_eq!(loose(&host(), &vec![Some(1), None]), [0].into());
        assert_eq!(loose(&host(), &vec![Some(1), Some(0), None]), [0, 1].into());
    }

    #[test]
    fn a_place_is_a_number_or_a_word() {
        let parse = |text| serde_json::from_str::<Affinity>(text).map(|affinity| affinity.cpu);
        for (text, place) in [
            (r#"{"cpu":3}"#, Place::Cpu(3)),
            (r#"{"cpu":"auto"}"#, Place::Auto),
            (r#"{"cpu":"none"}"#, Place::None),
        ] {
            assert_eq!(parse(text).expect(text), place);
            assert_eq!(
                serde_json::to_string(&Affinity { cpu: place }).expect("plain data"),
                text
            );
        }
        for text in [
            r#"{"cpu":-1}"#,
            r#"{"cpu":4294967296}"#,
            r#"{"cpu":"3"}"#,
            r#"{"cpu":null}"#,
            r#"{"cpu":[3]}"#,
        ] {
            let refusal = parse(text).expect_err(text).to_string();
            assert!(
                refusal.contains("expected a host CPU's number, \"auto\" or \"none\""),
                "{refusal}"
            );
        }
        assert!(parse("{}").is_err() && parse(r#"{"cpu":1,"cpus":2}"#).is_err());
    }
}
