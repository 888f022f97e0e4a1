//! How another thread gets a vCPU's attention, and tells it to hold, go on or end.
//!
//! The exit path looks at nothing. A kick is what makes `KVM_RUN` return `EINTR`, and only then does the vCPU look:
//!
//! ```text
//!   whoever asks                        vCPU thread                            KVM_RUN
//!   1 gate.want(..)                     a KVM_RUN ───────────────────────────► reads immediate_exit; if set: EINTR
//!   2 immediate_exit = 1                                                       enters the guest unless a signal is
//!   3 signal the thread                                                        pending; a signal takes it out: EINTR
//!                                       b immediate_exit = 0
//!                                       c gate.look()
//! ```
//!
//! No kick is lost. Take any request, and follow the vCPU from the moment of its signal (3).
//! * In the guest or about to enter it: KVM sees the pending signal, `KVM_RUN` returns EINTR, and c comes after 1.
//! * In user space, anywhere but between b and c: the signal itself does nothing, but 2 came before it and only b
//!   undoes 2. So the next a finds the byte set, or b has been passed after 2, which the last case is about.
//! * b overwrote the 1 of step 2: b's read-modify-write read what 2 released, so 1 happens before c, and c sees it.
//!
//! This is why the order is request, byte, signal on one side, and byte, request on the other. `tests` below walks
//! through every interleaving of these steps, and shows that any other order loses a kick.

use std::sync::atomic::Ordering;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use vmm_sys_util::signal::Killable;

use crate::run_page::RunPage;
use crate::signal;

/// What is wanted of a vCPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Want {
    /// Run the guest.
    Run,
    /// Stay out of the guest until told otherwise.
    Hold,
    /// End. Nothing overrides it.
    Stop,
}

#[derive(Debug)]
struct State {
    want: Want,
    /// The vCPU is out of the guest and stays out until `want` changes.
    held: bool,
    ended: bool,
}

/// Where one vCPU is told what is wanted of it, and where those who told it wait.
#[derive(Debug)]
pub(crate) struct Gate {
    state: Mutex<State>,
    changed: Condvar,
}

impl Gate {
    /// A vCPU starts held.
    pub(crate) fn new() -> Self {
        Self {
            state: Mutex::new(State {
                want: Want::Hold,
                held: false,
                ended: false,
            }),
            changed: Condvar::new(),
        }
    }

    /// Step 1. Says whether a kick has to follow: a held vCPU needs none.
    pub(crate) fn want(&self, want: Want) -> bool {
        let mut state = self.lock();
        if state.want != Want::Stop {
            state.want = want;
        }
        self.changed.notify_all();
        !state.held && !state.ended
    }

    /// Waits until the vCPU is held, or has ended.
    pub(crate) fn wait_held(&self) {
        let state = self.lock();
        drop(
            self.changed
                .wait_while(state, |state| !state.held && !state.ended && state.want == Want::Hold),
        );
    }

    /// Step c, on the vCPU thread.
    pub(crate) fn look(&self) -> Want {
        self.lock().want
    }

    /// On the vCPU thread: is held for as long as that is wanted, and says what is wanted instead.
    pub(crate) fn hold(&self) -> Want {
        let mut state = self.lock();
        state.held = true;
        self.changed.notify_all();
        state = self
            .changed
            .wait_while(state, |state| state.want == Want::Hold)
            .unwrap_or_else(PoisonError::into_inner);
        state.held = false;
        state.want
    }

    /// Does `what` while the thread is certain to be there, and so its id to be its own; `None` once it has ended. A thread
    /// that has to look at the gate meanwhile waits: keep it short.
    pub(crate) fn while_there<T>(&self, what: impl FnOnce() -> T) -> Option<T> {
        let state = self.lock();
        (!state.ended).then(what)
    }

    /// On the vCPU thread, last: nobody waits for it any more.
    pub(crate) fn end(&self) {
        self.lock().ended = true;
        self.changed.notify_all();
    }

    /// No code of others runs under the lock, and each change is one assignment: a poisoned state is a whole one.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Steps 2 and 3. The caller holds the `JoinHandle`, so that the thread's name is still its own, whether it has ended
/// or not.
pub(crate) fn kick(page: &RunPage, thread: &JoinHandle<()>) {
    page.immediate_exit().store(1, Ordering::Release);
    // A thread that has ended cannot be signalled, and need not be.
    let _ = thread.kill(signal::number());
}

/// Step b.
pub(crate) fn clear(page: &RunPage) {
    page.immediate_exit().swap(0, Ordering::AcqRel);
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::sync::Arc;
    use std::thread;

    use super::*;

    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    enum Ask {
        Request,
        Byte,
        Signal,
    }

    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    enum Answer {
        Clear,
        Look,
    }

    /// Where the vCPU thread is.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    enum At {
        /// In user space, about to call `KVM_RUN`.
        User,
        /// In the kernel, past its look at `immediate_exit`, before its look at pending signals.
        Entering,
        Guest,
        /// Back with `EINTR`: about to take step n of its answer.
        Answering(usize),
    }

    /// Two who ask, one vCPU, and what they share. Who asks is a bit.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    struct World {
        at: At,
        /// Steps each has taken.
        asked: [usize; 2],
        requested: u8,
        seen: u8,
        byte: bool,
        pending: bool,
    }

    /// Walks through every interleaving, and says whether one of them leaves the vCPU in the guest for good with a
    /// request unseen. The guest may exit of its own accord, or never.
    fn loses_a_kick(ask: [Ask; 3], answer: [Answer; 2]) -> bool {
        let start = World {
            at: At::User,
            asked: [0; 2],
            requested: 0,
            seen: 0,
            byte: false,
            pending: false,
        };
        let (mut known, mut next) = (HashSet::from([start]), vec![start]);
        while let Some(world) = next.pop() {
            let asked = world.asked == [ask.len(); 2];
            if asked && world.at == At::Guest && !world.pending && world.seen != world.requested {
                return true;
            }
            let asks = (0..2)
                .filter(|&who| world.asked[who] < ask.len())
                .map(|who| asker(world, who, ask));
            for world in asks.chain(vcpu(world, answer)) {
                if known.insert(world) {
                    next.push(world);
                }
            }
        }
        false
    }

    fn asker(mut world: World, who: usize, ask: [Ask; 3]) -> World {
        match ask[world.asked[who]] {
            Ask::Request => world.requested |= 1 << who,
            Ask::Byte => world.byte = true,
            // In user space its handler runs at once, and does nothing.
            Ask::Signal => world.pending = matches!(world.at, At::Entering | At::Guest),
        }
        world.asked[who] += 1;
        world
    }

    /// What the vCPU, KVM or the guest may do next.
    fn vcpu(world: World, answer: [Answer; 2]) -> Vec<World> {
        // On the way back to user space a pending signal's handler runs.
        let interrupted = World {
            at: At::Answering(0),
            pending: false,
            ..world
        };
        match world.at {
            At::User if world.byte => vec![interrupted],
            At::User => vec![World {
                at: At::Entering,
                ..world
            }],
            At::Entering | At::Guest if world.pending => vec![interrupted],
            At::Entering => vec![World { at: At::Guest, ..world }],
            At::Guest => vec![World { at: At::User, ..world }],
            At::Answering(step) => {
                let at = if step == 1 { At::User } else { At::Answering(1) };
                vec![match answer[step] {
                    Answer::Clear => World {
                        at,
                        byte: false,
                        ..world
                    },
                    Answer::Look => World {
                        at,
                        seen: world.requested,
                        ..world
                    },
                }]
            }
        }
    }

    #[test]
    fn in_our_order_no_interleaving_loses_a_kick_and_in_any_other_one_does() {
        use Answer::{Clear, Look};
        use Ask::{Byte, Request, Signal};
        for ask in [
            [Request, Byte, Signal],
            [Request, Signal, Byte],
            [Byte, Request, Signal],
            [Byte, Signal, Request],
            [Signal, Request, Byte],
            [Signal, Byte, Request],
        ] {
            for answer in [[Clear, Look], [Look, Clear]] {
                let ours = ask == [Request, Byte, Signal] && answer == [Clear, Look];
                assert_eq!(loses_a_kick(ask, answer), !ours, "{ask:?} {answer:?}");
            }
        }
    }

    #[test]
    fn who_waits_for_a_vcpu_that_ends_instead_is_let_go() {
        let gate = Arc::new(Gate::new());
        let waiter = thread::spawn({
            let gate = gate.clone();
            move || gate.wait_held()
        });
        gate.end();
        waiter.join().expect("it returns");
        assert!(!gate.want(Want::Hold), "nobody is there to kick");
    }

    #[test]
    fn a_held_vcpu_needs_no_kick_and_a_stop_is_for_good() {
        let gate = Arc::new(Gate::new());
        let vcpu = thread::spawn({
            let gate = gate.clone();
            move || gate.hold()
        });
        gate.wait_held();
        assert!(!gate.want(Want::Hold));
        assert!(!gate.want(Want::Stop));
        gate.want(Want::Run);
        assert_eq!(vcpu.join().expect("it returns"), Want::Stop);
        assert_eq!(gate.look(), Want::Stop);
    }
}
