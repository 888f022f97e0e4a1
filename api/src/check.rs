//! `chronovisor check`: how well this host can run guests and tell their time, and what to change.
//!
//! What the host says of itself is judged, nothing is changed. That a CPU is named by `nohz_full=` does not prove that its tick
//! stops: a reading's `tick_stopped` tells; with `--api-sock`, so does what disturbs the vCPUs of a microVM that runs.

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::Path;

use accounting::disturbance::{self, Disturbance};
use accounting::host::{CpuSet, cpu_list};
use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use vmm::host::NoBpf;

use crate::cli::Check;
use crate::client::Client;
use crate::exit;
use crate::host::Host;

/// Says it. The status is 0 when guests can run.
///
/// # Errors
/// The host's own account of itself cannot be read, or no microVM answers on the socket given.
pub fn check(args: &Check) -> Result<u8> {
    let host = Host::read(vmm::host::kvm()).context("the host's CPUs cannot be read")?;
    // The programs would run at the exits of the microVM that is asked after.
    let bpf = args.api_sock.is_none().then(vmm::host::bpf);
    let mut findings = judge(&host, bpf, &disturbance::of_process());
    if let Some(path) = &args.api_sock {
        findings.extend(microvm(path)?);
    }
    let guests_run = findings.iter().all(|finding| finding.verdict != Verdict::Error);
    let mut out = std::io::stdout().lock();
    if args.json {
        let report = Report {
            guests_run,
            findings: &findings,
            host: &host,
        };
        writeln!(out, "{}", serde_json::to_string(&report)?)?;
    } else {
        out.write_all(text(&findings).as_bytes())?;
    }
    Ok(if guests_run { 0 } else { exit::FAILED })
}

/// With `--json`.
#[derive(Serialize)]
struct Report<'a> {
    guests_run: bool,
    findings: &'a [Finding],
    host: &'a Host,
}

/// One thing looked at.
#[derive(Debug, Serialize)]
struct Finding {
    what: &'static str,
    verdict: Verdict,
    says: String,
    /// What to change, if anything.
    #[serde(rename = "do", skip_serializing_if = "Option::is_none")]
    advice: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Verdict {
    /// As good as it gets.
    Ok,
    /// Guests run; their time is known less well, or costs more.
    Warning,
    /// Guests do not run.
    Error,
}

fn text(findings: &[Finding]) -> String {
    let mut text = String::new();
    for Finding {
        what,
        verdict,
        says,
        advice,
    } in findings
    {
        let mark = match verdict {
            Verdict::Ok => "ok",
            Verdict::Warning => "warning",
            Verdict::Error => "error",
        };
        let _ = writeln!(text, "{mark:<8}{what:<11}{says}");
        if let Some(advice) = advice {
            let _ = writeln!(text, "{:<19}{advice}", "");
        }
    }
    text
}

fn judge(host: &Host, bpf_tried: Option<Result<(), NoBpf>>, disturbances: &[Disturbance]) -> Vec<Finding> {
    let mut findings = vec![kvm(host), cpus(host), nohz_full(host)];
    findings.extend(isolated(host));
    findings.push(tick(host));
    findings.extend(disturbances.iter().map(disturbance));
    findings.push(bpf(bpf_tried));
    findings.extend(huge_pages(host));
    findings
}

fn ok(what: &'static str, says: String) -> Finding {
    Finding {
        what,
        verdict: Verdict::Ok,
        says,
        advice: None,
    }
}

fn warning(what: &'static str, says: String, advice: String) -> Finding {
    Finding {
        what,
        verdict: Verdict::Warning,
        says,
        advice: Some(advice),
    }
}

fn kvm(host: &Host) -> Finding {
    let kvm = &host.kvm;
    let modules = if kvm.modules.is_empty() {
        "built in".to_owned()
    } else {
        kvm.modules.join(", ")
    };
    let error = |says, advice| Finding {
        what: "KVM",
        verdict: Verdict::Error,
        says,
        advice,
    };
    match &kvm.error {
        Some(says) => error(says.clone(), None),
        None if kvm.runs_stock_kernels != Some(true) => error(
            format!(
                "/dev/kvm ({modules}) cannot run a distribution's kernel: it lacks instructions that kernels execute"
            ),
            Some(
                "use a host with VMX or SVM: enable virtualisation in its firmware, or nesting if it is a guest"
                    .to_owned(),
            ),
        ),
        None => ok("KVM", format!("/dev/kvm ({modules}) runs stock kernels")),
    }
}

fn cpus(host: &Host) -> Finding {
    let (online, allowed) = (host.cpus.online.len(), host.cpus.allowed.len());
    let says = format!("{online} online, {allowed} for this process");
    if allowed > 1 {
        ok("CPUs", says)
    } else {
        let advice = "a vCPU shares its CPU with everything else here: its waiting time will show it";
        warning("CPUs", says, advice.to_owned())
    }
}

fn nohz_full(host: &Host) -> Finding {
    let what = "nohz_full";
    let wider = "guest time is told within wider bounds (source oncpu)";
    // The first CPU is kept for housekeeping: the kernel's timekeeping stays on a CPU that ticks.
    let others = CpuSet::from_iter(host.cpus.present.iter().copied().skip(1));
    let boot = format!(
        "boot the host with nohz_full={0} isolcpus={0} on its command line",
        cpu_list(&others)
    );
    match &host.cpus.nohz_full {
        _ if others.is_empty() => warning(
            what,
            format!("not possible with a single CPU: {wider}"),
            "use a host with more CPUs".to_owned(),
        ),
        None => warning(
            what,
            format!("this kernel was built without CONFIG_NO_HZ_FULL: {wider}"),
            format!("use a kernel that has it, as Debian's does, and {boot}"),
        ),
        Some(set) if set.is_empty() => warning(what, format!("no CPU is tickless: {wider}"), boot),
        Some(set) if set.is_disjoint(&host.cpus.allowed) => warning(
            what,
            format!(
                "CPUs {} are tickless, but this process may not use them: {wider}",
                cpu_list(set)
            ),
            "run in a cpuset that holds them".to_owned(),
        ),
        // nohz_full= implies rcu_nocbs= (Documentation/admin-guide/kernel-parameters.txt).
        Some(set) => ok(
            what,
            format!(
                "CPUs {}: guest time comes from the kernel's own accounting (source vtime)",
                cpu_list(set)
            ),
        ),
    }
}

/// Tickless CPUs that the scheduler may still fill with other tasks.
fn isolated(host: &Host) -> Option<Finding> {
    let tickless = host.cpus.nohz_full.as_ref().filter(|set| !set.is_empty())?;
    let shared = CpuSet::from_iter(tickless.difference(&host.cpus.isolated).copied());
    Some(if shared.is_empty() {
        ok("isolated", format!("CPUs {}", cpu_list(&host.cpus.isolated)))
    } else {
        let list = cpu_list(&shared);
        let says = format!("other tasks may run on the tickless CPUs {list}, and bring the tick back");
        warning(
            "isolated",
            says,
            format!("boot the host with isolcpus={list}, or put them into an isolated cpuset partition"),
        )
    })
}

fn tick(host: &Host) -> Finding {
    let hz = 1_000_000_000_u64.checked_div(host.tick_ns).unwrap_or_default();
    ok("tick", format!("{} us (HZ={hz})", host.tick_ns / 1000))
}

/// What spoils a tickless CPU for all vCPUs of this process, and of the processes that inherit its limits and its cgroup.
fn disturbance(disturbance: &Disturbance) -> Finding {
    warning(subject(disturbance.kind()), disturbance.says(), disturbance.advice())
}

/// What a disturbance is of, by its kind.
fn subject(kind: &str) -> &'static str {
    match kind {
        "rlimit_cpu" => "limits",
        "cfs_quota" => "quota",
        "cpu_timer" => "timers",
        "second_task" => "neighbour",
        "moved_affinity" => "affinity",
        _ => "tick",
    }
}

/// Not a shortcoming where it is absent: it has to be asked for.
fn bpf(tried: Option<Result<(), NoBpf>>) -> Finding {
    let says = match tried {
        Some(Ok(())) => {
            "guest time can be had to a few microseconds, at a cost to every exit (--gtime-source bpf)".to_owned()
        }
        Some(Err(why)) => format!("not here: {why}; --gtime-source bpf and auto take the next source"),
        None => "not tried beside the microVM, which that would disturb: do so without --api-sock".to_owned(),
    };
    ok("bpf", says)
}

/// What is used of `GET /host`.
#[derive(Deserialize)]
struct Answer {
    disturbances: Vec<Noticed>,
}

/// A disturbance, as the microVM's process noticed it.
#[derive(Deserialize)]
struct Noticed {
    kind: String,
    vcpu: Option<u32>,
    says: String,
}

/// What disturbs the microVM on the socket `path`, as its own process sees it.
fn microvm(path: &Path) -> Result<Vec<Finding>> {
    let answer = Client::connect(path)?
        .get("/host")
        .with_context(|| path.display().to_string())?;
    let answer: Answer = serde_json::from_slice(&answer)
        .with_context(|| format!("{}: what answers GET /host is not chronovisor", path.display()))?;
    Ok(noticed(answer, path))
}

fn noticed(answer: Answer, path: &Path) -> Vec<Finding> {
    if answer.disturbances.is_empty() {
        return vec![ok("microVM", format!("{}: nothing disturbs it", path.display()))];
    }
    let finding = |Noticed { kind, vcpu, says }| {
        let whose = vcpu.map_or_else(|| "the microVM".to_owned(), |index| format!("vCPU {index}"));
        Finding {
            what: subject(&kind),
            verdict: Verdict::Warning,
            says: format!("{whose}: {says}"),
            // Its line ends in what to do.
            advice: None,
        }
    };
    answer.disturbances.into_iter().map(finding).collect()
}

fn huge_pages(host: &Host) -> Option<Finding> {
    let mode = host.transparent_hugepage.as_deref()?;
    Some(if mode == "never" {
        let says = "transparent huge pages are off: guests start slower, with more page faults".to_owned();
        warning(
            "huge pages",
            says,
            "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled".to_owned(),
        )
    } else {
        ok("huge pages", format!("transparent huge pages: {mode}"))
    })
}

#[cfg(test)]
mod tests {
    use accounting::host::HostCpus;

    use super::*;
    use crate::host::Kvm;

    /// A host as good as it gets: CPUs 1 to 3 tickless and isolated.
    fn good() -> Host {
        let (all, quiet) = (CpuSet::from_iter(0..4), CpuSet::from_iter(1..4));
        Host {
            cpus: HostCpus {
                present: all.clone(),
                online: all.clone(),
                nohz_full: Some(quiet.clone()),
                isolated: quiet,
                allowed: all.clone(),
                affinity: all,
            },
            tick_ns: 4_000_000,
            kvm: Kvm {
                error: None,
                modules: vec!["kvm_amd".to_owned()],
                runs_stock_kernels: Some(true),
            },
            transparent_hugepage: Some("madvise".to_owned()),
        }
    }

    #[test]
    fn a_good_host_needs_no_advice() {
        let findings = judge(&good(), Some(Ok(())), &[]);
        assert!(
            findings.iter().all(|f| f.verdict == Verdict::Ok && f.advice.is_none()),
            "{}",
            text(&findings)
        );
        assert!(text(&findings).contains("HZ=250"));
    }

    #[test]
    fn why_bpf_cannot_be_had_is_said_and_held_against_nobody() {
        let finding = bpf(Some(Err(NoBpf::Silent)));
        assert!(
            finding.says.contains("not here: KVM's tracepoints stay silent"),
            "{finding:?}"
        );
        assert_eq!(finding.verdict, Verdict::Ok);
    }

    #[test]
    fn each_shortcoming_is_found_and_comes_with_what_to_do() {
        type Case = (fn(&mut Host), &'static str, Verdict, &'static str);
        use Verdict::{Error, Warning};
        let table: [Case; 8] = [
            (
                |h| h.kvm.error = Some("/dev/kvm does not exist".to_owned()),
                "KVM",
                Error,
                "does not exist",
            ),
            (|h| h.kvm.runs_stock_kernels = Some(false), "KVM", Error, "VMX or SVM"),
            (
                |h| h.cpus.allowed = CpuSet::from([1]),
                "CPUs",
                Warning,
                "shares its CPU",
            ),
            (|h| h.cpus.nohz_full = None, "nohz_full", Warning, "CONFIG_NO_HZ_FULL"),
            (
                |h| h.cpus.nohz_full = Some(CpuSet::new()),
                "nohz_full",
                Warning,
                "nohz_full=1-3 isolcpus=1-3",
            ),
            (|h| h.cpus.allowed = CpuSet::from([0]), "nohz_full", Warning, "cpuset"),
            (
                |h| h.cpus.isolated = CpuSet::from([2]),
                "isolated",
                Warning,
                "isolcpus=1,3",
            ),
            (
                |h| h.transparent_hugepage = Some("never".to_owned()),
                "huge pages",
                Warning,
                "madvise",
            ),
        ];
        for (spoil, what, verdict, says) in table {
            let mut host = good();
            spoil(&mut host);
            let findings = judge(&host, Some(Ok(())), &[]);
            let finding = findings.iter().find(|finding| finding.what == what).unwrap();
            assert_eq!(finding.verdict, verdict, "{finding:?}");
            let said = format!("{} {}", finding.says, finding.advice.as_deref().unwrap_or_default());
            assert!(said.contains(says), "{said}");
        }
    }

    #[test]
    fn what_spoils_a_tickless_cpu_is_a_warning_of_its_own() {
        let found = [
            Disturbance::RlimitCpu { limit_s: 60 },
            Disturbance::CfsQuota {
                file: "/c/cpu.max".into(),
                quota_us: 1,
                period_us: 2,
            },
        ];
        let text = text(&judge(&good(), Some(Ok(())), &found));
        for line in [
            "warning limits     CPU time of the process is limited to 60 s",
            "ulimit -t unlimited",
            "warning quota      /c/cpu.max allows",
        ] {
            assert!(text.contains(line), "{text}");
        }
    }

    #[test]
    fn what_a_microvm_says_of_itself_is_said_with_whose_it_is() {
        let path = Path::new("/run/api");
        let of = |json: &str| text(&noticed(serde_json::from_str(json).unwrap(), path));
        let found = of(
            r#"{"tick_ns": 1, "disturbances": [{"kind": "rlimit_cpu", "says": "60 s; lift it"},
            {"kind": "second_task", "vcpu": 1, "says": "another task; move it"}]}"#,
        );
        assert_eq!(
            found,
            "warning limits     the microVM: 60 s; lift it\nwarning neighbour  vCPU 1: another task; move it\n"
        );
        let none = of(r#"{"disturbances": []}"#);
        assert_eq!(none, "ok      microVM    /run/api: nothing disturbs it\n");
    }
}
