//! From a policy in JSON to programs that the kernel takes: by the build script for the policy that ships, at run time for
//! another.

use std::collections::HashMap;

use seccompiler::{BpfProgram, Error, TargetArch, compile_from_json, sock_filter};

/// The roles by name: what a policy has to tell of, as Firecracker's do.
pub const ROLES: [&str; 3] = ["vmm", "api", "vcpu"];

// linux/bpf_common.h: what an instruction does.
const LOAD_WORD: u16 = 0x20; // BPF_LD | BPF_W | BPF_ABS
const JUMP: u16 = 0x05; // BPF_JMP | BPF_JA
const JUMP_IF_EQUAL: u16 = 0x15; // BPF_JMP | BPF_JEQ | BPF_K
const JUMP_IF_AT_LEAST: u16 = 0x35; // BPF_JMP | BPF_JGE | BPF_K
const RETURN: u16 = 0x06; // BPF_RET | BPF_K

// linux/seccomp.h, struct seccomp_data: where it looks, in bytes.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;

/// linux/audit.h, AUDIT_ARCH_X86_64.
const X86_64: u32 = 0xc000_003e;
/// asm/unistd_64.h.
const CLONE3: u32 = 435;
/// linux/seccomp.h, SECCOMP_RET_ERRNO, with ENOSYS.
const NO_SUCH_CALL: u32 = 0x0005_0000 | 38;

const fn instruction(code: u16, jt: u8, jf: u8, k: u32) -> sock_filter {
    sock_filter { code, jt, jf, k }
}

/// What comes first in each program: clone3(2) is answered as by a kernel that has none. Its flags are in memory, where no program
/// can see whether it is a thread that is to be made or a process; the C library then takes clone(2), whose flags are arguments.
/// Whatever else is asked goes on to what follows.
const NO_CLONE3: [sock_filter; 5] = [
    instruction(LOAD_WORD, 0, 0, ARCHITECTURE),
    instruction(JUMP_IF_EQUAL, 0, 3, X86_64),
    instruction(LOAD_WORD, 0, 0, NUMBER),
    instruction(JUMP_IF_EQUAL, 0, 1, CLONE3),
    instruction(RETURN, 0, 0, NO_SUCH_CALL),
];

/// The programs of the policy `json`, by role.
///
/// # Errors
/// What is wrong with it.
pub fn compile(json: &[u8]) -> Result<HashMap<String, BpfProgram>, Error> {
    let mut programs = compile_from_json(json, TargetArch::x86_64)?;
    for program in programs.values_mut() {
        if let Some(tree) = tree(program) {
            *program = tree;
        }
        program.splice(0..0, NO_CLONE3.iter().cloned());
    }
    Ok(programs)
}

/// `chain` with its calls found by bisection. When a filter is installed the kernel runs it once for each system call there is (to
/// learn which are always allowed), so a chain of comparisons makes a start longer by more than all else about it.
///
/// seccompiler's chain is: a check of the architecture, 3 instructions; the number is loaded; for each call, in the order of their
/// numbers, a [`Block`]; the default action. `None` where it is not, and of one call there is nothing to bisect.
pub fn tree(chain: &[sock_filter]) -> Option<BpfProgram> {
    let (head, mut rest) = chain.split_at_checked(4)?;
    (head[3] == instruction(LOAD_WORD, 0, 0, NUMBER)).then_some(())?;
    let mut blocks: Vec<Block> = Vec::new();
    while rest.len() > 1 {
        let (block, next) = Block::first_of(rest)?;
        let in_order = blocks.last().is_none_or(|last| last.number < block.number);
        in_order.then_some(())?;
        blocks.push(block);
        rest = next;
    }
    let [default] = rest else { return None };
    (default.code == RETURN && blocks.len() > 1).then_some(())?;
    let mut program = head.to_vec();
    bisect(&blocks, default, &mut program);
    Some(program)
}

/// What is done about one call.
struct Block<'a> {
    number: u32,
    /// Leaves by returning only: no jump of it that is ever taken leads out of it.
    body: &'a [sock_filter],
}

impl<'a> Block<'a> {
    /// The one at the beginning of `rest`, and what comes behind it. It begins with
    ///
    /// ```text
    ///   the number is the call's? no: ──┐
    ///   jump over the next              │
    ///   jump to the next block      ◄───┘  by way of such jumps, one for each of the call's rules
    ///   body
    /// ```
    fn first_of(rest: &'a [sock_filter]) -> Option<(Self, &'a [sock_filter])> {
        let is = rest.first()?;
        (is.code == JUMP_IF_EQUAL && (is.jt, is.jf) == (0, 1) && rest.get(1)? == &instruction(JUMP, 0, 0, 1)).then_some(())?;
        let mut end = 2;
        while rest.get(end)?.code == JUMP {
            end += 1 + usize::try_from(rest[end].k).ok()?;
        }
        let block = Self {
            number: is.k,
            body: rest.get(3..end)?,
        };
        Some((block, &rest[end..]))
    }
}

fn bisect(blocks: &[Block], default: &sock_filter, program: &mut BpfProgram) {
    if let [block] = blocks {
        program.extend([instruction(JUMP_IF_EQUAL, 1, 0, block.number), default.clone()]);
        program.extend_from_slice(block.body);
        // Jumps of the chain to its next block, which nothing leads to any more, have to lead somewhere.
        program.push(default.clone());
        return;
    }
    let (low, high) = blocks.split_at(blocks.len() / 2);
    program.push(instruction(JUMP_IF_AT_LEAST, 0, 1, high[0].number));
    let over = program.len();
    program.push(instruction(JUMP, 0, 0, 0));
    bisect(low, default, program);
    program[over].k = u32::try_from(program.len() - over - 1).expect("the kernel takes 4096 instructions");
    bisect(high, default, program);
}
