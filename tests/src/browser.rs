//! Chromium without a window, driven by the DevTools protocol over a pipe: neither a port nor a driver is in between.
//!
//! Each message is one of JSON, ended by a NUL byte, as `--remote-debugging-pipe` has it; the methods are those of
//! <https://chromedevtools.github.io/devtools-protocol/>.

use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::bed::Folder;
use crate::vm::PATIENCE;

/// How long it may take to close, before it is killed.
const CLOSING: Duration = Duration::from_secs(10);

/// Where Chromium is, as `cargo xtask test` installed it.
///
/// # Errors
/// Why there is none.
pub fn chromium() -> Result<PathBuf, String> {
    if let Some(why) = std::env::var_os("CHRONOVISOR_CHROMIUM_LACK") {
        return Err(why.to_string_lossy().into_owned());
    }
    std::env::var_os("CHRONOVISOR_CHROMIUM")
        .map(PathBuf::from)
        .ok_or_else(|| {
            "there is no Chromium here, as in the emulated host, or `cargo xtask test` did not run this".to_owned()
        })
}

/// A Chromium with one page.
#[derive(Debug)]
pub struct Browser {
    child: Child,
    to: ChildStdin,
    from: Receiver<Value>,
    session: Option<String>,
    id: u64,
    loaded: bool,
    errors: Vec<String>,
    _profile: Folder,
}

impl Browser {
    /// Starts Chromium, and opens an empty page.
    ///
    /// # Panics
    /// When it does not start.
    #[must_use]
    pub fn start() -> Self {
        let profile = Folder::new();
        let chromium = chromium().expect("asked for before");
        let mut command = Command::new("sh");
        // It reads messages from descriptor 3 and writes them to 4. What it prints is about D-Bus and the like.
        command.args(["-c", "exec \"$0\" \"$@\" 3<&0 4>&1 </dev/null >/dev/null 2>&1"]);
        command.arg(chromium);
        command.args([
            "--headless=new",
            "--remote-debugging-pipe",
            "--no-first-run",
            "--disable-gpu",
        ]);
        // Nothing is opened but pages of ours: as root there is no sandbox to be had, and in a container little /dev/shm.
        command.args([
            "--no-sandbox",
            "--disable-dev-shm-usage",
            "--disable-background-networking",
        ]);
        command.args([
            "--disable-extensions",
            "--disable-component-update",
            "--hide-scrollbars",
        ]);
        command.arg(format!("--user-data-dir={}", profile.path().display()));
        // Its fonts' cache, and what else it thinks belongs to a home.
        command.env("HOME", profile.path());
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap_or_else(|e| panic!("{command:?}: {e}"));
        let (sender, from) = channel();
        let stdout = BufReader::new(child.stdout.take().expect("piped"));
        std::thread::spawn(move || {
            for message in stdout.split(0).map_while(Result::ok) {
                let message = serde_json::from_slice(&message).expect("DevTools speaks JSON");
                if sender.send(message).is_err() {
                    return;
                }
            }
        });
        let mut browser = Self {
            to: child.stdin.take().expect("piped"),
            child,
            from,
            session: None,
            id: 0,
            loaded: false,
            errors: Vec::new(),
            _profile: profile,
        };
        let target = browser.call("Target.createTarget", json!({ "url": "about:blank" }));
        let attached = browser.call(
            "Target.attachToTarget",
            json!({ "targetId": target["targetId"], "flatten": true }),
        );
        browser.session = attached["sessionId"].as_str().map(str::to_owned);
        for domain in ["Page", "Runtime", "Log"] {
            browser.call(&format!("{domain}.enable"), json!({}));
        }
        browser
    }

    /// Calls a method, of the page once there is one, and gives its result.
    ///
    /// # Panics
    /// When it is refused, or never answered.
    pub fn call(&mut self, method: &str, params: Value) -> Value {
        self.id += 1;
        let mut message = json!({ "id": self.id, "method": method, "params": params });
        if let Some(session) = &self.session {
            message["sessionId"] = session.as_str().into();
        }
        let sent = write!(self.to, "{message}\0").and_then(|()| self.to.flush());
        sent.unwrap_or_else(|e| panic!("Chromium takes no {method}: {e} ({:?})", self.child.try_wait()));
        let begun = Instant::now();
        loop {
            let mut answer = self.receive(method, begun);
            if answer["id"] == self.id {
                assert!(answer["error"].is_null(), "{method}: {}", answer["error"]);
                return answer["result"].take();
            }
            self.note(&answer);
        }
    }

    /// The next message, while `awaited` is waited for since `begun`.
    fn receive(&mut self, awaited: &str, begun: Instant) -> Value {
        match self.from.recv_timeout(PATIENCE.saturating_sub(begun.elapsed())) {
            Ok(message) => message,
            Err(RecvTimeoutError::Timeout) => panic!("{awaited} was never answered"),
            Err(RecvTimeoutError::Disconnected) => panic!("Chromium has ended: {:?}", self.child.wait()),
        }
    }

    /// Keeps what a developer would see in red or yellow.
    fn note(&mut self, event: &Value) {
        let params = &event["params"];
        self.loaded |= event["method"] == "Page.loadEventFired";
        let error = match event["method"].as_str().unwrap_or_default() {
            "Runtime.exceptionThrown" => Some(params["exceptionDetails"].to_string()),
            "Runtime.consoleAPICalled" if ["error", "warning", "assert"].iter().any(|t| params["type"] == *t) => {
                Some(params["args"].to_string())
            }
            // Violations of a Content-Security-Policy, and requests that failed, are among these.
            "Log.entryAdded" if ["error", "warning"].iter().any(|l| params["entry"]["level"] == *l) => {
                Some(params["entry"].to_string())
            }
            _ => None,
        };
        self.errors.extend(error);
    }

    /// Opens `url`, and returns once its script has run.
    ///
    /// # Panics
    /// When nobody answers there.
    pub fn open(&mut self, url: &str) {
        let begun = Instant::now();
        self.loaded = false;
        let opened = self.call("Page.navigate", json!({ "url": url }));
        assert!(opened["errorText"].is_null(), "{url}: {}", opened["errorText"]);
        while !self.loaded {
            let event = self.receive(url, begun);
            self.note(&event);
        }
    }

    /// The value of an expression in the page, or of the promise it gives.
    ///
    /// # Panics
    /// When it throws.
    pub fn evaluate(&mut self, expression: &str) -> Value {
        let params = json!({ "expression": expression, "returnByValue": true, "awaitPromise": true });
        let mut came = self.call("Runtime.evaluate", params);
        assert!(
            came["exceptionDetails"].is_null(),
            "{expression}: {}",
            came["exceptionDetails"]
        );
        came["result"]["value"].take()
    }

    /// Evaluates again and again until it is true.
    ///
    /// # Panics
    /// When patience ends before that.
    pub fn wait_until(&mut self, expression: &str) {
        let begun = Instant::now();
        while self.evaluate(expression) != true {
            if begun.elapsed() > PATIENCE {
                let page = self.evaluate("document.body.innerText");
                panic!("never came: {expression}; errors: {:#?}; the page: {page}", self.errors);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// A screen of that size, in CSS pixels, of that many pixels each; `dark` as the system's setting.
    pub fn screen(&mut self, width: u32, height: u32, scale: f64, dark: bool) {
        let mobile = width < 500;
        let metrics = json!({ "width": width, "height": height, "deviceScaleFactor": scale, "mobile": mobile });
        self.call("Emulation.setDeviceMetricsOverride", metrics);
        let scheme = if dark { "dark" } else { "light" };
        let features = json!([{ "name": "prefers-color-scheme", "value": scheme }]);
        self.call("Emulation.setEmulatedMedia", json!({ "features": features }));
    }

    /// All that the page complained of so far: errors and warnings, in the console's words.
    pub fn errors(&mut self) -> &[String] {
        // Events come in order: those before its answer have been noted then.
        self.evaluate("0");
        &self.errors
    }

    /// The whole page as a PNG.
    ///
    /// # Panics
    /// When there is none.
    pub fn screenshot(&mut self) -> Vec<u8> {
        let shot = self.call(
            "Page.captureScreenshot",
            json!({ "format": "png", "captureBeyondViewport": true, "optimizeForSpeed": false }),
        );
        base64(shot["data"].as_str().expect("a picture"))
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // Asked to, it ends its children before itself; killed, it leaves that to them, who still write to the profile.
        self.session = None;
        let _ = write!(self.to, "{{\"id\":0,\"method\":\"Browser.close\"}}\0").and_then(|()| self.to.flush());
        let begun = Instant::now();
        while begun.elapsed() < CLOSING && matches!(self.child.try_wait(), Ok(None)) {
            std::thread::sleep(Duration::from_millis(10));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The bytes that `text` stands for (RFC 4648, 4).
fn base64(text: &str) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(text.len() / 4 * 3);
    let (mut bits, mut held) = (0_u32, 0);
    for digit in text.bytes() {
        let value = match digit {
            b'A'..=b'Z' => digit - b'A',
            b'a'..=b'z' => digit - b'a' + 26,
            b'0'..=b'9' => digit - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => break,
        };
        bits = bits << 6 | u32::from(value);
        held += 6;
        if held >= 8 {
            held -= 8;
            bytes.push((bits >> held & 0xff) as u8);
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::base64;

    #[test]
    fn base64_is_that_of_rfc_4648() {
        for (text, bytes) in [
            ("", ""),
            ("Zg==", "f"),
            ("Zm8=", "fo"),
            ("Zm9v", "foo"),
            ("Zm9vYmE=", "fooba"),
        ] {
            assert_eq!(base64(text), bytes.as_bytes());
        }
        assert_eq!(base64("+/8="), [0xfb, 0xff]);
    }
}
