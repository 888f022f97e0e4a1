//! A real Prometheus, as Debian has it, and its promtool: `cargo xtask test` unpacks them and names their folder in
//! `CHRONOVISOR_PROMETHEUS`.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::bed::Folder;
use crate::client;
use crate::vm::{PATIENCE, Process};

/// What we ship for it.
pub const SHIPPED: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../resources");

/// Ends the calling test, in one line that is counted, unless Prometheus is here.
#[macro_export]
macro_rules! require_prometheus {
    () => {
        if let Err(why) = $crate::prometheus::folder() {
            $crate::bed::skipped("kvm", &why);
            return;
        }
    };
}

/// Where its programs are.
///
/// # Errors
/// Why they are not there.
pub fn folder() -> Result<PathBuf, String> {
    if let Some(why) = std::env::var_os("CHRONOVISOR_PROMETHEUS_LACK") {
        return Err(why.to_string_lossy().into_owned());
    }
    match std::env::var_os("CHRONOVISOR_PROMETHEUS") {
        Some(folder) => Ok(folder.into()),
        None => {
            Err("there is no Prometheus here, as in the emulated host, or `cargo xtask test` did not run this".into())
        }
    }
}

fn program(name: &str) -> Command {
    Command::new(folder().expect("looked for").join(name))
}

/// Runs promtool, `text` on its standard input.
///
/// # Panics
/// When it cannot be run.
#[must_use]
pub fn promtool<S: AsRef<std::ffi::OsStr>>(arguments: impl IntoIterator<Item = S>, text: &str) -> Output {
    let mut command = program("promtool");
    command.args(arguments).stdin(Stdio::piped());
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|e| panic!("{command:?}: {e}"));
    let mut stdin = child.stdin.take().expect("piped");
    // It may have had enough before all is written.
    let _ = stdin.write_all(text.as_bytes());
    drop(stdin);
    child.wait_with_output().expect("its output")
}

/// `GET path` at `address`, in HTTP/1.0 so that nothing comes in chunks; `headers` are whole lines.
///
/// # Errors
/// What the connection says.
pub fn get(address: SocketAddr, path: &str, headers: &str) -> io::Result<String> {
    let mut stream = TcpStream::connect(address)?;
    // A guard against a server that hangs; nothing is measured by it.
    stream.set_read_timeout(Some(PATIENCE))?;
    write!(stream, "GET {path} HTTP/1.0\r\nHost: localhost\r\n{headers}\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

/// One series' value.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Its value.
    pub value: f64,
}

/// Prometheus with the configuration we ship, but for its intervals, which are a second, and its targets.
#[derive(Debug)]
pub struct Prometheus {
    process: Process,
    address: SocketAddr,
    _folder: Folder,
}

impl Prometheus {
    /// Starts one that scrapes `target`.
    ///
    /// # Panics
    /// When it does not start.
    #[must_use]
    pub fn scraping(target: SocketAddr) -> Self {
        let folder = Folder::new();
        let shipped = |name: &str| {
            let path = Path::new(SHIPPED).join("prometheus").join(name);
            std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
        };
        let config = shipped("prometheus.yml").replace("15s", "1s").replace("10s", "1s");
        let config = folder.write("prometheus.yml", config);
        for rules in ["recording.yml", "alerts.yml"] {
            folder.write(rules, shipped(rules));
        }
        std::fs::create_dir(folder.join("targets")).expect("a folder");
        folder.write("targets/one.json", format!(r#"[{{"targets": ["{target}"]}}]"#));
        // Prometheus does not tell which port it took, so it is given one that was free just now.
        let free = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr());
        let address = free.expect("a free port");
        let mut command = program("prometheus");
        command
            .arg(format!("--config.file={}", config.display()))
            .arg(format!("--storage.tsdb.path={}", folder.join("data").display()))
            .arg(format!("--web.listen-address={address}"));
        let mut process = Process::spawn(command);
        process.wait_for_error("Server is ready");
        Self {
            process,
            address,
            _folder: folder,
        }
    }

    /// What `expression` is now.
    ///
    /// # Panics
    /// When Prometheus does not answer, or not with a vector.
    #[must_use]
    pub fn query(&self, expression: &str) -> Vec<Sample> {
        let encode = |byte: u8| match byte {
            byte if byte.is_ascii_alphanumeric() => char::from(byte).to_string(),
            byte => format!("%{byte:02X}"),
        };
        let query: String = expression.bytes().map(encode).collect();
        let answer = get(self.address, &format!("/api/v1/query?query={query}"), "")
            .unwrap_or_else(|e| panic!("{expression}: {e}; stderr:\n{}", self.process.stderr()));
        let response = client::read_response(&mut answer.as_bytes()).expect("JSON");
        let result = response.body["data"]["result"].as_array();
        let result = result.unwrap_or_else(|| panic!("{expression}: {:#}", response.body));
        let sample = |series: &Value| {
            let labels = series["metric"].as_object().expect("labels");
            let labels = labels
                .iter()
                .map(|(name, value)| (name.clone(), value.as_str().expect("text").to_owned()));
            Sample {
                labels: labels.collect(),
                value: series["value"][1].as_str().expect("text").parse().expect("a number"),
            }
        };
        result.iter().map(sample).collect()
    }

    /// Waits until `expression` is something.
    ///
    /// # Panics
    /// When patience ends first.
    pub fn wait_for(&self, expression: &str) -> Vec<Sample> {
        let begun = Instant::now();
        loop {
            let samples = self.query(expression);
            if !samples.is_empty() {
                return samples;
            }
            assert!(
                begun.elapsed() < PATIENCE,
                "{expression}: never came; stderr:\n{}",
                self.process.stderr()
            );
            std::thread::sleep(Duration::from_millis(200));
        }
    }
}

/// A running `chronovisor exporter`.
#[derive(Debug)]
pub struct Exporter {
    /// The process.
    pub process: Process,
    /// Where it serves.
    pub address: SocketAddr,
}

impl Exporter {
    /// Starts one on a free port, with `arguments`.
    ///
    /// # Panics
    /// When it does not start.
    #[must_use]
    pub fn start<S: Into<String>>(arguments: impl IntoIterator<Item = S>) -> Self {
        let first = ["exporter", "--listen=127.0.0.1:0"].map(str::to_owned);
        let mut process = Process::chronovisor(first.into_iter().chain(arguments.into_iter().map(Into::into)));
        process.wait_for_error("/metrics\n");
        let said = process.stderr();
        let address = said
            .split_once("http://")
            .and_then(|(_, rest)| rest.split_once('/'))
            .and_then(|(address, _)| address.parse().ok());
        let address = address.unwrap_or_else(|| panic!("no address: {said}"));
        Self { process, address }
    }

    /// Its page. `headers` are whole lines.
    ///
    /// # Panics
    /// When it is not answered.
    #[must_use]
    pub fn page(&self, headers: &str) -> String {
        page(self.address, headers)
    }
}

/// The page of the exporter at `address`. `headers` are whole lines.
///
/// # Panics
/// When it is not answered.
#[must_use]
pub fn page(address: SocketAddr, headers: &str) -> String {
    let answer = get(address, "/metrics", headers).expect("an answer");
    let (head, page) = answer.split_once("\r\n\r\n").expect("HTTP");
    assert!(head.starts_with("HTTP/1.0 200 "), "{head}");
    page.to_owned()
}
