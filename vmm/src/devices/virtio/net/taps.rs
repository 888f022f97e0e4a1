//! Taps from their interfaces' configuration to the machine's start: what the host gives them in between (addresses, a bridge, `up`) is
//! there when the guest comes. A tap that is made by being attached to goes with its last descriptor, and addresses go with their tap.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::tap::{Tap, TapError};
use super::{NetError, check_mtu};
use crate::config::NetworkInterface;

/// Taps that are attached to, by the ids of their interfaces. A copy has the same ones.
#[derive(Clone, Debug, Default)]
pub struct Taps(BTreeMap<String, Arc<Tap>>);

impl Taps {
    /// Attaches to the tap of `interface`, which lets go of another one that it had.
    ///
    /// # Errors
    /// See [`NetError`]; the interface keeps the tap that it had.
    pub fn hold(&mut self, interface: &NetworkInterface) -> Result<(), NetError> {
        check_mtu(interface)?;
        let tap = self.tap_of(interface)?;
        self.0.insert(interface.iface_id.clone(), tap);
        Ok(())
    }

    /// The tap of `interface`: that which is held for it, if it was not deleted since; or else a new one.
    pub(super) fn tap_of(&self, interface: &NetworkInterface) -> Result<Arc<Tap>, TapError> {
        // Who has it cannot attach to it once more.
        let held = self.0.get(&interface.iface_id);
        match held.filter(|tap| tap.name() == interface.host_dev_name && tap.is_there()) {
            Some(tap) => Ok(Arc::clone(tap)),
            None => Tap::open(&interface.iface_id, &interface.host_dev_name).map(Arc::new),
        }
    }
}
