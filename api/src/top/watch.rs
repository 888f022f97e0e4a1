//! Who asks: a thread for each microVM, so that one that hangs holds up nobody but itself; one that looks which microVMs there
//! are; and one that waits for keys. Each tells what it found out as an event.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::Builder;
use std::time::{Duration, Instant};

use accounting::Reading;
use ratatui::crossterm::event::{self, KeyEvent};

use super::state::Answer;
use crate::client::{Client, ClientError};
use crate::fleet::Fleet;

/// How often sockets are looked for.
const LOOK: Duration = Duration::from_secs(1);

/// What a watcher needs of a stack: it reads JSON of a few hundred KiB at most, on the heap.
const STACK: usize = 256 << 10;

/// What has happened.
#[derive(Debug)]
pub enum Event {
    /// A key was pressed.
    Key(KeyEvent),
    /// The terminal has another size.
    Resized,
    /// The terminal has gone.
    KeyboardGone,
    /// One of the signals that end a process.
    Signal(std::ffi::c_int),
    /// Somebody looked for sockets.
    Found {
        /// Those there are, sorted.
        sockets: Vec<PathBuf>,
        /// What could not be looked at, and why.
        unreadable: Option<String>,
    },
    /// A microVM was asked.
    Answer {
        /// Its socket.
        socket: PathBuf,
        /// What it said.
        answer: Answer,
    },
}

/// The threads that ask.
#[derive(Debug)]
pub struct Watchers {
    tell: Sender<Event>,
    /// How each is told how often to ask; it ends once this is dropped.
    at: BTreeMap<PathBuf, Sender<Duration>>,
}

impl Watchers {
    /// None yet. All events go to `tell`.
    #[must_use]
    pub const fn new(tell: Sender<Event>) -> Self {
        Self {
            tell,
            at: BTreeMap::new(),
        }
    }

    /// Looks for the fleet's sockets from now on.
    ///
    /// # Errors
    /// The thread could not be started.
    pub fn find(&self, fleet: Fleet) -> io::Result<()> {
        let tell = self.tell.clone();
        let look = move || loop {
            let found = fleet.find();
            let first = found.unreadable.first();
            let unreadable = first.map(|(path, error)| format!("cannot read {}: {error}", path.display()));
            let sockets = found.sockets;
            if tell.send(Event::Found { sockets, unreadable }).is_err() {
                return;
            }
            std::thread::sleep(LOOK);
        };
        Builder::new()
            .name("finder".to_owned())
            .stack_size(STACK)
            .spawn(look)
            .map(drop)
    }

    /// Has each of `sockets`, and no other, asked every `interval`.
    ///
    /// # Errors
    /// A thread could not be started.
    pub fn watch(&mut self, sockets: &[PathBuf], interval: Duration) -> io::Result<()> {
        self.at.retain(|socket, _| sockets.contains(socket));
        for socket in sockets {
            if self.at.contains_key(socket) {
                continue;
            }
            let (control, told) = channel();
            let mut watcher = Watcher {
                socket: socket.clone(),
                client: None,
                id: String::new(),
            };
            let tell = self.tell.clone();
            Builder::new()
                .name("watcher".to_owned())
                .stack_size(STACK)
                .spawn(move || watcher.watch(interval, &told, &tell))?;
            self.at.insert(socket.clone(), control);
        }
        Ok(())
    }

    /// Has all of them asked that often from now on.
    pub fn ask_every(&self, interval: Duration) {
        for control in self.at.values() {
            // One whose thread is no more is found out by its silence.
            let _ = control.send(interval);
        }
    }
}

/// Who asks one microVM.
struct Watcher {
    socket: PathBuf,
    client: Option<Client>,
    id: String,
}

impl Watcher {
    fn watch(&mut self, mut interval: Duration, told: &Receiver<Duration>, tell: &Sender<Event>) {
        loop {
            let asked = Instant::now();
            let answer = self.ask();
            let socket = self.socket.clone();
            if tell.send(Event::Answer { socket, answer }).is_err() {
                return;
            }
            loop {
                match told.recv_timeout((asked + interval).saturating_duration_since(Instant::now())) {
                    Ok(other) => interval = other,
                    Err(RecvTimeoutError::Timeout) => break,
                    Err(RecvTimeoutError::Disconnected) => return,
                }
            }
        }
    }

    fn ask(&mut self) -> Answer {
        let answer = match self.readings() {
            // The server closes connections on which nothing is asked for some time.
            Err(Failure::Client(ClientError::Broken(_))) => self.readings(),
            answer => answer,
        };
        match answer {
            Ok(readings) => Answer::Readings {
                id: self.id.clone(),
                readings,
            },
            Err(Failure::Client(ClientError::Connect { source, .. })) => {
                Answer::Nothing(format!("nobody serves its API ({source})"))
            }
            Err(error) => Answer::Nothing(error.to_string()),
        }
    }

    fn readings(&mut self) -> Result<Vec<Reading>, Failure> {
        let mut client = match self.client.take() {
            Some(client) => client,
            None => {
                let mut client = Client::connect(&self.socket)?;
                self.id = id(&mut client)?;
                client
            }
        };
        let readings = serde_json::from_slice(&client.get("/vcpus")?)?;
        self.client = Some(client);
        Ok(readings)
    }
}

/// Why there are no readings.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("{0}")]
    Client(#[from] ClientError),
    #[error("its answer is not what a microVM's is: {0}")]
    Json(#[from] serde_json::Error),
}

fn id(client: &mut Client) -> Result<String, Failure> {
    #[derive(serde::Deserialize)]
    struct Info {
        id: String,
    }
    Ok(serde_json::from_slice::<Info>(&client.get("/")?)?.id)
}

/// Waits for keys from now on.
///
/// # Errors
/// The thread could not be started.
pub fn keys(tell: Sender<Event>) -> io::Result<()> {
    let wait = move || {
        loop {
            let event = match event::read() {
                Ok(event::Event::Key(key)) if key.is_release() => continue,
                Ok(event::Event::Key(key)) => Event::Key(key),
                Ok(event::Event::Resize(..)) => Event::Resized,
                Ok(_) => continue,
                Err(_) => Event::KeyboardGone,
            };
            let gone = matches!(event, Event::KeyboardGone);
            if tell.send(event).is_err() || gone {
                return;
            }
        }
    };
    Builder::new().name("keys".to_owned()).spawn(wait).map(drop)
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Arc;

    use vmm::RunState;

    use super::*;
    use crate::backend::fake::Fake;
    use crate::routes::Limits;
    use crate::scratch::Scratch;
    use crate::server::{Listeners, Server};
    use crate::socket;

    /// A microVM that serves its API at `path`.
    fn serve(path: &Path) -> Server {
        let listeners = Listeners {
            unix: Some(socket::bind(path).unwrap()),
            tcp: None,
            token: None,
        };
        let backend = Arc::new(Fake::new(RunState::Running));
        let server = Server::spawn().unwrap();
        server.open(listeners, backend, Limits::default(), || {}).unwrap();
        server
    }

    /// The next answer of `socket`.
    fn answer(events: &Receiver<Event>, of: &Path) -> Answer {
        loop {
            // Far above what any answer takes.
            match events.recv_timeout(Duration::from_secs(60)).expect("an event") {
                Event::Answer { socket, answer } if socket == of => return answer,
                _ => {}
            }
        }
    }

    #[test]
    fn one_that_hangs_holds_up_nobody_else() {
        let scratch = Scratch::new();
        let [well, hung, left] = ["well", "hung", "left"].map(|name| scratch.path(name));
        let _server = serve(&well);
        // Connected to, and never answered.
        let _hung = std::os::unix::net::UnixListener::bind(&hung).unwrap();
        drop(std::os::unix::net::UnixListener::bind(&left).unwrap());
        let (tell, events) = channel();
        let mut watchers = Watchers::new(tell);
        let sockets = [hung.clone(), left.clone(), well.clone()];
        watchers.watch(&sockets, Duration::from_millis(10)).unwrap();
        for _ in 0..3 {
            let Answer::Readings { id, readings } = answer(&events, &well) else {
                panic!("it answers");
            };
            assert_eq!((&*id, readings.len()), ("fake", 2));
        }
        let Answer::Nothing(why) = answer(&events, &left) else {
            panic!("it does not answer");
        };
        assert!(why.contains("nobody serves"), "{why}");
    }

    #[test]
    fn one_that_comes_back_is_asked_on_and_one_that_is_not_wanted_no_more() {
        let scratch = Scratch::new();
        let path = scratch.path("s");
        let served = serve(&path);
        let (tell, events) = channel();
        let mut watchers = Watchers::new(tell);
        watchers
            .watch(std::slice::from_ref(&path), Duration::from_millis(10))
            .unwrap();
        assert!(matches!(answer(&events, &path), Answer::Readings { .. }));
        drop(served);
        while matches!(answer(&events, &path), Answer::Readings { .. }) {}
        let _again = serve(&path);
        while matches!(answer(&events, &path), Answer::Nothing(_)) {}
        watchers.watch(&[], Duration::from_millis(10)).unwrap();
        drop(watchers);
        // All who could tell have ended: the channel does.
        while events.recv_timeout(Duration::from_secs(60)) != Err(RecvTimeoutError::Disconnected) {}
    }

    impl PartialEq for Event {
        fn eq(&self, _: &Self) -> bool {
            false
        }
    }
}
