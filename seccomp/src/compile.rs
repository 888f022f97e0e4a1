//! From a policy in JSON to programs that the kernel takes: by the build script for the policy that ships, at run time for
//! another.

#[path = "shorten.rs"]
pub mod shorten;

use std::collections::HashMap;

use seccompiler::{BpfProgram, Error, TargetArch, compile_from_json, sock_filter};

/// The roles by name: what a policy has to tell of, as Firecracker's do.
pub const ROLES: [&str; 3] = ["vmm", "api", "vcpu"];

// linux/bpf_common.h: what an instruction does.
const LOAD_WORD: u16 = 0x20; // BPF_LD | BPF_W | BPF_ABS
const JUMP_IF_EQUAL: u16 = 0x15; // BPF_JMP | BPF_JEQ | BPF_K
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
        if let Some(shorter) = shorten::shorten(program) {
            *program = shorter;
        }
        program.splice(0..0, NO_CLONE3.iter().cloned());
    }
    Ok(programs)
}
