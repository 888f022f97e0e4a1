//! KVM's binary statistics of one vCPU (`Documentation/virt/kvm/api.rst`, section 4.133, `KVM_GET_STATS_FD`).
//!
//! The descriptor's file is a header, a table of descriptors and a block of data. Which statistics there are, and
//! where, differs between kernels and processors, so they are looked up by name, once; a reading is one pread.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// The statistics used here, in nanoseconds where they are times. One that this kernel lacks is `None`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KvmCounters {
    /// Time asleep in HLT; lands when the halt ends. The wait for a CPU after the wake-up is in it too.
    pub halt_wait_ns: Option<u64>,
    /// Time spent polling for a wake-up before sleeping, successful or not: on a CPU, in the kernel.
    pub halt_poll_ns: Option<u64>,
    /// Whether the vCPU is in HLT now.
    pub blocking: Option<bool>,
}

/// The statistics descriptor of one vCPU.
#[derive(Debug)]
pub struct KvmStats {
    file: File,
    halt_wait: Option<usize>,
    halt_poll: [Option<usize>; 2],
    blocking: Option<usize>,
    /// Where in the file `data` starts.
    at: u64,
    data: Vec<u8>,
}

/// `struct kvm_stats_header`: flags, name_size, num_desc, id_offset, desc_offset, data_offset.
const HEADER: usize = 24;
/// `struct kvm_stats_desc` without its name: flags, exponent and size, offset, bucket_size.
const DESCRIPTOR: usize = 16;
/// More than any kernel has (Linux 6.12 has 63 of 48 bytes each); what exceeds it is refused.
const MAX_BYTES: usize = 1 << 20;
/// `flags`: unit and base, `KVM_STATS_UNIT_MASK | KVM_STATS_BASE_MASK`.
const UNIT_AND_BASE: u32 = 0xff0;
/// Seconds, to a power of ten.
const SECONDS: u32 = 2 << 4;
/// With `SECONDS`: nanoseconds.
const NANO: i16 = -9;

/// One descriptor of the table.
struct Descriptor<'a> {
    name: &'a [u8],
    unit_and_base: u32,
    exponent: i16,
    /// Where its value is, from the start of the data block.
    offset: usize,
}

impl KvmStats {
    /// Reads the table behind `file`.
    ///
    /// # Errors
    /// `InvalidData` where the file is not as the kernel's document has it.
    pub fn open(file: File) -> io::Result<Self> {
        let mut header = [0; HEADER];
        file.read_exact_at(&mut header, 0)?;
        let (name_size, count) = (word(&header, 4)?, word(&header, 8)?);
        let (table_at, data_at) = (word(&header, 16)?, word(&header, 20)?);
        let stride = DESCRIPTOR + name_size;
        let bytes = stride
            .checked_mul(count)
            .filter(|&n| n <= MAX_BYTES)
            .ok_or_else(|| bad("the table is too large"))?;
        let mut table = vec![0; bytes];
        file.read_exact_at(&mut table, table_at as u64)?;

        let descriptors: Vec<_> = table
            .chunks_exact(stride)
            .map(Descriptor::parse)
            .collect::<io::Result<_>>()?;
        let find = |name: &str, time: bool| {
            let fits = |d: &&Descriptor<'_>| d.name == name.as_bytes() && (!time || d.is_nanoseconds());
            descriptors.iter().find(fits).map(|d| d.offset)
        };
        let mut stats = Self {
            file,
            halt_wait: find("halt_wait_ns", true),
            halt_poll: [find("halt_poll_success_ns", true), find("halt_poll_fail_ns", true)],
            blocking: find("blocking", false),
            at: 0,
            data: Vec::new(),
        };

        // The part of the data block that holds them.
        let offsets = || {
            [stats.halt_wait, stats.halt_poll[0], stats.halt_poll[1], stats.blocking]
                .into_iter()
                .flatten()
        };
        let (first, end) = (offsets().min().unwrap_or(0), offsets().max().map_or(0, |last| last + 8));
        if end - first > MAX_BYTES {
            return Err(bad("the data block is too large"));
        }
        let rebase = |offset: Option<usize>| offset.map(|o| o - first);
        stats.halt_wait = rebase(stats.halt_wait);
        stats.halt_poll = stats.halt_poll.map(rebase);
        stats.blocking = rebase(stats.blocking);
        stats.at = (data_at + first) as u64;
        stats.data = vec![0; end - first];
        Ok(stats)
    }

    /// Reads the statistics.
    ///
    /// # Errors
    /// What pread says.
    pub fn read(&mut self) -> io::Result<KvmCounters> {
        self.file.read_exact_at(&mut self.data, self.at)?;
        let value = |offset: Option<usize>| -> Option<u64> {
            let bytes = self.data.get(offset?..)?.first_chunk()?;
            Some(u64::from_ne_bytes(*bytes))
        };
        let halt_poll_ns = match self.halt_poll.map(value) {
            [None, None] => None,
            [success, fail] => Some(success.unwrap_or(0).saturating_add(fail.unwrap_or(0))),
        };
        Ok(KvmCounters {
            halt_wait_ns: value(self.halt_wait),
            halt_poll_ns,
            blocking: value(self.blocking).map(|v| v != 0),
        })
    }
}

impl<'a> Descriptor<'a> {
    fn parse(bytes: &'a [u8]) -> io::Result<Self> {
        let name = &bytes[DESCRIPTOR..];
        let end = name
            .iter()
            .position(|&b| b == 0)
            .ok_or_else(|| bad("a name without its end"))?;
        let exponent = bytes[4..].first_chunk().map(|b| i16::from_ne_bytes(*b));
        Ok(Self {
            name: &name[..end],
            unit_and_base: u32::try_from(word(bytes, 0)?).unwrap_or(u32::MAX) & UNIT_AND_BASE,
            exponent: exponent.ok_or_else(|| bad("a descriptor cut short"))?,
            offset: word(bytes, 8)?,
        })
    }

    fn is_nanoseconds(&self) -> bool {
        self.unit_and_base == SECONDS && self.exponent == NANO
    }
}

fn word(bytes: &[u8], at: usize) -> io::Result<usize> {
    let word = bytes
        .get(at..)
        .and_then(<[u8]>::first_chunk)
        .map(|b| u32::from_ne_bytes(*b));
    word.and_then(|w| usize::try_from(w).ok())
        .ok_or_else(|| bad("cut short"))
}

fn bad(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    /// A statistics file of the given (name, flags, exponent, value)s.
    fn file(stats: &[(&str, u32, i16, u64)]) -> Vec<u8> {
        let name_size = 48u32;
        let (count, id_size) = (u32::try_from(stats.len()).expect("few"), 48u32);
        let (header, stride) = (24u32, 16 + name_size);
        let desc_at = header + id_size;
        let data_at = desc_at + stride * count;
        let mut out = Vec::new();
        for word in [0, name_size, count, header, desc_at, data_at] {
            out.extend(word.to_ne_bytes());
        }
        out.resize(desc_at as usize, b'i');
        for (i, (name, flags, exponent, _)) in (0u32..).zip(stats) {
            out.extend(flags.to_ne_bytes());
            out.extend(exponent.to_ne_bytes());
            out.extend(1u16.to_ne_bytes());
            out.extend((8 * i).to_ne_bytes());
            out.extend(0u32.to_ne_bytes());
            let mut name = name.as_bytes().to_vec();
            name.resize(name_size as usize, 0);
            out.extend(name);
        }
        for (.., value) in stats {
            out.extend(value.to_ne_bytes());
        }
        out
    }

    fn open(bytes: &[u8]) -> io::Result<KvmStats> {
        let path = std::env::temp_dir().join(format!("chronovisor-kvm-stats-{:?}", std::thread::current().id()));
        let mut file = File::create(&path)?;
        file.write_all(bytes)?;
        let file = File::open(&path);
        std::fs::remove_file(&path)?;
        KvmStats::open(file?)
    }

    const NS: (u32, i16) = (SECONDS, NANO);

    #[test]
    fn statistics_are_found_by_name_wherever_they_are() -> io::Result<()> {
        let bytes = file(&[
            ("exits", 0, 0, 9),
            ("halt_poll_fail_ns", NS.0, NS.1, 5),
            ("blocking", 3 << 4, 0, 1),
            ("halt_wait_ns", NS.0, NS.1, 700),
            ("halt_poll_success_ns", NS.0, NS.1, 6),
        ]);
        let expected = KvmCounters {
            halt_wait_ns: Some(700),
            halt_poll_ns: Some(11),
            blocking: Some(true),
        };
        assert_eq!(open(&bytes)?.read()?, expected);
        Ok(())
    }

    #[test]
    fn a_statistic_that_is_missing_or_of_another_unit_is_none() -> io::Result<()> {
        let bytes = file(&[("halt_wait_ns", SECONDS, -6, 700), ("exits", 0, 0, 9)]);
        assert_eq!(open(&bytes)?.read()?, KvmCounters::default());
        assert_eq!(open(&file(&[]))?.read()?, KvmCounters::default());
        Ok(())
    }

    #[test]
    fn a_file_cut_anywhere_is_refused() -> io::Result<()> {
        let bytes = file(&[("halt_wait_ns", NS.0, NS.1, 700)]);
        for cut in 0..bytes.len() {
            assert!(
                open(&bytes[..cut]).and_then(|mut stats| stats.read()).is_err(),
                "cut at {cut}"
            );
        }
        Ok(())
    }

    #[test]
    fn absurd_sizes_and_offsets_are_refused() {
        for (at, word) in [(4, u32::MAX), (8, u32::MAX), (16, u32::MAX), (20, u32::MAX)] {
            let mut bytes = file(&[("halt_wait_ns", NS.0, NS.1, 700)]);
            bytes[at..at + 4].copy_from_slice(&word.to_ne_bytes());
            assert!(
                open(&bytes).and_then(|mut stats| stats.read()).is_err(),
                "{word:#x} at {at}"
            );
        }
    }
}
