//! A client that keeps its connection, which one that measures has to.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use crate::vm::PATIENCE;
use anyhow::{Context, Result, ensure};

/// One kept connection to the API.
#[derive(Debug)]
pub struct Connection {
    stream: UnixStream,
    /// Kept, so that asking allocates nothing.
    answer: Vec<u8>,
}

impl Connection {
    /// Connects to the API's socket.
    ///
    /// # Errors
    /// What the socket says.
    pub fn open(socket: &Path) -> Result<Self> {
        let stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(Self {
            stream,
            answer: vec![0; 1 << 16],
        })
    }

    /// Asks, and reads the answer to its end.
    ///
    /// # Errors
    /// What the socket says, or that the answer is none of 200.
    pub fn get(&mut self, path: &str) -> Result<()> {
        let question = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n");
        self.stream.write_all(question.as_bytes())?;
        let mut have = 0;
        loop {
            let read = self.stream.read(&mut self.answer[have..])?;
            ensure!(read > 0, "the server closed the connection");
            have += read;
            if let Some(whole) = length(&self.answer[..have])? {
                ensure!(have <= whole, "more than one answer came");
                if have == whole {
                    return Ok(());
                }
            }
        }
    }
}

/// How long the answer that starts with `bytes` is, once its head is there.
fn length(bytes: &[u8]) -> Result<Option<usize>> {
    let text = std::str::from_utf8(bytes)?;
    let Some((head, _)) = text.split_once("\r\n\r\n") else {
        return Ok(None);
    };
    ensure!(head.starts_with("HTTP/1.1 200 "), "not 200: {head}");
    let mut lines = head.lines();
    let body = lines.find_map(|line| line.strip_prefix("content-length: "));
    Ok(Some(
        head.len() + 4 + body.context("no content-length")?.parse::<usize>()?,
    ))
}
