//! Two files of /proc that a jail's own /proc has not, handed over opened: `/proc/interrupts`, and `/proc/timer_list`,
//! which only root can open. By them a reading tells whether a vCPU's tick is stopped (`accounting::disturbance`).
//!
//! They are handed over as systemd hands sockets over, as descriptors from 3 on, in three variables of the environment:
//! `LISTEN_PID`, `LISTEN_FDS` and `LISTEN_FDNAMES` (sd_listen_fds(3)).

use std::ffi::OsString;
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, RawFd};

use accounting::disturbance::SystemFile;
use rustix::io::{FdFlags, fcntl_setfd};

use super::error::JailError;

/// The first descriptor that is handed over (`SD_LISTEN_FDS_START`).
const FIRST: RawFd = 3;

const FILES: [(&str, SystemFile); 2] = [
    ("proc-interrupts", SystemFile::Interrupts),
    ("proc-timer-list", SystemFile::TimerList),
];

/// What is handed over.
#[derive(Debug)]
pub struct Handover(Vec<(&'static str, File)>);

impl Handover {
    /// Opens what there is: it has to come before anything else is opened, for the numbers.
    pub fn open() -> Self {
        let mut files: Vec<(&'static str, File)> = Vec::new();
        for (name, which) in FILES {
            let next = FIRST + i32::try_from(files.len()).unwrap_or(0);
            // A host without it, or which forbids it, tells less.
            if let Ok(file) = File::open(which.path())
                && file.as_raw_fd() == next
            {
                files.push((name, file));
            }
        }
        Self(files)
    }

    /// Has exec leave them open, and gives what the environment says of them.
    pub fn environment(&self) -> Result<Vec<OsString>, JailError> {
        for (name, file) in &self.0 {
            fcntl_setfd(file, FdFlags::empty()).map_err(JailError::step(format!("hand over {name}")))?;
        }
        let names: Vec<_> = self.0.iter().map(|(name, _)| *name).collect();
        Ok(vec![
            format!("LISTEN_PID={}", std::process::id()).into(),
            format!("LISTEN_FDS={}", names.len()).into(),
            format!("LISTEN_FDNAMES={}", names.join(":")).into(),
        ])
    }
}

/// Takes what a jail has handed over to this process, if one has.
pub fn take() {
    let variable = |name: &str| std::env::var(name).ok();
    if variable("LISTEN_PID").as_deref() != Some(&*std::process::id().to_string()) {
        return;
    }
    let names = variable("LISTEN_FDNAMES").unwrap_or_default();
    let count = variable("LISTEN_FDS").and_then(|count| count.parse().ok()).unwrap_or(0);
    for (descriptor, name) in (FIRST..).zip(names.split(':')).take(count) {
        if let Some((_, which)) = FILES.iter().find(|(known, _)| *known == name) {
            which.hand_over(file(descriptor));
        }
    }
}

#[expect(unsafe_code, reason = "a descriptor by its number")]
fn file(descriptor: RawFd) -> File {
    // SAFETY: by its name it is one that a jail opened for this process, by whose number it was told so; nobody else
    // here knows of it, for it is taken once, before anything else is started.
    let file = unsafe { File::from_raw_fd(descriptor) };
    let _ = fcntl_setfd(&file, FdFlags::CLOEXEC);
    file
}
