//! What the guest does to its disk: load that checks what it reads, and a measurement.
//!
//! Pages are read and written past the guest's page cache, so that each reaches the device. A page's contents follow from its
//! number and from how often it was written: a page that lands elsewhere, or keeps what it had, is found.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::thread;
use std::time::{Duration, Instant};

use crate::modules;

const PAGE: usize = 4096;
/// As `fio` would be told: 4 KiB to 1 MiB.
const PAGES: [usize; 5] = [1, 4, 16, 64, 256];
/// At once: each has a part of the disk to itself.
const THREADS: u64 = 4;
/// Of Linux on x86-64: past the page cache.
const O_DIRECT: i32 = 0o40000;

/// The first disk, once its driver has found it; and its length.
pub fn open() -> io::Result<(File, u64)> {
    modules::load("virtio_mmio")?;
    modules::load("virtio_blk")?;
    let begun = Instant::now();
    loop {
        match OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(O_DIRECT)
            .open("/dev/vda")
        {
            Ok(mut disk) => {
                let len = disk.seek(SeekFrom::End(0))?;
                return Ok((disk, len));
            }
            // The device is probed while the module loads; its node follows.
            Err(_) if begun.elapsed() < Duration::from_secs(10) => thread::sleep(Duration::from_millis(10)),
            Err(error) => return Err(error),
        }
    }
}

/// Pages written, read, and found to be wrong.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tally {
    pub written: u64,
    pub read: u64,
    pub wrong: u64,
}

/// Writes and reads the disk, which has to be all zeros, for `time`; flushes, and reads all of it once more.
pub fn verify(time: Duration) -> io::Result<Tally> {
    let (disk, len) = open()?;
    let pages = len / PAGE as u64 / THREADS;
    let mut total = Tally::default();
    let parts: Vec<_> = (0..THREADS)
        .map(|part| Part::new(&disk, part, part * pages, pages))
        .collect();
    let tallies = thread::scope(|scope| {
        let run = |part: Part<'_>| scope_run(part, time);
        let threads: Vec<_> = parts.into_iter().map(|part| scope.spawn(move || run(part))).collect();
        threads
            .into_iter()
            .map(|thread| thread.join().expect("a thread that does I/O"))
            .collect::<Vec<_>>()
    });
    for tally in tallies {
        let tally = tally?;
        total.written += tally.written;
        total.read += tally.read;
        total.wrong += tally.wrong;
    }
    Ok(total)
}

fn scope_run(mut part: Part<'_>, time: Duration) -> io::Result<Tally> {
    let begun = Instant::now();
    while begun.elapsed() < time {
        part.step()?;
    }
    part.disk.sync_all()?;
    part.read_all()?;
    Ok(part.tally)
}

/// A thread's part of the disk.
struct Part<'a> {
    disk: &'a File,
    first: u64,
    /// How often each page was written.
    written: Vec<u32>,
    /// Where the sequential part of the load goes on.
    next: usize,
    random: u64,
    buffer: Vec<u8>,
    tally: Tally,
}

impl<'a> Part<'a> {
    fn new(disk: &'a File, part: u64, first: u64, pages: u64) -> Self {
        Self {
            disk,
            first,
            written: vec![0; usize::try_from(pages).expect("a disk of less than 2^64 pages")],
            next: 0,
            random: mix(part + 1),
            buffer: vec![0; (PAGES[PAGES.len() - 1] + 1) * PAGE],
            tally: Tally::default(),
        }
    }

    fn random(&mut self, below: usize) -> usize {
        self.random = mix(self.random);
        usize::try_from(self.random % below as u64).expect("less than `below`")
    }

    /// One request: sequential or anywhere, of any size, one way or the other.
    fn step(&mut self) -> io::Result<()> {
        let size = self.random(PAGES.len());
        let count = PAGES[size].min(self.written.len());
        let sequential = self.random(2) == 0;
        let write = self.random(2) == 0;
        let at = if sequential {
            self.next
        } else {
            self.random(self.written.len())
        };
        let at = if at + count > self.written.len() { 0 } else { at };
        if sequential {
            self.next = at + count;
        }
        if write {
            self.write(at, count)
        } else {
            self.read(at, count)
        }
    }

    /// As much of the buffer as `count` pages take, where a page of it begins: as O_DIRECT wants it.
    fn aligned(buffer: &mut [u8], count: usize) -> &mut [u8] {
        let start = buffer.as_ptr().align_offset(PAGE);
        &mut buffer[start..start + count * PAGE]
    }

    fn write(&mut self, at: usize, count: usize) -> io::Result<()> {
        let bytes = Self::aligned(&mut self.buffer, count);
        for (page, (times, bytes)) in (at..).zip(self.written[at..at + count].iter_mut().zip(bytes.chunks_mut(PAGE))) {
            *times += 1;
            fill(self.first + page as u64, *times, |place, word| {
                bytes[place * 8..][..8].copy_from_slice(&word.to_le_bytes());
            });
        }
        self.disk.write_all_at(bytes, (self.first + at as u64) * PAGE as u64)?;
        self.tally.written += count as u64;
        Ok(())
    }

    fn read(&mut self, at: usize, count: usize) -> io::Result<()> {
        let bytes = Self::aligned(&mut self.buffer, count);
        self.disk.read_exact_at(bytes, (self.first + at as u64) * PAGE as u64)?;
        for (page, bytes) in (at..).zip(bytes.chunks(PAGE)) {
            let mut right = true;
            fill(self.first + page as u64, self.written[page], |place, word| {
                right &= bytes[place * 8..][..8] == word.to_le_bytes();
            });
            self.tally.wrong += u64::from(!right);
        }
        self.tally.read += count as u64;
        Ok(())
    }

    fn read_all(&mut self) -> io::Result<()> {
        let largest = PAGES[PAGES.len() - 1];
        let mut at = 0;
        while at < self.written.len() {
            let count = largest.min(self.written.len() - at);
            self.read(at, count)?;
            at += count;
        }
        Ok(())
    }
}

/// Gives each word of page `page` as it is after `times` writes: zeros after none.
fn fill(page: u64, times: u32, mut word: impl FnMut(usize, u64)) {
    let seed = mix(page << 32 | u64::from(times));
    for place in 0..PAGE / 8 {
        word(
            place,
            if times == 0 {
                0
            } else {
                seed.wrapping_mul(2 * place as u64 + 1)
            },
        );
    }
}

/// The finaliser of SplitMix64 (Steele, Lea and Flood, 2014): each bit of the input moves about half of the output's.
fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ x >> 31
}

/// Bytes, and how long they took.
pub struct Moved {
    bytes: u64,
    took: Duration,
}

impl Moved {
    /// For the console.
    pub fn text(self) -> String {
        format!("{} bytes in {} us", self.bytes, self.took.as_micros())
    }
}

/// Reads the disk from its start on, again and again, for `time`: 64 KiB at a time.
pub fn read_for(time: Duration) -> io::Result<Moved> {
    move_for(time, |disk, bytes, at| disk.read_exact_at(bytes, at))
}

/// Likewise, writes zeros.
pub fn write_for(time: Duration) -> io::Result<Moved> {
    move_for(time, |disk, bytes, at| disk.write_all_at(bytes, at))
}

fn move_for(time: Duration, one: impl Fn(&File, &mut [u8], u64) -> io::Result<()>) -> io::Result<Moved> {
    let (disk, len) = open()?;
    let mut buffer = vec![0; 17 * PAGE];
    let piece = Part::aligned(&mut buffer, 16);
    let room = len / piece.len() as u64 * piece.len() as u64;
    let (begun, mut bytes) = (Instant::now(), 0);
    while begun.elapsed() < time {
        one(&disk, piece, bytes % room)?;
        bytes += piece.len() as u64;
    }
    let took = begun.elapsed();
    Ok(Moved { bytes, took })
}
