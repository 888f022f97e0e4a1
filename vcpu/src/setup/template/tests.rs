use super::*;
use kvm_bindings::KVM_CPUID_FLAG_SIGNIFCANT_INDEX;

const ALL: [Template; 5] = [Template::C3, Template::T2, Template::T2S, Template::T2CL, Template::T2A];
// Leaf 1, EAX, of processors on the market.
const SKYLAKE: u32 = 0x5_0654;
const CASCADE_LAKE: u32 = 0x5_0657;
const COOPER_LAKE: u32 = 0x5_065b;
const ICE_LAKE: u32 = 0x6_06a6;
const SAPPHIRE_RAPIDS: u32 = 0x8_06f8;
const MILAN: u32 = 0xa0_0f11;
const GENOA: u32 = 0xa1_0f11;

/// A host of this vendor and version, each other word of which is `word`.
fn host(vendor: &str, eax: u32, word: u32) -> CpuId {
    let text = |from: &str, at: usize| {
        let mut bytes = [0; 4];
        let end = from.len().min(at + 4);
        bytes[..end - at].copy_from_slice(&from.as_bytes()[at..end]);
        u32::from_le_bytes(bytes)
    };
    let leaf = |function, index, [eax, ebx, ecx, edx]: [u32; 4]| kvm_cpuid_entry2 {
        function,
        index,
        flags: if matches!(function, 7 | 0xd) {
            KVM_CPUID_FLAG_SIGNIFCANT_INDEX
        } else {
            0
        },
        eax,
        ebx,
        ecx,
        edx,
        ..Default::default()
    };
    CpuId::from_entries(&[
        leaf(0, 0, [0x1f, text(vendor, 0), text(vendor, 8), text(vendor, 4)]),
        leaf(1, 0, [eax, word, word, word]),
        leaf(6, 0, [word; 4]),
        leaf(7, 0, [1, word, word, word]),
        leaf(7, 1, [word; 4]),
        leaf(0xd, 0, [word; 4]),
        leaf(0xd, 1, [word; 4]),
        leaf(0x8000_0001, 0, [word; 4]),
        leaf(0x8000_0002, 0, [text("Xeon", 0), 0, 0, 0]),
        leaf(0x8000_0008, 0, [word; 4]),
    ])
    .unwrap()
}

/// What `template` leaves of a host that it is for, and that can do everything, or nothing; and what it says of it.
fn changed(template: Template, word: u32) -> (impl Fn(u32, u32) -> [u32; 4], Vec<String>) {
    let eax = if template == Template::T2A { MILAN } else { CASCADE_LAKE };
    let mut cpuid = host(template.vendor(), eax, word);
    let warnings = template.change_cpuid(&mut cpuid).unwrap();
    let of = move |function, index| {
        let mut leaves = cpuid.as_slice().iter();
        let leaf = leaves
            .find(|leaf| (leaf.function, leaf.index) == (function, index))
            .unwrap();
        [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx]
    };
    (of, warnings)
}

fn bits<const N: usize>(bits: [u32; N]) -> u32 {
    bits.into_iter().fold(0, |word, bit| word | 1 << bit)
}

/// The words that CPUID answered on a c3.large, of a Xeon E5-2680 v2; and those of QEMU's `Haswell-noTSX`, with the bits that a
/// hypervisor adds. Beside them what is told of every host.
#[test]
fn of_a_host_that_can_do_everything_what_an_ivy_bridge_or_a_haswell_can_is_left() {
    let beyond_7 = bits([6, 13, 20]);
    let amd = (bits([1, 4, 9, 22]), 0x0183_f3ff);
    for template in ALL {
        let ivy_bridge = template == Template::C3;
        let (cpuid, warnings) = changed(template, u32::MAX);
        let word = |c3, t2| if ivy_bridge { c3 } else { t2 };
        assert_eq!(
            cpuid(1, 0)[2..],
            [word(0xffba_2203, 0xfffa_3203), 0x178b_fbff],
            "{template:?}"
        );
        // QEMU's leaves out IA32_TSC_ADJUST, which came with Haswell.
        let leaf7_ebx = word(0x281, 0x7a9 | bits([1])) | beyond_7;
        assert_eq!(
            cpuid(7, 0)[1..],
            [leaf7_ebx, 0, bits([10, 26, 27, 28, 29, 31])],
            "{template:?}"
        );
        assert_eq!(cpuid(7, 1), [0, 0, u32::MAX, 0]);
        assert_eq!(cpuid(0xd, 0)[0], 0x7);
        assert_eq!((cpuid(0xd, 1)[0], cpuid(0xd, 1)[2]), (0x1, 0));
        let extended = [word(0x1, 0x21) | amd.0, 0x2810_0800 | amd.1];
        assert_eq!(cpuid(0x8000_0001, 0)[2..], extended, "{template:?}");
        assert_eq!(cpuid(6, 0), [u32::MAX; 4], "no feature of a program's is in it");
        assert_eq!(warnings, [] as [&str; 0], "{template:?}");
    }
}

#[test]
fn instructions_that_not_all_hosts_have_are_on_none() {
    let gone = [
        (
            7,
            1,
            bits([11, 16, 18, 19, 23, 24, 29]),
            "RTM, AVX512F, RDSEED, ADX, CLFLUSHOPT, CLWB, SHA",
        ),
        (
            7,
            2,
            bits([1, 2, 3, 8, 9, 10, 22]),
            "AVX512_VBMI, UMIP, PKU, GFNI, VAES, VPCLMULQDQ, RDPID",
        ),
        (7, 3, bits([4, 22, 24, 25]), "FSRM, AMX-BF16, AMX-TILE, AMX-INT8"),
        (1, 2, bits([3, 5]), "MONITOR, VMX"),
        (
            0x8000_0001,
            2,
            bits([2, 6, 7, 8, 29]),
            "SVM, SSE4A, MisAlignSse, PREFETCHW, MONITORX",
        ),
        (0x8000_0001, 3, bits([22, 25, 26]), "MmxExt, FFXSR, Page1GB"),
        (0x8000_0008, 1, bits([0, 4, 9]), "CLZERO, RDPRU, WBNOINVD"),
    ];
    for template in ALL {
        let (cpuid, _) = changed(template, u32::MAX);
        for (leaf, register, bits, names) in gone {
            assert_eq!(cpuid(leaf, 0)[register] & bits, 0, "{template:?}: one of {names}");
        }
    }
}

#[test]
fn a_host_gets_nothing_that_it_has_not_and_what_it_lacks_is_told() {
    for template in ALL {
        let (cpuid, warnings) = changed(template, 0);
        for (leaf, sub) in [(7, 0), (7, 1), (0xd, 0), (0xd, 1), (0x8000_0001, 0), (0x8000_0008, 0)] {
            assert_eq!(cpuid(leaf, sub)[1..], [0; 3], "{template:?}");
        }
        assert_eq!(cpuid(1, 0)[1..], [0; 3]);
        let [warning] = &warnings[..] else {
            panic!("{warnings:?}")
        };
        let start =
            format!("cpu_template {template:?}: of the template's features this host's KVM lacks SSE3, PCLMULQDQ, ");
        assert!(warning.starts_with(&start), "{warning}");
        assert_eq!(warning.contains("AVX2"), template != Template::C3, "{warning}");
        assert!(
            !warning.contains("STIBP") && !warning.contains("TopologyExtensions"),
            "{warning}"
        );
    }
}

#[test]
fn an_intel_guest_sees_the_older_model_and_an_amd_guest_its_own() {
    for (template, eax) in ALL.into_iter().zip([0x3_06e4, 0x3_06f2, 0x3_06f2, 0x3_06f2, MILAN]) {
        assert_eq!(changed(template, u32::MAX).0(1, 0)[0], eax, "{template:?}");
    }
    for version in [Version::IVY_BRIDGE, Version::HASWELL] {
        assert_eq!(Version::of(version.eax()), version);
    }
}

#[test]
fn a_template_is_for_its_vendors_models_and_no_others() {
    // Whose the host is, which, and for which of ALL it is right.
    let table = [
        (INTEL, SKYLAKE, [true, true, true, false, false]),
        (INTEL, CASCADE_LAKE, [true, true, true, true, false]),
        (INTEL, ICE_LAKE, [true, true, false, true, false]),
        (INTEL, SAPPHIRE_RAPIDS, [true, true, false, true, false]),
        (INTEL, COOPER_LAKE, [false; 5]),
        (INTEL, Version::HASWELL.eax(), [false; 5]),
        (INTEL, MILAN, [false; 5]),
        (AMD, MILAN, [false, false, false, false, true]),
        (AMD, GENOA, [false; 5]),
        (AMD, SKYLAKE, [false; 5]),
    ];
    for (vendor, eax, right) in table {
        for (template, right) in ALL.into_iter().zip(right) {
            let mut cpuid = host(vendor, eax, u32::MAX);
            let outcome = template.change_cpuid(&mut cpuid);
            assert_eq!(outcome.is_ok(), right, "{template:?} on {vendor} {eax:#x}");
            match outcome {
                Err(TemplateError::Vendor { .. }) => assert_ne!(vendor, template.vendor()),
                Err(TemplateError::Model { .. }) => assert_eq!(vendor, template.vendor()),
                Ok(_) => continue,
            }
            let untouched = host(vendor, eax, u32::MAX);
            assert_eq!(
                cpuid.as_slice(),
                untouched.as_slice(),
                "what is refused changes nothing"
            );
        }
    }
}

#[test]
fn a_refusal_names_the_template_and_the_hosts_cpu() {
    let refusal = |template: Template, vendor, eax| {
        let refused = template.change_cpuid(&mut host(vendor, eax, 0));
        refused.unwrap_err().to_string()
    };
    assert_eq!(
        refusal(Template::T2, AMD, GENOA),
        "CPU vendor mismatched between actual CPU and CPU template. T2 is for GenuineIntel, and this host's CPU is \
         \"Xeon\" (AuthenticAMD, family 0x19, model 0x11, stepping 1): name another cpu_template, or none"
    );
    assert_eq!(
        refusal(Template::T2CL, INTEL, SKYLAKE),
        "The current CPU model is not permitted to apply the CPU template. T2CL is for Intel's Cascade Lake, Ice Lake and \
         Sapphire Rapids servers, and this host's CPU is \"Xeon\" (GenuineIntel, family 0x6, model 0x55, stepping 4): name \
         another cpu_template, or none"
    );
}

#[test]
fn only_c3_on_skylake_has_a_danger_to_tell_of() {
    for template in [Template::C3, Template::T2, Template::T2S] {
        let warnings = template.change_cpuid(&mut host(INTEL, SKYLAKE, u32::MAX)).unwrap();
        let told = warnings.iter().any(|warning| warning.contains("MMIO stale data"));
        assert_eq!(told, template == Template::C3, "{warnings:?}");
    }
}

/// Bits of IA32_ARCH_CAPABILITIES that say that a processor is safe: from RDCL_NO to ITS_NO.
#[test]
fn no_template_says_that_a_processor_is_safe_which_is_not() {
    let no: u64 = [0, 4, 5, 6, 8, 13, 14, 15, 20, 24, 26, 27, 62]
        .map(|bit| 1 << bit)
        .into_iter()
        .sum();
    for template in ALL {
        let after = |value: u64| template.msr().map_or(value, |(_, keeps, sets)| value & keeps | sets);
        assert_eq!(after(0) & no, 0, "{template:?}");
    }
    let msr = |template: Template| template.msr().unwrap();
    // RSBA and RRSBA say what to beware of. RDCL_NO, MDS_NO and the like are Cascade Lake's and not Skylake's.
    let (number, keeps, sets) = msr(Template::T2S);
    assert_eq!((number, sets), (0x10a, 1 << 2 | 1 << 19));
    assert_eq!(keeps & (1 << 0 | 1 << 4 | 1 << 5 | 1 << 8), 0);
    // Where a guest stays, it is told all; but not of registers that KVM does not give it: from MCU_CONTROL to DOITM.
    let (number, keeps, sets) = msr(Template::T2CL);
    assert_eq!((number, sets, keeps & no), (0x10a, 0, no));
    assert_eq!(keeps & (0xf << 9 | 1 << 18 | 1 << 23), 0);
}
