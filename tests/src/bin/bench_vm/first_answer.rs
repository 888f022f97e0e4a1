//! `first_answer`: from exec to the first answer of the API, against a bare server on the same HTTP stack and the same kind of
//! socket (`bare_server.rs`), by turns; medians. It is what a client waits for that has just spawned its microVM.
//!
//! Both programs are copies, as an installation makes them: what a linker wrote in many small pieces is in the page cache in as
//! many, and takes a tenth more page faults to map (187 against 171, as measured).

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use tests::bed::Folder;
use tests::connection::Connection;
use tests::row;
use tests::vm::PATIENCE;

const STARTS: usize = 101;
/// Between two tries to connect: short beside the milliseconds that are measured, and long enough to leave the CPU to
/// the server.
const RETRY: Duration = Duration::from_micros(50);

/// Prints the row.
pub fn measure() -> Result<()> {
    let installed = Folder::new();
    let install = |program: &Path, name: &str| -> Result<PathBuf> {
        let copy = installed.join(name);
        std::fs::copy(program, &copy)?;
        Ok(copy)
    };
    let ours = install(&tests::bed::file("chronovisor"), "chronovisor")?;
    let bare = install(&std::env::current_exe()?.with_file_name("bare_server"), "bare_server")?;
    let mut times = [Vec::new(), Vec::new()];
    for round in 0..=STARTS {
        // They take turns at being first.
        for side in [round % 2, 1 - round % 2] {
            let folder = Folder::new();
            let socket = folder.join("api.sock");
            let mut command = if side == 0 {
                Command::new(&ours)
            } else {
                Command::new(&bare)
            };
            if side == 0 {
                command.arg("--api-sock");
            }
            let took = first_answer(command.arg(&socket), &socket)?;
            // The first round brings both into the page cache.
            if round > 0 {
                times[side].push(took.as_secs_f64() * 1e3);
            }
        }
    }
    let [ours, against] = times.map(row::median);
    row::print("first_answer", ours, against, "ms", 1.5);
    Ok(())
}

fn first_answer(command: &mut Command, socket: &Path) -> Result<Duration> {
    let begun = Instant::now();
    let mut server = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn()?;
    let mut connection = loop {
        match Connection::open(socket) {
            Ok(connection) => break connection,
            Err(error) => ensure!(begun.elapsed() < PATIENCE, "the socket never answered: {error}"),
        }
        std::thread::sleep(RETRY);
    };
    connection.get("/version")?;
    let took = begun.elapsed();
    server.kill()?;
    server.wait()?;
    Ok(took)
}
