//! Everything of this process that is no vCPU, kept off the vCPUs' host CPUs.
//!
//! A thread that stays where the scheduler put it may be on a vCPU's CPU, take its time and restart its tick. What threads there are
//! is for the whole process to know: its first one, those that wait for signals or for what is typed, the API's, the VMM's, and
//! io_uring's workers, which the kernel starts. So all of them are asked of `/proc/self/task`, and none of them by name.

use std::collections::BTreeSet;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use accounting::host::{CpuSet, mask, run_on};
use rustix::io::Errno;
use rustix::process::{Pid, RawPid};
use rustix::thread::{gettid, sched_setaffinity};

/// The threads of all vCPUs of this process.
static VCPUS: Mutex<BTreeSet<RawPid>> = Mutex::new(BTreeSet::new());

fn vcpus() -> MutexGuard<'static, BTreeSet<RawPid>> {
    // A set of numbers is as good after a panic as before.
    VCPUS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The calling thread is a vCPU's for as long as this lives.
#[derive(Debug)]
pub(crate) struct OfVcpu(RawPid);

impl OfVcpu {
    /// Before the thread sets its own affinity: who confines others may have taken it for one of them, and has done then.
    pub fn here() -> Self {
        let tid = gettid().as_raw_nonzero().get();
        vcpus().insert(tid);
        Self(tid)
    }
}

impl Drop for OfVcpu {
    fn drop(&mut self) {
        vcpus().remove(&self.0);
    }
}

/// Confines the calling thread, and every other thread of this process that is no vCPU's, to `cpus`. Those that they start later
/// inherit it.
///
/// io_uring's workers are threads that may refuse (Linux 5.12 to 6.2: `PF_NO_SETAFFINITY`): where they run is their ring's to
/// say.
///
/// # Errors
/// What `sched_setaffinity` says: `EINVAL` where none of `cpus` may be used, and then nobody has moved. Or `/proc` cannot be read.
pub fn confine_others(cpus: &CpuSet) -> io::Result<()> {
    let vcpus = vcpus();
    run_on(cpus)?;
    let mask = mask(cpus)?;
    let mut seen = BTreeSet::new();
    loop {
        let before = seen.len();
        for task in std::fs::read_dir("/proc/self/task")? {
            let tid = task?.file_name().to_str().and_then(|name| name.parse().ok());
            let Some(tid) = tid.and_then(Pid::from_raw) else {
                continue;
            };
            let number = tid.as_raw_nonzero().get();
            if vcpus.contains(&number) || !seen.insert(number) {
                continue;
            }
            match sched_setaffinity(Some(tid), &mask) {
                // It has ended.
                Ok(()) | Err(Errno::SRCH) => {}
                Err(Errno::INVAL) if is_of_io_uring(number) => {}
                Err(error) => return Err(error.into()),
            }
        }
        // One that had not been confined yet may have started another meanwhile.
        if seen.len() == before {
            return Ok(());
        }
    }
}

/// Whether `tid` is a thread of the kernel's that works for an io_uring (`iou-wrk-`, `iou-sqp-`); or has ended.
fn is_of_io_uring(tid: RawPid) -> bool {
    let name = std::fs::read_to_string(format!("/proc/self/task/{tid}/comm"));
    name.map_or(true, |name| name.starts_with("iou-"))
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use accounting::host::HostCpus;
    use rustix::thread::sched_getaffinity;

    use super::*;

    #[test]
    fn all_threads_but_vcpus_are_confined_with_those_that_they_start() {
        let host = HostCpus::read().expect("sysfs");
        let (Some(&first), Some(&last)) = (host.affinity.first(), host.affinity.last()) else {
            panic!("this thread runs on some CPU");
        };
        if first == last {
            let test = "all_threads_but_vcpus_are_confined_with_those_that_they_start";
            println!("SKIPPED anywhere: {test}: this process has one CPU only");
            return;
        }
        let allowed_in = |vcpu: bool| {
            let (go, may) = channel::<()>();
            let (tell, told) = channel();
            let (ready, is_ready) = channel();
            let all = host.affinity.clone();
            let thread = std::thread::spawn(move || {
                let of_vcpu = vcpu.then(OfVcpu::here);
                run_on(&all).expect("they are its own");
                ready.send(()).expect("somebody waits");
                may.recv().expect("somebody tells");
                let count = || sched_getaffinity(None).expect("one's own").count();
                let of_child = std::thread::spawn(move || sched_getaffinity(None).expect("one's own").count());
                tell.send((count(), of_child.join().expect("it counts")))
                    .expect("somebody listens");
                drop(of_vcpu);
            });
            is_ready.recv().expect("it is there");
            (go, told, thread)
        };
        let (other, vcpu) = (allowed_in(false), allowed_in(true));
        confine_others(&CpuSet::from([first])).expect("it is one of its own");
        let counted = [other, vcpu].map(|(go, told, thread)| {
            go.send(()).expect("it waits");
            let counted = told.recv().expect("it tells");
            thread.join().expect("it ends");
            counted
        });
        confine_others(&host.affinity).expect("they are its own");
        let all = u32::try_from(host.affinity.len()).expect("a few");
        assert_eq!(counted, [(1, 1), (all, all)]);
    }

    #[test]
    fn cpus_that_cannot_be_had_are_refused() {
        let refused = confine_others(&CpuSet::from([1023])).expect_err("no host has so many");
        assert_eq!(refused.raw_os_error(), Some(libc::EINVAL));
    }
}
