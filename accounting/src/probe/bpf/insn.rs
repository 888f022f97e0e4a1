//! A tiny assembler: the dozen BPF instructions that [`super::program`] is made of.
//!
//! Encodings are those of the kernel's `Documentation/bpf/standardization/instruction-set.rst` (RFC 9669): eight bytes,
//! `opcode, src:4 dst:4, offset:16, imm:32`, little-endian on x86. The low three bits of an opcode are its class.

/// A register. `R0` is a call's result, `R1` to `R5` its arguments, which the call destroys; `R6` to `R9` survive it.
/// Those that no program here uses are left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Reg {
    R0 = 0,
    R1 = 1,
    R2 = 2,
    R3 = 3,
    R4 = 4,
    R6 = 6,
    R7 = 7,
    /// The frame pointer, read-only: the stack is the 512 bytes below it.
    Fp = 10,
}

/// A function of the kernel, by its number in `enum bpf_func_id` (`include/uapi/linux/bpf.h`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum Function {
    /// `void *(map, key)`: the value's address, or 0.
    MapLookupElem = 1,
    /// `u64 ()`: `CLOCK_MONOTONIC` in nanoseconds.
    KtimeGetNs = 5,
    /// `long (dev, ino, bpf_pidns_info *, size)`: the current thread's ids in the PID namespace that (dev, ino) names;
    /// not 0 where it is of another. Since Linux 5.7.
    GetNsCurrentPidTgid = 120,
}

/// When a jump is taken. Comparisons are of 64 bits, unsigned; an immediate is sign-extended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum When {
    /// `dst == src`
    Equal = 0x10,
    /// `dst > src`
    Greater = 0x20,
    /// `dst != src`
    NotEqual = 0x50,
}

/// A place to jump to, forwards: the verifier then needs no proof that the program ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Label(usize);

/// One instruction, as the kernel reads it (`struct bpf_insn`); a 64-bit constant takes two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Insn {
    opcode: u8,
    /// Source in the high four bits, destination in the low.
    registers: u8,
    offset: i16,
    imm: i32,
}

// Classes.
const LD: u8 = 0;
const LDX: u8 = 1;
const STX: u8 = 3;
const JMP: u8 = 5;
const ALU64: u8 = 7;
/// The operand is the source register (ALU and JMP classes), not the immediate.
const BY_REGISTER: u8 = 0x08;
// Memory accesses: at `register + offset`, of a width.
const MEM: u8 = 0x60;
const WORD: u8 = 0x00;
const DOUBLE: u8 = 0x18;
// Arithmetic.
const ADD: u8 = 0x00;
const SUB: u8 = 0x10;
const AND: u8 = 0x50;
const LSH: u8 = 0x60;
const MOV: u8 = 0xb0;
// Control.
const CALL: u8 = 0x80;
const EXIT: u8 = 0x90;
/// In a 64-bit load's source field: the constant is a map's descriptor, which the kernel replaces by the map.
const PSEUDO_MAP_FD: u8 = 1;

/// A program being written, top to bottom.
#[derive(Debug, Default)]
pub struct Assembler {
    insns: Vec<Insn>,
    /// Where each label was placed.
    places: Vec<Option<usize>>,
    /// Jumps, and the labels they go to.
    jumps: Vec<(usize, Label)>,
}

impl Assembler {
    fn push(&mut self, opcode: u8, dst: Reg, src: u8, offset: i16, imm: i32) {
        self.insns.push(Insn {
            opcode,
            registers: src << 4 | dst as u8,
            offset,
            imm,
        });
    }

    /// `dst = src`
    pub fn mov(&mut self, dst: Reg, src: Reg) {
        self.push(ALU64 | BY_REGISTER | MOV, dst, src as u8, 0, 0);
    }

    /// `dst = imm`, sign-extended.
    pub fn mov_imm(&mut self, dst: Reg, imm: i32) {
        self.push(ALU64 | MOV, dst, 0, 0, imm);
    }

    /// `dst = imm`, all 64 bits.
    pub fn mov_imm64(&mut self, dst: Reg, imm: u64) {
        self.wide(dst, 0, imm);
    }

    /// `dst = ` the map of descriptor `fd`.
    pub fn mov_map(&mut self, dst: Reg, fd: u32) {
        self.wide(dst, PSEUDO_MAP_FD, fd.into());
    }

    fn wide(&mut self, dst: Reg, src: u8, imm: u64) {
        let [a, b, c, d, e, f, g, h] = imm.to_le_bytes();
        self.push(LD | DOUBLE, dst, src, 0, i32::from_le_bytes([a, b, c, d]));
        self.push(0, Reg::R0, 0, 0, i32::from_le_bytes([e, f, g, h]));
    }

    /// `dst += src`
    pub fn add(&mut self, dst: Reg, src: Reg) {
        self.push(ALU64 | BY_REGISTER | ADD, dst, src as u8, 0, 0);
    }

    /// `dst += imm`
    pub fn add_imm(&mut self, dst: Reg, imm: i32) {
        self.push(ALU64 | ADD, dst, 0, 0, imm);
    }

    /// `dst -= src`
    pub fn sub(&mut self, dst: Reg, src: Reg) {
        self.push(ALU64 | BY_REGISTER | SUB, dst, src as u8, 0, 0);
    }

    /// `dst &= imm`
    pub fn and_imm(&mut self, dst: Reg, imm: i32) {
        self.push(ALU64 | AND, dst, 0, 0, imm);
    }

    /// `dst <<= imm`
    pub fn shl_imm(&mut self, dst: Reg, imm: i32) {
        self.push(ALU64 | LSH, dst, 0, 0, imm);
    }

    /// `dst = *(u32 *)(src + offset)`, zero-extended.
    pub fn load_u32(&mut self, dst: Reg, src: Reg, offset: i16) {
        self.push(LDX | MEM | WORD, dst, src as u8, offset, 0);
    }

    /// `dst = *(u64 *)(src + offset)`
    pub fn load_u64(&mut self, dst: Reg, src: Reg, offset: i16) {
        self.push(LDX | MEM | DOUBLE, dst, src as u8, offset, 0);
    }

    /// `*(u64 *)(dst + offset) = src`
    pub fn store_u64(&mut self, dst: Reg, offset: i16, src: Reg) {
        self.push(STX | MEM | DOUBLE, dst, src as u8, offset, 0);
    }

    /// `R0 = function(R1, R2, ...)`
    pub fn call(&mut self, function: Function) {
        self.push(JMP | CALL, Reg::R0, 0, 0, function as i32);
    }

    /// Jumps to `to` when `dst` compares so with `imm`.
    pub fn jump_imm(&mut self, when: When, dst: Reg, imm: i32, to: Label) {
        self.jumps.push((self.insns.len(), to));
        self.push(JMP | when as u8, dst, 0, 0, imm);
    }

    /// Jumps to `to` when `dst` compares so with `src`.
    pub fn jump(&mut self, when: When, dst: Reg, src: Reg, to: Label) {
        self.jumps.push((self.insns.len(), to));
        self.push(JMP | BY_REGISTER | when as u8, dst, src as u8, 0, 0);
    }

    /// Ends the program; its result is `R0`.
    pub fn exit(&mut self) {
        self.push(JMP | EXIT, Reg::R0, 0, 0, 0);
    }

    /// A label, to be placed further down.
    pub fn label(&mut self) -> Label {
        self.places.push(None);
        Label(self.places.len() - 1)
    }

    /// Places `label` before the next instruction.
    pub fn place(&mut self, label: Label) {
        self.places[label.0] = Some(self.insns.len());
    }

    /// The program, its jumps resolved.
    ///
    /// # Panics
    /// When a label that is jumped to has no place, or lies behind the jump.
    #[must_use]
    pub fn finish(mut self) -> Vec<Insn> {
        for (at, label) in self.jumps {
            let place = self.places[label.0].expect("a label that is jumped to has a place");
            // An offset counts from the instruction after the jump.
            let offset = place.checked_sub(at + 1).expect("jumps go forwards");
            self.insns[at].offset = i16::try_from(offset).expect("programs here are short");
        }
        self.insns
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As the kernel reads it, byte by byte.
    fn bytes(write: impl FnOnce(&mut Assembler)) -> Vec<[u8; 8]> {
        let mut assembler = Assembler::default();
        write(&mut assembler);
        let insns = assembler.finish();
        insns
            .iter()
            .map(|i| {
                let ([a, b], [c, d, e, f]) = (i.offset.to_le_bytes(), i.imm.to_le_bytes());
                [i.opcode, i.registers, a, b, c, d, e, f]
            })
            .collect()
    }

    /// By hand from the tables of instruction-set.rst, whose opcodes name class, operation and source.
    #[test]
    fn each_instruction_is_encoded_as_the_instruction_set_says() {
        use Reg::{Fp, R0, R1, R2, R6, R7};
        type Write = fn(&mut Assembler);
        let cases: [(Write, [u8; 8]); 13] = [
            (|a| a.mov(R6, R0), [0xbf, 0x06, 0, 0, 0, 0, 0, 0]),
            (|a| a.mov_imm(R0, -2), [0xb7, 0x00, 0, 0, 0xfe, 0xff, 0xff, 0xff]),
            (|a| a.add(R2, R1), [0x0f, 0x12, 0, 0, 0, 0, 0, 0]),
            (|a| a.add_imm(R2, -8), [0x07, 0x02, 0, 0, 0xf8, 0xff, 0xff, 0xff]),
            (|a| a.sub(R6, R7), [0x1f, 0x76, 0, 0, 0, 0, 0, 0]),
            (|a| a.and_imm(R1, 1), [0x57, 0x01, 0, 0, 1, 0, 0, 0]),
            (|a| a.shl_imm(R1, 4), [0x67, 0x01, 0, 0, 4, 0, 0, 0]),
            (|a| a.load_u32(R1, Fp, -4), [0x61, 0xa1, 0xfc, 0xff, 0, 0, 0, 0]),
            (|a| a.load_u64(R1, R7, 32), [0x79, 0x71, 32, 0, 0, 0, 0, 0]),
            (|a| a.store_u64(R7, 32, R6), [0x7b, 0x67, 32, 0, 0, 0, 0, 0]),
            (
                |a| a.call(Function::GetNsCurrentPidTgid),
                [0x85, 0x00, 0, 0, 120, 0, 0, 0],
            ),
            (|a| a.exit(), [0x95, 0x00, 0, 0, 0, 0, 0, 0]),
            (|a| a.mov(Fp, R1), [0xbf, 0x1a, 0, 0, 0, 0, 0, 0]),
        ];
        for (n, (write, expected)) in cases.into_iter().enumerate() {
            assert_eq!(bytes(write), [expected], "case {n}");
        }
    }

    #[test]
    fn a_constant_of_64_bits_takes_two_instructions_and_a_map_is_one_that_says_so() {
        assert_eq!(
            bytes(|a| a.mov_imm64(Reg::R2, 0x0123_4567_89ab_cdef)),
            [
                [0x18, 0x02, 0, 0, 0xef, 0xcd, 0xab, 0x89],
                [0, 0, 0, 0, 0x67, 0x45, 0x23, 0x01]
            ]
        );
        assert_eq!(
            bytes(|a| a.mov_map(Reg::R1, 5)),
            [[0x18, 0x11, 0, 0, 5, 0, 0, 0], [0; 8]]
        );
    }

    #[test]
    fn a_jump_counts_from_the_instruction_after_it() {
        let program = bytes(|a| {
            let (near, far) = (a.label(), a.label());
            a.jump_imm(When::NotEqual, Reg::R0, 7, far);
            a.jump_imm(When::Equal, Reg::R0, 0, near);
            a.jump(When::Greater, Reg::R4, Reg::R6, near);
            a.place(near);
            a.exit();
            a.place(far);
            a.exit();
        });
        assert_eq!(
            program[..3],
            [
                [0x55, 0x00, 3, 0, 7, 0, 0, 0],
                [0x15, 0x00, 1, 0, 0, 0, 0, 0],
                [0x2d, 0x64, 0, 0, 0, 0, 0, 0]
            ]
        );
    }
}
