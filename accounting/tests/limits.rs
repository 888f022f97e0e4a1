//! As many vCPUs as there may be.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::thread;

use accounting::host::HostCpus;
use accounting::vtime::ExitReason;
use accounting::{Account, Gtime, Open, laws};

/// How the vCPU threads are told to end, on the way out of a failure too: else the test would never end.
struct SetWhenDropped<'a>(&'a AtomicBool);

impl Drop for SetWhenDropped<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

#[test]
fn thirty_two_vcpus_are_read_lawfully_at_once() {
    const VCPUS: u32 = 32;
    let host = Arc::new(HostCpus::read().expect("sysfs"));
    let (tell, told) = channel();
    let done = AtomicBool::new(false);
    let accounts = thread::scope(|scope| {
        let _done = SetWhenDropped(&done);
        for index in 0..VCPUS {
            let (tell, host, done) = (tell.clone(), Arc::clone(&host), &done);
            scope.spawn(move || {
                let open = Open {
                    index,
                    kvm_stats: None,
                    pinned: None,
                    host,
                    gtime: Gtime::default(),
                };
                let (mut writer, account) = Account::open(open).expect("own probes");
                tell.send(Arc::clone(&account)).expect("the test listens");
                drop(tell);
                writer.resume();
                writer.guest_enter(None);
                while !done.load(Ordering::Relaxed) {
                    writer.guest_exit();
                    writer.guest_enter(Some(ExitReason::Io));
                    thread::yield_now();
                }
                writer.guest_exit();
                account.close(writer);
            });
        }
        // Nobody has an end to tell by any more, once each has told or failed.
        drop(tell);
        let accounts: Vec<_> = told.iter().collect();
        assert_eq!(accounts.len(), VCPUS as usize);
        let mut last: Vec<_> = accounts
            .iter()
            .map(|account| (account.read(), account.histograms()))
            .collect();
        for _ in 0..50 {
            for (account, last) in accounts.iter().zip(&mut last) {
                let reading = account.read();
                assert_eq!(laws::check_pair(&last.0, &reading), Ok(()));
                // A writer that does nothing but stamp may outrun every try, and then the answer is the one before: of an
                // earlier instant than the reading's.
                let histograms = account.histograms();
                assert!(histograms.vmm.count >= last.1.vmm.count && histograms.run.count >= last.1.run.count);
                *last = (reading, histograms);
            }
        }
        accounts
    });
    for account in accounts {
        let (reading, histograms) = (account.read(), account.histograms());
        assert!(
            histograms.vmm.count >= reading.exits.total,
            "{histograms:?} {reading:?}"
        );
    }
}
