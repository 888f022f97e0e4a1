//! A whole Debian as the guest, from the disk that `cargo xtask rootfs` makes: it boots to its login, and what it wrote is
//! there at its next boot.

use std::path::Path;
use std::process::Command;

use tests::bed;
use tests::require_bed;
use tests::vm::Vm;

/// The disk in the emulated host.
const DISK: &str = "/dev/vda";

/// Ends the test, in the one line that is counted, where there is no disk.
fn has_disk() -> bool {
    let there = Path::new(DISK).exists();
    if !there {
        bed::skipped(
            "nohz-full",
            "this host has no /dev/vda: cargo xtask rootfs could not make the disk",
        );
    }
    there
}

/// A guest at its shell.
struct Guest {
    vm: Vm,
    commands: u32,
}

impl Guest {
    /// Boots, with two vCPUs, the disk and an interface, and logs in.
    fn boot() -> Self {
        let path = |name: &str| bed::file(name).display().to_string();
        let vm = Vm::run([
            "--kernel",
            &path("vmlinux"),
            "--initrd",
            &path("guest.cpio"),
            "--cmdline",
            "console=ttyS0 reboot=k panic=-1 quiet noxsave",
            "--disk",
            DISK,
            "--net",
            "tap=rootfs0",
            "--cpus",
            "2",
            "--mem",
            "384M",
        ]);
        let mut guest = Self { vm, commands: 0 };
        for (asks, answer) in [(" login: ", "root\n"), ("Password: ", "chronovisor\n"), (":~# ", "")] {
            guest.vm.process.wait_for(asks);
            guest.vm.process.type_in(answer);
        }
        guest
    }

    /// What `command` prints.
    fn run(&mut self, command: &str) -> String {
        self.commands += 1;
        // The terminal echoes what is typed: only the shell makes one number of it.
        self.vm
            .process
            .type_in(&format!("{command}; echo \"end $((1000 + {}))\"\n", self.commands));
        let output = self.vm.process.wait_for(&format!("end {}", 1000 + self.commands));
        let before = output.rfind(&format!("{}))\"", self.commands)).map_or(0, |at| at);
        output[before..].replace('\r', "\n")
    }

    fn sum(&mut self) -> String {
        let output = self.run("sha256sum /root/file");
        let words = output.split_whitespace();
        let sum = words
            .into_iter()
            .find(|word| word.len() == 64 && word.bytes().all(|byte| byte.is_ascii_hexdigit()));
        sum.unwrap_or_else(|| panic!("no sum in {output}")).to_owned()
    }

    fn ends_with(mut self, status: i32) {
        let (ended, output, stderr) = self.vm.process.wait();
        assert_eq!(ended.code(), Some(status), "{stderr}\n{output}");
    }
}

/// Whether the disk's file system is whole, by one who only looks.
fn check_disk() {
    let output = Command::new("e2fsck")
        .args(["-f", "-n", DISK])
        .output()
        .expect("e2fsck");
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "{said}\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

#[test]
fn what_a_debian_guest_wrote_and_synced_is_there_after_ctrl_alt_del_and_its_file_system_is_whole() {
    require_bed!(nohz_full);
    tests::require_no_jail!("its disk is a device of the host's, which is root's");
    if !has_disk() {
        return;
    }
    let mut guest = Guest::boot();
    let nproc = guest.run("nproc");
    assert!(nproc.lines().any(|line| line == "2"), "two vCPUs: {nproc}");
    // The login does not wait for the interface.
    let addresses = guest.run("timeout 60 sh -c 'until ip -4 -o address show dev eth0 | grep inet; do sleep 1; done'");
    assert!(addresses.contains("172.16.0.2/30"), "{addresses}");
    let greeting = guest.run("timeout 60 bash -c 'read -r line </dev/tcp/172.16.0.2/22; echo $line'");
    assert!(greeting.contains("SSH-2.0-OpenSSH"), "{greeting}");
    let written = guest.run("dd if=/dev/urandom of=/root/file bs=64k count=64 && sync");
    assert!(written.contains("64+0 records out"), "{written}");
    let sum = guest.sum();
    let asked = guest
        .vm
        .ask("PUT", "/actions", Some(r#"{"action_type": "SendCtrlAltDel"}"#));
    assert_eq!(asked.status, 204, "{}", asked.fault());
    // systemd takes Ctrl-Alt-Del for a restart, which is where a microVM ends.
    guest.ends_with(3);
    check_disk();

    let mut guest = Guest::boot();
    assert_eq!(guest.sum(), sum);
    guest.vm.process.type_in("systemctl poweroff\n");
    guest.ends_with(0);
    check_disk();
}
