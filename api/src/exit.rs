//! How `chronovisor` ends: one word on stderr, one exit status for each way.

use std::ffi::c_int;

use vmm::End;

use crate::ending::Asked;
use crate::signals;

/// Something failed before the guest ran, or in a command that runs none.
pub const FAILED: u8 = 1;
/// The command line was wrong.
pub const USAGE: u8 = 2;
/// `run`: the guest asked for a reboot.
pub const REBOOT: u8 = 3;
/// The guest triple-faulted.
pub const TRIPLE_FAULT: u8 = 4;
/// KVM could not go on.
pub const KVM_ERROR: u8 = 5;
/// A defect of ours (`EX_SOFTWARE` of sysexits.h).
pub const INTERNAL: u8 = 70;

/// The statuses, for `--help`.
pub const HELP: &str = "\
Exit status:
  0      the guest powered off, or shut down because SIGTERM asked it to, or Ctrl-A x was typed;
         serving the API, also: the guest rebooted
  1      something failed before the guest ran
  2      the command line is wrong
  3      run: the guest asked for a reboot
  4      the guest triple-faulted
  5      KVM could not go on
  70     a defect of chronovisor itself
  148    a thread made a system call that it may not make
  128+n  ended by signal n: SIGTERM at once where no guest could hear it, else by the second one";

/// What to do about a guest's reboot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnReboot {
    /// Its own status.
    Report,
    /// 0: a Firecracker guest shuts down by rebooting, and its clients take it for that.
    Succeed,
}

/// The status and the word for an end.
#[must_use]
pub fn of(end: &End, asked: Option<Asked>, on_reboot: OnReboot) -> (u8, String) {
    match end {
        // A Linux guest takes Ctrl-Alt-Del for a wish to reboot.
        End::PowerOff | End::Reboot if asked == Some(Asked::Signal(libc::SIGTERM)) => {
            (0, "the guest shut down, as SIGTERM asked it to".to_owned())
        }
        End::PowerOff => (0, "the guest powered off".to_owned()),
        End::Reboot => {
            let status = if on_reboot == OnReboot::Succeed { 0 } else { REBOOT };
            (status, "the guest asked for a reboot".to_owned())
        }
        End::TripleFault => (
            TRIPLE_FAULT,
            "the guest triple-faulted: its kernel lost its last exception handler".to_owned(),
        ),
        End::KvmError(line) => (KVM_ERROR, line.clone()),
        End::Stopped => match asked {
            Some(Asked::Signal(signal)) => (by_signal(signal), format!("ended by {}", signals::name(signal))),
            Some(Asked::Escape) => (0, "ended by Ctrl-A x".to_owned()),
            None => (0, "ended on request".to_owned()),
        },
    }
}

/// The shell's status for a process ended by `signal`.
#[must_use]
pub fn by_signal(signal: c_int) -> u8 {
    u8::try_from(128 + signal).unwrap_or(u8::MAX)
}

/// An error and what it came from, on one line. A cause that its effect has quoted already is not said twice.
#[must_use]
pub fn one_line(error: &anyhow::Error) -> String {
    let mut line = String::new();
    for part in error.chain().map(ToString::to_string) {
        if line.is_empty() {
            line = part;
        } else if !line.contains(&part) {
            line = format!("{line}: {part}");
        }
    }
    line.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Says one line on stderr, as this program.
pub fn say(line: &str) {
    use std::io::Write;
    // A closed stderr must not turn an end into a panic.
    let _ = writeln!(std::io::stderr(), "chronovisor: {line}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_one_line_and_says_nothing_twice() {
        let error = anyhow::anyhow!("no such file")
            .context("k: cannot be opened: no such file")
            .context("--kernel k\n ");
        assert_eq!(one_line(&error), "--kernel k : k: cannot be opened: no such file");
    }

    #[test]
    fn each_end_has_its_own_status_and_word() {
        let ends = [
            (End::PowerOff, None, OnReboot::Report, 0, "powered off"),
            (End::Reboot, None, OnReboot::Report, 3, "reboot"),
            (End::Reboot, None, OnReboot::Succeed, 0, "reboot"),
            (End::TripleFault, None, OnReboot::Succeed, 4, "triple-faulted"),
            (
                End::KvmError("vCPU 0: what".to_owned()),
                None,
                OnReboot::Report,
                5,
                "vCPU 0: what",
            ),
            (End::Stopped, Some(Asked::Escape), OnReboot::Report, 0, "Ctrl-A x"),
            (
                End::Stopped,
                Some(Asked::Signal(libc::SIGTERM)),
                OnReboot::Report,
                143,
                "SIGTERM",
            ),
            (
                End::Stopped,
                Some(Asked::Signal(libc::SIGINT)),
                OnReboot::Succeed,
                130,
                "SIGINT",
            ),
            // The guest was quicker than the signal.
            (
                End::PowerOff,
                Some(Asked::Signal(libc::SIGINT)),
                OnReboot::Report,
                0,
                "powered off",
            ),
            // The guest did as it was asked.
            (
                End::PowerOff,
                Some(Asked::Signal(libc::SIGTERM)),
                OnReboot::Report,
                0,
                "as SIGTERM asked",
            ),
            (
                End::Reboot,
                Some(Asked::Signal(libc::SIGTERM)),
                OnReboot::Report,
                0,
                "as SIGTERM asked",
            ),
            (
                End::TripleFault,
                Some(Asked::Signal(libc::SIGTERM)),
                OnReboot::Report,
                4,
                "triple-faulted",
            ),
        ];
        for (end, asked, on_reboot, status, word) in ends {
            let (got, said) = of(&end, asked, on_reboot);
            assert_eq!(got, status, "{end:?}");
            assert!(said.contains(word), "{end:?} said {said:?}");
        }
    }
}
