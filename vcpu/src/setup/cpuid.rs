//! The CPUID a vCPU shows its guest: what KVM supports on this host, plus who this vCPU is among how many.
//!
//! KVM answers for the host's processor; every leaf that counts or numbers processors is rewritten, since those would
//! describe the host's. The guest is one package. Leaves: Intel SDM vol. 2A, CPUID; AMD APM vol. 3, appendix E.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm, VcpuFd};

use super::SetupError;

/// How many vCPUs, and what the guest takes them for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Topology {
    /// 1 to 32.
    pub vcpus: u32,
    /// Whether vCPUs 2n and 2n+1 are hardware threads of one core; else each is a core.
    pub smt: bool,
}

impl Topology {
    fn threads_per_core(self) -> u32 {
        if self.smt && self.vcpus > 1 { 2 } else { 1 }
    }

    /// Bits of the APIC id that number the thread in its core.
    fn thread_bits(self) -> u32 {
        self.threads_per_core().ilog2()
    }

    /// Bits of the APIC id that number the thread in its package: APIC ids are indices, and the field is rounded up.
    fn package_bits(self) -> u32 {
        self.vcpus.next_power_of_two().ilog2()
    }
}

/// What the guest may be shown, for every vCPU alike.
///
/// # Errors
/// What KVM said.
pub fn supported(kvm: &Kvm) -> Result<CpuId, kvm_ioctls::Error> {
    let mut cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?;
    if kvm.check_extension(Cap::TscDeadlineTimer) {
        // KVM emulates it but leaves it to us to say so (Documentation/virt/kvm/api.rst, KVM_GET_SUPPORTED_CPUID).
        if let Some(leaf) = find(cpuid.as_mut_slice(), 1) {
            leaf.ecx |= leaf1::ECX_TSC_DEADLINE;
        }
    }
    Ok(cpuid)
}

/// Takes XSAVE, and what cannot be had without it (AVX and all that builds on it), out of `cpuid`: for hosts that offer
/// XSAVE and cannot keep the promise, as QEMU's emulator when it runs a nested guest.
pub fn mask_xsave(cpuid: &mut CpuId) {
    for leaf in cpuid.as_mut_slice() {
        match (leaf.function, leaf.index) {
            (1, _) => leaf.ecx &= !leaf1::ECX_NEEDS_XSAVE,
            (7, 0) => {
                leaf.ebx &= !leaf7::EBX_NEEDS_XSAVE;
                leaf.ecx &= !leaf7::ECX_NEEDS_XSAVE;
                leaf.edx &= !leaf7::EDX_NEEDS_XSAVE;
            }
            (7, 1) => leaf.eax &= !leaf7::SUB1_EAX_NEEDS_XSAVE,
            (0xd, _) => (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (0, 0, 0, 0),
            (0x8000_0001, _) => leaf.ecx &= !amd::ECX_NEEDS_XSAVE,
            _ => {}
        }
    }
}

/// Sets the CPUID of vCPU `index`.
///
/// # Errors
/// [`SetupError::Kvm`]; [`SetupError::Leaves`].
pub fn set(fd: &VcpuFd, supported: &CpuId, topology: Topology, index: u32) -> Result<(), SetupError> {
    let leaves = of_vcpu(supported.as_slice(), topology, index);
    let cpuid = CpuId::from_entries(&leaves).map_err(|_| SetupError::Leaves {
        index,
        leaves: leaves.len(),
    })?;
    fd.set_cpuid2(&cpuid).map_err(|source| SetupError::Kvm {
        index,
        what: "set the CPUID",
        source,
    })
}

/// `supported`, as vCPU `index` of `topology` shows it.
#[must_use]
pub fn of_vcpu(supported: &[kvm_cpuid_entry2], topology: Topology, index: u32) -> Vec<kvm_cpuid_entry2> {
    // Leaf 0x1f is 0xb with more levels; a guest that finds it absent reads 0xb.
    let mut leaves: Vec<_> = supported
        .iter()
        .filter(|leaf| !matches!(leaf.function, 0xb | 0x1f))
        .copied()
        .collect();
    let amd = find(&mut leaves, 0).is_some_and(|leaf| amd::VENDORS.contains(&[leaf.ebx, leaf.edx, leaf.ecx]));
    if amd && topology.threads_per_core() > 1 {
        amd::extend(&mut leaves);
    }
    for leaf in &mut leaves {
        match leaf.function {
            1 => leaf1::rewrite(leaf, topology, index),
            4 => leaf4::rewrite(leaf, topology),
            // The performance counters would be the host's, and each a perf event on a CPU that should be left alone.
            0xa => (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (0, 0, 0, 0),
            0x8000_0001 if amd => amd::rewrite_features(leaf, topology),
            0x8000_0008 if amd => amd::rewrite_counts(leaf, topology),
            0x8000_001d if amd => leaf4::rewrite_sharing(leaf, topology),
            0x8000_001e if amd => amd::rewrite_ids(leaf, topology, index),
            _ => {}
        }
    }
    if find(&mut leaves, 0).is_some_and(|leaf| leaf.eax >= 0xb) {
        leaves.extend(leaf_b::levels(topology, index));
    }
    leaves
}

fn find(leaves: &mut [kvm_cpuid_entry2], function: u32) -> Option<&mut kvm_cpuid_entry2> {
    leaves.iter_mut().find(|leaf| leaf.function == function)
}

/// `value` in `field`, the rest of `register` as it was.
fn put(register: &mut u32, field: std::ops::RangeInclusive<u32>, value: u32) {
    let mask = (u32::MAX >> (31 - field.end())) & (u32::MAX << field.start());
    *register = *register & !mask | (value << field.start()) & mask;
}

/// Processor info and feature bits.
mod leaf1 {
    use super::{Topology, kvm_cpuid_entry2, put};

    pub(super) const ECX_TSC_DEADLINE: u32 = 1 << 24;
    /// FMA, XSAVE, OSXSAVE, AVX, F16C.
    pub(super) const ECX_NEEDS_XSAVE: u32 = 1 << 12 | 1 << 26 | 1 << 27 | 1 << 28 | 1 << 29;
    const ECX_HYPERVISOR: u32 = 1 << 31;
    const EDX_HTT: u32 = 1 << 28;

    pub(super) fn rewrite(leaf: &mut kvm_cpuid_entry2, topology: Topology, index: u32) {
        put(&mut leaf.ebx, 16..=23, 1 << topology.package_bits());
        put(&mut leaf.ebx, 24..=31, index);
        leaf.ecx |= ECX_HYPERVISOR;
        leaf.edx = if topology.vcpus > 1 {
            leaf.edx | EDX_HTT
        } else {
            leaf.edx & !EDX_HTT
        };
    }
}

/// Deterministic cache parameters; AMD has the same layout in 0x8000001d, less the count of cores.
mod leaf4 {
    use super::{Topology, kvm_cpuid_entry2, put};

    pub(super) fn rewrite(leaf: &mut kvm_cpuid_entry2, topology: Topology) {
        rewrite_sharing(leaf, topology);
        // The last subleaf, type 0, is all zeroes.
        if leaf.eax & 0x1f != 0 {
            put(
                &mut leaf.eax,
                26..=31,
                (1 << (topology.package_bits() - topology.thread_bits())) - 1,
            );
        }
    }

    /// How many threads share the cache: a core's for levels 1 and 2, the package's above.
    pub(super) fn rewrite_sharing(leaf: &mut kvm_cpuid_entry2, topology: Topology) {
        let level = leaf.eax >> 5 & 0x7;
        if leaf.eax & 0x1f != 0 {
            let bits = if level < 3 {
                topology.thread_bits()
            } else {
                topology.package_bits()
            };
            put(&mut leaf.eax, 14..=25, (1 << bits) - 1);
        }
    }
}

/// Structured extended features.
mod leaf7 {
    /// AVX2; AVX512 F, DQ, IFMA, PF, ER, CD, BW, VL.
    pub(super) const EBX_NEEDS_XSAVE: u32 =
        1 << 5 | 1 << 16 | 1 << 17 | 1 << 21 | 1 << 26 | 1 << 27 | 1 << 28 | 1 << 30 | 1 << 31;
    /// AVX512 VBMI, PKU, VBMI2, VAES, VPCLMULQDQ, AVX512 VNNI, BITALG, VPOPCNTDQ.
    pub(super) const ECX_NEEDS_XSAVE: u32 = 1 << 1 | 1 << 3 | 1 << 6 | 1 << 9 | 1 << 10 | 1 << 11 | 1 << 12 | 1 << 14;
    /// AVX512 4VNNIW, 4FMAPS, VP2INTERSECT; AMX BF16; AVX512 FP16; AMX TILE, INT8.
    pub(super) const EDX_NEEDS_XSAVE: u32 = 1 << 2 | 1 << 3 | 1 << 8 | 1 << 22 | 1 << 23 | 1 << 24 | 1 << 25;
    /// AVX VNNI, AVX512 BF16, AMX FP16, AVX IFMA.
    pub(super) const SUB1_EAX_NEEDS_XSAVE: u32 = 1 << 4 | 1 << 5 | 1 << 21 | 1 << 23;
}

/// Extended topology.
mod leaf_b {
    use super::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, Topology, kvm_cpuid_entry2};

    pub(super) fn levels(topology: Topology, index: u32) -> [kvm_cpuid_entry2; 3] {
        const INVALID: u32 = 0;
        const SMT: u32 = 1;
        const CORE: u32 = 2;
        let level = |sub, kind, bits, threads| kvm_cpuid_entry2 {
            function: 0xb,
            index: sub,
            flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            eax: bits,
            ebx: threads,
            ecx: kind << 8 | sub,
            edx: index,
            ..Default::default()
        };
        [
            level(0, SMT, topology.thread_bits(), topology.threads_per_core()),
            level(1, CORE, topology.package_bits(), topology.vcpus),
            level(2, INVALID, 0, 0),
        ]
    }
}

/// AMD's own leaves.
mod amd {
    use super::{Topology, find, kvm_cpuid_entry2, put};

    /// EBX, EDX, ECX of leaf 0: "AuthenticAMD", "HygonGenuine".
    pub(super) const VENDORS: [[u32; 3]; 2] = [
        [0x6874_7541, 0x6974_6e65, 0x444d_4163],
        [0x6f67_7948, 0x6e65_476e, 0x656e_6975],
    ];
    /// XOP, FMA4.
    pub(super) const ECX_NEEDS_XSAVE: u32 = 1 << 11 | 1 << 16;
    /// The processors that leaf 1 counts are cores. Without it Linux takes them for threads of one core.
    const ECX_CMP_LEGACY: u32 = 1 << 1;
    /// Leaves 0x8000001d and 0x8000001e are there. Linux looks for threads of a core on no AMD processor without it.
    const ECX_TOPOEXT: u32 = 1 << 22;
    const IDS: u32 = 0x8000_001e;

    /// Makes room for [`rewrite_ids`], which older processors, and some emulated ones, have no leaf for.
    pub(super) fn extend(leaves: &mut Vec<kvm_cpuid_entry2>) {
        if find(leaves, IDS).is_none() {
            leaves.push(kvm_cpuid_entry2 {
                function: IDS,
                ..Default::default()
            });
        }
        if let Some(highest) = find(leaves, 0x8000_0000) {
            highest.eax = highest.eax.max(IDS);
        }
        if let Some(features) = find(leaves, 0x8000_0001) {
            features.ecx |= ECX_TOPOEXT;
        }
    }

    pub(super) fn rewrite_features(leaf: &mut kvm_cpuid_entry2, topology: Topology) {
        leaf.ecx &= !ECX_CMP_LEGACY;
        if topology.vcpus > 1 && !topology.smt {
            leaf.ecx |= ECX_CMP_LEGACY;
        }
    }

    pub(super) fn rewrite_counts(leaf: &mut kvm_cpuid_entry2, topology: Topology) {
        put(&mut leaf.ecx, 0..=7, topology.vcpus - 1);
        put(&mut leaf.ecx, 12..=15, topology.package_bits());
    }

    /// Extended APIC id, core id and threads per core, node id and nodes.
    pub(super) fn rewrite_ids(leaf: &mut kvm_cpuid_entry2, topology: Topology, index: u32) {
        leaf.eax = index;
        leaf.ebx = index >> topology.thread_bits();
        put(&mut leaf.ebx, 8..=15, topology.threads_per_core() - 1);
        leaf.ecx = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AMD: [u32; 3] = amd::VENDORS[0];
    const INTEL: [u32; 3] = [0x756e_6547, 0x4965_6e69, 0x6c65_746e];

    fn leaf(function: u32, index: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            index,
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        }
    }

    /// A host with all the leaves that say something of processors, every bit of them set but for the caches' types.
    fn host([ebx, edx, ecx]: [u32; 3]) -> Vec<kvm_cpuid_entry2> {
        let ones = [u32::MAX; 4];
        let cache = |function, index, level: u32| leaf(function, index, [0xffff_ff00 | level << 5 | 1, 0, 0, 0]);
        let mut leaves = vec![
            leaf(0, 0, [0x1f, ebx, ecx, edx]),
            leaf(1, 0, [0xffff_ffff, u32::MAX, 0, 0]),
        ];
        for function in [4, 0x8000_001d] {
            leaves.extend([cache(function, 0, 1), cache(function, 1, 3), leaf(function, 2, [0; 4])]);
        }
        leaves.extend([0xa, 0xb, 0x1f].map(|function| leaf(function, 0, ones)));
        leaves.extend([0x8000_0001, 0x8000_0008, 0x8000_001e].map(|function| leaf(function, 0, ones)));
        leaves
    }

    fn of(vendor: [u32; 3], vcpus: u32, smt: bool, index: u32) -> impl Fn(u32, u32) -> [u32; 4] {
        let leaves = of_vcpu(&host(vendor), Topology { vcpus, smt }, index);
        move |function, sub| {
            let leaf = leaves
                .iter()
                .find(|leaf| (leaf.function, leaf.index) == (function, sub))
                .expect("the leaf");
            [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx]
        }
    }

    #[test]
    fn every_leaf_that_tells_an_apic_id_tells_the_vcpus_own() {
        for index in [0, 5, 31] {
            let cpuid = of(AMD, 32, false, index);
            let [_, ebx, ..] = cpuid(1, 0);
            assert_eq!(ebx >> 24, index);
            assert_eq!([0, 1, 2].map(|sub| cpuid(0xb, sub)[3]), [index; 3]);
            assert_eq!(cpuid(0x8000_001e, 0)[0], index);
        }
    }

    #[test]
    fn the_guest_is_one_package_of_as_many_cores_as_it_has_vcpus() {
        let cpuid = of(INTEL, 3, false, 0);
        // Fields that make room for ids are rounded up to a power of two; counts are not.
        assert_eq!(cpuid(1, 0)[1] >> 16 & 0xff, 4);
        assert_eq!(cpuid(1, 0)[3] >> 28 & 1, 1, "HTT: the field above is valid");
        assert_eq!(cpuid(4, 0)[0] >> 26, 3, "room for 4 cores, less one");
        assert_eq!(
            [0, 1].map(|sub| cpuid(4, sub)[0] >> 14 & 0xfff),
            [0, 3],
            "L1 is a core's own, L3 the package's"
        );
        assert_eq!(cpuid(4, 2), [0; 4], "the end of the list stays");
        assert_eq!(cpuid(0xb, 0)[..3], [0, 1, 1 << 8]);
        assert_eq!(cpuid(0xb, 1)[..3], [2, 3, 2 << 8 | 1]);
        assert_eq!(cpuid(0xb, 2)[..3], [0, 0, 2]);
    }

    #[test]
    fn with_smt_two_vcpus_are_threads_of_one_core() {
        let cpuid = of(INTEL, 4, true, 3);
        assert_eq!(cpuid(4, 0)[0] >> 26, 1);
        assert_eq!(cpuid(4, 0)[0] >> 14 & 0xfff, 1);
        assert_eq!(cpuid(0xb, 0)[..3], [1, 2, 1 << 8]);
        assert_eq!(cpuid(0xb, 1)[..3], [2, 4, 2 << 8 | 1]);
        let cpuid = of(AMD, 4, true, 3);
        assert_eq!(
            cpuid(0x8000_001e, 0)[1] & 0xffff,
            1 << 8 | 1,
            "second core, two threads each"
        );
    }

    #[test]
    fn amd_has_the_leaf_that_tells_threads_of_a_core_where_there_are_any() {
        let [ebx, edx, ecx] = AMD;
        let old = [
            leaf(0, 0, [0xd, ebx, ecx, edx]),
            leaf(0x8000_0000, 0, [0x8000_000a, 0, 0, 0]),
            leaf(0x8000_0001, 0, [0; 4]),
        ];
        for (smt, highest, ids) in [(true, 0x8000_001e, Some(1 << 8 | 1)), (false, 0x8000_000a, None)] {
            let mut leaves = of_vcpu(&old, Topology { vcpus: 4, smt }, 2);
            assert_eq!(find(&mut leaves, 0x8000_0000).map(|leaf| leaf.eax), Some(highest));
            assert_eq!(
                find(&mut leaves, 0x8000_0001).map(|leaf| leaf.ecx >> 22 & 1),
                Some(smt.into())
            );
            assert_eq!(find(&mut leaves, 0x8000_001e).map(|leaf| leaf.ebx), ids);
        }
    }

    #[test]
    fn amd_counts_its_cores_in_leaves_of_its_own() {
        let cpuid = of(AMD, 3, false, 2);
        assert_eq!(cpuid(0x8000_0008, 0)[2] & 0xff, 2);
        assert_eq!(cpuid(0x8000_0008, 0)[2] >> 12 & 0xf, 2);
        assert_eq!(cpuid(0x8000_0001, 0)[2] >> 1 & 1, 1, "cores, not threads");
        assert_eq!(of(AMD, 2, true, 0)(0x8000_0001, 0)[2] >> 1 & 1, 0, "threads, not cores");
        assert_eq!(cpuid(0x8000_001d, 1)[0] >> 14 & 0xfff, 3);
        // On Intel these are reserved.
        assert_eq!(of(INTEL, 3, false, 2)(0x8000_0008, 0), [u32::MAX; 4]);
    }

    #[test]
    fn a_lone_vcpu_is_a_lone_core() {
        let cpuid = of(INTEL, 1, true, 0);
        assert_eq!((cpuid(1, 0)[1] >> 16, cpuid(1, 0)[3] >> 28 & 1), (1, 0));
        assert_eq!([0, 1].map(|sub| cpuid(0xb, sub)[..2].to_vec()), [[0, 1], [0, 1]]);
    }

    #[test]
    fn the_guest_knows_that_it_is_one_and_has_no_performance_counters() {
        let cpuid = of(INTEL, 1, false, 0);
        assert_eq!(cpuid(1, 0)[2] >> 31, 1);
        assert_eq!(cpuid(0xa, 0), [0; 4]);
    }

    #[test]
    fn without_xsave_nothing_that_needs_it_is_left() {
        let ones = [u32::MAX; 4];
        let leaves = [(1, 0), (7, 0), (7, 1), (0xd, 0), (0xd, 1)].map(|(function, index)| leaf(function, index, ones));
        let mut cpuid = CpuId::from_entries(&leaves).unwrap();
        mask_xsave(&mut cpuid);
        let [leaf1, leaf7, _, leaf_d, leaf_d1] = cpuid.as_slice() else {
            panic!("as many as before")
        };
        let (avx, sse42, avx2, bmi1) = (28, 20, 5, 3);
        assert_eq!((leaf1.ecx >> avx & 1, leaf1.ecx >> sse42 & 1), (0, 1));
        assert_eq!((leaf7.ebx >> avx2 & 1, leaf7.ebx >> bmi1 & 1), (0, 1));
        assert_eq!(
            [leaf_d, leaf_d1].map(|leaf| leaf.eax | leaf.ebx | leaf.ecx | leaf.edx),
            [0, 0]
        );
    }
}
