//! The VMM thread: epoll over requests, the machine's events, its devices and the console, until the microVM has ended.
//!
//! It runs on housekeeping CPUs, sleeps when nobody wants anything, and is the only thread that changes the microVM's state.

use std::cell::RefCell;
use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};

use accounting::host::{CpuSet, HostCpus, run_on};
use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};
use vmm_sys_util::eventfd::EventFd;

use crate::console::{ConsoleIo, Redirect};
use crate::devices::ring::OutputRing;
use crate::devices::{MachineEvent, SerialPort};
use crate::end::End;
use crate::lifecycle::Lifecycle;
use crate::machine::Surroundings;
use crate::{Options, Request, Shared, metrics};

/// Where requests arrive.
#[derive(Debug)]
pub(crate) struct Inbox {
    pub incoming: Receiver<Request>,
    pub wake: Arc<EventFd>,
}

/// Starts the thread; how the microVM ended comes from what is returned, or nothing where the thread panicked. It is not to be
/// joined: requests that a disk has not answered (`block/uring.rs`) are this thread's, and keep it, though it has nothing left to
/// do. What fails on it is the microVM's [`End`].
pub(crate) fn spawn(
    options: Options,
    cpus: Arc<HostCpus>,
    inbox: Inbox,
    shared: Arc<Shared>,
) -> io::Result<Receiver<End>> {
    let Options {
        id,
        console,
        gtime_source,
        log,
        mmds_limit_bytes,
    } = options;
    let ring = Arc::new(OutputRing::new()?);
    let redirect = Redirect::default();
    let serial = Arc::new(SerialPort::new(Arc::clone(&ring))?);
    let console = ConsoleIo::new(console, Arc::clone(&ring), Arc::clone(&serial), Arc::clone(&redirect))?;
    let (events, happened) = channel();
    let wake = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
    let around = Surroundings {
        cpus,
        gtime_source,
        ring,
        serial,
        events,
        wake: wake.try_clone()?,
        redirect,
        log,
    };

    let (tell_end, end) = channel();
    // Nobody waits until it runs: a client waits for the API meanwhile, and requests queue.
    vcpu::thread("vmm").spawn(move || {
        // The event manager holds its subscribers by Rc, so it is made on its own thread.
        let prepared = run_on(&around.cpus.housekeeping(&CpuSet::new()))
            .and_then(|()| EventManager::new().map_err(io::Error::other));
        let manager = match prepared {
            Ok(manager) => manager,
            Err(e) => {
                let _ = tell_end.send(End::KvmError(format!(
                    "the VMM cannot make its event loop: {e}; raise its limit of open files"
                )));
                return;
            }
        };
        let control = Control {
            lifecycle: Lifecycle::new(id, around, shared, mmds_limit_bytes),
            inbox,
            happened,
            happening: wake,
            metrics: None,
            unheard: None,
        };
        // Nobody listens where nobody asks.
        let _ = tell_end.send(run(manager, control, console));
    })?;
    Ok(end)
}

/// That events of `whose` cannot be waited for, in the words of the end that follows: a guest whose device does not answer would
/// hang, and nobody would know why.
pub(crate) fn unheard(whose: &str, why: &event_manager::Error) -> String {
    let why = match why {
        event_manager::Error::Epoll(errno) => errno.to_string(),
        other => other.to_string(),
    };
    format!("the VMM cannot wait for events of {whose}: {why}; see what this host allows (fs.epoll.max_user_watches)")
}

type Subscriber = Rc<RefCell<dyn MutEventSubscriber>>;

fn run(mut manager: EventManager<Subscriber>, control: Control, console: ConsoleIo) -> End {
    let control = Rc::new(RefCell::new(control));
    let console = Rc::new(RefCell::new(console));
    manager.add_subscriber(Rc::clone(&control) as Subscriber);
    manager.add_subscriber(Rc::clone(&console) as Subscriber);
    let mut unheard = control
        .borrow_mut()
        .unheard
        .take()
        .or(console.borrow_mut().unheard.take());
    let mut devices_added = false;
    let end = loop {
        if let Some(why) = unheard {
            break End::KvmError(why);
        }
        if let Some(end) = control.borrow().lifecycle.end() {
            break end.clone();
        }
        // Here, for no subscriber can add another while it is called.
        if !devices_added && let Some(machine) = control.borrow().lifecycle.running() {
            devices_added = true;
            for events in machine.device_events() {
                let events = Rc::new(RefCell::new(events));
                manager.add_subscriber(Rc::clone(&events) as Subscriber);
                unheard = unheard.or(events.borrow_mut().unheard.take());
            }
            continue;
        }
        if let Err(e) = manager.run() {
            break End::KvmError(format!(
                "the VMM cannot wait for events: {e}; report it with this host's kernel version"
            ));
        }
    };
    // The machine is gone, its vCPUs joined: nothing more will be said.
    console.borrow_mut().last_words();
    end
}

/// The side of the event loop that changes the microVM's state.
struct Control {
    lifecycle: Lifecycle<Surroundings>,
    inbox: Inbox,
    happened: Receiver<MachineEvent>,
    happening: EventFd,
    /// Ticks every [`metrics::INTERVAL`], once there is a file for metrics: without, nothing wakes this thread.
    metrics: Option<OwnedFd>,
    /// Why requests cannot be waited for.
    unheard: Option<String>,
}

const REQUEST: u32 = 0;
const EVENT: u32 = 1;
const METRICS: u32 = 2;

impl Control {
    fn begin_metrics(&mut self, ops: &mut EventOps) {
        if self.metrics.is_some() || !self.lifecycle.has_metrics() {
            return;
        }
        let added = metrics_timer().and_then(|timer| {
            let events = Events::with_data(&timer, METRICS, EventSet::IN);
            ops.add(events).map_err(|e| io::Error::other(e.to_string()))?;
            Ok(timer)
        });
        match added {
            Ok(timer) => self.metrics = Some(timer),
            Err(e) => tracing::warn!("no timer for the metrics: {e}; they are written on request only"),
        }
    }

    fn flush_metrics(&mut self) {
        let timer = self.metrics.as_ref();
        // However often it went off: a line is due.
        let due = timer.is_some_and(|timer| rustix::io::read(timer, &mut [0; 8]).is_ok());
        if due && let Err(e) = self.lifecycle.flush_metrics() {
            tracing::warn!("{e}");
        }
    }
}

fn metrics_timer() -> io::Result<OwnedFd> {
    let timer = timerfd_create(
        TimerfdClockId::Monotonic,
        TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC,
    )?;
    let every = Timespec::try_from(metrics::INTERVAL).map_err(io::Error::other)?;
    let times = Itimerspec {
        it_interval: every,
        it_value: every,
    };
    timerfd_settime(&timer, TimerfdTimerFlags::empty(), &times)?;
    Ok(timer)
}

impl MutEventSubscriber for Control {
    fn process(&mut self, events: Events, ops: &mut EventOps) {
        match events.data() {
            REQUEST => {
                let _ = self.inbox.wake.read();
                while let Ok(Request { action, reply }) = self.inbox.incoming.try_recv() {
                    tracing::debug!("{action:?}");
                    reply.answer(self.lifecycle.act(action));
                }
                self.begin_metrics(ops);
            }
            EVENT => {
                let _ = self.happening.read();
                while let Ok(event) = self.happened.try_recv() {
                    tracing::debug!("{event:?}");
                    self.lifecycle.hear(event);
                }
            }
            METRICS => self.flush_metrics(),
            _ => {}
        }
    }

    fn init(&mut self, ops: &mut EventOps) {
        for (fd, data) in [(&*self.inbox.wake, REQUEST), (&self.happening, EVENT)] {
            if let Err(e) = ops.add(Events::with_data(fd, data, EventSet::IN)) {
                self.unheard = Some(unheard("its own", &e));
            }
        }
    }
}
