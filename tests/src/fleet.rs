//! A machine's worth of sockets for the exporter: made-up microVMs that answer, and what else is found at a socket.

use std::path::PathBuf;
use std::thread;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};

use crate::bed::Folder;

/// What a made-up microVM answers: one vCPU's metrics.
pub const TEXT: &str = include_str!("../../api/src/prometheus/golden.txt");

/// What a socket does with who connects.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Does {
    /// Answers as a microVM.
    Well,
    /// Nothing.
    Hang,
    /// Sends its answer a byte at a time.
    Drip,
    /// Sends what is no answer.
    Babble,
}

/// Of each ten sockets: seven are microVMs.
const TEN: [Does; 10] = [
    Does::Well,
    Does::Well,
    Does::Hang,
    Does::Well,
    Does::Well,
    Does::Babble,
    Does::Well,
    Does::Drip,
    Does::Well,
    Does::Well,
];
/// How many sockets there are.
pub const SOCKETS: usize = 200;
/// How many of them answer as a microVM does.
pub const WELL: usize = SOCKETS / TEN.len() * 7;
/// How many never answer, or not in time.
pub const SILENT: usize = SOCKETS / TEN.len() * 2;

/// The sockets, served by a thread of their own that ends with the process.
#[derive(Debug)]
pub struct Fleet {
    folder: Folder,
}

impl Fleet {
    /// Binds and serves them.
    ///
    /// # Panics
    /// When that fails.
    #[must_use]
    pub fn serve() -> Self {
        let folder = Folder::new();
        let path = |n: usize| (folder.join(&format!("{n:03}.socket")), TEN[n % TEN.len()]);
        serve((0..SOCKETS).map(path).collect());
        Self { folder }
    }

    /// The exporter's flag that has it find them.
    #[must_use]
    pub fn flag(&self) -> String {
        format!("--sockets={}", self.folder.join("*.socket").display())
    }
}

async fn answer(mut stream: UnixStream, does: Does) {
    let mut request = [0; 512];
    let _ = stream.read(&mut request).await;
    let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{TEXT}", TEXT.len());
    match does {
        Does::Well => {
            let _ = stream.write_all(answer.as_bytes()).await;
        }
        // Until the exporter has had enough.
        Does::Hang => {
            let _ = stream.read(&mut request).await;
        }
        Does::Drip => {
            for byte in answer.as_bytes().chunks(1) {
                if stream.write_all(byte).await.is_err() {
                    return;
                }
                tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            }
        }
        Does::Babble => {
            let _ = stream.write_all(&[0xff; 20_000]).await;
        }
    }
}

fn serve(paths: Vec<(PathBuf, Does)>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.expect("a runtime");
    let bound: Vec<_> = {
        let _in_runtime = runtime.enter();
        let bind = |(path, does)| (UnixListener::bind(path).expect("a socket"), does);
        paths.into_iter().map(bind).collect()
    };
    thread::spawn(move || {
        runtime.block_on(async {
            for (listener, does) in bound {
                tokio::spawn(async move {
                    while let Ok((stream, _)) = listener.accept().await {
                        tokio::spawn(answer(stream, does));
                    }
                });
            }
            std::future::pending::<()>().await;
        });
    });
}

/// The value of the page's sample that starts so.
///
/// # Panics
/// When there is none.
#[must_use]
pub fn value(page: &str, start: &str) -> u64 {
    let line = page.lines().find(|line| line.starts_with(start));
    let value = line
        .and_then(|line| line.rsplit_once(' '))
        .and_then(|(_, value)| value.parse().ok());
    value.unwrap_or_else(|| panic!("{start}:\n{page}"))
}
