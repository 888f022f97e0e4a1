//! An exporter over 200 sockets and a microVM's: what it costs that microVM.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use accounting::host::{HostCpus, run_on};
use tests::bystander::{self, Bystander, unnoticed};
use tests::flat::Program;
use tests::fleet::{Fleet, WELL, value};
use tests::prometheus::{Exporter, page};
use tests::vm::Vm;
use tests::{bed, require_bed};

#[test]
fn an_exporter_over_200_sockets_keeps_no_reading_waiting_and_no_vcpu_from_its_cpu() {
    require_bed!(kvm);
    let mut vm = Vm::flat(&Program::spin_forever(), ["--pin=auto"]);
    let own = [vm.reading().host_cpu.cpu].into_iter().collect();
    run_on(&HostCpus::read().expect("sysfs").housekeeping(&own)).expect("a CPU beside the guest's");
    let fleet = Fleet::serve();
    let exporter = Exporter::start([fleet.flag(), format!("--sockets={}", vm.socket().display())]);
    let address = exporter.address;
    let up = value(&exporter.page(""), "chronovisor_exporter_sockets{state=\"up\"}");
    assert_eq!(up, WELL as u64 + 1);

    let mut bystander = Bystander::open(vm.socket()).expect("the API");
    // One scrape a look of a second, and the next as soon as that is answered.
    let scrape = || {
        let over = Arc::new(AtomicBool::new(false));
        let scrapes = {
            let over = over.clone();
            move || {
                while !over.load(Ordering::Relaxed) {
                    let _ = page(address, "X-Prometheus-Scrape-Timeout-Seconds: 0.5\r\n");
                }
            }
        };
        Scraper(over, Some(thread::spawn(scrapes)))
    };
    match unnoticed(&mut bystander, bystander::READERS, scrape) {
        Ok(seen) => println!("{seen:?}"),
        Err(why) => bed::skipped("kvm", &why),
    }
}

/// Scrapes until it is dropped.
struct Scraper(Arc<AtomicBool>, Option<thread::JoinHandle<()>>);

impl Drop for Scraper {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
        if let Some(thread) = self.1.take() {
            // What made it panic has been told.
            let _ = thread.join();
        }
    }
}
