//! The socket at `uds_path`.

use std::os::unix::fs::symlink;

use super::*;

fn refused(path: &Path) -> String {
    Vsock::new(&config(path)).expect_err("it should be refused").to_string()
}

#[test]
fn a_path_that_cannot_be_is_refused_with_what_to_do_and_left_as_it_was() {
    let folder = Folder::new();
    let (in_use, plain, link) = (folder.path("in-use"), folder.path("plain"), folder.path("link"));
    let _listener = UnixListener::bind(&in_use).unwrap();
    std::fs::write(&plain, "precious").unwrap();
    symlink(folder.path("target"), &link).unwrap();
    let table = [
        (in_use.clone(), "another process is listening"),
        (plain.clone(), "not a socket"),
        (link.clone(), "not a socket"),
        (folder.path("missing/s"), "directory does not exist"),
        (folder.path("plain/s"), "Not a directory"),
        (folder.path(&"l".repeat(107)), "at most 107"),
    ];
    for (path, says) in table {
        let said = refused(&path);
        assert!(said.contains(says), "{said}");
        assert!(
            said.starts_with(&format!("vsock: uds_path {}", path.display())),
            "{said}"
        );
    }
    assert!(in_use.exists() && !folder.path("target").exists());
    assert_eq!(std::fs::read_to_string(&plain).unwrap(), "precious");
}

#[test]
fn one_left_behind_by_a_process_that_has_ended_is_replaced() {
    let folder = Folder::new();
    let path = folder.path("v");
    drop(UnixListener::bind(&path).unwrap());
    let vsock = Vsock::new(&config(&path)).unwrap();
    assert!(UnixStream::connect(&path).is_ok());
    drop(vsock);
    assert!(!path.exists());
}

#[test]
fn a_context_id_that_is_not_a_guests_is_refused_before_anything_is_made() {
    let folder = Folder::new();
    for guest_cid in [0, 1, 2, u32::MAX] {
        let config = config::Vsock {
            guest_cid,
            ..config(&folder.path("v"))
        };
        let said = Vsock::new(&config).unwrap_err().to_string();
        assert!(
            said.contains(&format!("guest_cid {guest_cid} ")) && said.contains("from 3"),
            "{said}"
        );
    }
    assert!(!folder.path("v").exists());
}

#[test]
fn the_socket_goes_with_the_device_unless_another_has_taken_its_place() {
    let folder = Folder::new();
    let path = folder.path("v");
    let vsock = Vsock::new(&config(&path)).unwrap();
    assert!(UnixStream::connect(&path).is_ok());
    drop(vsock);
    assert!(!path.exists());
    let vsock = Vsock::new(&config(&path)).unwrap();
    // Made before the other goes, so that it cannot get its inode number.
    std::fs::write(folder.path("other"), "precious").unwrap();
    std::fs::rename(folder.path("other"), &path).unwrap();
    drop(vsock);
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
}

#[test]
fn a_path_too_long_with_its_port_refuses_the_guest() {
    let mut guest = Guest::new();
    let name = "v".repeat(107 - guest.folder.path("").as_os_str().len());
    let path = guest.folder.path(&name);
    assert_eq!(path.as_os_str().len(), 107);
    let vsock = Arc::new(Mutex::new(Vsock::new(&config(&path)).unwrap()));
    guest.driver = Driver::start(vsock.clone(), u64::MAX);
    guest.vsock = vsock;
    guest.offer(RX_CHAINS);
    guest.send(PORTS, Op::Request);
    guest.expect(Op::Reset);
}
