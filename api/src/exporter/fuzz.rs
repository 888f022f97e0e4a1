//! What a socket may answer: see [`crate::fuzz`].

use super::parse::{Metrics, cut};
use crate::prometheus::text::Kind;

pub(crate) fn run(data: &[u8]) {
    let Ok(text) = String::from_utf8(data.to_vec()) else {
        return;
    };
    let Ok(metrics) = Metrics::parse(text) else {
        return;
    };
    // What has passed is a text by itself, family for family, its samples whole.
    for family in metrics.families() {
        let pieces: String = cut(family.samples).flat_map(|(name, rest)| [name, rest]).collect();
        assert_eq!(pieces, family.samples);
        let kind = match family.kind {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
            Kind::Histogram => "histogram",
        };
        let (name, help) = (family.name, family.help);
        let alone = format!("# HELP {name} {help}\n# TYPE {name} {kind}\n{}", family.samples);
        let again = Metrics::parse(alone).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(again.families().count(), 1);
        assert!(
            family.samples.lines().all(|line| !line.contains("socket=\"")),
            "{}",
            family.samples
        );
    }
}
