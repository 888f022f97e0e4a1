//! docs/accuracy.md.

use std::fmt::Write;

use super::row::{Measured, Row, ms, percent};
use crate::machine::Machine;

const WHAT: &str = "\
![How far each figure is from the truth](accuracy.svg)

**Truth.** The guests are a few dozen bytes that read the TSC over and over. A step from one read to the next of at most 10 us
is time that the guest burned; a longer one is time that it lost: its thread was preempted, or the host handled an interrupt,
and the guest cannot know which part of the step was its own. So the truth is between what it burned and that plus what it
lost, and no more than its thread was on a CPU: both are in the table. Where KVM's tracepoints speak, kvm_entry and kvm_exit are
recorded as well, stamped by the same TSC. Errors are against the trace, or where there is none against the middle of
what the guest says. Of three runs that one is shown whose guests were
disturbed least, by their own figures and by how long they waited for their CPU.

**Entries and exits.** Time in `KVM_RUN` that the guest did not see: KVM, before the guest's first instruction and after its last.
Guest time, to the kernel and to every reading, begins where KVM has decided to enter the guest, so a part of it is guest
time, which the trace sees and the guest does not. It is a microsecond an exit on a processor that virtualises, and 20 to 100 in an emulator or on a software backend.

**Trace.** Up to Linux 6.1, KVM on AMD tells kvm_exit when it begins to handle the exit, after the kernel has ended guest time: where
there are many exits the trace, and *bpf* with it, say more than the kernel's vtime does.

**Truth inside.** Whether an interval can hold the truth: it does not end below what the guest burned, nor begin above that plus what it
lost, entries and exits.

**Where.** In the emulated host, whose kernel is Debian's and whose KVM is kvm-amd, CPU 0 ticks and CPU 1 is `nohz_full`. On a ticking CPU
the kernel samples; on a tickless one it stamps. An emulator's CPU is not always there: to the guest that is lost time.

**/proc.** `gtime` is field 43 of `/proc/PID/task/TID/stat`: on a CPU whose tick samples, sampled; on a tickless one, the kernel's
vtime. `/proc/stat` is user, nice and system of the CPU's line, whoever ran there. Both come in steps of 10 ms.

**Workloads.** *spin*: burns 2 s. *exit storm*: exits after each 50 us, 40,000 times. *timer sleeper*: sleeps for 7 ms and burns for 3 ms, by
turns; the sleep is an exit, and the VMM's. *two on one CPU*: two spinning guests pinned to one CPU. *tick dodger*: sleeps across
each tick of the host, and burns for 3 of the 4 ms between.
";

/// The whole document.
pub fn render(rows: &[Row], machine: &Machine) -> String {
    let Machine { date, cpus, kernel } = machine;
    let mut text = format!(
        "# Accuracy\n\nGuest time as each way of telling it has it, beside what the guest itself knows. Written by `cargo xtask accuracy` \
         on {date}, on {cpus}, Linux {kernel}.\n\n{WHAT}\n"
    );
    text += "| where | workload | guest, ms | trace, ms | entries and exits, ms | /proc gtime, ms | error | /proc/stat, ms | source | \
             point, ms | error | lower, ms | upper, ms | truth inside |\n\
             |---|---|--:|--:|--:|--:|--:|--:|---|--:|--:|--:|--:|---|\n";
    for row in rows {
        write_row(&mut text, row).expect("a string takes everything");
    }
    text
}

fn write_row(text: &mut String, row: &Row) -> std::fmt::Result {
    let Measured { truth, proc, .. } = &row.measured;
    for (n, source) in row.measured.sources.iter().enumerate() {
        if n == 0 {
            write!(
                text,
                "| {} | {} | {} to {} | {} | {} | {} | {} | {} ",
                row.place(),
                row.name(),
                ms(truth.burned_ns),
                ms(truth.most_ns),
                truth.trace_ns.map_or("-".to_owned(), ms),
                ms(truth.exits_ns),
                proc.gtime_ns / 1_000_000,
                percent(truth.error(proc.gtime_ns)),
                proc.cpu_charged_ns / 1_000_000,
            )?;
        } else {
            write!(text, "| | | | | | | | ")?;
        }
        writeln!(
            text,
            "| {} | {} | {} | {} | {} | {} |",
            source.source,
            ms(source.point_ns),
            percent(truth.error(source.point_ns)),
            ms(source.lower_ns),
            ms(source.upper_ns),
            if truth.inside(source) { "yes" } else { "**no**" },
        )?;
    }
    Ok(())
}
