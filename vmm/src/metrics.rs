//! `/metrics`: Firecracker's metrics, a line of JSON at the start, every 60 s, at each `FlushMetrics`, and at the end.
//!
//! Names and places are Firecracker's where the figure is the same: `block` sums up all `block_{id}`, and so on. As there, a
//! counter is what was counted since the line before. What is not counted here is left out rather than said to be 0; `vcpu`
//! has an entry for each reason that a vCPU left the guest for, as in a reading.
//!
//! A line that cannot be written (a fifo nobody reads) is lost, and what it would have told is in the next one. One of which only a
//! part could be written is ended before the next: a reader of lines finds one that is no JSON.

use std::fs::File;
use std::io::{self, Write};
use std::time::{Duration, SystemTime};

use accounting::Reading;
use serde_json::{Map, Value, json};

use crate::attach::Named;
use crate::config::Metrics;

/// From one line to the next.
pub const INTERVAL: Duration = Duration::from_secs(60);

/// Why there are no metrics. Firecracker's words.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MetricsError {
    /// The file cannot be opened.
    #[error("Cannot initialize the metrics system due to bad user input: {0}")]
    Open(io::Error),
    /// There is a file already.
    #[error("Cannot initialize the metrics system due to bad user input: Reinitialization of metrics not allowed.")]
    Again,
    /// A line could not be written.
    #[error("Failed to write metrics: {0}")]
    Write(io::Error),
}

/// Counters since the start, in objects of objects.
pub type Counters = Map<String, Value>;

/// The file, and what it has been told.
#[derive(Debug)]
pub(crate) struct MetricsFile {
    file: File,
    told: Value,
    /// The last line was not taken whole.
    torn: bool,
}

impl MetricsFile {
    pub(crate) fn open(config: &Metrics) -> Result<Self, MetricsError> {
        let file = crate::log::append_to(&config.metrics_path).map_err(MetricsError::Open)?;
        Ok(Self {
            file,
            told: Value::Null,
            torn: false,
        })
    }

    /// Writes a line of what `counters` grew by, and of `values` as they are.
    pub(crate) fn write(&mut self, counters: Counters, values: Counters) -> Result<(), MetricsError> {
        let counters = Value::Object(counters);
        let now = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap_or_default();
        let begin = if self.torn { "\n" } else { "" };
        let mut grown = grown(&counters, &self.told);
        if let Value::Object(grown) = &mut grown {
            grown.extend(values);
        }
        let grown = grown.to_string();
        // The time comes first, as in Firecracker's.
        let rest = grown.strip_prefix('{').unwrap_or("}");
        let comma = if rest == "}" { "" } else { "," };
        let line = format!("{begin}{{\"utc_timestamp_ms\":{}{comma}{rest}\n", now.as_millis());
        let bytes = line.as_bytes();
        let written = self.file.write(bytes).map_err(MetricsError::Write)?;
        self.torn = written < bytes.len();
        if self.torn {
            return Err(MetricsError::Write(io::ErrorKind::WriteZero.into()));
        }
        self.told = counters;
        Ok(())
    }
}

/// `now` less `before`, number by number.
fn grown(now: &Value, before: &Value) -> Value {
    match now {
        Value::Object(now) => {
            let entry =
                |(key, value): (&String, &Value)| (key.clone(), grown(value, before.get(key).unwrap_or(&Value::Null)));
            Value::Object(now.iter().map(entry).collect())
        }
        _ => match (now.as_u64(), before.as_u64()) {
            (Some(now), Some(before)) => now.saturating_sub(before).into(),
            _ => now.clone(),
        },
    }
}

/// Adds the metrics of the devices of one kind: all together under `kind`, and each under `kind_id`.
pub(crate) fn add<T>(counters: &mut Counters, kind: &str, devices: &[Named<T>], metrics: impl Fn(&T) -> Value) {
    let mut sum = Value::Null;
    for (id, device) in devices {
        let of_one = metrics(&device.lock().expect("no holder of this lock panics"));
        sum = added(sum, &of_one);
        counters.insert(format!("{kind}_{id}"), of_one);
    }
    counters.insert(kind.to_owned(), if sum.is_null() { json!({}) } else { sum });
}

fn added(sum: Value, one: &Value) -> Value {
    match (sum, one) {
        (Value::Object(mut sum), Value::Object(one)) => {
            for (key, value) in one {
                let so_far = sum.remove(key).unwrap_or_default();
                sum.insert(key.clone(), added(so_far, value));
            }
            Value::Object(sum)
        }
        (sum, one) => match (sum.as_u64(), one.as_u64()) {
            (Some(sum), Some(one)) => sum.saturating_add(one).into(),
            _ => one.clone(),
        },
    }
}

/// `vcpu`: why the vCPUs left the guest, how often, and how long that took the VMM.
pub(crate) fn of_vcpus(readings: &[Reading]) -> Value {
    let mut vcpu = Counters::new();
    let mut failures = 0;
    for (reason, totals) in readings.iter().flat_map(|reading| &reading.exits.by_reason) {
        if reason == "internal_error" || reason == "fail_entry" {
            failures += totals.count;
        }
        for (key, value) in [
            (format!("exit_{reason}"), json!(totals.count)),
            (format!("exit_{reason}_agg"), json!({ "sum_us": totals.vmm_ns / 1000 })),
        ] {
            let so_far = vcpu.remove(&key).unwrap_or_default();
            vcpu.insert(key, added(so_far, &value));
        }
    }
    vcpu.insert("failures".to_owned(), failures.into());
    Value::Object(vcpu)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::TempFile;

    fn lines(file: &TempFile) -> Vec<Value> {
        let text = std::fs::read_to_string(file.path()).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    fn counters(value: Value) -> Counters {
        match value {
            Value::Object(counters) => counters,
            other => panic!("{other}"),
        }
    }

    #[test]
    fn a_line_tells_what_was_counted_since_the_line_before() {
        let file = TempFile::new(b"");
        let config = Metrics {
            metrics_path: file.path().to_owned(),
        };
        let mut metrics = MetricsFile::open(&config).unwrap();
        let time = |us: u64| counters(json!({ "api_server": { "us": us } }));
        metrics
            .write(counters(json!({ "block": { "read_count": 5 }, "vsock": {} })), time(9))
            .unwrap();
        metrics
            .write(
                counters(json!({ "block": { "read_count": 7, "flush_count": 1 }, "vsock": {} })),
                time(9),
            )
            .unwrap();
        metrics.write(Counters::new(), Counters::new()).unwrap();
        let lines = lines(&file);
        assert_eq!(lines[0]["block"], json!({ "read_count": 5 }));
        assert_eq!(lines[1]["block"], json!({ "read_count": 2, "flush_count": 1 }));
        assert_eq!(lines[1]["vsock"], json!({}));
        assert_eq!(lines[1]["api_server"]["us"], 9, "what is no counter does not grow");
        assert!(
            lines
                .iter()
                .all(|line| line["utc_timestamp_ms"].as_u64() > Some(1_600_000_000_000))
        );
    }

    #[test]
    fn devices_of_a_kind_are_told_each_and_together() {
        use std::sync::{Arc, Mutex};
        let devices = [
            ("a".to_owned(), Arc::new(Mutex::new(1u64))),
            ("b".to_owned(), Arc::new(Mutex::new(2))),
        ];
        let mut all = Counters::new();
        add(&mut all, "block", &devices, |count| json!({ "read_count": count }));
        add(&mut all, "net", &[] as &[Named<u64>], |_| json!({}));
        assert_eq!(
            Value::Object(all),
            json!({ "block": { "read_count": 3 }, "block_a": { "read_count": 1 }, "block_b": { "read_count": 2 }, "net": {} })
        );
    }

    #[test]
    fn a_file_that_cannot_be_is_refused_in_firecrackers_words() {
        let config = Metrics {
            metrics_path: "/nowhere/metrics".into(),
        };
        assert_eq!(
            MetricsFile::open(&config).unwrap_err().to_string(),
            "Cannot initialize the metrics system due to bad user input: No such file or directory (os error 2)"
        );
    }
}
