//! A driver in miniature: finds virtio devices by the kernel's command line alone, as a kernel without ACPI does.

use super::Program;

/// What the command line names a device by (Documentation/admin-guide/kernel-parameters.txt): `SIZE@BASE:IRQ` follows.
const KEY: &[u8] = b"virtio_mmio.device=";

impl Program {
    /// For each device that the command line names: reads its MagicValue and its DeviceID (virtio 1.2, 4.2.2) where the line says
    /// that it is, and writes a line to the serial port of the four bytes of the first, the second as a digit, and the rest
    /// of what names it: `virt 2:5` is a block device of interrupt 5. Then resets the machine.
    ///
    /// The line is that of the 64-bit boot protocol, by `cmd_line_ptr` of the zero page: a program for [`super::elf`].
    #[must_use]
    pub fn find_virtio() -> Self {
        let mut code = vec![
            0x8b, 0x9e, 0x28, 0x02, 0x00, 0x00, //       mov    0x228(%rsi), %ebx
            // scan:
            0x48, 0x8d, 0x3d, 0x86, 0x00, 0x00, 0x00, // lea    KEY(%rip), %rdi
            0x48, 0x89, 0xde, //                         mov    %rbx, %rsi
            // same:
            0x8a, 0x07, //                               mov    (%rdi), %al
            0x84, 0xc0, //                               test   %al, %al
            0x74, 0x16, //                               je     found
            0x38, 0x06, //                               cmp    %al, (%rsi)
            0x75, 0x08, //                               jne    differs
            0x48, 0xff, 0xc6, //                         inc    %rsi
            0x48, 0xff, 0xc7, //                         inc    %rdi
            0xeb, 0xee, //                               jmp    same
            // differs:
            0x80, 0x3b, 0x00, //                         cmpb   $0, (%rbx)
            0x74, 0x66, //                               je     end
            0x48, 0xff, 0xc3, //                         inc    %rbx
            0xeb, 0xda, //                               jmp    scan
            // found:
            0x48, 0x89, 0xf3, //                         mov    %rsi, %rbx
            // size:
            0x8a, 0x03, //                               mov    (%rbx), %al
            0x84, 0xc0, //                               test   %al, %al
            0x74, 0x58, //                               je     end
            0x48, 0xff, 0xc3, //                         inc    %rbx
            0x3c, b'@', //                               cmp    $'@', %al
            0x75, 0xf3, //                               jne    size
            0x48, 0x83, 0xc3, 0x02, //                   add    $2, %rbx        past "0x"
            0x31, 0xc9, //                               xor    %ecx, %ecx
            // digit:
            0x0f, 0xb6, 0x03, //                         movzbl (%rbx), %eax
            0x2c, b'0', //                               sub    $'0', %al
            0x3c, 0x09, //                               cmp    $9, %al
            0x76, 0x06, //                               jbe    value
            0x2c, 0x27, //                               sub    $('a' - '0' - 10), %al
            0x3c, 0x0f, //                               cmp    $15, %al
            0x77, 0x0c, //                               ja     tell
            // value:
            0x48, 0xc1, 0xe1, 0x04, //                   shl    $4, %rcx
            0x48, 0x09, 0xc1, //                         or     %rax, %rcx
            0x48, 0xff, 0xc3, //                         inc    %rbx
            0xeb, 0xe5, //                               jmp    digit
            // tell:
            0x8b, 0x01, //                               mov    (%rcx), %eax    MagicValue
            0x66, 0xba, 0xf8, 0x03, //                   mov    $COM1, %dx
            0xee, //                                     out    %al, %dx
            0xc1, 0xe8, 0x08, //                         shr    $8, %eax
            0xee, //                                     out    %al, %dx
            0xc1, 0xe8, 0x08, //                         shr    $8, %eax
            0xee, //                                     out    %al, %dx
            0xc1, 0xe8, 0x08, //                         shr    $8, %eax
            0xee, //                                     out    %al, %dx
            0xb0, b' ', //                               mov    $' ', %al
            0xee, //                                     out    %al, %dx
            0x8b, 0x41, 0x08, //                         mov    8(%rcx), %eax   DeviceID
            0x04, b'0', //                               add    $'0', %al
            0xee, //                                     out    %al, %dx
            // rest:
            0x8a, 0x03, //                               mov    (%rbx), %al
            0x3c, b' ', //                               cmp    $' ', %al
            0x76, 0x06, //                               jbe    told
            0xee, //                                     out    %al, %dx
            0x48, 0xff, 0xc3, //                         inc    %rbx
            0xeb, 0xf4, //                               jmp    rest
            // told:
            0xb0, b'\n', //                              mov    $'\n', %al
            0xee,  //                                     out    %al, %dx
            0xe9, 0x79, 0xff, 0xff, 0xff, //             jmp    scan
            // end:
            0xb0, 0xfe, //                               mov    $0xfe, %al
            0xe6, 0x64, //                               out    %al, $0x64
            0xeb, 0xfe, //                               jmp    .
        ];
        code.extend(KEY);
        code.push(0);
        Self { code, ring: 0 }
    }
}
