//! The devices of `chronovisor run`: `--disk`, `--net`, `--vsock`.
//!
//! A value is `key=value` pairs with commas between them, as in QEMU and Cloud Hypervisor; a disk's is a path.

use std::path::PathBuf;

use vmm::config::{CacheType, Drive, IoEngine, MacAddr, NetworkInterface, Vsock};

/// `--disk FILE[:ro]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    /// A raw image, or a block device.
    pub path: PathBuf,
    /// Whether writes are refused.
    pub read_only: bool,
}

impl Disk {
    /// The `index`th disk. People expect of a disk that what the guest flushed is there after a power failure.
    pub fn drive(self, index: usize, root: bool) -> Drive {
        Drive {
            drive_id: disk_name(index),
            partuuid: None,
            is_root_device: root,
            cache_type: CacheType::Writeback,
            is_read_only: self.read_only,
            path_on_host: Some(self.path),
            rate_limiter: None,
            io_engine: IoEngine::Sync,
            socket: None,
        }
    }
}

/// As the guest's kernel calls it: `vda`, `vdb` ... `vdz`, `vdaa`.
fn disk_name(index: usize) -> String {
    let mut letters = Vec::new();
    let mut left = index + 1;
    while left > 0 {
        left -= 1;
        letters.push(char::from(b'a' + u8::try_from(left % 26).unwrap_or(0)));
        left /= 26;
    }
    let name: String = letters.iter().rev().collect();
    format!("vd{name}")
}

pub(super) fn disk(text: &str) -> Result<Disk, String> {
    let (path, read_only) = match text.strip_suffix(":ro") {
        Some(path) => (path, true),
        None => (text, false),
    };
    if path.is_empty() {
        return Err("name an image: FILE, or FILE:ro".to_owned());
    }
    Ok(Disk {
        path: path.into(),
        read_only,
    })
}

/// `--net tap=NAME[,mac=MAC][,id=ID]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Net {
    tap: String,
    mac: Option<MacAddr>,
    id: Option<String>,
}

impl Net {
    /// The `index`th interface.
    pub fn interface(self, index: usize) -> NetworkInterface {
        NetworkInterface {
            iface_id: self.id.unwrap_or_else(|| format!("eth{index}")),
            host_dev_name: self.tap,
            guest_mac: self.mac,
            mtu: None,
            rx_rate_limiter: None,
            tx_rate_limiter: None,
        }
    }
}

pub(super) fn net(text: &str) -> Result<Net, String> {
    let mut pairs = Pairs::new(text)?;
    let net = Net {
        tap: pairs.take("tap").ok_or("say which tap device: tap=NAME")?,
        mac: pairs.take("mac").map(|mac| mac.parse()).transpose()?,
        id: pairs.take("id"),
    };
    pairs.end("tap, mac and id").map(|()| net)
}

/// `--vsock cid=CID,uds=PATH`.
pub(super) fn vsock(text: &str) -> Result<Vsock, String> {
    let mut pairs = Pairs::new(text)?;
    let cid = pairs.take("cid").ok_or("say which context id the guest has: cid=3")?;
    let vsock = Vsock {
        vsock_id: None,
        guest_cid: cid
            .parse()
            .map_err(|_| format!("cid={cid} is not a context id: give a number from 3 up"))?,
        uds_path: pairs
            .take("uds")
            .ok_or("say where its unix socket is to be: uds=PATH")?
            .into(),
    };
    pairs.end("cid and uds").map(|()| vsock)
}

/// What is left of `key=value,key=value`.
struct Pairs(Vec<(String, String)>);

impl Pairs {
    fn new(text: &str) -> Result<Self, String> {
        let pair = |part: &str| match part.split_once('=') {
            Some((key, value)) if !value.is_empty() => Ok((key.to_owned(), value.to_owned())),
            _ => Err(format!("{part:?} is not of the form key=value")),
        };
        text.split(',').map(pair).collect::<Result<_, _>>().map(Self)
    }

    fn take(&mut self, key: &str) -> Option<String> {
        let found = self.0.iter().position(|(name, _)| name == key)?;
        Some(self.0.remove(found).1)
    }

    /// What is left, nobody knows, or was said twice.
    fn end(self, known: &str) -> Result<(), String> {
        match self.0.first() {
            Some((key, _)) => Err(format!("{key:?} is unknown here, or given twice: {known} are known")),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_a_path_and_may_be_read_only() {
        assert!(!disk("root.img").unwrap().read_only);
        let disk_ro = disk("/images/a:b.img:ro").unwrap();
        assert_eq!(
            (disk_ro.path.to_str(), disk_ro.read_only),
            (Some("/images/a:b.img"), true)
        );
        assert!(disk("").is_err() && disk(":ro").is_err());
        let names = [0, 1, 25, 26, 27, 701, 702].map(disk_name);
        assert_eq!(names, ["vda", "vdb", "vdz", "vdaa", "vdab", "vdzz", "vdaaa"]);
    }

    #[test]
    fn an_interface_needs_its_tap_and_may_have_more() {
        let whole = net("mac=06:00:ac:10:00:02,tap=tap0,id=lan").unwrap().interface(7);
        assert_eq!((whole.iface_id.as_str(), whole.host_dev_name.as_str()), ("lan", "tap0"));
        assert_eq!(whole.guest_mac.unwrap().to_string(), "06:00:ac:10:00:02");
        assert_eq!(net("tap=tap1").unwrap().interface(1).iface_id, "eth1");
        for (text, says) in [
            ("", "key=value"),
            ("tap0", "key=value"),
            ("tap=", "key=value"),
            ("mac=06:00:ac:10:00:02", "tap=NAME"),
            ("tap=a,mac=nonsense", "MAC address"),
            ("tap=a,tap=b", "twice"),
            ("tap=a,mtu=9000", "\"mtu\""),
        ] {
            let said = net(text).unwrap_err();
            assert!(said.contains(says), "{text}: {said}");
        }
    }

    #[test]
    fn a_socket_device_needs_both_its_ends() {
        let whole = vsock("uds=/run/v.sock,cid=3").unwrap();
        assert_eq!((whole.guest_cid, whole.uds_path.to_str()), (3, Some("/run/v.sock")));
        for (text, says) in [
            ("cid=3", "uds=PATH"),
            ("uds=p", "cid=3"),
            ("cid=x,uds=p", "cid=x"),
            ("cid=3,uds=p,x=1", "\"x\""),
        ] {
            let said = vsock(text).unwrap_err();
            assert!(said.contains(says), "{text}: {said}");
        }
    }
}
