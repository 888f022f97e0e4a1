//! Drivers, loaded when a step needs one: `/modules/NAME` lists the modules, `/modules/MODULE.ko` each is.

use std::fs::{self, File};
use std::io;

use rustix::io::Errno;
use rustix::system::finit_module;

/// Loads `name` and what it depends on; a module that is there already stays.
pub fn load(name: &str) -> io::Result<()> {
    for module in fs::read_to_string(format!("/modules/{name}"))?.lines() {
        let file = File::open(format!("/modules/{module}.ko"))?;
        match finit_module(file, c"", 0) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(io::Error::other(format!("{module}: {error}"))),
        }
    }
    Ok(())
}
