//! What the templates' processors have, feature by feature.
//!
//! Bits and names: Intel SDM vol. 2A, CPUID; AMD APM vol. 3, appendix E, for those that are marked AMD's; SDM vol. 4, table 2-2, and
//! Intel's "CPUID Enumeration and Architectural MSRs" for IA32_ARCH_CAPABILITIES. Which processor has which: Linux's and QEMU's
//! descriptions of Ivy Bridge and Haswell servers agree with Intel's.

use super::super::custom::Register::{self, Eax, Ebx, Ecx, Edx};
use Since::{Beyond, Haswell, IvyBridge};

/// From which of the templates' processors on a feature is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Since {
    /// Intel's server processors of 2013.
    IvyBridge,
    /// Those of 2014.
    Haswell,
    /// Not theirs, and yet every guest is told where the host has it: how to be safe from attacks, or what this host's x87 does. A
    /// program does not choose its instructions by it.
    Beyond,
}

/// A register of a leaf, and all that a guest may find in it: bits that are not named here are cleared.
pub(super) struct Word {
    pub(super) leaf: u32,
    pub(super) subleaf: u32,
    pub(super) register: Register,
    pub(super) features: &'static [Feature],
}

/// A feature by its bit; or some that are told apart elsewhere, by their first and last.
pub(super) struct Feature {
    pub(super) first: u32,
    pub(super) last: u32,
    pub(super) name: &'static str,
    pub(super) since: Since,
}

const fn at(leaf: u32, subleaf: u32, register: Register) -> Word {
    Word {
        leaf,
        subleaf,
        register,
        features: &[],
    }
}

impl Word {
    const fn of(self, features: &'static [Feature]) -> Self {
        Self { features, ..self }
    }
}

const fn has(bit: u32, name: &'static str, since: Since) -> Feature {
    run(bit, bit, name, since)
}

const fn run(first: u32, last: u32, name: &'static str, since: Since) -> Feature {
    Feature {
        first,
        last,
        name,
        since,
    }
}

impl Feature {
    /// Its bits.
    pub(super) const fn mask(&self) -> u32 {
        u32::MAX >> (31 - self.last) & u32::MAX << self.first
    }
}

/// Every word that features are in which programs choose instructions by.
pub(super) const WORDS: [Word; 14] = [
    at(0x1, 0, Ecx).of(&[
        has(0, "SSE3", IvyBridge),
        has(1, "PCLMULQDQ", IvyBridge),
        has(9, "SSSE3", IvyBridge),
        has(12, "FMA", Haswell),
        has(13, "CMPXCHG16B", IvyBridge),
        has(17, "PCID", IvyBridge),
        has(19, "SSE4.1", IvyBridge),
        has(20, "SSE4.2", IvyBridge),
        has(21, "x2APIC", IvyBridge),
        has(22, "MOVBE", Haswell),
        has(23, "POPCNT", IvyBridge),
        has(24, "TSC-Deadline", IvyBridge),
        has(25, "AES", IvyBridge),
        has(26, "XSAVE", IvyBridge),
        has(28, "AVX", IvyBridge),
        has(29, "F16C", IvyBridge),
        has(30, "RDRAND", IvyBridge),
        // CR4's, which KVM keeps up to date; and that there is a hypervisor.
        has(27, "OSXSAVE", Beyond),
        has(31, "hypervisor", Beyond),
    ]),
    at(0x1, 0, Edx).of(&[
        has(0, "FPU", IvyBridge),
        has(1, "VME", IvyBridge),
        has(2, "DE", IvyBridge),
        has(3, "PSE", IvyBridge),
        has(4, "TSC", IvyBridge),
        has(5, "MSR", IvyBridge),
        has(6, "PAE", IvyBridge),
        has(7, "MCE", IvyBridge),
        has(8, "CX8", IvyBridge),
        has(9, "APIC", IvyBridge),
        has(11, "SEP", IvyBridge),
        has(12, "MTRR", IvyBridge),
        has(13, "PGE", IvyBridge),
        has(14, "MCA", IvyBridge),
        has(15, "CMOV", IvyBridge),
        has(16, "PAT", IvyBridge),
        has(17, "PSE-36", IvyBridge),
        has(19, "CLFSH", IvyBridge),
        has(23, "MMX", IvyBridge),
        has(24, "FXSR", IvyBridge),
        has(25, "SSE", IvyBridge),
        has(26, "SSE2", IvyBridge),
        // How many processors there are.
        has(28, "HTT", Beyond),
    ]),
    at(0x7, 0, Ebx).of(&[
        has(0, "FSGSBASE", IvyBridge),
        has(1, "IA32_TSC_ADJUST", Haswell),
        has(3, "BMI1", Haswell),
        has(5, "AVX2", Haswell),
        has(7, "SMEP", IvyBridge),
        has(8, "BMI2", Haswell),
        has(9, "ERMS", IvyBridge),
        has(10, "INVPCID", Haswell),
        has(6, "FDP_EXCPTN_ONLY", Beyond),
        has(13, "no FPU CS and DS", Beyond),
        // Of all hosts that the templates are for, and for kernels only.
        has(20, "SMAP", Beyond),
    ]),
    // AVX-512's and newer instructions; PKU and UMIP, which not all hosts have.
    at(0x7, 0, Ecx),
    at(0x7, 0, Edx).of(&[
        has(10, "MD_CLEAR", Beyond),
        has(26, "IBRS and IBPB", Beyond),
        has(27, "STIBP", Beyond),
        has(28, "L1D_FLUSH", Beyond),
        has(29, "IA32_ARCH_CAPABILITIES", Beyond),
        has(31, "SSBD", Beyond),
    ]),
    at(0x7, 1, Eax),
    at(0x7, 1, Ebx),
    at(0x7, 1, Edx),
    // What XSAVE saves: KVM lets the guest enable no more.
    at(0xd, 0, Eax).of(&[
        has(0, "x87 state", IvyBridge),
        has(1, "SSE state", IvyBridge),
        has(2, "AVX state", IvyBridge),
    ]),
    at(0xd, 1, Eax).of(&[has(0, "XSAVEOPT", IvyBridge)]),
    at(0xd, 1, Ecx),
    at(0x8000_0001, 0, Ecx).of(&[
        has(0, "LAHF", IvyBridge),
        has(5, "LZCNT", Haswell),
        // AMD's: how processors are numbered, CR8 outside of long mode, and which errata the operating system works around.
        has(1, "CmpLegacy", Beyond),
        has(4, "AltMovCr8", Beyond),
        has(9, "OSVW", Beyond),
        has(22, "TopologyExtensions", Beyond),
    ]),
    at(0x8000_0001, 0, Edx).of(&[
        has(11, "SYSCALL", IvyBridge),
        has(20, "NX", IvyBridge),
        has(27, "RDTSCP", IvyBridge),
        has(29, "LM", IvyBridge),
        // AMD has some of leaf 1's here once more.
        run(0, 9, "FPU to APIC", Beyond),
        run(12, 17, "MTRR to PSE-36", Beyond),
        run(23, 24, "MMX and FXSR", Beyond),
    ]),
    at(0x8000_0008, 0, Ebx).of(&[
        // AMD's, and KVM's on Intel's too.
        has(2, "RstrFpErrPtrs", Beyond),
        has(12, "IBPB", Beyond),
        has(14, "IBRS", Beyond),
        has(15, "STIBP", Beyond),
        has(16, "IbrsAlwaysOn", Beyond),
        has(17, "StibpAlwaysOn", Beyond),
        has(18, "IbrsPreferred", Beyond),
        has(19, "IbrsSameMode", Beyond),
        has(20, "EferLmsleUnsupported", Beyond),
        has(24, "SSBD", Beyond),
        has(25, "SsbdVirtSpecCtrl", Beyond),
        has(26, "SsbdNotRequired", Beyond),
        has(28, "PSFD", Beyond),
        has(29, "BTC_NO", Beyond),
        has(30, "IBPB_RET", Beyond),
    ]),
];

/// IA32_ARCH_CAPABILITIES: to which attacks an Intel processor is open. KVM shows a vCPU what it knows of the host's.
pub(super) mod arch_capabilities {
    /// Its number.
    pub(in super::super) const MSR: u32 = 0x10a;

    const RDCL_NO: u64 = 1 << 0;
    const IBRS_ALL: u64 = 1 << 1;
    const RSBA: u64 = 1 << 2;
    const SKIP_L1DFL_VMENTRY: u64 = 1 << 3;
    const SSB_NO: u64 = 1 << 4;
    const MDS_NO: u64 = 1 << 5;
    const IF_PSCHANGE_MC_NO: u64 = 1 << 6;
    const TSX_CTRL: u64 = 1 << 7;
    const TAA_NO: u64 = 1 << 8;
    const SBDR_SSDP_NO: u64 = 1 << 13;
    const FBSDP_NO: u64 = 1 << 14;
    const PSDP_NO: u64 = 1 << 15;
    const FB_CLEAR: u64 = 1 << 17;
    const RRSBA: u64 = 1 << 19;
    const BHI_NO: u64 = 1 << 20;
    const PBRSB_NO: u64 = 1 << 24;
    const GDS_NO: u64 = 1 << 26;
    const RFDS_NO: u64 = 1 << 27;
    const RFDS_CLEAR: u64 = 1 << 28;
    const ITS_NO: u64 = 1 << 62;

    /// Of a guest that may be moved between Skylake and Cascade Lake: it is told what KVM says of both once their microcode is up to
    /// date, and to expect of returns (RSBA, RRSBA) what either does. A processor is never said to be safe that is not.
    pub(in super::super) const T2S_KEEPS: u64 = SKIP_L1DFL_VMENTRY | IF_PSCHANGE_MC_NO | FB_CLEAR | GDS_NO | RFDS_NO;
    pub(in super::super) const T2S_SETS: u64 = RSBA | RRSBA;

    /// Of a guest that stays on processors of one model: all that is said of attacks. TSX_CTRL too, for with it a kernel that is not
    /// told of TSX can still turn it off.
    pub(in super::super) const T2CL_KEEPS: u64 = RDCL_NO
        | IBRS_ALL
        | RSBA
        | SKIP_L1DFL_VMENTRY
        | SSB_NO
        | MDS_NO
        | IF_PSCHANGE_MC_NO
        | TSX_CTRL
        | TAA_NO
        | SBDR_SSDP_NO
        | FBSDP_NO
        | PSDP_NO
        | FB_CLEAR
        | RRSBA
        | BHI_NO
        | PBRSB_NO
        | GDS_NO
        | RFDS_NO
        | RFDS_CLEAR
        | ITS_NO;
}
