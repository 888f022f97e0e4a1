//! Writes initramfs archives: the "newc" cpio format that the kernel unpacks
//! (Documentation/driver-api/early-userspace/buffer-format.rst).
//!
//! Everything belongs to root and has no date, so the same input gives the same bytes.

use std::io::{self, Write};

const S_IFDIR: u32 = 0o040_000;
const S_IFREG: u32 = 0o100_000;
const S_IFLNK: u32 = 0o120_000;

/// An archive being written. [`Archive::finish`] ends it: without the trailer the kernel takes it for a truncated one.
pub struct Archive<W> {
    out: W,
    written: usize,
    inode: u32,
}

impl<W: Write> Archive<W> {
    pub const fn new(out: W) -> Self {
        Self {
            out,
            written: 0,
            inode: 0,
        }
    }

    /// A directory. The kernel makes no parents: name them first.
    pub fn dir(&mut self, path: &str) -> io::Result<()> {
        self.entry(path, S_IFDIR | 0o755, &[])
    }

    /// A regular file.
    pub fn file(&mut self, path: &str, permissions: u32, content: &[u8]) -> io::Result<()> {
        self.entry(path, S_IFREG | permissions, content)
    }

    /// A symbolic link.
    pub fn symlink(&mut self, path: &str, target: &str) -> io::Result<()> {
        self.entry(path, S_IFLNK | 0o777, target.as_bytes())
    }

    /// Writes the trailer and gives the writer back.
    pub fn finish(mut self) -> io::Result<W> {
        self.inode = 0;
        self.header("TRAILER!!!", 0, 0)?;
        self.out.flush()?;
        Ok(self.out)
    }

    fn entry(&mut self, path: &str, mode: u32, content: &[u8]) -> io::Result<()> {
        self.inode += 1;
        let size = u32::try_from(content.len())
            .map_err(|_| io::Error::other(format!("{path}: a cpio archive holds no file of 4 GiB or more")))?;
        self.header(path, mode, size)?;
        self.put(content)?;
        self.pad()
    }

    fn header(&mut self, path: &str, mode: u32, size: u32) -> io::Result<()> {
        let path = path.trim_start_matches('/');
        let name_size = path.len() + 1;
        // magic, inode, mode, uid, gid, links, mtime, size, device major and minor, rdev major and minor, name size, check
        let header = format!(
            "070701{:08X}{mode:08X}{:08X}{:08X}{:08X}{:08X}{size:08X}{:08X}{:08X}{:08X}{:08X}{name_size:08X}{:08X}",
            self.inode, 0, 0, 1, 0, 0, 0, 0, 0, 0
        );
        self.put(header.as_bytes())?;
        self.put(path.as_bytes())?;
        self.put(&[0])?;
        self.pad()
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.written += bytes.len();
        self.out.write_all(bytes)
    }

    /// Headers and contents start at multiples of four.
    fn pad(&mut self) -> io::Result<()> {
        let padding = self.written.next_multiple_of(4) - self.written;
        self.put(&[0; 3][..padding])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads an archive back, as the kernel does: (name, mode, content).
    fn unpack(mut bytes: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
        let mut entries = Vec::new();
        loop {
            let field = |n: usize| {
                let hex = std::str::from_utf8(&bytes[6 + 8 * n..14 + 8 * n]).unwrap();
                u32::from_str_radix(hex, 16).unwrap()
            };
            assert_eq!(&bytes[..6], b"070701");
            let (mode, size, name_size) = (field(1), field(6) as usize, field(11) as usize);
            let name = String::from_utf8(bytes[110..110 + name_size - 1].to_vec()).unwrap();
            assert_eq!(bytes[110 + name_size - 1], 0, "a name ends in NUL");
            let content = (110 + name_size).next_multiple_of(4);
            if name == "TRAILER!!!" {
                assert_eq!(bytes.len(), content, "nothing follows the trailer");
                return entries;
            }
            entries.push((name, mode, bytes[content..content + size].to_vec()));
            bytes = &bytes[(content + size).next_multiple_of(4)..];
        }
    }

    #[test]
    fn what_is_packed_is_unpacked() {
        let mut archive = Archive::new(Vec::new());
        archive.dir("bin").unwrap();
        archive.symlink("/bin/sh", "busybox").unwrap();
        // Lengths of every remainder by four: padding is what breaks first.
        for length in 0..5_usize {
            archive.file(&"n".repeat(length + 1), 0o644, &vec![7; length]).unwrap();
        }
        let entries = unpack(&archive.finish().unwrap());
        assert_eq!(entries[0], ("bin".into(), 0o040_755, vec![]));
        assert_eq!(entries[1], ("bin/sh".into(), 0o120_777, b"busybox".to_vec()));
        for length in 0..5 {
            assert_eq!(
                entries[2 + length],
                ("n".repeat(length + 1), 0o100_644, vec![7; length])
            );
        }
    }
}
