//! A guest's processor as its user wants it: bits of CPUID and of model-specific registers set or cleared, and KVM's capabilities
//! asked for. The shape is Firecracker's `/cpu-config`, on x86.
//!
//! ```json
//! { "kvm_capabilities": ["171", "!229"],
//!   "cpuid_modifiers": [{ "leaf": "0x1", "subleaf": "0x0", "flags": 0,
//!                         "modifiers": [{ "register": "ecx", "bitmap": "0bxxxxxxx0" }] }],
//!   "msr_modifiers": [{ "addr": "0x10a", "bitmap": "0b1_xxxx" }] }
//! ```
//!
//! A bitmap is written from its highest bit down: `0`, `1`, or `x` for a bit that is left as it is; what is left out above stays
//! as it is, and `_` is for the eye. What it changes has to be there: a leaf, register or capability that this host does not have
//! is an error, for the guest would not be what was asked for.

use std::fmt;
use std::str::FromStr;

use kvm_bindings::{CpuId, Msrs, kvm_cpuid_entry2, kvm_msr_entry};
use kvm_ioctls::{Kvm, VcpuFd};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// What [`number`] reads.
#[cfg(feature = "schema")]
const NUMBER: &str = "^(0x[0-9a-fA-F]{1,8}|0b[01]{1,32})$";

/// What to change. The default changes nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct CpuConfig {
    /// Capabilities of KVM's that have to be there; or, with `!`, need not be, though we would ask for them.
    #[serde(default)]
    #[cfg_attr(
        feature = "schema",
        schemars(with = "Vec<String>", inner(regex(pattern = r"^!?[0-9]{1,9}$")))
    )]
    pub kvm_capabilities: Vec<Capability>,
    /// Changes of CPUID.
    #[serde(default)]
    pub cpuid_modifiers: Vec<LeafModifier>,
    /// Changes of model-specific registers.
    #[serde(default)]
    pub msr_modifiers: Vec<MsrModifier>,
}

/// A capability by its number (Documentation/virt/kvm/api.rst).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Capability {
    /// `"171"`: it has to be there.
    Needed(u32),
    /// `"!171"`: it need not be.
    NotNeeded(u32),
}

impl TryFrom<String> for Capability {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let (number, make): (_, fn(u32) -> Self) = match text.strip_prefix('!') {
            Some(number) => (number, Self::NotNeeded),
            None => (text.as_str(), Self::Needed),
        };
        number
            .parse()
            .map(make)
            .map_err(|_| format!("Invalid KVM capability {text:?}: a number is needed, or ! and a number"))
    }
}

impl From<Capability> for String {
    fn from(capability: Capability) -> Self {
        match capability {
            Capability::Needed(number) => number.to_string(),
            Capability::NotNeeded(number) => format!("!{number}"),
        }
    }
}

/// Changes of one leaf of CPUID.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct LeafModifier {
    /// EAX, as a guest asks.
    #[serde(deserialize_with = "number", serialize_with = "hexadecimal")]
    #[cfg_attr(feature = "schema", schemars(with = "String", regex(pattern = NUMBER)))]
    pub leaf: u32,
    /// ECX, as a guest asks.
    #[serde(deserialize_with = "number", serialize_with = "hexadecimal")]
    #[cfg_attr(feature = "schema", schemars(with = "String", regex(pattern = NUMBER)))]
    pub subleaf: u32,
    /// KVM's flags of the leaf: 1 where the subleaf matters.
    pub flags: u32,
    /// Changes of its registers.
    pub modifiers: Vec<RegisterModifier>,
}

/// A change of one register of a leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct RegisterModifier {
    /// Which.
    pub register: Register,
    /// How.
    #[cfg_attr(
        feature = "schema",
        schemars(with = "String", regex(pattern = r"^0b_*([01x]_*){1,32}$"))
    )]
    pub bitmap: Bitmap<32>,
}

/// A register that CPUID answers in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
#[expect(missing_docs, reason = "the processor's names")]
pub enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

/// A change of a model-specific register.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct MsrModifier {
    /// Its number.
    #[serde(deserialize_with = "number", serialize_with = "hexadecimal")]
    #[cfg_attr(feature = "schema", schemars(with = "String", regex(pattern = NUMBER)))]
    pub addr: u32,
    /// How.
    #[cfg_attr(
        feature = "schema",
        schemars(with = "String", regex(pattern = r"^0b_*([01x]_*){1,64}$"))
    )]
    pub bitmap: Bitmap<64>,
}

/// Bits of a register of `BITS` bits that are set or cleared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Bitmap<const BITS: usize> {
    /// Those that are.
    filter: u64,
    /// To what.
    value: u64,
}

impl<const BITS: usize> Bitmap<BITS> {
    fn apply(self, to: u64) -> u64 {
        to & !self.filter | self.value
    }
}

impl<const BITS: usize> FromStr for Bitmap<BITS> {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bits = text
            .strip_prefix("0b")
            .ok_or_else(|| format!("Invalid bitmap {text:?}: it starts with 0b"))?;
        let bits: Vec<char> = bits.chars().filter(|&bit| bit != '_').collect();
        if bits.is_empty() || bits.len() > BITS {
            return Err(format!(
                "Invalid bitmap {text:?}: it has {} bits, where 1 to {BITS} are possible",
                bits.len()
            ));
        }
        let mut bitmap = Self { filter: 0, value: 0 };
        for bit in bits {
            let (filter, value) = match bit {
                '0' => (1, 0),
                '1' => (1, 1),
                'x' => (0, 0),
                _ => return Err(format!("Invalid bitmap {text:?}: a bit is 0, 1 or x, not {bit:?}")),
            };
            bitmap.filter = bitmap.filter << 1 | filter;
            bitmap.value = bitmap.value << 1 | value;
        }
        Ok(bitmap)
    }
}

impl<const BITS: usize> TryFrom<String> for Bitmap<BITS> {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl<const BITS: usize> fmt::Display for Bitmap<BITS> {
    /// From the highest bit that is set or cleared down.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("0b")?;
        let highest = self.filter.checked_ilog2().unwrap_or(0);
        (0..=highest).rev().try_for_each(|bit| {
            f.write_str(match (self.filter >> bit & 1, self.value >> bit & 1) {
                (0, _) => "x",
                (_, 0) => "0",
                _ => "1",
            })
        })
    }
}

impl<const BITS: usize> From<Bitmap<BITS>> for String {
    fn from(bitmap: Bitmap<BITS>) -> Self {
        bitmap.to_string()
    }
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "as serde's serialize_with wants it")]
fn hexadecimal<S: Serializer>(number: &u32, to: S) -> Result<S::Ok, S::Error> {
    to.collect_str(&format_args!("{number:#x}"))
}

/// `"0x1f"` or `"0b11111"`.
fn number<'de, D: Deserializer<'de>>(from: D) -> Result<u32, D::Error> {
    let text = String::deserialize(from)?;
    let parsed = match (text.strip_prefix("0x"), text.strip_prefix("0b")) {
        (Some(digits), _) => u32::from_str_radix(digits, 16),
        (_, Some(digits)) => u32::from_str_radix(digits, 2),
        _ => {
            return Err(serde::de::Error::custom(format!(
                "No supported number system prefix found in value [{text}]. Make sure to prefix the number with '0x' for \
                 hexadecimal numbers or '0b' for binary numbers."
            )));
        }
    };
    parsed.map_err(|error| serde::de::Error::custom(format!("Invalid number [{text}]: {error}")))
}

/// Why a processor cannot be had as it is wanted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CustomError {
    /// KVM lacks a capability.
    #[error("this host's KVM lacks capability {0}, which cpu-config asks for: take it out of kvm_capabilities")]
    Capability(u32),
    /// There is no such leaf here.
    #[error(
        "CPUID leaf {leaf:#x}, subleaf {subleaf:#x}, flags {flags} is not among those of this host, so cpu-config cannot \
         change it: take it out of cpuid_modifiers"
    )]
    Leaf {
        /// The leaf.
        leaf: u32,
        /// Its subleaf.
        subleaf: u32,
        /// Its flags.
        flags: u32,
    },
    /// There is no such register here, or it does not take the value.
    #[error("MSR {msr:#x} of vCPU {index} cannot be {done}: take it out of msr_modifiers")]
    Msr {
        /// The vCPU.
        index: u32,
        /// The register.
        msr: u32,
        /// "read" or "set".
        done: &'static str,
    },
}

impl CpuConfig {
    /// Whether capability `number`, which we would ask for, need not be there.
    #[must_use]
    pub fn does_without(&self, number: u32) -> bool {
        self.kvm_capabilities.contains(&Capability::NotNeeded(number))
    }

    /// Whether `kvm` has the capabilities that it has to have.
    ///
    /// # Errors
    /// The first that it lacks.
    pub fn check(&self, kvm: &Kvm) -> Result<(), CustomError> {
        for capability in &self.kvm_capabilities {
            if let Capability::Needed(number) = *capability
                && kvm.check_extension_raw(number.into()) <= 0
            {
                return Err(CustomError::Capability(number));
            }
        }
        Ok(())
    }

    /// Changes `cpuid`, the whole guest's; what numbers its processors is written over it afterwards.
    ///
    /// # Errors
    /// A leaf that is not there.
    pub fn change_cpuid(&self, cpuid: &mut CpuId) -> Result<(), CustomError> {
        for modifier in &self.cpuid_modifiers {
            let LeafModifier {
                leaf, subleaf, flags, ..
            } = *modifier;
            let mut leaves = cpuid.as_mut_slice().iter_mut();
            let found = leaves.find(|found| (found.function, found.index, found.flags) == (leaf, subleaf, flags));
            let found = found.ok_or(CustomError::Leaf { leaf, subleaf, flags })?;
            for modifier in &modifier.modifiers {
                let register = register(found, modifier.register);
                // A bitmap of 32 bits leaves 32.
                *register = u32::try_from(modifier.bitmap.apply((*register).into())).unwrap_or(*register);
            }
        }
        Ok(())
    }

    /// Changes the model-specific registers of vCPU `index`.
    ///
    /// # Errors
    /// The first register that cannot be read or set.
    pub fn change_msrs(&self, fd: &VcpuFd, index: u32) -> Result<(), CustomError> {
        for &MsrModifier { addr, bitmap } in &self.msr_modifiers {
            change_msr(fd, addr, |value| bitmap.apply(value)).map_err(|done| CustomError::Msr {
                index,
                msr: addr,
                done,
            })?;
        }
        Ok(())
    }
}

/// The register that CPUID answers `leaf` in.
pub(super) fn register(leaf: &mut kvm_cpuid_entry2, register: Register) -> &mut u32 {
    match register {
        Register::Eax => &mut leaf.eax,
        Register::Ebx => &mut leaf.ebx,
        Register::Ecx => &mut leaf.ecx,
        Register::Edx => &mut leaf.edx,
    }
}

/// Makes of model-specific register `msr` what `change` does of its value. The error is what could not be done: "read" or "set".
pub(super) fn change_msr(fd: &VcpuFd, msr: u32, change: impl FnOnce(u64) -> u64) -> Result<(), &'static str> {
    let entry = kvm_msr_entry {
        index: msr,
        ..Default::default()
    };
    let mut msrs = Msrs::from_entries(&[entry]).map_err(|_| "read")?;
    // KVM says how many it took: none, or this one.
    if !matches!(fd.get_msrs(&mut msrs), Ok(1)) {
        return Err("read");
    }
    msrs.as_mut_slice()[0].data = change(msrs.as_slice()[0].data);
    if !matches!(fd.set_msrs(&msrs), Ok(1)) {
        return Err("set");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvm_bindings::kvm_cpuid_entry2;

    fn parse(text: &str) -> Result<CpuConfig, String> {
        serde_json::from_str(text).map_err(|error| error.to_string())
    }

    #[test]
    fn a_configuration_reads_as_firecracker_documents_it() {
        let config = parse(
            r#"{"kvm_capabilities": ["171", "!229"],
                "cpuid_modifiers": [{"leaf": "0x80000001", "subleaf": "0b0111", "flags": 1,
                                     "modifiers": [{"register": "edx", "bitmap": "0b1_0x"}]}],
                "msr_modifiers": [{"addr": "0x10a", "bitmap": "0b0000_0000_1xx1"}]}"#,
        )
        .unwrap();
        assert_eq!(
            config.kvm_capabilities,
            [Capability::Needed(171), Capability::NotNeeded(229)]
        );
        assert!(config.does_without(229) && !config.does_without(171));
        let leaf = &config.cpuid_modifiers[0];
        assert_eq!((leaf.leaf, leaf.subleaf, leaf.flags), (0x8000_0001, 7, 1));
        assert_eq!(
            leaf.modifiers[0].bitmap,
            Bitmap {
                filter: 0b110,
                value: 0b100
            }
        );
        assert_eq!(
            config.msr_modifiers[0].bitmap,
            Bitmap {
                filter: 0b1111_1111_1001,
                value: 0b1001
            }
        );
        assert_eq!(parse("{}"), Ok(CpuConfig::default()));
    }

    #[test]
    fn a_configuration_is_written_as_it_is_read() {
        let text = r#"{"kvm_capabilities":["171","!229"],"cpuid_modifiers":[{"leaf":"0x80000001","subleaf":"0x7","flags":1,"modifiers":[{"register":"edx","bitmap":"0b10x"}]}],"msr_modifiers":[{"addr":"0x10a","bitmap":"0b1xx1"},{"addr":"0x277","bitmap":"0bx"}]}"#;
        assert_eq!(serde_json::to_string(&parse(text).unwrap()).unwrap(), text);
        let whole = format!("0b{}", "01".repeat(32));
        assert_eq!(whole.parse::<Bitmap<64>>().unwrap().to_string(), whole);
    }

    #[test]
    fn what_is_none_is_refused_in_words() {
        let leaf = |leaf: &str, register: &str, bitmap: &str| {
            format!(
                r#"{{"cpuid_modifiers": [{{"leaf": "{leaf}", "subleaf": "0x0", "flags": 0,
                     "modifiers": [{{"register": "{register}", "bitmap": "{bitmap}"}}]}}]}}"#
            )
        };
        let table = [
            (
                r#"{"kvm_capabilities": ["x"]}"#.to_owned(),
                "Invalid KVM capability \"x\"",
            ),
            (r#"{"vcpu_features": []}"#.to_owned(), "unknown field `vcpu_features`"),
            (
                leaf("1", "eax", "0b1"),
                "No supported number system prefix found in value [1].",
            ),
            (leaf("0xg", "eax", "0b1"), "Invalid number [0xg]"),
            (leaf("0x1", "ekx", "0b1"), "unknown variant `ekx`"),
            (leaf("0x1", "eax", "1"), "it starts with 0b"),
            (leaf("0x1", "eax", "0b"), "it has 0 bits, where 1 to 32"),
            (leaf("0x1", "eax", "0b2"), "a bit is 0, 1 or x, not '2'"),
            (
                leaf("0x1", "eax", &format!("0b{}", "x".repeat(33))),
                "it has 33 bits, where 1 to 32",
            ),
        ];
        for (text, says) in table {
            let said = parse(&text).expect_err(&text);
            assert!(said.contains(says), "{text}: {said}");
        }
    }

    #[test]
    fn bits_are_set_cleared_or_left_and_other_leaves_stay() {
        let leaf = |function, ecx| kvm_cpuid_entry2 {
            function,
            ecx,
            ..Default::default()
        };
        let mut cpuid = CpuId::from_entries(&[leaf(0, 5), leaf(1, 0b1010)]).unwrap();
        let config = |leaf: &str| {
            parse(&format!(
                r#"{{"cpuid_modifiers": [{{"leaf": "{leaf}", "subleaf": "0x0", "flags": 0,
                     "modifiers": [{{"register": "ecx", "bitmap": "0b0xx1"}}]}}]}}"#
            ))
            .unwrap()
        };
        config("0x1").change_cpuid(&mut cpuid).unwrap();
        assert_eq!(
            cpuid.as_slice().iter().map(|leaf| leaf.ecx).collect::<Vec<_>>(),
            [5, 0b0011]
        );
        let refused = config("0x2").change_cpuid(&mut cpuid).unwrap_err().to_string();
        assert!(refused.starts_with("CPUID leaf 0x2, subleaf 0x0, flags 0 is not among those of this host"));
    }
}
