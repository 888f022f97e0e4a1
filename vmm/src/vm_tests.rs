//! Whole microVMs on this host's /dev/kvm, seen through [`VmmHandle`]. The guests are a few bytes of kernel-mode code, which
//! software backends emulate. Without a /dev/kvm each says so and passes: the tests of record are in `tests/`.

use super::*;
use crate::config::{BootSource, MachineConfig, Pinning};
use crate::testing::{TempFile, elf, elf_with_pvh_note};
use accounting::GtimeSource;
use std::io::Read;
use std::time::{Duration, Instant};

const ADDRESS: u64 = 0x20_0000;

/// mov al, `byte`; mov dx, `port`; out dx, al
fn out(port: u16, byte: u8) -> Vec<u8> {
    let [low, high] = port.to_le_bytes();
    vec![0xb0, byte, 0x66, 0xba, low, high, 0xee]
}

/// mov ax, `value`; mov dx, `port`; out dx, ax
fn out_word(port: u16, value: u16) -> Vec<u8> {
    let ([low, high], [to_low, to_high]) = (value.to_le_bytes(), port.to_le_bytes());
    vec![0x66, 0xb8, low, high, 0x66, 0xba, to_low, to_high, 0x66, 0xef]
}

const SPIN: [u8; 2] = [0xeb, 0xfe];

struct Run {
    vmm: Vmm,
    handle: VmmHandle,
    output: std::io::PipeReader,
    _kernel: TempFile,
}

fn start(code: &[u8], vcpus: u8) -> Option<Run> {
    if let Err(error) = kvm::open() {
        eprintln!("skipped: {error}");
        return None;
    }
    let kernel = TempFile::new(&elf(ADDRESS, code));
    let (output, write) = std::io::pipe().unwrap();
    let console = Console::Files {
        input: None,
        output: write.into(),
    };
    let (vmm, handle) = Vmm::spawn(Options {
        id: "test".into(),
        console,
        gtime_source: GtimeSource::Auto,
        log: crate::log::LogSink::default(),
        mmds_limit_bytes: crate::mmds::data::DEFAULT_LIMIT_BYTES,
    })
    .unwrap();
    let ask = |action| assert_eq!(handle.request(action).unwrap(), Reply::Done);
    ask(Action::PutMachineConfig(MachineConfig {
        vcpu_count: vcpus,
        mem_size_mib: 16,
        ..MachineConfig::default()
    }));
    ask(Action::SetPinning(Pinning::None));
    ask(Action::PutBootSource(BootSource {
        kernel_image_path: kernel.path().into(),
        boot_args: None,
        initrd_path: None,
    }));
    ask(Action::Start);
    Some(Run {
        vmm,
        handle,
        output,
        _kernel: kernel,
    })
}

#[test]
fn a_guest_writes_to_its_console_and_resets() {
    let code = [out(0x3f8, b'h'), out(0x3f8, b'i'), out(0x64, 0xfe), SPIN.to_vec()].concat();
    let Some(mut run) = start(&code, 1) else { return };
    assert_eq!(run.vmm.join(), End::Reboot);
    let mut said = String::new();
    run.output.read_to_string(&mut said).unwrap();
    assert_eq!(said, "hi");
}

#[test]
fn a_guest_powers_off_by_acpi() {
    let code = [
        out_word(0x604, 5 << 10),
        out_word(0x604, 1 << 13 | 5 << 10),
        SPIN.to_vec(),
    ]
    .concat();
    let Some(run) = start(&code, 1) else { return };
    assert_eq!(run.vmm.join(), End::PowerOff);
    assert!(matches!(run.handle.request(Action::GetInfo), Err(ActionError::Ended)));
    assert_eq!(run.handle.accounts().get().unwrap().len(), 1, "accounts stay readable");
}

#[test]
fn a_guest_resets_by_acpi() {
    let Some(run) = start(&[out(0x608, 1), SPIN.to_vec()].concat(), 1) else {
        return;
    };
    assert_eq!(run.vmm.join(), End::Reboot);
}

#[test]
fn a_fault_without_handlers_is_a_triple_fault() {
    // ud2
    let Some(run) = start(&[0x0f, 0x0b], 1) else { return };
    assert_eq!(run.vmm.join(), End::TripleFault);
}

#[test]
fn a_spinning_guest_is_paused_resumed_and_stopped() {
    let Some(run) = start(&SPIN, 2) else { return };
    let state = || match run.handle.request(Action::GetInfo).unwrap() {
        Reply::Info(info) => info.state,
        other => panic!("{other:?}"),
    };
    for _ in 0..3 {
        run.handle.request(Action::Pause).unwrap();
        assert_eq!(state(), RunState::Paused);
        run.handle.request(Action::Resume).unwrap();
        assert_eq!(state(), RunState::Running);
    }
    assert_eq!(run.handle.accounts().get().unwrap().len(), 2);
    run.handle.request(Action::Stop).unwrap();
    assert_eq!(run.vmm.join(), End::Stopped);
}

#[test]
fn a_guest_whose_console_nobody_reads_is_blocked_and_can_still_be_paused_and_stopped() {
    // mov esi, ADDRESS; mov ecx, 4096; mov dx, 0x3f8; rep outsb; and again
    let code = b"\xbe\0\0\x20\0\xb9\0\x10\0\0\x66\xba\xf8\x03\xf3\x6e\xeb\xee";
    let Some(run) = start(code, 1) else { return };
    let blocked = || run.handle.accounts().get().unwrap()[0].read().modes.blocked_ns;
    let deadline = Instant::now() + Duration::from_secs(60);
    while blocked() < 100_000_000 {
        assert!(Instant::now() < deadline, "pipe and ring fill: 128 KiB");
        std::thread::sleep(Duration::from_millis(10));
    }
    run.handle.request(Action::Pause).unwrap();
    run.handle.request(Action::Resume).unwrap();
    run.handle.request(Action::Stop).unwrap();
    assert_eq!(run.vmm.join(), End::Stopped);
}

#[test]
fn a_failed_start_can_be_mended() {
    if kvm::open().is_err() {
        return;
    }
    let (vmm, handle) = Vmm::spawn(Options {
        id: "test".into(),
        console: Console::None,
        gtime_source: GtimeSource::Auto,
        log: crate::log::LogSink::default(),
        mmds_limit_bytes: crate::mmds::data::DEFAULT_LIMIT_BYTES,
    })
    .unwrap();
    let put = |kernel: &TempFile| {
        let source = BootSource {
            kernel_image_path: kernel.path().into(),
            boot_args: None,
            initrd_path: None,
        };
        handle.request(Action::PutBootSource(source)).unwrap();
    };
    put(&TempFile::new(b"no kernel"));
    // The file is gone by now, which is as good a failure as any.
    let refusal = handle.request(Action::Start).unwrap_err().to_string();
    assert!(refusal.starts_with("cannot open kernel"), "{refusal}");
    let kernel = TempFile::new(&elf(ADDRESS, &[out(0x64, 0xfe), SPIN.to_vec()].concat()));
    put(&kernel);
    handle.request(Action::SetPinning(Pinning::None)).unwrap();
    handle.request(Action::Start).unwrap();
    assert_eq!(vmm.join(), End::Reboot);
}

#[test]
fn a_request_after_the_end_is_answered_not_lost() {
    let (vmm, handle) = Vmm::spawn(Options {
        id: "test".into(),
        console: Console::None,
        gtime_source: GtimeSource::Auto,
        log: crate::log::LogSink::default(),
        mmds_limit_bytes: crate::mmds::data::DEFAULT_LIMIT_BYTES,
    })
    .unwrap();
    assert!(matches!(handle.request(Action::Stop), Ok(Reply::Done)));
    assert_eq!(vmm.join(), End::Stopped);
    for _ in 0..3 {
        assert!(matches!(handle.request(Action::GetInfo), Err(ActionError::Ended)));
    }
}

#[test]
fn a_software_backend_refuses_an_operating_system_at_once() {
    let status = host::kvm();
    if status.error.is_some() || status.runs_stock_kernels == Some(true) {
        eprintln!("skipped: this needs a KVM that cannot run stock kernels");
        return;
    }
    let (vmm, handle) = Vmm::spawn(Options {
        id: "test".into(),
        console: Console::None,
        gtime_source: GtimeSource::Auto,
        log: crate::log::LogSink::default(),
        mmds_limit_bytes: crate::mmds::data::DEFAULT_LIMIT_BYTES,
    })
    .unwrap();
    let kernel = TempFile::new(&elf_with_pvh_note(ADDRESS, 0x20_0000));
    let kernel_image_path = kernel.path().into();
    handle
        .request(Action::PutBootSource(BootSource {
            kernel_image_path,
            boot_args: None,
            initrd_path: None,
        }))
        .unwrap();
    let refusal = handle.request(Action::Start).unwrap_err().to_string();
    assert!(
        refusal.contains("is a software backend that cannot run the kernel"),
        "{refusal}"
    );
    handle.request(Action::Stop).unwrap();
    assert_eq!(vmm.join(), End::Stopped);
}
