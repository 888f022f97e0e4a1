//! What the devices are made of: the shapes of Firecracker's `/drives`, `/network-interfaces`, `/vsock`, `/entropy` and
//! `/balloon`. What one may hold beside its type is said by `devices.rs`, and by its device, where it is built. What was left out is shown as null, as there.

use std::path::PathBuf;

use serde::{Deserialize, Deserializer, Serialize};

/// A field that Firecracker lets be `null`, for its default.
fn or_default<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(from: D) -> Result<T, D::Error> {
    Ok(Option::deserialize(from)?.unwrap_or_default())
}

/// One token bucket: at most `size` tokens at once, full again after `refill_time` from empty.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct TokenBucket {
    /// Tokens it holds: bytes, or operations. 0 sets no limit.
    pub size: u64,
    /// Tokens given once, at the start, on top.
    #[serde(default)]
    pub one_time_burst: Option<u64>,
    /// Milliseconds to fill. 0 sets no limit.
    pub refill_time: u64,
}

/// A limit on bytes and on operations, each where given.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct RateLimiter {
    /// Bytes.
    #[serde(default)]
    pub bandwidth: Option<TokenBucket>,
    /// Operations: requests, or frames.
    #[serde(default)]
    pub ops: Option<TokenBucket>,
}

/// `/drives/{id}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Drive {
    /// Its name: letters, digits and `_`.
    #[cfg_attr(feature = "schema", schemars(regex(pattern = r"^[A-Za-z0-9_]+$")))]
    pub drive_id: String,
    /// The partition to mount as root, of a root device; all of it where absent.
    #[serde(default)]
    pub partuuid: Option<String>,
    /// Whether the kernel is told to mount it as its root. At most one is.
    pub is_root_device: bool,
    /// Whether the guest's flushes reach the disk.
    #[serde(default)]
    pub cache_type: CacheType,
    /// Whether writes are refused.
    #[serde(default, deserialize_with = "or_default")]
    #[cfg_attr(feature = "schema", schemars(with = "crate::schema::NullOr<bool>"))]
    pub is_read_only: bool,
    /// A raw image, or a block device.
    #[serde(default)]
    pub path_on_host: Option<PathBuf>,
    /// Limits reads and writes together.
    #[serde(default)]
    pub rate_limiter: Option<RateLimiter>,
    /// How requests reach the file.
    #[serde(default, deserialize_with = "or_default")]
    #[cfg_attr(feature = "schema", schemars(with = "crate::schema::NullOr<IoEngine>"))]
    pub io_engine: IoEngine,
    /// Of a vhost-user back end, which we do not have.
    #[serde(default)]
    pub socket: Option<PathBuf>,
}

/// What becomes of a guest's flush.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub enum CacheType {
    /// None is offered; a power failure of the host may lose what the guest thought safe.
    #[default]
    Unsafe,
    /// fsync.
    Writeback,
}

/// How a block device's requests reach its file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub enum IoEngine {
    /// `preadv` and `pwritev`, one after the other.
    #[default]
    Sync,
    /// `io_uring`, as many at once as the guest asks.
    Async,
}

/// `PATCH /drives/{id}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct DriveUpdate {
    /// Which.
    #[cfg_attr(feature = "schema", schemars(regex(pattern = r"^[A-Za-z0-9_]+$")))]
    pub drive_id: String,
    /// Another image, or the same one with another size.
    #[serde(default)]
    pub path_on_host: Option<PathBuf>,
    /// Another limit.
    #[serde(default)]
    pub rate_limiter: Option<RateLimiter>,
}

/// `/network-interfaces/{id}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct NetworkInterface {
    /// Its name: letters, digits and `_`.
    #[cfg_attr(feature = "schema", schemars(regex(pattern = r"^[A-Za-z0-9_]+$")))]
    pub iface_id: String,
    /// The tap device on the host.
    pub host_dev_name: String,
    /// The guest's address; the guest chooses where absent.
    #[serde(default)]
    pub guest_mac: Option<MacAddr>,
    /// What the guest is told as its MTU.
    #[serde(default)]
    #[cfg_attr(feature = "schema", schemars(range(min = 68)))]
    pub mtu: Option<u16>,
    /// Limits what the guest receives.
    #[serde(default)]
    pub rx_rate_limiter: Option<RateLimiter>,
    /// Limits what it sends.
    #[serde(default)]
    pub tx_rate_limiter: Option<RateLimiter>,
}

/// `PATCH /network-interfaces/{id}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct NetworkInterfaceUpdate {
    /// Which.
    #[cfg_attr(feature = "schema", schemars(regex(pattern = r"^[A-Za-z0-9_]+$")))]
    pub iface_id: String,
    /// Another limit.
    #[serde(default)]
    pub rx_rate_limiter: Option<RateLimiter>,
    /// Another limit.
    #[serde(default)]
    pub tx_rate_limiter: Option<RateLimiter>,
}

/// An Ethernet address, as `06:00:ac:10:00:02`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(try_from = "String", into = "String")]
#[cfg_attr(feature = "schema", schemars(extend("pattern" = "^[0-9a-fA-F]{2}(:[0-9a-fA-F]{2}){5}$")))]
pub struct MacAddr(pub [u8; 6]);

impl std::fmt::Display for MacAddr {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl std::str::FromStr for MacAddr {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || {
            format!("invalid MAC address {text:?}: six pairs of hexadecimal digits are needed, as in 06:00:ac:10:00:02")
        };
        let mut mac = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut mac {
            let part = parts.next().ok_or_else(bad)?;
            if part.len() != 2 || !part.bytes().all(|digit| digit.is_ascii_hexdigit()) {
                return Err(bad());
            }
            *byte = u8::from_str_radix(part, 16).map_err(|_| bad())?;
        }
        if parts.next().is_some() {
            Err(bad())
        } else {
            Ok(Self(mac))
        }
    }
}

impl TryFrom<String> for MacAddr {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<MacAddr> for String {
    fn from(mac: MacAddr) -> Self {
        mac.to_string()
    }
}

/// `/vsock`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Vsock {
    /// Of Firecracker before 1.0; without effect, and not shown.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock_id: Option<String>,
    /// The guest's context id, from 3 up.
    #[cfg_attr(feature = "schema", schemars(range(min = 3)))]
    pub guest_cid: u32,
    /// The unix socket that stands for the guest on the host.
    pub uds_path: PathBuf,
}

/// `/entropy`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Entropy {
    /// Limits what the guest is given.
    #[serde(default)]
    pub rate_limiter: Option<RateLimiter>,
}

/// `/balloon`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Balloon {
    /// How much memory the guest is to give back, in MiB.
    pub amount_mib: u32,
    /// Whether the guest may take some of it back before it kills processes.
    pub deflate_on_oom: bool,
    /// Seconds between two statistics of the guest's; 0 asks for none.
    #[serde(default)]
    pub stats_polling_interval_s: u16,
    /// Whether the guest can be asked which pages are free.
    #[serde(default)]
    pub free_page_hinting: bool,
    /// Whether the guest reports pages as it frees them.
    #[serde(default)]
    pub free_page_reporting: bool,
}

/// `PATCH /balloon`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct BalloonUpdate {
    /// How much memory the guest is to give back, in MiB.
    pub amount_mib: u32,
}

/// `PATCH /balloon/statistics`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct BalloonStatsUpdate {
    /// Seconds between two statistics. From 0 to more, or from more to 0, it cannot be changed after the start.
    pub stats_polling_interval_s: u16,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mac_address_reads_back_as_it_was_written_and_nothing_else_is_one() {
        let mac: MacAddr = "06:00:AC:10:00:fe".parse().unwrap();
        assert_eq!((mac.0[2], mac.to_string().as_str()), (0xac, "06:00:ac:10:00:fe"));
        for text in [
            "",
            "06:00:ac:10:00",
            "06:00:ac:10:00:02:03",
            "6:0:ac:10:0:2",
            "06-00-ac-10-00-02",
            "06:00:ac:10:00:+2",
        ] {
            assert!(text.parse::<MacAddr>().is_err(), "{text}");
        }
    }
}
