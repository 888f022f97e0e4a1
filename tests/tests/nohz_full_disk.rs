//! A Linux guest's disk: what it reads is what it wrote, whatever happens meanwhile, and its time shows none of it.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use accounting::Reading;
use accounting::reading::Modes;
use serde_json::{Value, json};
use tests::bed::{self, Folder};
use tests::require_bed;
use tests::thread_io::bytes_moved_by;
use tests::vm::{Vm, grown};

const MIB: u64 = 1 << 20;

fn image(folder: &Folder, mib: u64) -> std::path::PathBuf {
    let path = folder.join("disk");
    File::create(&path)
        .and_then(|file| file.set_len(mib * MIB))
        .expect("an image");
    path
}

fn drives(path: &Path, more: &Value) -> Value {
    let mut drive = json!({ "drive_id": "disk", "path_on_host": path, "is_root_device": false });
    drive
        .as_object_mut()
        .expect("an object")
        .extend(more.as_object().expect("an object").clone());
    json!({ "drives": [drive] })
}

/// What the guest said of a step, behind its name.
fn said(output: &str, step: &str) -> String {
    let line = output
        .lines()
        .find_map(|line| line.trim().strip_prefix(&format!("chronovisor guest: {step}: ")));
    line.unwrap_or_else(|| panic!("no word of {step} in {output}"))
        .to_owned()
}

fn patch_state(vm: &Vm, state: &str) {
    let answer = vm.ask("PATCH", "/vm", Some(&json!({ "state": state }).to_string()));
    assert_eq!(answer.status, 204, "{}", answer.fault());
}

/// Threads of the process that io_uring has for those who submit, by its name for them: `iou-wrk-` and whose they are.
fn owners_of_workers(vm: &Vm) -> Vec<String> {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", vm.process.id())).expect("procfs");
    let names = tasks.filter_map(|task| std::fs::read_to_string(task.expect("a thread").path().join("comm")).ok());
    let owner = |name: String| Some(name.trim().strip_prefix("iou-wrk-")?.to_owned());
    names.filter_map(owner).collect()
}

/// Load for `seconds` with a pause each second; then nothing is wrong, and the vCPUs were not the ones to do the I/O.
fn load_with_pauses(seconds: u64, drive: &Value) {
    const MIB_OF_DISK: u64 = 64;
    let folder = Folder::new();
    // It goes on until the last pause is over: its clock does not stand still meanwhile.
    let ms = (seconds + 5) * 1000;
    let step = format!("disk-verify:{ms}");
    let mut vm = Vm::serve_debian(&format!("{step},poweroff"), drives(&image(&folder, MIB_OF_DISK), drive));
    vm.process.wait_for("chronovisor guest: disk-verify");
    let first = vm.readings();
    let process = vm.process.id();
    let moved_by = |vcpus: &[Reading]| -> Vec<_> { vcpus.iter().map(|r| bytes_moved_by(process, r.tid)).collect() };
    let before = moved_by(&first);
    let begun = Instant::now();
    let mut last = first.clone();
    while begun.elapsed() < Duration::from_secs(seconds) {
        std::thread::sleep(Duration::from_millis(900));
        patch_state(&vm, "Paused");
        last = vm.readings();
        std::thread::sleep(Duration::from_millis(100));
        patch_state(&vm, "Resumed");
    }
    let moved = moved_by(&last)
        .into_iter()
        .zip(before)
        .map(|(last, first)| last - first);
    let owners = owners_of_workers(&vm);
    println!("io_uring's workers are those of {owners:?}");
    for ((first, last), moved) in first.iter().zip(&last).zip(moved) {
        let Modes {
            guest_ns,
            host_user_ns,
            host_kernel_ns,
            blocked_ns,
            ..
        } = grown(first, last);
        let [user, blocked] =
            [host_user_ns, blocked_ns].map(|ns| ns as f64 / (last.elapsed_ns - first.elapsed_ns) as f64);
        println!(
            "vCPU {}: {guest_ns} ns guest, {host_user_ns} host_user: {user:.4}, {host_kernel_ns} host_kernel, \
             {blocked_ns} blocked: {blocked:.4}, {moved} bytes moved",
            last.index
        );
        // I/O on a vCPU thread would be seen as whatever it is. Parsing a request would be host_user; a transfer would be bytes
        // moved by that thread, whose own are eventfds' of 8 bytes for the console: a hundredth of the disk is far more than these,
        // and far less than the guest writes. Waiting for a disk, in a flush for instance, would be blocked; and what is
        // submitted to io_uring has workers that are named after who submitted it.
        assert!(user < 0.02, "host_user has a share of {user}: {:?}", grown(first, last));
        assert!(
            blocked < 0.02,
            "blocked has a share of {blocked}: {:?}",
            grown(first, last)
        );
        assert!(
            moved < MIB_OF_DISK * MIB / 100,
            "vCPU {} moved {moved} bytes",
            last.index
        );
        assert!(
            !owners.contains(&last.tid.to_string()),
            "vCPU {} submits: {owners:?}",
            last.index
        );
    }
    let (status, output, stderr) = vm.process.wait();
    assert_eq!(status.code(), Some(0), "{stderr}");
    let said = said(&output, &format!("disk-verify {ms} ms"));
    println!("{drive}: {said}");
    assert!(said.ends_with(" 0 wrong"), "{said}");
    // "N pages written, N read, 0 wrong": as many as the disk has, and once more what is read in the end. A disk that stalls has
    // far fewer.
    let pages: Vec<u64> = said.split(' ').filter_map(|word| word.parse().ok()).collect();
    let disk = MIB_OF_DISK * MIB / 4096;
    assert!(pages[0] >= disk && pages[1] >= 2 * disk, "{said}; the disk has {disk}");
}

#[test]
fn a_minute_of_io_uring_load_with_a_pause_each_second_corrupts_nothing() {
    require_bed!(nohz_full);
    load_with_pauses(60, &json!({ "io_engine": "Async", "cache_type": "Writeback" }));
}

#[test]
fn load_by_the_sync_engine_with_a_pause_each_second_corrupts_nothing() {
    require_bed!(nohz_full);
    load_with_pauses(15, &json!({ "io_engine": "Sync", "cache_type": "Writeback" }));
}

#[test]
fn a_limited_disk_gives_its_rate_within_5_percent_over_10_s() {
    require_bed!(nohz_full);
    let folder = Folder::new();
    // 2 MiB/s; the bucket's first filling is 1 % of 10 s.
    let limit = json!({ "bandwidth": { "size": 2 * MIB / 10, "refill_time": 100 } });
    let drive = drives(&image(&folder, 16), &json!({ "rate_limiter": limit }));
    let mut vm = Vm::serve_debian("disk-read:10000,poweroff", drive);
    let (status, output, stderr) = vm.process.wait();
    assert_eq!(status.code(), Some(0), "{stderr}");
    let said = said(&output, "disk-read 10000 ms");
    // "N bytes in N us"
    let numbers: Vec<f64> = said.split(' ').filter_map(|word| word.parse().ok()).collect();
    let rate = numbers[0] / numbers[1] * 1e6 / (2 * MIB) as f64;
    println!("{said}: {rate:.3} of the limit");
    assert!((0.95..=1.05).contains(&rate), "{rate} of the limit: {said}");
}

/// What a limited device gets through in a second, as a share of its limit, by the counters of the metrics in `file`.
///
/// Its driver always has more to ask for. A bucket that fills in a second makes good for what the emulated host, when it is
/// busy, holds the guest up; full at the start, it has to be empty first.
fn share(vm: &Vm, file: &Path, pointer: &str, limit: u64) -> f64 {
    std::thread::sleep(Duration::from_secs(2));
    let share = vm.rate(file, pointer, Duration::from_secs(10)) / limit as f64;
    println!("{pointer}: {share:.3} of the limit");
    share
}

#[test]
fn a_disk_limited_in_operations_writes_at_its_rate_within_5_percent_over_10_s_and_a_patch_limits_its_bytes() {
    require_bed!(nohz_full);
    const OPS: u64 = 20;
    let folder = Folder::new();
    let lines = folder.join("metrics");
    let per_second = |rate: u64| json!({ "size": rate, "refill_time": 1000 });
    let limits = json!({ "rate_limiter": { "ops": per_second(OPS) } });
    let mut sections = drives(&image(&folder, 16), &limits);
    sections["metrics"] = json!({ "metrics_path": lines });
    let mut vm = Vm::serve_debian("disk-write:600000", sections);
    vm.process.wait_for("chronovisor guest: disk-write");
    let writes = share(&vm, &lines, "/block_disk/write_count", OPS);
    assert!((0.95..=1.05).contains(&writes), "{writes} of the limit");

    // A bucket of size 0 is none.
    let limits = json!({ "bandwidth": per_second(2 * MIB), "ops": { "size": 0, "refill_time": 0 } });
    let update = json!({ "drive_id": "disk", "rate_limiter": limits });
    let answer = vm.ask("PATCH", "/drives/disk", Some(&update.to_string()));
    assert_eq!(answer.status, 204, "{}", answer.fault());
    let bytes = share(&vm, &lines, "/block_disk/write_bytes", 2 * MIB);
    assert!((0.95..=1.05).contains(&bytes), "{bytes} of the new limit");
}

/// Its file system is made by a guest of its own; its init says where the root is.
#[test]
fn a_root_drive_with_a_partuuid_is_booted_from_that_partition() {
    require_bed!(nohz_full);
    let folder = Folder::new();
    let path = image(&folder, 16);
    // A DOS partition table: the disk's signature, one partition from 1 MiB to the end, and the mark at the end.
    let mut sector = [0; 512];
    sector[440..444].copy_from_slice(&0x0eaa_91a0_u32.to_le_bytes());
    sector[450] = 0x83;
    sector[454..458].copy_from_slice(&2048_u32.to_le_bytes());
    sector[458..462].copy_from_slice(&(15 * 2048_u32).to_le_bytes());
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    File::options()
        .write(true)
        .open(&path)
        .and_then(|mut disk| disk.write_all(&sector))
        .expect("a partition table");

    let disk = path.display().to_string();
    let mut vm = Vm::debian("disk-read:0,shell", ["--disk", &disk]);
    let commands = [
        "set -e; busybox mke2fs /dev/vda1; busybox mount -t ext4 /dev/vda1 /tmp",
        "cd /tmp; busybox mkdir bin dev proc sys; busybox cp /bin/busybox bin",
        r"busybox printf '#!/bin/busybox sh\nbusybox cat /proc/mounts\nbusybox poweroff -f\n' > starts",
        "busybox chmod +x starts; cd /; busybox umount /tmp; exec busybox poweroff -f",
    ];
    vm.process.wait_for("guest# ");
    vm.process.type_in(&(commands.join("\n") + "\n"));
    let (status, output, _) = vm.process.wait();
    assert_eq!(status.code(), Some(0), "{output}");

    let more = json!({ "is_root_device": true, "partuuid": "0eaa91a0-01" });
    let mut sections = drives(&path, &more);
    sections["boot-source"] = json!({
        "kernel_image_path": bed::file("vmlinux"),
        "initrd_path": bed::file("guest.cpio"),
        "boot_args": "console=ttyS0 reboot=k panic=-1 quiet noxsave init=/starts",
    });
    let mut vm = Vm::serve_debian("", sections);
    vm.process.wait_for("/dev/vda1 / ext4 rw");
    assert_eq!(vm.process.wait().0.code(), Some(0));
}
