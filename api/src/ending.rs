//! Who asks the microVM to end, and what is done about it.
//!
//! ```text
//!            SIGTERM                  SIGTERM, any other           any, 1 s later
//!  running ───────────► guest asked ───────────────────► stopping ─────────────────► exit without the VMM
//!     │                     │                               ▲                        (it does not answer)
//!     │  Ctrl-A x, SIGINT, SIGHUP, SIGQUIT                  │
//!     └─────────────────────┼───────────────────────────────┘
//!                           ▼
//!                 the guest ends by itself
//! ```

use std::ffi::c_int;
use std::time::{Duration, Instant};

/// Who asked for the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    /// Ctrl-A x.
    Escape,
    /// A signal, by number.
    Signal(c_int),
}

/// What is to be done about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Deed {
    /// Have the guest end itself.
    AskGuest,
    /// End the microVM.
    Stop,
    /// End this process.
    Exit,
    /// Nothing: it is being done.
    Wait,
}

/// Within this time a second SIGTERM is the first one: timeout(1) sends one to the process and one to its group.
const SAME: Duration = Duration::from_millis(100);
/// How long after a request to stop another one means that the first is not obeyed. Service managers send several at once.
const PATIENCE: Duration = Duration::from_secs(1);

#[derive(Clone, Copy, Debug, Default)]
enum State {
    #[default]
    Running,
    GuestAsked(Asked, Instant),
    Stopping(Asked, Instant),
}

/// See the module.
#[derive(Debug, Default)]
pub struct Ending(State);

impl Ending {
    /// `asked` wants an end now.
    pub fn ask(&mut self, asked: Asked, now: Instant) -> Deed {
        let term = asked == Asked::Signal(libc::SIGTERM);
        let (state, deed) = match self.0 {
            State::Running if term => (State::GuestAsked(asked, now), Deed::AskGuest),
            State::GuestAsked(_, at) if term && now - at < SAME => return Deed::Wait,
            State::Running | State::GuestAsked(..) => (State::Stopping(asked, now), Deed::Stop),
            State::Stopping(_, at) if now - at < PATIENCE => return Deed::Wait,
            State::Stopping(..) => return Deed::Exit,
        };
        self.0 = state;
        deed
    }

    /// Who brought it to where it is.
    pub fn asked(&self) -> Option<Asked> {
        match self.0 {
            State::Running => None,
            State::GuestAsked(asked, _) | State::Stopping(asked, _) => Some(asked),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TERM: Asked = Asked::Signal(libc::SIGTERM);
    const INT: Asked = Asked::Signal(libc::SIGINT);

    /// What is done about each request, made at so many milliseconds.
    fn deeds(requests: &[(Asked, u64)]) -> Vec<Deed> {
        let (begin, mut ending) = (Instant::now(), Ending::default());
        let deed = |&(asked, ms)| ending.ask(asked, begin + Duration::from_millis(ms));
        requests.iter().map(deed).collect()
    }

    #[test]
    fn the_first_sigterm_asks_the_guest_the_second_ends_it_and_a_third_needs_no_vmm() {
        use Deed::{AskGuest, Exit, Stop, Wait};
        assert_eq!(deeds(&[(TERM, 0), (TERM, 500), (TERM, 1600)]), [AskGuest, Stop, Exit]);
        assert_eq!(deeds(&[(TERM, 0), (TERM, 1), (TERM, 100)]), [AskGuest, Wait, Stop]);
        assert_eq!(deeds(&[(TERM, 0), (TERM, 500), (TERM, 501)]), [AskGuest, Stop, Wait]);
    }

    #[test]
    fn nothing_else_asks_the_guest() {
        use Deed::{AskGuest, Exit, Stop, Wait};
        assert_eq!(deeds(&[(INT, 0), (INT, 999), (TERM, 1000)]), [Stop, Wait, Exit]);
        assert_eq!(deeds(&[(Asked::Escape, 0), (Asked::Escape, 2000)]), [Stop, Exit]);
        assert_eq!(deeds(&[(TERM, 0), (INT, 1)]), [AskGuest, Stop]);
    }

    #[test]
    fn who_ended_it_is_who_asked_last_to_effect() {
        let (now, mut ending) = (Instant::now(), Ending::default());
        assert_eq!(ending.asked(), None);
        ending.ask(TERM, now);
        assert_eq!(ending.asked(), Some(TERM));
        ending.ask(Asked::Escape, now);
        ending.ask(INT, now);
        assert_eq!(ending.asked(), Some(Asked::Escape));
    }
}
