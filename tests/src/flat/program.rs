//! The programs, by hand: position-independent, each instruction beside its bytes.

/// Where the programs tell something; each `out` is an exit.
pub mod port {
    /// About to start a round of [`super::Program::spin_for`].
    pub const READY: u16 = 0x500;
    /// A 64-bit figure: its low 32 bits, then its high.
    pub const REPORT: u16 = 0x504;
    /// All rounds done; what follows is an endless loop.
    pub const DONE: u16 = 0x508;
    /// Nothing but an exit.
    pub const STORM: u16 = 0x50c;
    /// To be held for as many microseconds as are written: the VMM sleeps.
    pub const SLEEP: u16 = 0x510;
    /// To be held until the host's next tick is over: the VMM sleeps across it.
    pub const DODGE: u16 = 0x514;
}

/// What a guest of [`Program::burn`] does before each of its slices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Between {
    /// Nothing: the slices are one.
    Nothing,
    /// An exit to STORM.
    Exit,
    /// Sleeps for so many microseconds.
    Sleep(u32),
    /// Sleeps across the host's next tick.
    Dodge,
}

impl Between {
    fn code(self) -> Vec<u8> {
        let (port, value) = match self {
            Self::Nothing => return vec![],
            Self::Exit => (port::STORM, 0),
            Self::Sleep(us) => (port::SLEEP, us),
            Self::Dodge => (port::DODGE, 0),
        };
        let mut code = vec![0xb8]; //                    mov    $value, %eax
        code.extend(value.to_le_bytes());
        code.extend([0x66, 0xba]); //                    mov    $port, %dx
        code.extend(port.to_le_bytes());
        code.push(0xef); //                              out    %eax, %dx
        code
    }
}

/// A program and the privilege it wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Program {
    pub(super) code: Vec<u8>,
    /// The ring it starts in, where there is a choice: 0 or 3.
    pub(super) ring: u8,
}

impl Program {
    /// `rounds` times: tells READY, spins until the TSC has advanced by at least `ticks`, and reports by how much it
    /// has. Then DONE. 0 rounds are 2^64.
    #[must_use]
    pub fn spin_for(ticks: u64, rounds: u64) -> Self {
        let mut code = vec![];
        code.extend([0x48, 0xbb]); //                    movabs $ticks, %rbx
        code.extend(ticks.to_le_bytes());
        code.extend([0x48, 0xb9]); //                    movabs $rounds, %rcx
        code.extend(rounds.to_le_bytes());
        code.extend([
            // round:
            0x66, 0xba, 0x00, 0x05, //                   mov    $READY, %dx
            0xef, //                                     out    %eax, %dx
            0x0f, 0x31, //                               rdtsc
            0x48, 0xc1, 0xe2, 0x20, //                   shl    $32, %rdx
            0x48, 0x09, 0xd0, //                         or     %rdx, %rax
            0x48, 0x89, 0xc6, //                         mov    %rax, %rsi
            // again:
            0x0f, 0x31, //                               rdtsc
            0x48, 0xc1, 0xe2, 0x20, //                   shl    $32, %rdx
            0x48, 0x09, 0xd0, //                         or     %rdx, %rax
            0x48, 0x29, 0xf0, //                         sub    %rsi, %rax
            0x48, 0x39, 0xd8, //                         cmp    %rbx, %rax
            0x72, 0xef, //                               jb     again
            0x66, 0xba, 0x04, 0x05, //                   mov    $REPORT, %dx
            0xef, //                                     out    %eax, %dx
            0x48, 0xc1, 0xe8, 0x20, //                   shr    $32, %rax
            0xef, //                                     out    %eax, %dx
            0x48, 0xff, 0xc9, //                         dec    %rcx
            0x75, 0xcf, //                               jnz    round
            0x66, 0xba, 0x08, 0x05, //                   mov    $DONE, %dx
            0xef, //                                     out    %eax, %dx
            0xeb, 0xfe, //                               jmp    .
        ]);
        Self { code, ring: 3 }
    }

    /// Tells READY, burns `slices` slices of `slice` ticks each, `between` before each, and reports two figures: the
    /// ticks it burned, and those it lost. Then DONE.
    ///
    /// It reads the TSC over and over. A step of at most `gap` ticks from one read to the next is burned; a longer one
    /// is lost, for the guest was somewhere between the two reads and cannot tell where: its thread was preempted, or
    /// the host handled an interrupt. What it burned is thus the least guest time there was, and with what it lost the
    /// most, but for the few instructions before the first and after the last read of a slice.
    #[must_use]
    pub fn burn(slice: u64, slices: u64, between: Between, gap: u64) -> Self {
        let mut code = vec![0x49, 0xba]; //              movabs $slice, %r10
        code.extend(slice.to_le_bytes());
        code.extend([0x49, 0xb9]); //                    movabs $gap, %r9
        code.extend(gap.to_le_bytes());
        code.extend([0x48, 0xb9]); //                    movabs $slices, %rcx
        code.extend(slices.to_le_bytes());
        code.extend([
            0x31, 0xdb, //                               xor    %ebx, %ebx
            0x31, 0xff, //                               xor    %edi, %edi
            0x66, 0xba, 0x00, 0x05, //                   mov    $READY, %dx
            0xef, //                                     out    %eax, %dx
        ]);
        let slice_at = code.len();
        // slice:
        code.extend(between.code());
        code.extend([
            0x0f, 0x31, //                               rdtsc
            0x48, 0xc1, 0xe2, 0x20, //                   shl    $32, %rdx
            0x48, 0x09, 0xd0, //                         or     %rdx, %rax
            0x49, 0x89, 0xc0, //                         mov    %rax, %r8
            0x48, 0x89, 0xc6, //                         mov    %rax, %rsi
            // again:
            0x0f, 0x31, //                               rdtsc
            0x48, 0xc1, 0xe2, 0x20, //                   shl    $32, %rdx
            0x48, 0x09, 0xd0, //                         or     %rdx, %rax
            0x48, 0x89, 0xc2, //                         mov    %rax, %rdx
            0x48, 0x29, 0xf2, //                         sub    %rsi, %rdx
            0x48, 0x89, 0xc6, //                         mov    %rax, %rsi
            0x4c, 0x39, 0xca, //                         cmp    %r9, %rdx
            0x77, 0x05, //                               ja     lost
            0x48, 0x01, 0xd3, //                         add    %rdx, %rbx
            0xeb, 0x03, //                               jmp    check
            // lost:
            0x48, 0x01, 0xd7, //                         add    %rdx, %rdi
            // check:
            0x4c, 0x29, 0xc0, //                         sub    %r8, %rax
            0x4c, 0x39, 0xd0, //                         cmp    %r10, %rax
            0x72, 0xd9, //                               jb     again
            0x48, 0xff, 0xc9, //                         dec    %rcx
        ]);
        let back = u8::try_from(code.len() + 2 - slice_at).expect("some 80 bytes");
        code.extend([
            0x75,
            back.wrapping_neg(), //                jnz    slice
            0x66,
            0xba,
            0x04,
            0x05, //                   mov    $REPORT, %dx
            0x48,
            0x89,
            0xd8, //                         mov    %rbx, %rax
            0xef, //                                     out    %eax, %dx
            0x48,
            0xc1,
            0xe8,
            0x20, //                   shr    $32, %rax
            0xef, //                                     out    %eax, %dx
            0x48,
            0x89,
            0xf8, //                         mov    %rdi, %rax
            0xef, //                                     out    %eax, %dx
            0x48,
            0xc1,
            0xe8,
            0x20, //                   shr    $32, %rax
            0xef, //                                     out    %eax, %dx
            0x66,
            0xba,
            0x08,
            0x05, //                   mov    $DONE, %dx
            0xef, //                                     out    %eax, %dx
            0xeb,
            0xfe, //                               jmp    .
        ]);
        Self { code, ring: 3 }
    }

    /// Spins for ever, and never exits of its own accord.
    #[must_use]
    pub fn spin_forever() -> Self {
        let code = vec![
            0xeb, 0xfe, //                               jmp    .
        ];
        Self { code, ring: 3 }
    }

    /// For ever: spins for 2^30 ticks, then exits to STORM over and over for as long. On 2 GHz each takes half a second.
    #[must_use]
    pub fn by_turns() -> Self {
        let code = vec![
            // again:
            0x0f, 0x31, //                               rdtsc
            0xa9, 0x00, 0x00, 0x00, 0x40, //             test   $(1 << 30), %eax
            0x74, 0xf7, //                               jz     again
            0x66, 0xba, 0x0c, 0x05, //                   mov    $STORM, %dx
            0xef, //                                     out    %eax, %dx
            0xeb, 0xf0, //                               jmp    again
        ];
        Self { code, ring: 3 }
    }

    /// `exits` times an exit to STORM, counted by the guest itself; then it reports its count, and DONE. 0 is 2^64.
    #[must_use]
    pub fn exit_storm(exits: u64) -> Self {
        let mut code = vec![0x48, 0xb9]; //              movabs $exits, %rcx
        code.extend(exits.to_le_bytes());
        code.extend([
            0x48, 0x31, 0xf6, //                         xor    %rsi, %rsi
            0x66, 0xba, 0x0c, 0x05, //                   mov    $STORM, %dx
            // again:
            0xef, //                                     out    %eax, %dx
            0x48, 0xff, 0xc6, //                         inc    %rsi
            0x48, 0xff, 0xc9, //                         dec    %rcx
            0x75, 0xf7, //                               jnz    again
            0x48, 0x89, 0xf0, //                         mov    %rsi, %rax
            0x66, 0xba, 0x04, 0x05, //                   mov    $REPORT, %dx
            0xef, //                                     out    %eax, %dx
            0x48, 0xc1, 0xe8, 0x20, //                   shr    $32, %rax
            0xef, //                                     out    %eax, %dx
            0x66, 0xba, 0x08, 0x05, //                   mov    $DONE, %dx
            0xef, //                                     out    %eax, %dx
            0xeb, 0xfe, //                               jmp    .
        ]);
        Self { code, ring: 3 }
    }

    /// Halts, and halts again whatever wakes it. In kernel mode, since HLT is privileged.
    #[must_use]
    pub fn halt() -> Self {
        let code = vec![
            0xfb, //                                     sti
            // again:
            0xf4, //                                     hlt
            0xeb, 0xfd, //                               jmp    again
        ];
        Self { code, ring: 0 }
    }

    /// Writes "up" to the serial port, waits for a key, looking out for one every 100,000 turns of a loop, and resets the machine:
    /// Ctrl-Alt-Del ends it in good order, as it would a Linux guest.
    #[must_use]
    pub fn reset_by_key() -> Self {
        let code = vec![
            0x66, 0xba, 0xf8, 0x03, //                   mov    $COM1, %dx
            0xb0, b'u', //                               mov    $'u', %al
            0xee, //                                     out    %al, %dx
            0xb0, b'p', //                               mov    $'p', %al
            0xee, //                                     out    %al, %dx
            0xb0, b'\n', //                              mov    $'\n', %al
            0xee,  //                                     out    %al, %dx
            // wait:
            0xb9, 0xa0, 0x86, 0x01, 0x00, //             mov    $100000, %ecx
            // turn:
            0xff, 0xc9, //                               dec    %ecx
            0x75, 0xfc, //                               jnz    turn
            0xe4, 0x64, //                               in     $0x64, %al
            0xa8, 0x01, //                               test   $1, %al
            0x74, 0xf1, //                               jz     wait
            0xb0, 0xfe, //                               mov    $0xfe, %al
            0xe6, 0x64, //                               out    %al, $0x64
            0xeb, 0xfe, //                               jmp    .
        ];
        Self { code, ring: 3 }
    }

    /// Sets the keyboard controller up as a driver does, with its interrupt on, writes "up" to the serial port, and spins without
    /// ever reading a key.
    #[must_use]
    pub fn deaf_driver() -> Self {
        let code = vec![
            0xb0, 0x60, //                               mov    $0x60, %al
            0xe6, 0x64, //                               out    %al, $0x64
            0xb0, 0x01, //                               mov    $1, %al
            0xe6, 0x60, //                               out    %al, $0x60
            0x66, 0xba, 0xf8, 0x03, //                   mov    $COM1, %dx
            0xb0, b'u', //                               mov    $'u', %al
            0xee, //                                     out    %al, %dx
            0xb0, b'p', //                               mov    $'p', %al
            0xee, //                                     out    %al, %dx
            0xb0, b'\n', //                              mov    $'\n', %al
            0xee,  //                                     out    %al, %dx
            0xeb, 0xfe, //                               jmp    .
        ];
        Self { code, ring: 3 }
    }

    /// Asks CPUID for `leaf` and `subleaf`, writes EAX, EBX, ECX and EDX to the serial port in hexadecimal, and resets the machine. As
    /// a kernel.
    #[must_use]
    pub fn cpuid(leaf: u32, subleaf: u32) -> Self {
        let mut code = vec![0xb8]; //                    mov    $leaf, %eax
        code.extend(leaf.to_le_bytes());
        code.push(0xb9); //                              mov    $subleaf, %ecx
        code.extend(subleaf.to_le_bytes());
        code.extend([
            0x0f, 0xa2, //                               cpuid
            0x41, 0x89, 0xc0, //                         mov    %eax, %r8d
            0x41, 0x89, 0xd9, //                         mov    %ebx, %r9d
            0x41, 0x89, 0xca, //                         mov    %ecx, %r10d
            0x41, 0x89, 0xd3, //                         mov    %edx, %r11d
        ]);
        code.extend(tell_and_reset());
        Self { code, ring: 0 }
    }

    /// Reads model-specific register `msr`, writes it to the serial port in 32 hexadecimal digits, and resets the machine. As a
    /// kernel.
    #[must_use]
    pub fn rdmsr(msr: u32) -> Self {
        let mut code = vec![0xb9]; //                    mov    $msr, %ecx
        code.extend(msr.to_le_bytes());
        code.extend([
            0x0f, 0x32, //                               rdmsr
            0x45, 0x31, 0xc0, //                         xor    %r8d, %r8d
            0x45, 0x31, 0xc9, //                         xor    %r9d, %r9d
            0x41, 0x89, 0xd2, //                         mov    %edx, %r10d
            0x41, 0x89, 0xc3, //                         mov    %eax, %r11d
        ]);
        code.extend(tell_and_reset());
        Self { code, ring: 0 }
    }

    /// Faults, with nothing there to handle it.
    #[must_use]
    pub fn triple_fault() -> Self {
        let code = vec![
            0x0f, 0x0b, //                               ud2
        ];
        Self { code, ring: 3 }
    }
}

/// Writes %r8d to %r11d to the serial port, 8 digits each, and a newline, and resets the machine.
fn tell_and_reset() -> Vec<u8> {
    let mut code = vec![0x66, 0xba, 0xf8, 0x03]; //      mov    $COM1, %dx
    // %r8d to %r11d differ in three bits of `mov`.
    for register in [0xc3, 0xcb, 0xd3, 0xdb] {
        code.extend([
            0x44, 0x89, register, //                     mov    %r8d, %ebx
            0xb9, 0x08, 0x00, 0x00, 0x00, //             mov    $8, %ecx
            // digit:
            0xc1, 0xc3, 0x04, //                         rol    $4, %ebx
            0x88, 0xd8, //                               mov    %bl, %al
            0x24, 0x0f, //                               and    $0xf, %al
            0x04, 0x30, //                               add    $'0', %al
            0x3c, 0x39, //                               cmp    $'9', %al
            0x76, 0x02, //                               jbe    tell
            0x04, 0x27, //                               add    $'a' - '9' - 1, %al
            // tell:
            0xee, //                                     out    %al, %dx
            0xff, 0xc9, //                               dec    %ecx
            0x75, 0xec, //                               jnz    digit
        ]);
    }
    code.extend([
        0xb0, b'\n', //                                  mov    $'\n', %al
        0xee,  //                                         out    %al, %dx
        0xb0, 0xfe, //                                   mov    $0xfe, %al
        0xe6, 0x64, //                                   out    %al, $0x64
        0xeb, 0xfe, //                                   jmp    .
    ]);
    code
}
