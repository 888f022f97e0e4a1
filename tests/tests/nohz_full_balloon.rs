//! The balloon and the entropy device, with Linux's drivers: what a guest does without the host has back, and randomness comes.

use serde_json::{Value, json};
use tests::require_bed;
use tests::vm::Vm;

/// MiB of guest memory.
const MEMORY: u64 = 384;
/// MiB that the guest uses and frees: most of it.
const TOUCHED: u64 = 240;
/// MiB that the VMM may take beside the guest, and more: the design gives it 5.
const VMM: u64 = 16;

fn sections(balloon: Value) -> Value {
    json!({
        "machine-config": { "vcpu_count": 1, "mem_size_mib": MEMORY },
        "balloon": balloon,
        "entropy": {},
    })
}

/// MiB of the process that are in the host's memory.
fn resident(vm: &Vm) -> u64 {
    let path = format!("/proc/{}/smaps_rollup", vm.process.id());
    let rollup = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path}: {e}"));
    let rss = rollup.lines().find_map(|line| line.strip_prefix("Rss:"));
    let kib = rss.and_then(|rss| rss.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok());
    kib.unwrap_or_else(|| panic!("no Rss in {rollup}")) >> 10
}

fn patch(vm: &Vm, path: &str, body: &Value) {
    let answer = vm.ask("PATCH", path, Some(&body.to_string()));
    assert_eq!(answer.status, 204, "{path}: {}", answer.fault());
}

fn statistics(vm: &Vm) -> Value {
    let answer = vm.ask("GET", "/balloon/statistics", None);
    assert_eq!(answer.status, 200, "{}", answer.fault());
    answer.body
}

#[test]
fn the_entropy_device_feeds_the_guest() {
    require_bed!(nohz_full);
    let mut vm = Vm::serve_debian("hwrng:16384,poweroff", json!({ "entropy": {} }));
    // That one of 256 values is missing from 16,384 random bytes has a chance of 256 * (255/256)^16384, below 10^-25.
    vm.process
        .wait_for("chronovisor guest: hwrng 16384 bytes: 16384 bytes of 256 values");
    assert_eq!(vm.process.wait().0.code(), Some(0));
}

#[test]
fn a_balloon_that_inflates_gives_the_host_its_memory_back_and_deflates_again() {
    require_bed!(nohz_full);
    const AMOUNT: u64 = 256;
    let balloon = json!({ "amount_mib": 0, "deflate_on_oom": false, "stats_polling_interval_s": 1 });
    let plan = format!("touch:{TOUCHED},balloon,sleep:100000");
    let mut vm = Vm::serve_debian(&plan, sections(balloon));
    vm.process.wait_for("chronovisor guest: balloon: loaded");
    vm.wait_until("statistics", |vm| statistics(vm)["total_memory"].is_u64());
    let before_stats = statistics(&vm);
    let total = before_stats["total_memory"].as_u64().expect("a number") >> 20;
    assert!((MEMORY / 2..=MEMORY).contains(&total), "{before_stats}");

    let before = resident(&vm);
    assert!(
        before >= TOUCHED,
        "{before} MiB are resident, though the guest touched more"
    );
    patch(&vm, "/balloon", &json!({ "amount_mib": AMOUNT }));
    vm.wait_until("a full balloon", |vm| statistics(vm)["actual_mib"] == AMOUNT);
    // What is in the balloon is nowhere.
    let most = MEMORY - AMOUNT + VMM;
    vm.wait_until("less resident memory", |vm| resident(vm) <= most);
    let after = resident(&vm);
    let free = |stats: &Value| stats["free_memory"].as_u64().expect("a number") >> 20;
    vm.wait_until("statistics of less free memory", |vm| {
        free(&statistics(vm)) + AMOUNT / 2 < free(&before_stats)
    });
    println!(
        "resident: {before} MiB, with a balloon of {AMOUNT} MiB {after} MiB; {}",
        statistics(&vm)
    );

    patch(&vm, "/balloon", &json!({ "amount_mib": 0 }));
    vm.wait_until("an empty balloon", |vm| statistics(vm)["actual_mib"] == 0);
}

#[test]
fn free_pages_come_back_when_hinted_at_and_when_reported() {
    require_bed!(nohz_full);
    let plan = format!("touch:{TOUCHED},balloon,sleep:100000");
    for (hinting, reporting) in [(true, false), (false, true)] {
        let balloon = json!({
            "amount_mib": 0, "deflate_on_oom": false, "free_page_hinting": hinting, "free_page_reporting": reporting,
        });
        let mut vm = Vm::serve_debian(&plan, sections(balloon));
        vm.process.wait_for("chronovisor guest: touch");
        vm.wait_until("touched memory", |vm| resident(vm) >= TOUCHED);
        let before = resident(&vm);
        vm.process.wait_for("chronovisor guest: balloon: loaded");
        if hinting {
            patch(&vm, "/balloon/hinting/start", &json!({}));
            vm.wait_until("the end of the run", |vm| {
                vm.ask("GET", "/balloon/hinting/status", None).body == json!({ "host_cmd": 1, "guest_cmd": 0 })
            });
        }
        // Half at least: a guest tells of large pieces only, and keeps some.
        vm.wait_until("less resident memory", |vm| resident(vm) <= before - TOUCHED / 2);
        println!(
            "resident: {before} MiB, after {} {} MiB",
            if hinting { "hinting" } else { "reporting" },
            resident(&vm)
        );
    }
}

/// And one that may not leaves the guest to its own devices: it kills what runs.
#[test]
fn a_balloon_that_may_deflates_when_the_guest_is_out_of_memory() {
    require_bed!(nohz_full);
    // MiB that are left beside the balloon, and twice as much that is written to a file in memory.
    const LEFT: u64 = 40;
    for deflate_on_oom in [true, false] {
        let balloon = json!({ "amount_mib": 0, "deflate_on_oom": deflate_on_oom, "stats_polling_interval_s": 1 });
        let mut vm = Vm::serve_debian("balloon,shell", json!({ "balloon": balloon }));
        vm.process.wait_for("guest# ");
        vm.wait_until("statistics", |vm| statistics(vm)["available_memory"].is_u64());
        let available = statistics(&vm)["available_memory"].as_u64().expect("a number") >> 20;
        let amount = available - LEFT;
        patch(&vm, "/balloon", &json!({ "amount_mib": amount }));
        vm.wait_until("a full balloon", |vm| statistics(vm)["actual_mib"] == amount);
        let count = 2 * LEFT;
        vm.process
            .type_in(&format!("busybox dd if=/dev/zero of=/file bs=1M count={count}\n"));
        if deflate_on_oom {
            vm.process.wait_for(&format!("{count}+0 records out"));
            let actual = statistics(&vm)["actual_mib"].as_u64().expect("a number");
            println!("{available} MiB were free; of a balloon of {amount} there are {actual} left");
            assert!(actual < amount, "{actual} of {amount}");
        } else {
            vm.process.wait_for("Out of memory");
            assert_eq!(statistics(&vm)["actual_mib"], amount);
        }
    }
}
