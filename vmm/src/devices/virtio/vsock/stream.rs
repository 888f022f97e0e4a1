//! Between a connection and the host's end of it, a unix stream that does not block: straight from and to guest memory,
//! where there is room.

use std::io::{self, ErrorKind, Write};
use std::os::unix::net::UnixStream;

use vm_memory::{ReadVolatile, VolatileMemoryError, VolatileSlice, WriteVolatile};

use super::connection::Connection;
use crate::devices::virtio::queue::Buffers;

/// What a socket said through vm-memory.
fn io_error(error: VolatileMemoryError) -> io::Error {
    match error {
        VolatileMemoryError::IOError(error) => error,
        other => io::Error::other(other),
    }
}

/// Reads at most `most` bytes into the start of `room`.
pub fn read_into(mut stream: &UnixStream, room: &Buffers<'_>, most: u32) -> io::Result<u32> {
    let mut read = 0;
    for slice in room.clone().take_front(most as usize).slices() {
        let mut slice = *slice;
        match stream.read_volatile(&mut slice).map_err(io_error) {
            Ok(len) => {
                read += len;
                if len < slice.len() {
                    break;
                }
            }
            // What was read first is sent first.
            Err(_) if read > 0 => break,
            Err(error) => return Err(error),
        }
    }
    // At most `most`.
    Ok(u32::try_from(read).unwrap_or(most))
}

/// Writes the guest's `data` to the host's end, or holds it. True if the host's end is gone.
pub fn write_through(mut stream: &UnixStream, connection: &mut Connection, data: Buffers<'_>) -> bool {
    for slice in data.slices() {
        let mut done = 0;
        if connection.is_hung_up() {
            done = slice.len();
        } else if connection.may_write() {
            match stream.write_volatile(slice).map_err(io_error) {
                Ok(len) => done = len,
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(_) => {
                    connection.hung_up();
                    done = slice.len();
                }
            }
            if done < slice.len() {
                connection.full();
            }
        }
        // A slice is at most as long as a packet.
        connection.took(u32::try_from(done).unwrap_or(u32::MAX));
        hold(connection, slice, done);
    }
    connection.is_hung_up()
}

fn hold(connection: &mut Connection, slice: &VolatileSlice<'_>, from: usize) {
    if let Ok(rest) = slice.offset(from)
        && !rest.is_empty()
    {
        let mut bytes = vec![0; rest.len()];
        let len = rest.copy_to(&mut bytes);
        connection.hold(&bytes[..len]);
    }
}

/// Writes what is held, as far as the host's end takes it. True if that is gone.
pub fn flush(mut stream: &UnixStream, connection: &mut Connection) -> bool {
    loop {
        let bytes = connection.to_write();
        if bytes.is_empty() {
            return false;
        }
        match stream.write(bytes) {
            Ok(len) => connection.took_held(len),
            Err(error) if error.kind() == ErrorKind::WouldBlock => connection.full(),
            Err(_) => {
                connection.hung_up();
                return true;
            }
        }
    }
}
