//! What to do about one return from `KVM_RUN`: a function of the exit and the handler, with no vCPU in sight.

use accounting::vtime::ExitReason;
use kvm_ioctls::VcpuExit;

use crate::run_page::RunPage;
use crate::{ExitHandler, VcpuEnd};

/// What the loop does next.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// The exit was handled: enter the guest again.
    Enter(ExitReason),
    /// Somebody kicked the vCPU, or a signal came: look at what is wanted.
    Look,
    /// The vCPU cannot go on.
    End(VcpuEnd),
}

/// Hands `exit` to `handler`. `page` is the same vCPU's, for what [`VcpuExit`] leaves out.
#[inline]
pub(crate) fn handle<H: ExitHandler>(
    handler: &H,
    exit: Result<VcpuExit<'_>, kvm_ioctls::Error>,
    page: &RunPage,
) -> Next {
    match exit {
        Ok(VcpuExit::IoOut(port, data)) => {
            for access in data.chunks_exact(width(page)) {
                handler.io_write(port, access);
            }
            Next::Enter(ExitReason::Io)
        }
        Ok(VcpuExit::IoIn(port, data)) => {
            for access in data.chunks_exact_mut(width(page)) {
                handler.io_read(port, access);
            }
            Next::Enter(ExitReason::Io)
        }
        Ok(VcpuExit::MmioRead(addr, data)) => {
            handler.mmio_read(addr, data);
            Next::Enter(ExitReason::Mmio)
        }
        Ok(VcpuExit::MmioWrite(addr, data)) => {
            handler.mmio_write(addr, data);
            Next::Enter(ExitReason::Mmio)
        }
        Ok(VcpuExit::Intr) => Next::Look,
        Ok(VcpuExit::Hlt) => Next::End(VcpuEnd::Halted),
        Ok(VcpuExit::Shutdown) => Next::End(VcpuEnd::TripleFault),
        Ok(VcpuExit::SystemEvent(kind, _)) => Next::End(VcpuEnd::SystemEvent(kind)),
        Ok(VcpuExit::FailEntry(reason, _)) => Next::End(VcpuEnd::FailEntry { reason }),
        Ok(VcpuExit::InternalError) => Next::End(page.internal_error()),
        Ok(_) => Next::End(VcpuEnd::Unhandled(page.exit_reason())),
        // EAGAIN: an application processor that waited for its SIPI has been woken (arch/x86/kvm/x86.c,
        // kvm_arch_vcpu_ioctl_run). Looking costs nothing there.
        Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => Next::Look,
        Err(error) => Next::End(VcpuEnd::Run(error.errno())),
    }
}

/// The width of the current port access, never 0: `chunks_exact` would panic.
fn width(page: &RunPage) -> usize {
    usize::from(page.io_size().max(1))
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use kvm_bindings::{
        KVM_EXIT_HYPERCALL, KVM_INTERNAL_ERROR_EMULATION, KVM_INTERNAL_ERROR_SIMUL_EX, kvm_run,
        kvm_run__bindgen_ty_1__bindgen_ty_4, kvm_run__bindgen_ty_1__bindgen_ty_14,
    };

    use super::*;

    /// Notes what it is asked, and answers reads with 1, 2, 3, ...
    #[derive(Default)]
    struct Notes(Mutex<Vec<String>>);

    impl Notes {
        fn note(&self, line: String) -> u8 {
            let mut lines = self.0.lock().unwrap();
            lines.push(line);
            u8::try_from(lines.len()).unwrap()
        }
    }

    impl ExitHandler for Notes {
        fn io_read(&self, port: u16, data: &mut [u8]) {
            data[0] = self.note(format!("in {port:#x} {}", data.len()));
        }
        fn io_write(&self, port: u16, data: &[u8]) {
            self.note(format!("out {port:#x} {data:x?}"));
        }
        fn mmio_read(&self, addr: u64, data: &mut [u8]) {
            data[0] = self.note(format!("read {addr:#x} {}", data.len()));
        }
        fn mmio_write(&self, addr: u64, data: &[u8]) {
            self.note(format!("write {addr:#x} {data:x?}"));
        }
        fn ended(&self, _: u32, _: VcpuEnd) {
            unreachable!("the loop's to call");
        }
    }

    fn page(fill: impl FnOnce(&mut kvm_run)) -> RunPage {
        let mut run = kvm_run::default();
        fill(&mut run);
        RunPage::of(run)
    }

    fn io(size: u8) -> RunPage {
        page(|run| {
            run.__bindgen_anon_1.io = kvm_run__bindgen_ty_1__bindgen_ty_4 {
                size,
                ..Default::default()
            }
        })
    }

    fn end(exit: VcpuExit<'_>, page: &RunPage) -> VcpuEnd {
        match handle(&Notes::default(), Ok(exit), page) {
            Next::End(end) => end,
            next => panic!("{next:?}"),
        }
    }

    #[test]
    fn port_and_memory_accesses_reach_the_handler_and_the_guest_goes_on() {
        let (notes, mut data) = (Notes::default(), [0; 4]);
        assert_eq!(
            handle(&notes, Ok(VcpuExit::IoOut(0x3f8, b"x")), &io(1)),
            Next::Enter(ExitReason::Io)
        );
        assert_eq!(
            handle(&notes, Ok(VcpuExit::IoIn(0x60, &mut data)), &io(4)),
            Next::Enter(ExitReason::Io)
        );
        assert_eq!(
            handle(&notes, Ok(VcpuExit::MmioWrite(0xd000_0000, &[7, 8])), &io(0)),
            Next::Enter(ExitReason::Mmio)
        );
        assert_eq!(data, [2, 0, 0, 0]);
        assert_eq!(
            handle(&notes, Ok(VcpuExit::MmioRead(0xd000_0004, &mut data)), &io(0)),
            Next::Enter(ExitReason::Mmio)
        );
        assert_eq!(data, [4, 0, 0, 0]);
        let lines = notes.0.into_inner().unwrap();
        assert_eq!(
            lines,
            [
                "out 0x3f8 [78]",
                "in 0x60 4",
                "write 0xd0000000 [7, 8]",
                "read 0xd0000004 4"
            ]
        );
    }

    #[test]
    fn a_string_instruction_arrives_as_its_single_accesses() {
        let (notes, mut data) = (Notes::default(), [0; 6]);
        handle(&notes, Ok(VcpuExit::IoIn(0x1f0, &mut data)), &io(2));
        assert_eq!(data, [1, 0, 2, 0, 3, 0]);
        handle(&notes, Ok(VcpuExit::IoOut(0x3f8, b"ab")), &io(1));
        assert_eq!(notes.0.into_inner().unwrap()[3..], ["out 0x3f8 [61]", "out 0x3f8 [62]"]);
    }

    #[test]
    fn a_signal_or_a_woken_processor_makes_the_loop_look_and_any_other_failure_ends_it() {
        let failed = |errno| handle(&Notes::default(), Err(kvm_ioctls::Error::new(errno)), &io(0));
        assert_eq!(failed(libc::EINTR), Next::Look);
        assert_eq!(failed(libc::EAGAIN), Next::Look);
        assert_eq!(failed(libc::ENOEXEC), Next::End(VcpuEnd::Run(libc::ENOEXEC)));
    }

    #[test]
    fn each_exit_we_cannot_go_on_from_has_its_own_end() {
        let page = page(|run| run.exit_reason = KVM_EXIT_HYPERCALL);
        assert_eq!(end(VcpuExit::Hlt, &page), VcpuEnd::Halted);
        assert_eq!(end(VcpuExit::Shutdown, &page), VcpuEnd::TripleFault);
        assert_eq!(end(VcpuExit::SystemEvent(3, &[]), &page), VcpuEnd::SystemEvent(3));
        assert_eq!(
            end(VcpuExit::FailEntry(0x8000_0021, 1), &page),
            VcpuEnd::FailEntry { reason: 0x8000_0021 }
        );
        assert_eq!(end(VcpuExit::Nmi, &page), VcpuEnd::Unhandled(KVM_EXIT_HYPERCALL));
    }

    #[test]
    fn an_internal_error_tells_its_suberror_and_the_instruction_where_kvm_gives_it() {
        let failed = |suberror, flags| {
            page(|run| {
                let mut failure = kvm_run__bindgen_ty_1__bindgen_ty_14 {
                    suberror,
                    ndata: 3,
                    flags,
                    ..Default::default()
                };
                failure.__bindgen_anon_1.__bindgen_anon_1.insn_size = 3;
                failure.__bindgen_anon_1.__bindgen_anon_1.insn_bytes = [0x0f; 15];
                run.__bindgen_anon_1.emulation_failure = failure;
            })
        };
        let told = |suberror, flags| end(VcpuExit::InternalError, &failed(suberror, flags));
        let without = |suberror| VcpuEnd::InternalError {
            suberror,
            rip: 0,
            insn: [0; 15],
            insn_len: 0,
        };
        assert_eq!(
            told(KVM_INTERNAL_ERROR_EMULATION, 1),
            VcpuEnd::InternalError {
                suberror: 1,
                rip: 0,
                insn: [0x0f; 15],
                insn_len: 3
            }
        );
        assert_eq!(told(KVM_INTERNAL_ERROR_EMULATION, 0), without(1));
        assert_eq!(told(KVM_INTERNAL_ERROR_SIMUL_EX, 1), without(2));
    }
}
