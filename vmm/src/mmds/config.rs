//! `PUT /mmds/config`: which interfaces reach the service, at which address, in which version. Shapes and words are Firecracker's.

use std::net::Ipv4Addr;

use serde::{Deserialize, Deserializer, Serialize};
use thiserror::Error;

/// Where the service is without `ipv4_address`.
pub const DEFAULT_IPV4: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);

/// What [`is_host_link_local`] takes.
#[cfg(feature = "schema")]
const HOST_LINK_LOCAL: &str =
    r"^169\.254\.([1-9]|[1-9]\d|1\d\d|2[0-4]\d|25[0-4])\.(\d|[1-9]\d|1\d\d|2[0-4]\d|25[0-5])$";

/// How a guest must ask.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[cfg_attr(feature = "schema", schemars(rename = "MmdsVersion"))]
pub enum Version {
    /// A GET is answered.
    #[default]
    V1,
    /// A GET is answered that carries a session token.
    V2,
}

/// `/mmds/config`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct MmdsConfig {
    /// How a guest must ask.
    #[serde(default)]
    pub version: Version,
    /// Ids of the network interfaces that reach the service.
    #[cfg_attr(feature = "schema", schemars(length(min = 1)))]
    pub network_interfaces: Vec<String>,
    /// The service's address.
    #[serde(default = "default_ipv4", deserialize_with = "ipv4_or_null")]
    #[cfg_attr(feature = "schema", schemars(with = "crate::schema::NullOr<Ipv4Addr>", regex(pattern = HOST_LINK_LOCAL)))]
    pub ipv4_address: Ipv4Addr,
    /// Whether every answer is IMDS text, whatever `Accept` says.
    #[serde(default)]
    pub imds_compat: bool,
}

/// Why a configuration is refused.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ConfigError {
    /// The address is none that RFC 3927 gives to hosts.
    #[error("The MMDS IPv4 address is not link local.")]
    NotLinkLocal(Ipv4Addr),
    /// No interface is named.
    #[error("The list of network interface IDs that allow forwarding MMDS requests is empty.")]
    NoInterface,
    /// An interface is named that is not configured: this one.
    #[error(
        "The list of network interface IDs provided contains at least one ID that does not correspond to any existing network \
         interface."
    )]
    UnknownInterface(String),
}

impl MmdsConfig {
    /// Checks the configuration against the ids of the interfaces there are, in Firecracker's order.
    ///
    /// # Errors
    /// See [`ConfigError`].
    pub fn check<'a>(&self, interfaces: impl IntoIterator<Item = &'a str>) -> Result<(), ConfigError> {
        if !is_host_link_local(self.ipv4_address) {
            return Err(ConfigError::NotLinkLocal(self.ipv4_address));
        }
        if self.network_interfaces.is_empty() {
            return Err(ConfigError::NoInterface);
        }
        let known: Vec<&str> = interfaces.into_iter().collect();
        match self.network_interfaces.iter().find(|id| !known.contains(&id.as_str())) {
            Some(id) => Err(ConfigError::UnknownInterface(id.clone())),
            None => Ok(()),
        }
    }
}

/// RFC 3927, section 2.1: of 169.254.0.0/16 the first and the last 256 addresses are reserved.
fn is_host_link_local(address: Ipv4Addr) -> bool {
    matches!(address.octets(), [169, 254, 1..=254, _])
}

fn default_ipv4() -> Ipv4Addr {
    DEFAULT_IPV4
}

/// A null is as no address: Firecracker's field is an option.
fn ipv4_or_null<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Ipv4Addr, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or(DEFAULT_IPV4))
}

#[cfg(test)]
mod tests {
    use serde_json::{from_value, json, to_value};

    use super::*;

    fn config(json: serde_json::Value) -> MmdsConfig {
        from_value(json).unwrap()
    }

    #[test]
    fn what_is_left_out_is_firecrackers_default() {
        let whole = json!({ "version": "V1", "network_interfaces": ["eth0"], "ipv4_address": "169.254.169.254",
                            "imds_compat": false });
        for short in [
            json!({ "network_interfaces": ["eth0"] }),
            json!({ "network_interfaces": ["eth0"], "ipv4_address": null }),
        ] {
            assert_eq!(to_value(config(short)).unwrap(), whole);
        }
        let other = json!({ "version": "V2", "network_interfaces": ["a", "b"], "ipv4_address": "169.254.170.2",
                            "imds_compat": true });
        assert_eq!(to_value(config(other.clone())).unwrap(), other);
    }

    #[test]
    fn what_is_not_its_shape_is_refused() {
        for wrong in [
            json!({}),
            json!({ "version": "V2" }),
            json!({ "network_interfaces": "eth0" }),
            json!({ "network_interfaces": ["eth0"], "version": "V3" }),
            json!({ "network_interfaces": ["eth0"], "version": null }),
            json!({ "network_interfaces": ["eth0"], "ipv4_address": "169.254" }),
            json!({ "network_interfaces": ["eth0"], "imds_compat": 1 }),
            json!({ "network_interfaces": ["eth0"], "port": 80 }),
        ] {
            assert!(from_value::<MmdsConfig>(wrong.clone()).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_check_names_what_is_wrong_in_firecrackers_words() {
        let known = ["eth0", "eth1"];
        let good = config(json!({ "network_interfaces": ["eth1", "eth0"] }));
        assert_eq!(good.check(known), Ok(()));

        let none = config(json!({ "network_interfaces": [] })).check(known).unwrap_err();
        assert_eq!(
            none.to_string(),
            "The list of network interface IDs that allow forwarding MMDS requests is empty."
        );
        let unknown = config(json!({ "network_interfaces": ["eth0", "eth2"] }))
            .check(known)
            .unwrap_err();
        assert_eq!(unknown, ConfigError::UnknownInterface("eth2".into()));
        assert_eq!(
            unknown.to_string(),
            "The list of network interface IDs provided contains at least one ID that does not correspond to any existing network \
             interface."
        );
        // The address is looked at first.
        let bad = config(json!({ "network_interfaces": [], "ipv4_address": "10.0.0.1" }))
            .check(known)
            .unwrap_err();
        assert_eq!(bad.to_string(), "The MMDS IPv4 address is not link local.");
    }

    #[test]
    fn an_address_is_one_that_a_host_may_have() {
        for (address, good) in [
            ([169, 254, 1, 0], true),
            ([169, 254, 169, 254], true),
            ([169, 254, 254, 255], true),
            ([169, 254, 0, 1], false),
            ([169, 254, 255, 1], false),
            ([169, 253, 1, 1], false),
            ([127, 0, 0, 1], false),
        ] {
            assert_eq!(is_host_link_local(address.into()), good, "{address:?}");
        }
    }
}
