//! What each way of telling a vCPU's guest time says, beside what is known to be true of it: every workload, on
//! each kind of CPU that this host has. Prints one row of JSON a line; `cargo xtask accuracy` makes the table and the plot.

use accounting::host::HostCpus;
use accounting::reading::{Bounds, Source};
use anyhow::{Context, Result};
use serde_json::{Value, json};
use tests::kernel::{Kernel, release};
use tests::workload::{ALL, Burned, Workload, run_traced};

/// Runs of one workload; that one is told in which the host disturbed the guests least.
const RUNS: usize = 3;

fn main() -> Result<()> {
    let host = HostCpus::read().context("cannot read the host's CPUs")?;
    let (tickless, ticking): (Vec<u32>, Vec<u32>) = host.allowed.iter().partition(|&&cpu| host.is_nohz_full(cpu));
    for cpu in [ticking.last(), tickless.first()].into_iter().flatten() {
        for workload in ALL {
            for (vcpu, burned) in least_disturbed(&workload, *cpu)?.iter().enumerate() {
                let mut row = row(burned);
                row["kernel_release"] = release().into();
                row["cpu"] = (*cpu).into();
                row["tickless"] = host.is_nohz_full(*cpu).into();
                row["workload"] = workload.name.into();
                row["guests"] = workload.guests.into();
                row["vcpu"] = vcpu.into();
                println!("{row}");
            }
        }
    }
    Ok(())
}

/// Judged by the guests and by the scheduler's exact clock, and not by what anybody says of guest time: by how well the guests
/// know what they burned, how many ticks they failed to dodge, and how long one that is alone waited for its CPU.
fn least_disturbed(workload: &Workload, cpu: u32) -> Result<Vec<Burned>> {
    let ppm = |part: u64, of: u64| part * 1_000_000 / of.max(1);
    let disturbed = |guests: &Vec<Burned>| -> u64 {
        let each = guests.iter().map(|guest| {
            let waited_ns = match workload.guests {
                1 => guest.counted(|k| k.run_delay_ns),
                _ => 0,
            };
            ppm(guest.most_ns() - guest.burned_ns + waited_ns, guest.burned_ns)
                + ppm(guest.dodged.caught, guest.dodged.slices)
        });
        each.sum()
    };
    let runs = (0..RUNS)
        .map(|_| run_traced(workload, cpu))
        .collect::<Result<Vec<_>>>()?;
    Ok(runs.into_iter().min_by_key(disturbed).expect("at least one"))
}

fn row(burned: &Burned) -> Value {
    let kernel = |figure: fn(&Kernel) -> u64| burned.counted(figure);
    let truth = |source| {
        let Bounds { lower, upper } = burned.truth(source);
        json!({ "lower_ns": lower, "upper_ns": upper })
    };
    let sources = burned.grown().into_iter().map(|figure| {
        json!({
            "source": figure.source.name(),
            "truth": truth(figure.source),
            "point_ns": figure.point,
            "lower_ns": figure.lower,
            "upper_ns": figure.upper,
        })
    });
    json!({
        "guest": { "burned_ns": burned.burned_ns, "most_ns": burned.most_ns(), "exits_ns": burned.exits_ns },
        "proc": {
            // The kernel's own guest time turns where `vtime` does.
            "truth": truth(Source::Vtime),
            "gtime_ns": kernel(|k| k.gtime_ns),
            "utime_ns": kernel(|k| k.utime_ns),
            "stime_ns": kernel(|k| k.stime_ns),
            "cpu_charged_ns": kernel(|k| k.charged_ns),
        },
        "waited_ns": kernel(|k| k.run_delay_ns),
        "slices": burned.dodged.slices,
        "caught": burned.dodged.caught,
        "sources": sources.collect::<Vec<_>>(),
    })
}
