//! What a vCPU's guest time is to be derived from, prepared once for all vCPUs of a process.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use crate::probe::bpf::Meter;
use crate::reading::Source;
use crate::split::Claim;

/// The claims of one instant, the most exact source first. Source `oncpu` always has one, last.
pub(super) type Claims = [Option<Claim>; 3];

/// What guest time is to be derived from. A source that the host does not have gives way to the next: a reading names
/// the one it was made by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum GtimeSource {
    /// The most exact that there is.
    #[default]
    Auto,
    /// This one, or the next that there is.
    From(Source),
}

impl GtimeSource {
    pub(super) fn choose(self, claims: &Claims) -> Claim {
        let allowed = |claim: &&Claim| match self {
            Self::Auto => true,
            Self::From(first) => claim.source >= first,
        };
        *claims
            .iter()
            .flatten()
            .find(allowed)
            .expect("oncpu is last, and always there")
    }
}

/// A [`GtimeSource`], and what it needs of the host.
#[derive(Clone, Debug, Default)]
pub struct Gtime {
    pub(super) source: GtimeSource,
    pub(super) bpf: Bpf,
}

/// The BPF programs, or why there are none.
#[derive(Clone, Debug)]
pub(super) enum Bpf {
    Attached(Arc<Meter>),
    Absent(Arc<str>),
}

impl Default for Bpf {
    fn default() -> Self {
        Self::Absent("it was not asked for".into())
    }
}

impl Gtime {
    /// Prepares for `source`: attaches the BPF programs where it may be derived from theirs. They stay attached until the
    /// last copy of this and the last account opened with it are gone.
    #[must_use]
    pub fn prepare(source: GtimeSource) -> Self {
        let bpf = match source {
            GtimeSource::Auto | GtimeSource::From(Source::Bpf) => match Meter::attach() {
                Ok(meter) => Bpf::Attached(meter),
                Err(error) => Bpf::Absent(error.to_string().into()),
            },
            GtimeSource::From(Source::Vtime | Source::Oncpu) => Bpf::default(),
        };
        Self { source, bpf }
    }

    /// Why source `bpf` was asked for, by name, and cannot be had.
    #[must_use]
    pub fn refused(&self) -> Option<&str> {
        match (self.source, &self.bpf) {
            (GtimeSource::From(Source::Bpf), Bpf::Absent(why)) => Some(why),
            _ => None,
        }
    }
}

impl fmt::Display for GtimeSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::From(source) => f.write_str(source.name()),
        }
    }
}

/// Why a word is no source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("use auto, bpf, vtime or oncpu")]
pub struct UnknownSource;

impl FromStr for GtimeSource {
    type Err = UnknownSource;

    fn from_str(word: &str) -> Result<Self, UnknownSource> {
        if word == "auto" {
            return Ok(Self::Auto);
        }
        let source = Source::ALL.into_iter().find(|source| source.name() == word);
        source.map(Self::From).ok_or(UnknownSource)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reading::Bounds;

    fn claim(source: Source) -> Option<Claim> {
        Some(Claim {
            source,
            point_ns: 1,
            bounds: Bounds { lower: 0, upper: 2 },
        })
    }

    #[test]
    fn the_most_exact_there_is_or_the_one_asked_for_or_the_next() {
        use Source::{Bpf, Oncpu, Vtime};
        let all = [claim(Bpf), claim(Vtime), claim(Oncpu)];
        let no_bpf = [None, claim(Vtime), claim(Oncpu)];
        let least = [None, None, claim(Oncpu)];
        for (word, claims, chosen) in [
            ("auto", all, Bpf),
            ("auto", no_bpf, Vtime),
            ("auto", least, Oncpu),
            ("bpf", all, Bpf),
            ("bpf", no_bpf, Vtime),
            ("vtime", all, Vtime),
            ("vtime", least, Oncpu),
            ("oncpu", all, Oncpu),
        ] {
            let source: GtimeSource = word.parse().expect("a source");
            assert_eq!(
                (source.choose(&claims).source, source.to_string().as_str()),
                (chosen, word)
            );
        }
        assert_eq!("Auto".parse::<GtimeSource>(), Err(UnknownSource));
    }
}
