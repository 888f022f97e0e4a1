//! A program of seccompiler's, made shorter, and to the same effect.
//!
//! Why: to install a filter the kernel translates it, and runs it once for each system call there is (to learn which are always
//! allowed). Both go by its length, and a microVM waits for it four times and once more for each vCPU; made shorter, it is installed
//! in a third of the time. seccompiler's is a chain: is it this call? then its rules; else, is it the next? Here
//!
//! ```text
//!  calls are found by bisection, to a group of a few     what is the same is there once a group
//!
//!     number >= 60? ─ yes ─► ...                           is it read?   ─┐
//!          │                                               is it write?  ─┼─► allowed
//!          no                                              is it openat? ─│──► its rules
//!          └────────────► a group ───────────────────►     not allowed    │
//! ```
//!
//! and of a call's rules those instructions go that nothing leads to, or that load what has been loaded.
//!
//! Whatever has not the shape that is expected is left as it is.

use std::collections::BTreeMap;

use seccompiler::{BpfProgram, sock_filter};

use super::{JUMP_IF_EQUAL, LOAD_WORD, NUMBER, RETURN, instruction};

// linux/bpf_common.h.
const JUMP: u16 = 0x05; // BPF_JMP | BPF_JA
const JUMP_IF_GREATER: u16 = 0x25; // BPF_JMP | BPF_JGT | BPF_K
const JUMP_IF_AT_LEAST: u16 = 0x35; // BPF_JMP | BPF_JGE | BPF_K
const AND: u16 = 0x54; // BPF_ALU | BPF_AND | BPF_K

/// A group's calls at most, and its instructions: a conditional jump leads over 255 at most.
const CALLS: usize = 8;
const INSTRUCTIONS: usize = 200;

/// `chain` made shorter; `None` where it has another shape than seccompiler's: a check of the architecture, 3 instructions; the
/// number is loaded; for each call, in the order of their numbers, a [`Call`]; the default action.
pub fn shorten(chain: &[sock_filter]) -> Option<BpfProgram> {
    let (head, mut rest) = chain.split_at_checked(4)?;
    (head[3] == instruction(LOAD_WORD, 0, 0, NUMBER)).then_some(())?;
    let mut calls: Vec<Call> = Vec::new();
    while rest.len() > 1 {
        let (call, next) = Call::first_of(rest)?;
        calls
            .last()
            .is_none_or(|last| last.number < call.number)
            .then_some(())?;
        calls.push(call);
        rest = next;
    }
    let [default] = rest else { return None };
    (default.code == RETURN).then_some(())?;
    let mut program = head.to_vec();
    bisect(&calls, default, &mut program)?;
    Some(program)
}

/// What is done about one call.
struct Call {
    number: u32,
    rules: BpfProgram,
}

impl Call {
    /// The one at the beginning of `rest`, and what comes behind it. It begins with
    ///
    /// ```text
    ///   is it this call?  no: ──┐
    ///   jump over the next      │
    ///   jump to the next call ◄─┘  by way of such jumps, one for each of the call's rules
    ///   rules
    /// ```
    fn first_of(rest: &[sock_filter]) -> Option<(Self, &[sock_filter])> {
        let [is, over, ..] = rest else { return None };
        let begins = is.code == JUMP_IF_EQUAL && (is.jt, is.jf) == (0, 1) && *over == instruction(JUMP, 0, 0, 1);
        begins.then_some(())?;
        let mut end = 2;
        while rest.get(end)?.code == JUMP {
            end += 1 + usize::try_from(rest[end].k).ok()?;
        }
        let call = Self {
            number: is.k,
            rules: reachable(rest.get(3..end)?)?,
        };
        Some((call, &rest[end..]))
    }
}

/// Those of `rules` that something leads to. None of them leads out.
fn reachable(rules: &[sock_filter]) -> Option<BpfProgram> {
    // Where to, past jumps that are always taken and loads of what is loaded: `held`, by its offset.
    let past = |mut to: usize, held: Option<u32>| loop {
        let next: &sock_filter = rules.get(to)?;
        to += match next.code {
            JUMP => 1 + usize::try_from(next.k).ok()?,
            LOAD_WORD if held == Some(next.k) => 1,
            _ => break Some(to),
        };
    };
    // All jumps lead on, so one pass sees all that leads to an instruction before the instruction. What may be held there, and
    // where each leads.
    let mut found = BTreeMap::from([(past(0, None)?, None)]);
    let mut kept: Vec<(usize, [usize; 2])> = Vec::new();
    while let Some((at, mut held)) = found.pop_first() {
        let sock_filter { code, jt, jf, k } = rules[at];
        let next = match code {
            RETURN => {
                kept.push((at, [at; 2]));
                continue;
            }
            LOAD_WORD => {
                held = Some(k);
                [0; 2]
            }
            AND => {
                held = None;
                [0; 2]
            }
            JUMP_IF_EQUAL | JUMP_IF_GREATER | JUMP_IF_AT_LEAST => [jt, jf],
            _ => return None,
        };
        let [yes, no] = next.map(|jump| past(at + 1 + usize::from(jump), held));
        let next = [yes?, no?];
        for to in next {
            let meets = found.entry(to).or_insert(held);
            if *meets != held {
                *meets = None;
            }
        }
        kept.push((at, next));
    }
    // Some is there: the first.
    let place = |of: usize| kept.binary_search_by_key(&of, |(at, _)| *at).ok();
    let mut program = Vec::with_capacity(kept.len());
    for (here, &(at, next)) in kept.iter().enumerate() {
        let mut instruction = rules[at].clone();
        if instruction.code != RETURN {
            let [yes, no] = next.map(|to| u8::try_from(place(to)? - here - 1).ok());
            (instruction.jt, instruction.jf) = (yes?, no?);
            let leads_on = matches!(instruction.code, LOAD_WORD | AND);
            (!leads_on || (instruction.jt, instruction.jf) == (0, 0)).then_some(())?;
        }
        program.push(instruction);
    }
    Some(program)
}

fn bisect(calls: &[Call], default: &sock_filter, program: &mut BpfProgram) -> Option<()> {
    let instructions: usize = calls.iter().map(|call| call.rules.len()).sum();
    if calls.len() <= 1 || (calls.len() <= CALLS && instructions <= INSTRUCTIONS) {
        return group(calls, default, program);
    }
    let (low, high) = calls.split_at(calls.len() / 2);
    program.push(instruction(JUMP_IF_AT_LEAST, 0, 1, high[0].number));
    let over = program.len();
    program.push(instruction(JUMP, 0, 0, 0));
    bisect(low, default, program)?;
    program[over].k = u32::try_from(program.len() - over - 1).ok()?;
    bisect(high, default, program)
}

fn group(calls: &[Call], default: &sock_filter, program: &mut BpfProgram) -> Option<()> {
    // What comes behind the comparisons: the default action, then the rules of each call, those that are the same once.
    let mut behind = vec![default.clone()];
    let mut places: Vec<(&[sock_filter], usize)> = Vec::new();
    for (index, call) in calls.iter().enumerate() {
        let known = places.iter().find(|(rules, _)| *rules == call.rules);
        let place = known.map_or(behind.len(), |(_, place)| *place);
        if known.is_none() {
            places.push((&call.rules, place));
            behind.extend_from_slice(&call.rules);
        }
        let jump = u8::try_from(calls.len() - index - 1 + place).ok()?;
        program.push(instruction(JUMP_IF_EQUAL, jump, 0, call.number));
    }
    program.append(&mut behind);
    Some(())
}
