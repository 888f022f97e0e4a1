//! Takes the ELF vmlinux out of a bzImage (Documentation/arch/x86/boot.rst: the setup header).
//!
//! A bzImage is a boot sector, the setup code, and a decompressor that carries the kernel as its payload. Debian's is
//! compressed in LZ4's legacy frame format; other compressions are named in the error, not decoded.

use anyhow::{Context, Result, bail, ensure};

const SETUP_SECTS: usize = 0x1f1;
const MAGIC: usize = 0x202;
const VERSION: usize = 0x206;
const PAYLOAD_OFFSET: usize = 0x248;
const PAYLOAD_LENGTH: usize = 0x24c;

/// The first protocol that says where the payload is.
const VERSION_2_08: u16 = 0x0208;

const LZ4_LEGACY_MAGIC: u32 = 0x184c_2102;
/// Each block of a legacy frame but the last decodes to this much.
const LZ4_BLOCK: usize = 8 << 20;

/// The vmlinux inside `bzimage`.
pub fn extract(bzimage: &[u8]) -> Result<Vec<u8>> {
    ensure!(
        bzimage.get(MAGIC..MAGIC + 4) == Some(b"HdrS"),
        "not a bzImage: no setup header"
    );
    let version = u16_at(bzimage, VERSION)?;
    ensure!(
        version >= VERSION_2_08,
        "boot protocol {version:#06x} is older than 2.08 and does not say where its payload is"
    );
    let setup_sectors = match bzimage[SETUP_SECTS] {
        0 => 4, // the protocol's backward compatible reading
        n => usize::from(n),
    };
    let start = (1 + setup_sectors) * 512 + usize::try_from(u32_at(bzimage, PAYLOAD_OFFSET)?)?;
    let length = usize::try_from(u32_at(bzimage, PAYLOAD_LENGTH)?)?;
    let payload = start
        .checked_add(length)
        .and_then(|end| bzimage.get(start..end))
        .with_context(|| {
            format!(
                "its payload of {length} bytes at {start} is outside the file of {} bytes: truncated?",
                bzimage.len()
            )
        })?;

    let vmlinux = decompress(payload)?;
    ensure!(vmlinux.starts_with(b"\x7fELF"), "its payload is not an ELF file");
    Ok(vmlinux)
}

/// LZ4's legacy frames, and the size the kernel's build appends to them.
fn decompress(payload: &[u8]) -> Result<Vec<u8>> {
    match payload.get(..4) {
        Some(&[0x02, 0x21, 0x4c, 0x18]) => {}
        Some(&[0x1f, 0x8b, ..]) => {
            bail!("its payload is compressed with gzip; only LZ4, Debian's choice, is supported")
        }
        Some(&[0x28, 0xb5, 0x2f, 0xfd]) => bail!("its payload is compressed with zstd; only LZ4 is supported"),
        Some(&[0xfd, b'7', b'z', b'X']) => bail!("its payload is compressed with xz; only LZ4 is supported"),
        _ => bail!("its payload is in an unknown format; only LZ4 is supported"),
    }
    let (frames, size) = payload.split_at(payload.len() - 4);
    let size = usize::try_from(u32_at(size, 0)?)?;

    let mut vmlinux = Vec::new();
    let mut block = vec![0; LZ4_BLOCK];
    let mut at = 4;
    while at < frames.len() {
        let length = u32_at(frames, at)?;
        at += 4;
        if length == LZ4_LEGACY_MAGIC {
            continue; // a further frame
        }
        let end = at + usize::try_from(length)?;
        let compressed = frames
            .get(at..end)
            .with_context(|| format!("the LZ4 block at {at} reaches beyond its payload: truncated?"))?;
        let decoded = lz4_flex::block::decompress_into(compressed, &mut block)
            .with_context(|| format!("the LZ4 block at {at} is damaged"))?;
        vmlinux.extend_from_slice(&block[..decoded]);
        at = end;
    }
    ensure!(
        vmlinux.len() == size,
        "it decompresses to {} bytes; it says {size}",
        vmlinux.len()
    );
    Ok(vmlinux)
}

fn u16_at(bytes: &[u8], at: usize) -> Result<u16> {
    let field = bytes
        .get(at..at + 2)
        .with_context(|| format!("no field at {at:#x}: truncated?"))?;
    Ok(u16::from_le_bytes(field.try_into()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Result<u32> {
    let field = bytes
        .get(at..at + 4)
        .with_context(|| format!("no field at {at:#x}: truncated?"))?;
    Ok(u32::from_le_bytes(field.try_into()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A bzImage of one setup sector with this payload.
    fn bzimage(payload: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 1024 + 16];
        image[SETUP_SECTS] = 1;
        image[MAGIC..MAGIC + 4].copy_from_slice(b"HdrS");
        image[VERSION..VERSION + 2].copy_from_slice(&0x020f_u16.to_le_bytes());
        image[PAYLOAD_OFFSET..PAYLOAD_OFFSET + 4].copy_from_slice(&16_u32.to_le_bytes());
        let length = u32::try_from(payload.len()).unwrap();
        image[PAYLOAD_LENGTH..PAYLOAD_LENGTH + 4].copy_from_slice(&length.to_le_bytes());
        image.extend_from_slice(payload);
        image
    }

    /// A legacy frame of `blocks`, and the size appended.
    fn frame(blocks: &[&[u8]]) -> Vec<u8> {
        let mut payload = LZ4_LEGACY_MAGIC.to_le_bytes().to_vec();
        for block in blocks {
            let compressed = lz4_flex::block::compress(block);
            payload.extend_from_slice(&u32::try_from(compressed.len()).unwrap().to_le_bytes());
            payload.extend_from_slice(&compressed);
        }
        let size: usize = blocks.iter().map(|block| block.len()).sum();
        payload.extend_from_slice(&u32::try_from(size).unwrap().to_le_bytes());
        payload
    }

    fn error(image: &[u8]) -> String {
        format!("{:#}", extract(image).unwrap_err())
    }

    #[test]
    fn the_blocks_of_a_payload_are_joined() {
        let image = bzimage(&frame(&[b"\x7fELF and ", b"so on, and on, and on, and on, and on"]));
        assert_eq!(
            extract(&image).unwrap(),
            b"\x7fELF and so on, and on, and on, and on, and on"
        );
    }

    #[test]
    fn every_truncation_is_an_error_not_a_panic() {
        let image = bzimage(&frame(&[&[b"\x7fELF".as_slice(), &[7; 5000]].concat()]));
        for length in 0..image.len() {
            extract(&image[..length]).unwrap_err();
        }
    }

    #[test]
    fn every_damaged_byte_is_an_error_or_harmless_not_a_panic() {
        let image = bzimage(&frame(&[b"\x7fELF, a few bytes, a few bytes, a few bytes"]));
        for at in 0..image.len() {
            for value in [0, 0x7f, 0xff] {
                let mut damaged = image.clone();
                damaged[at] = value;
                let _ = extract(&damaged);
            }
        }
    }

    #[test]
    fn what_is_not_supported_is_named() {
        assert!(error(b"#!/bin/sh").contains("not a bzImage"));
        assert!(error(&bzimage(b"\x28\xb5\x2f\xfd....")).contains("zstd"));
        assert!(error(&bzimage(b"??????")).contains("unknown format"));
        assert!(error(&bzimage(&frame(&[b"text"]))).contains("not an ELF file"));
    }

    #[test]
    fn a_wrong_size_is_an_error() {
        let mut payload = frame(&[b"\x7fELF"]);
        let last = payload.len() - 4;
        payload[last] += 1;
        assert_eq!(error(&bzimage(&payload)), "it decompresses to 4 bytes; it says 5");
    }
}
