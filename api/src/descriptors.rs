//! How many descriptors this process may have.
//!
//! The soft limit that processes are started with, 1024 as a rule, is there for programs that use select(2), which fails beyond it
//! (getrlimit(2), and systemd.exec(5) on `LimitNOFILE=`). A microVM has more: a vsock's connections alone may be 1023.

use std::io;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Raises the soft limit to the hard one.
///
/// # Errors
/// What the system said; the limit is what it was.
pub fn raise_limit() -> io::Result<()> {
    let limit = getrlimit(Resource::Nofile);
    if limit.current == limit.maximum {
        return Ok(());
    }
    let raised = Rlimit {
        current: limit.maximum,
        ..limit
    };
    Ok(setrlimit(Resource::Nofile, raised)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// In a process of its own, whose limit is lower.
    #[test]
    fn the_soft_limit_becomes_the_hard_one() {
        const LIMITED: &str = "CHRONOVISOR_TEST_LIMITED";
        if std::env::var_os(LIMITED).is_some() {
            let before = getrlimit(Resource::Nofile);
            raise_limit().unwrap();
            let after = getrlimit(Resource::Nofile);
            println!("limits: {:?} {:?}", before.current, after.current == before.maximum);
            return;
        }
        let itself = std::env::current_exe().unwrap();
        // The thread has that name only where there are several.
        let name = "descriptors::tests::the_soft_limit_becomes_the_hard_one";
        let output = std::process::Command::new("sh")
            .args(["-c", "ulimit -S -n 64 && exec \"$@\"", "sh"])
            .arg(itself)
            .args(["--exact", name, "--nocapture"])
            .env(LIMITED, "")
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(said.contains("limits: Some(64) true"), "{output:?}");
    }
}
