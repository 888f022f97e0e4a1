//! docs/accuracy.md.

use std::fmt::Write;

use super::row::{Guest, Row, ms, percent};
use crate::machine::Machine;

const WHAT: &str = "\
![How far each figure is from the truth](accuracy.svg)

**Truth.** It is an interval, and each figure has its own: error and *truth inside* are by that, and nothing else. The error is
from its middle, which is *known to* half of its width: what is off by less may be right.

* In the emulated host, where the kernel's tracer can be asked, it is by stamps of the TSC at the very turns that a figure is
  of. *bpf* stamps at KVM's tracepoints: one recording of them was begun before its programs were attached and one after,
  so each of its stamps lies between two of theirs. *vtime*, *oncpu* and `/proc` tell the kernel's own guest time: on the
  tickless CPU, where the kernel stamps, probes at the first instruction and at the return of `vtime_guest_enter` and
  `vtime_guest_exit` enclose those stamps. On the ticking CPU there are none, and KVM's tracepoints are the truth of all figures.
* Elsewhere it is what the guest says. The guests are a few dozen bytes that read the TSC over and over. A step from one read to the
  next of at most 10 us is time that it burned; a longer one is time that it lost: its thread was preempted, or the host
  handled an interrupt, and the guest cannot know which part of the step was its own. So it burned what it is sure of, or up to
  that plus what it lost, and no more than its thread was on a CPU: column *guest*.

All figures are what was added since the guest was ready to burn. Of three runs that one is shown whose guests were disturbed least, by
their own figures and by how long they waited for their CPU.

**Why bpf and vtime differ.** They are stamps of two turns that are not at the same place. The kernel's guest time ends as soon as
the processor is back from the guest. Up to Linux 6.1, KVM on AMD passes kvm_exit only when it begins to handle the exit, so
to *bpf* guest time is longer by all that is between, with the interrupts handled there; in an emulator some 10 us, which 40,000 exits
make visible. Each is held against its own turns.

**What the tracer adds.** Three recordings slow each entry and exit down, for all figures alike: *entries and exits* has it in it. Time
between the two stamps that enclose a turn is the width of the truth.

**Entries and exits.** Time in `KVM_RUN` that the guest did not see: KVM, before the guest's first instruction and after its last.
Guest time, to the kernel and to every reading, begins where KVM has decided to enter the guest, so a part of it is guest
time, which the stamps see and the guest does not. It is 20 to 100 us an exit in an
emulator or on a software backend. *oncpu* cannot tell it from guest time, and is mostly off by that.

**Where.** In the emulated host, whose kernel is Debian's and whose KVM is kvm-amd, CPU 0 ticks and CPU 1 is `nohz_full`. On a ticking CPU
the kernel samples; on a tickless one it stamps. An emulator's CPU is not always there: to the guest that is lost time.

**/proc.** `gtime` is field 43 of `/proc/PID/task/TID/stat`: on a CPU whose tick samples, sampled; on a tickless one, the kernel's
vtime. `/proc/stat` is user, nice and system of the CPU's line, whoever ran there. Both come in steps of 10 ms.

**Workloads.** *spin*: burns 2 s. *exit storm*: exits after each 50 us, 40,000 times. *timer sleeper*: sleeps for 7 ms and burns for 3 ms, by
turns; the sleep is an exit, and the VMM's. *two on one CPU*: two spinning guests pinned to one CPU. *tick dodger*: sleeps across
each tick of the host, and burns for 3.4 of the 4 ms between.
";

/// The whole document.
pub fn render(rows: &[Row], machine: &Machine) -> String {
    let Machine { date, cpus, kernel } = machine;
    let mut text = format!(
        "# Accuracy\n\nGuest time as each way of telling it has it, beside what is known to be true. Written by `cargo xtask accuracy` \
         on {date}, on {cpus}, Linux {kernel}.\n\n{WHAT}\n"
    );
    text += "| where | workload | guest, ms | entries and exits, ms | by | says, ms | truth, ms | known to | error | claims, ms | truth inside |\n\
             |---|---|--:|--:|---|--:|--:|--:|--:|--:|---|\n";
    for row in rows {
        write_row(&mut text, row).expect("a string takes everything");
    }
    text
}

fn write_row(text: &mut String, row: &Row) -> std::fmt::Result {
    let Guest {
        burned_ns,
        most_ns,
        exits_ns,
    } = row.measured.guest;
    for (n, figure) in row.figures().into_iter().enumerate() {
        if n == 0 {
            let (place, name) = (row.place(), row.name());
            let (burned, exits) = (span([burned_ns, most_ns]), ms(exits_ns));
            write!(text, "| {place} | {name} | {burned} | {exits} ")?;
        } else {
            write!(text, "| | | | ")?;
        }
        let none = || "-".to_owned();
        let (by, says) = match figure.by {
            "proc" => ("/proc gtime", (figure.ns / 1_000_000).to_string()),
            "stat" => ("/proc/stat", (figure.ns / 1_000_000).to_string()),
            source => (source, ms(figure.ns)),
        };
        let truth = figure
            .truth
            .map_or_else(none, |truth| span([truth.lower_ns, truth.upper_ns]));
        let known = figure
            .truth
            .map_or_else(none, |truth| format!("± {:.2} %", truth.error(truth.upper_ns)));
        let error = figure.truth.map_or_else(none, |truth| percent(truth.error(figure.ns)));
        let claim = figure.claim_ns.map_or_else(none, span);
        let inside = match figure.truth.zip(figure.claim_ns) {
            Some((truth, claim)) if truth.may_be_in(claim) => "yes",
            Some(_) => "**no**",
            None => "-",
        };
        writeln!(
            text,
            "| {by} | {says} | {truth} | {known} | {error} | {claim} | {inside} |"
        )?;
    }
    Ok(())
}

fn span([from, to]: [u64; 2]) -> String {
    format!("{} to {}", ms(from), ms(to))
}
