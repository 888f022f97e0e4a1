//! A disk's driver in miniature: writes records one after the other, flushes each, and tells on the console which are flushed.

use vmm::layout::VIRTIO_MMIO;

use super::Program;
use super::elf::ADDRESS;

/// Bytes of a record: one sector.
pub const RECORD: usize = 512;

// Where its tables are: behind the code, in the same segment, a page each.
const CODE: u64 = ADDRESS;
const DESC: u64 = CODE + 0x1000;
const AVAIL: u64 = CODE + 0x2000;
const USED: u64 = CODE + 0x3000;
/// The heads of its two requests (virtio 1.2, 5.2.6), and the status byte that they share.
const HEAD: u64 = CODE + 0x4000;
const FLUSH_HEAD: u64 = HEAD + 0x20;
const STATUS: u64 = HEAD + 0x40;
const DATA: u64 = CODE + 0x5000;
const END: u64 = CODE + 0x6000;

/// Record `number`, which belongs in the sector of that number: each word another one, and all of them others in each record.
#[must_use]
pub fn record(number: u32) -> [u8; RECORD] {
    let mut bytes = [0; RECORD];
    let first = u64::from(number) + 1;
    for (place, word) in (0..).zip(bytes.chunks_exact_mut(8)) {
        word.copy_from_slice(&(first * (2 * place + 1)).to_le_bytes());
    }
    bytes
}

/// The tables as the device finds them.
fn tables() -> Vec<u8> {
    const NEXT: u16 = 1;
    const WRITE: u16 = 2;
    let mut bytes = vec![0; usize::try_from(END - DESC).expect("some pages")];
    let mut put = |at: u64, field: &[u8]| {
        let at = usize::try_from(at - DESC).expect("some pages");
        bytes[at..at + field.len()].copy_from_slice(field);
    };
    let chains = [
        (HEAD, 16, NEXT, 1),
        (DATA, u32::try_from(RECORD).expect("a sector"), NEXT, 2),
        (STATUS, 1, WRITE, 0),
        (FLUSH_HEAD, 16, NEXT, 4),
        (STATUS, 1, WRITE, 0),
    ];
    for (index, (address, len, flags, next)) in (0..).zip(chains) {
        let at = DESC + 16 * index;
        put(at, &address.to_le_bytes());
        put(at + 8, &u32::to_le_bytes(len));
        put(at + 12, &flags.to_le_bytes());
        put(at + 14, &u16::to_le_bytes(next));
    }
    put(HEAD, &1u32.to_le_bytes()); // VIRTIO_BLK_T_OUT
    put(FLUSH_HEAD, &4u32.to_le_bytes()); // VIRTIO_BLK_T_FLUSH
    put(AVAIL, &1u16.to_le_bytes()); // VIRTQ_AVAIL_F_NO_INTERRUPT
    bytes
}

impl Program {
    /// On the first virtio device, which has to be a disk that offers a flush: writes [`record`] `first`, flushes it, waits for both,
    /// tells its number by 8 hexadecimal digits and a newline on the serial port, and goes on with the next one. Where one of
    /// the two fails, it tells `E` and a newline instead, and tries the same record again in a while.
    ///
    /// It polls, and takes no interrupt. A program for [`super::elf`].
    #[must_use]
    pub fn write_records(first: u32) -> Self {
        let low = |address: u64| u32::try_from(address).expect("below 4 GiB");
        let mut code = vec![0xbb]; //                    mov    $VIRTIO_MMIO, %ebx
        code.extend(low(VIRTIO_MMIO).to_le_bytes());
        // Registers of the MMIO transport (4.2.2), in the order of 3.1.1.
        for (register, value) in [
            (0x70, 0),          // Status: reset
            (0x70, 1),          // ACKNOWLEDGE
            (0x70, 3),          // DRIVER
            (0x24, 1),          // DriverFeaturesSel
            (0x20, 1),          // VIRTIO_F_VERSION_1
            (0x24, 0),          //
            (0x20, 1 << 9),     // VIRTIO_BLK_F_FLUSH
            (0x70, 11),         // FEATURES_OK
            (0x30, 0),          // QueueSel
            (0x38, 8),          // QueueNum
            (0x80, low(DESC)),  // QueueDesc
            (0x84, 0),          //
            (0x90, low(AVAIL)), // QueueDriver
            (0x94, 0),          //
            (0xa0, low(USED)),  // QueueDevice
            (0xa4, 0),          //
            (0x44, 1),          // QueueReady
            (0x70, 15),         // DRIVER_OK
        ] {
            code.extend([0xc7, 0x83]); //                movl   $value, register(%rbx)
            code.extend(u32::to_le_bytes(register));
            code.extend(u32::to_le_bytes(value));
        }
        code.extend([0x41, 0xb8]); //                    mov    $first, %r8d
        code.extend(first.to_le_bytes());
        code.extend([
            0x45, 0x31, 0xc9, //                          xor    %r9d, %r9d
            // record:
            0x49, 0x8d, 0x40, 0x01, //                    lea    0x1(%r8), %rax
            0x48, 0x8d, 0x14, 0x00, //                    lea    (%rax, %rax), %rdx
            0xbf, 0x00, 0x50, 0x10, 0x00, //              mov    $DATA, %edi
            0xb9, 0x40, 0x00, 0x00, 0x00, //              mov    $WORDS, %ecx
            // fill:
            0x48, 0x89, 0x07, //                          mov    %rax, (%rdi)
            0x48, 0x01, 0xd0, //                          add    %rdx, %rax
            0x48, 0x83, 0xc7, 0x08, //                    add    $0x8, %rdi
            0xff, 0xc9, //                                dec    %ecx
            0x75, 0xf2, //                                jnz    fill
            0x4c, 0x89, 0x04, 0x25, 0x08, 0x40, 0x10, 0x00, // mov    %r8, HEAD + 8
            // again:
            0x31, 0xf6, //                                xor    %esi, %esi
            0xe8, 0x4b, 0x00, 0x00, 0x00, //              call   request
            0x75, 0x34, //                                jnz    failed
            0xbe, 0x03, 0x00, 0x00, 0x00, //              mov    $0x3, %esi
            0xe8, 0x3f, 0x00, 0x00, 0x00, //              call   request
            0x75, 0x28, //                                jnz    failed
            0x66, 0xba, 0xf8, 0x03, //                    mov    $COM1, %dx
            0x44, 0x89, 0xc5, //                          mov    %r8d, %ebp
            0xb9, 0x08, 0x00, 0x00, 0x00, //              mov    $0x8, %ecx
            // digit:
            0xc1, 0xc5, 0x04, //                          rol    $0x4, %ebp
            0x89, 0xe8, //                                mov    %ebp, %eax
            0x24, 0x0f, //                                and    $0xf, %al
            0x04, 0x30, //                                add    $'0', %al
            0x3c, 0x39, //                                cmp    $'9', %al
            0x76, 0x02, //                                jbe    tell
            0x04, 0x27, //                                add    $('a' - '9' - 1), %al
            // tell:
            0xee, //                                      out    %al, %dx
            0xff, 0xc9, //                                dec    %ecx
            0x75, 0xec, //                                jnz    digit
            0xb0, b'\n', //                                mov    $'\n', %al
            0xee,  //                                      out    %al, %dx
            0x41, 0xff, 0xc0, //                          inc    %r8d
            0xeb, 0x9b, //                                jmp    record
            // failed:
            0x66, 0xba, 0xf8, 0x03, //                    mov    $COM1, %dx
            0xb0, b'E', //                                mov    $'E', %al
            0xee, //                                      out    %al, %dx
            0xb0, b'\n', //                                mov    $'\n', %al
            0xee,  //                                      out    %al, %dx
            0xb9, 0xa0, 0x86, 0x01, 0x00, //              mov    $100000, %ecx
            // turn:
            0xff, 0xc9, //                                dec    %ecx
            0x75, 0xfc, //                                jnz    turn
            0xeb, 0xae, //                                jmp    again
            // request:
            0xc6, 0x04, 0x25, 0x40, 0x40, 0x10, 0x00, 0xff, // movb   $0xff, STATUS
            0x44, 0x89, 0xc8, //                          mov    %r9d, %eax
            0x83, 0xe0, 0x07, //                          and    $0x7, %eax
            0x66, 0x89, 0x34, 0x45, 0x04, 0x20, 0x10, 0x00, // mov    %si, AVAIL + 4(, %rax, 2)
            0x41, 0xff, 0xc1, //                          inc    %r9d
            0x66, 0x44, 0x89, 0x0c, 0x25, 0x02, 0x20, 0x10, 0x00, // mov    %r9w, AVAIL + 2
            0xc7, 0x43, 0x50, 0x00, 0x00, 0x00, 0x00, //  movl   $0x0, NOTIFY(%rbx)
            // wait:
            0x66, 0x44, 0x39, 0x0c, 0x25, 0x02, 0x30, 0x10, 0x00, // cmp    %r9w, USED + 2
            0x75, 0xf5, //                                jnz    wait
            0x80, 0x3c, 0x25, 0x40, 0x40, 0x10, 0x00, 0x00, // cmpb   $0x0, STATUS
            0xc3, //                                      ret
        ]);
        code.resize(usize::try_from(DESC - CODE).expect("a page"), 0);
        code.extend(tables());
        Self { code, ring: 0 }
    }
}
