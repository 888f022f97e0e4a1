//! What the guest is to do: `chronovisor.do=STEP,STEP,...` on the kernel's command line.
//!
//! | step | does |
//! |---|---|
//! | `spin:MS` | keeps every CPU busy for so many milliseconds |
//! | `sleep:MS` | leaves every CPU idle |
//! | `disk-verify:MS` | writes and reads all over `/dev/vda`, which has to be zeros, and checks what it reads |
//! | `disk-read:MS` | reads `/dev/vda` and says how much |
//! | `disk-write:MS` | writes `/dev/vda` and says how much |
//! | `chatter:MS` | writes to the console for so long, while it does what follows |
//! | `hwrng:BYTES` | reads so many bytes of the entropy device |
//! | `touch:MIB` | writes to so much memory, and frees it |
//! | `balloon` | loads the balloon's driver |
//! | `vsock-echo:PORT` | takes one connection of the host's and sends back what comes |
//! | `vsock-send:PORT` | connects to the host, sends 4 MiB, and reads what comes back |
//! | `cpu-flags` | tells what the first CPU can do, as `/proc/cpuinfo` has it |
//! | `topology` | tells each CPU's siblings, as `/sys` has them: `cpu1 shares its core with 0-1` |
//! | `net-up` | loads the network's driver, gives eth0 the address 172.16.0.2/30, and says its MTU |
//! | `net-receive:PORT` | takes one connection of the host's and reads 64 MiB |
//! | `net-send:PORT` | connects to the host and sends 64 MiB |
//! | `net-flood:MS` | connects to the host's port 5003 and sends for so long |
//! | `metadata` | asks the metadata service for `/latest/meta-data/instance-id` |
//! | `repeat:N` | does what stands before it N times in all |
//! | `forever` | does what stands before it again and again |
//! | `shell` | a shell on the console, until it ends |
//! | `poweroff`, `reboot`, `panic` | ends the guest |
//!
//! A guest whose steps run out powers off.

use std::fmt;
use std::time::Duration;

/// One step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    Spin(Duration),
    Sleep(Duration),
    DiskVerify(Duration),
    DiskRead(Duration),
    DiskWrite(Duration),
    Chatter(Duration),
    NetUp,
    NetReceive(u16),
    NetSend(u16),
    NetFlood(Duration),
    Metadata,
    VsockEcho(u32),
    VsockSend(u32),
    Hwrng(usize),
    Touch(usize),
    Balloon,
    CpuFlags,
    Topology,
    PowerOff,
    Reboot,
    Shell,
    Panic,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Spin(time) => write!(f, "spin {} ms", time.as_millis()),
            Self::Sleep(time) => write!(f, "sleep {} ms", time.as_millis()),
            Self::DiskVerify(time) => write!(f, "disk-verify {} ms", time.as_millis()),
            Self::VsockEcho(port) => write!(f, "vsock-echo {port}"),
            Self::VsockSend(port) => write!(f, "vsock-send {port}"),
            Self::NetUp => f.write_str("net-up"),
            Self::NetReceive(port) => write!(f, "net-receive {port}"),
            Self::NetSend(port) => write!(f, "net-send {port}"),
            Self::NetFlood(time) => write!(f, "net-flood {} ms", time.as_millis()),
            Self::Metadata => f.write_str("metadata"),
            Self::DiskRead(time) => write!(f, "disk-read {} ms", time.as_millis()),
            Self::DiskWrite(time) => write!(f, "disk-write {} ms", time.as_millis()),
            Self::Chatter(time) => write!(f, "chatter {} ms", time.as_millis()),
            Self::Hwrng(bytes) => write!(f, "hwrng {bytes} bytes"),
            Self::Touch(mib) => write!(f, "touch {mib} MiB"),
            Self::Balloon => f.write_str("balloon"),
            Self::CpuFlags => f.write_str("cpu-flags"),
            Self::Topology => f.write_str("topology"),
            Self::PowerOff => f.write_str("poweroff"),
            Self::Reboot => f.write_str("reboot"),
            Self::Shell => f.write_str("shell"),
            Self::Panic => f.write_str("panic"),
        }
    }
}

/// The steps, and how often.
#[derive(Debug, PartialEq, Eq)]
pub struct Plan {
    repeated: Vec<Step>,
    /// `None` is for ever.
    times: Option<usize>,
    then: Vec<Step>,
}

impl Plan {
    /// Reads the kernel's command line. The last `chronovisor.do=` wins, as with the kernel's own parameters. None if there is none.
    pub fn of_command_line(line: &str) -> Result<Option<Self>, String> {
        let words = line.split_whitespace();
        let plan = words
            .filter_map(|word| word.strip_prefix("chronovisor.do="))
            .next_back();
        plan.map(Self::parse).transpose()
    }

    /// What a guest does that was told nothing.
    pub fn shell() -> Self {
        Self {
            repeated: Vec::new(),
            times: Some(0),
            then: vec![Step::Shell],
        }
    }

    /// The steps in the order they are to be done.
    pub fn steps(&self) -> impl Iterator<Item = Step> + '_ {
        let rounds = (0..).take_while(|&round: &usize| self.times.is_none_or(|times| round < times));
        rounds
            .flat_map(|_| self.repeated.iter().copied())
            .chain(self.then.iter().copied())
    }

    fn parse(plan: &str) -> Result<Self, String> {
        let mut steps = Vec::new();
        let mut repeat = None;
        for word in plan.split(',') {
            let (name, value) = word
                .split_once(':')
                .map_or((word, None), |(name, value)| (name, Some(value)));
            let number = || value.and_then(|value| value.parse::<u64>().ok());
            let time = || {
                number()
                    .map(Duration::from_millis)
                    .ok_or(format!("chronovisor.do={plan}: {word}: {name}:MILLISECONDS expected"))
            };
            let count = |what| {
                let count = number().and_then(|count| usize::try_from(count).ok());
                count.ok_or(format!("chronovisor.do={plan}: {word}: {name}:{what} expected"))
            };
            let port = || {
                let port = number().and_then(|port| u32::try_from(port).ok());
                port.ok_or(format!("chronovisor.do={plan}: {word}: {name}:PORT expected"))
            };
            let tcp_port = || {
                let port = number().and_then(|port| u16::try_from(port).ok());
                port.ok_or(format!("chronovisor.do={plan}: {word}: {name}:PORT expected"))
            };
            match name {
                "spin" => steps.push(Step::Spin(time()?)),
                "sleep" => steps.push(Step::Sleep(time()?)),
                "disk-verify" => steps.push(Step::DiskVerify(time()?)),
                "vsock-echo" => steps.push(Step::VsockEcho(port()?)),
                "vsock-send" => steps.push(Step::VsockSend(port()?)),
                "net-up" => steps.push(Step::NetUp),
                "net-receive" => steps.push(Step::NetReceive(tcp_port()?)),
                "net-send" => steps.push(Step::NetSend(tcp_port()?)),
                "net-flood" => steps.push(Step::NetFlood(time()?)),
                "metadata" => steps.push(Step::Metadata),
                "disk-read" => steps.push(Step::DiskRead(time()?)),
                "disk-write" => steps.push(Step::DiskWrite(time()?)),
                "chatter" => steps.push(Step::Chatter(time()?)),
                "hwrng" => steps.push(Step::Hwrng(count("BYTES")?)),
                "touch" => steps.push(Step::Touch(count("MIB")?)),
                "balloon" => steps.push(Step::Balloon),
                "cpu-flags" => steps.push(Step::CpuFlags),
                "topology" => steps.push(Step::Topology),
                "poweroff" => steps.push(Step::PowerOff),
                "reboot" => steps.push(Step::Reboot),
                "shell" => steps.push(Step::Shell),
                "panic" => steps.push(Step::Panic),
                "forever" | "repeat" => {
                    let times = number().and_then(|times| usize::try_from(times).ok());
                    if name == "repeat" && times.is_none() {
                        return Err(format!("chronovisor.do={plan}: {word}: repeat:TIMES expected"));
                    }
                    let times = if name == "forever" { None } else { times };
                    if repeat.replace((std::mem::take(&mut steps), times)).is_some() {
                        return Err(format!("chronovisor.do={plan}: only one repeat or forever is possible"));
                    }
                }
                _ => return Err(format!("chronovisor.do={plan}: unknown step {word}")),
            }
        }
        let (repeated, times) = repeat.unwrap_or((Vec::new(), Some(0)));
        if times.is_none() && repeated.is_empty() {
            return Err(format!("chronovisor.do={plan}: nothing to do forever"));
        }
        Ok(Self {
            repeated,
            times,
            then: steps,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn steps(line: &str) -> Vec<Step> {
        Plan::of_command_line(line).unwrap().unwrap().steps().take(5).collect()
    }

    const fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    #[test]
    fn steps_are_done_in_order() {
        let line = "console=ttyS0 chronovisor.do=spin:20,sleep:30,topology,poweroff quiet\n";
        assert_eq!(
            steps(line),
            [Step::Spin(ms(20)), Step::Sleep(ms(30)), Step::Topology, Step::PowerOff]
        );
    }

    #[test]
    fn repeat_counts_rounds_and_goes_on() {
        assert_eq!(
            steps("chronovisor.do=spin:1,repeat:2,reboot"),
            [Step::Spin(ms(1)), Step::Spin(ms(1)), Step::Reboot]
        );
    }

    #[test]
    fn forever_does_not_end() {
        let (spin, sleep) = (Step::Spin(ms(1)), Step::Sleep(ms(2)));
        assert_eq!(
            steps("chronovisor.do=spin:1,sleep:2,forever"),
            [spin, sleep, spin, sleep, spin]
        );
    }

    #[test]
    fn nothing_said_is_no_plan() {
        assert_eq!(Plan::of_command_line("console=ttyS0 root=/dev/vda"), Ok(None));
    }

    #[test]
    fn nonsense_is_named() {
        for (line, said) in [
            ("jump", "unknown step jump"),
            ("spin", "spin:MILLISECONDS"),
            ("sleep:soon", "sleep:soon"),
            ("touch", "touch:MIB"),
            ("hwrng:-1", "hwrng:BYTES"),
            ("spin:1,repeat", "repeat:TIMES"),
            ("forever", "nothing to do"),
            ("spin:1,forever,forever", "only one"),
        ] {
            let error = Plan::of_command_line(&format!("chronovisor.do={line}")).unwrap_err();
            assert!(error.contains(said), "{line}: {error}");
        }
    }
}
