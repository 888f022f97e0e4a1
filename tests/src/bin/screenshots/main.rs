//! `screenshots FOLDER`: pictures of the page `GET /ui` and of `chronovisor top`, both of a guest that is made to show
//! something. `cargo xtask screenshots` says where what it needs is.

mod terminal;

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::json;
use tests::bed::{self, Folder};
use tests::browser::Browser;
use tests::flat::Program;
use tests::vm::{PATIENCE, Vm};

/// Pictures are kept with the documentation: none is to weigh more, in bytes.
const MOST: usize = 150_000;

fn main() -> Result<()> {
    let folder = std::env::args_os()
        .nth(1)
        .map(PathBuf::from)
        .context("usage: screenshots FOLDER")?;
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let address = {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").context("no port is free on 127.0.0.1")?;
        listener.local_addr()?.to_string()
    };
    let arguments = ["--cpus=2", "--id=demo", "--api-listen", &address];
    // What else runs on this machine is not to be in the picture. Whoever is not root has to live with it.
    let prelude = "{ chrt --rr --pid 1 $$ 2>/dev/null || :; }";
    let mut vm = Vm::flat_after(prelude, &Program::by_turns(), arguments);
    let mut browser = Browser::start();
    let top = Top::start(vm.socket())?;
    browser.screen(1280, 800, 1.0, false);
    browser.open(&format!("http://{address}/ui"));
    browser.evaluate("$('interval').value = '100'; $('interval').dispatchEvent(new Event('change'))");
    // A picture shows 12 s at that interval: the disturbance is to be in the middle of a full one.
    let drawn_for = |s| format!("vcpus[0]?.last.at_ns - vcpus[0]?.samples[0].at >= {s}n * 10n ** 9n");
    browser.wait_until(&drawn_for(4));
    disturb(&mut vm)?;
    browser.wait_until(&drawn_for(12));
    browser.wait_until("vcpus[0].last.exits.total > vcpus[0].before.exits.total");
    let top = top.screen()?;

    for (name, width, dark) in [
        ("ui-light", 1280, false),
        ("ui-dark", 1280, true),
        ("ui-phone", 360, false),
    ] {
        browser.screen(width, 800, 1.0, dark);
        // The page hears of its new size before one frame, and is drawn by the next.
        browser.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))");
        keep(&folder, name, &browser.screenshot())?;
        if name == "ui-light" {
            // The others are to show the same, whatever time it takes to make them.
            browser.evaluate("$('hold').click()");
        }
    }
    let problems = browser.errors();
    ensure!(problems.is_empty(), "the page complains: {problems:#?}");

    browser.open("about:blank");
    let frame = browser.call("Page.getFrameTree", json!({}))["frameTree"]["frame"]["id"].take();
    browser.call(
        "Page.setDocumentContent",
        json!({ "frameId": frame, "html": terminal::page(&top) }),
    );
    let size = browser
        .evaluate("(r => [r.width, r.height].map(Math.ceil))(document.querySelector('pre').getBoundingClientRect())");
    let size: [u32; 2] = serde_json::from_value(size)?;
    browser.screen(size[0], size[1], 1.0, true);
    keep(&folder, "top", &browser.screenshot())
}

/// Writes a picture, in 256 colours: for a page of text and areas that is a third of the bytes.
fn keep(folder: &Path, name: &str, png: &[u8]) -> Result<()> {
    let mut pngquant = Command::new("pngquant");
    pngquant.args(["--speed", "1", "--strip", "256", "-"]);
    pngquant.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = pngquant.spawn().context("cannot run pngquant")?;
    // It reads all before it writes anything.
    child.stdin.take().context("piped")?.write_all(png)?;
    let output = child.wait_with_output()?;
    ensure!(output.status.success(), "pngquant: {}", output.status);
    let (path, png) = (folder.join(format!("{name}.png")), output.stdout);
    ensure!(
        png.len() <= MOST,
        "{} would have {} bytes, over {MOST}",
        path.display(),
        png.len()
    );
    fs::write(&path, &png).with_context(|| format!("cannot write {}", path.display()))?;
    println!("wrote {}, {} KiB", path.display(), png.len().div_ceil(1024));
    Ok(())
}

/// Somebody else wants the CPU of vCPU 0 for a while; then the guest is paused for one.
fn disturb(vm: &mut Vm) -> Result<()> {
    let cpu = vm.reading().host_cpu.cpu.to_string();
    let mut other = Command::new("sh");
    // By turns with the vCPU, where both are of the same class.
    other.args([
        "-c",
        "chrt --rr --pid 1 $$ 2>/dev/null; exec timeout 2 taskset --cpu-list $0 sh -c 'while :; do :; done'",
    ]);
    other.arg(&cpu).status().context("cannot run sh")?;
    std::thread::sleep(Duration::from_millis(700));
    for state in ["Paused", "Resumed"] {
        let answer = vm.ask("PATCH", "/vm", Some(&json!({ "state": state }).to_string()));
        ensure!(answer.status == 204, "{state}: {answer:?}");
        std::thread::sleep(Duration::from_millis(700));
    }
    Ok(())
}

/// `chronovisor top` on a terminal of tmux's.
struct Top {
    folder: Folder,
}

impl Top {
    /// Of the microVM that serves its API on `socket`.
    fn start(socket: &Path) -> Result<Self> {
        let top = Self { folder: Folder::new() };
        let program = bed::file("chronovisor");
        let mut tmux = top.tmux(&["-f", "/dev/null", "new-session", "-d", "-x", "120", "-y", "30"]);
        // A program that ends would take its screen, and what it said, along.
        tmux.args(["sh", "-c", "\"$0\" \"$@\"; echo \"ended: $?\"; sleep 600"]);
        run(tmux
            .arg(program)
            .args(["top", "--api-sock"])
            .arg(socket)
            .env("COLORTERM", "truecolor"))?;
        Ok(top)
    }

    /// A server of our own, that no other tmux of the user's knows of.
    fn tmux(&self, arguments: &[&str]) -> Command {
        let mut tmux = Command::new("tmux");
        tmux.arg("-S").arg(self.folder.join("tmux")).args(arguments);
        tmux
    }

    /// What it shows, once it shows something.
    fn screen(&self) -> Result<String> {
        let begun = Instant::now();
        loop {
            let screen = run(&mut self.tmux(&["capture-pane", "-e", "-p"]))?;
            if screen.contains("ended: ") {
                bail!("chronovisor top has ended:\n{screen}");
            }
            if !screen.trim().is_empty() {
                return Ok(screen);
            }
            ensure!(begun.elapsed() < PATIENCE, "chronovisor top shows nothing");
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for Top {
    fn drop(&mut self) {
        let _ = run(&mut self.tmux(&["kill-server"]));
    }
}

/// What `command` prints.
fn run(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("cannot run {command:?}"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success(),
        "{command:?}: {}: {}",
        output.status,
        said.trim()
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
