//! What the entropy device gives.

use std::fs::File;
use std::io::{self, Read};

use crate::modules;

/// What was read.
pub struct Random {
    pub bytes: usize,
    /// How many different values its bytes have.
    pub values: usize,
}

/// Reads `bytes` of the entropy device, by its driver and the kernel's `/dev/hwrng`.
pub fn read(bytes: usize) -> io::Result<Random> {
    modules::load("virtio_mmio")?;
    modules::load("virtio_rng")?;
    let mut random = vec![0; bytes];
    File::open("/dev/hwrng")?.read_exact(&mut random)?;
    let mut seen = [false; 256];
    for byte in random {
        seen[usize::from(byte)] = true;
    }
    let values = seen.iter().filter(|seen| **seen).count();
    Ok(Random { bytes, values })
}
