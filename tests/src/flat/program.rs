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

    /// Spins for ever, and never exits of its own accord.
    #[must_use]
    pub fn spin_forever() -> Self {
        let code = vec![
            0xeb, 0xfe, //                               jmp    .
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

    /// Faults, with nothing there to handle it.
    #[must_use]
    pub fn triple_fault() -> Self {
        let code = vec![
            0x0f, 0x0b, //                               ud2
        ];
        Self { code, ring: 3 }
    }
}
