//! From a plan's devices to devices on the bus: each built, given its window and interrupt, and named on the command line where
//! kernels look for that.
//!
//! The order is Firecracker's, for guests that count: balloon, drives, interfaces, vsock, entropy. A root drive is first among
//! the drives, so that it is `/dev/vda`.

use std::sync::{Arc, Mutex};

use kvm_ioctls::{IoEventAddress, VmFd};

use crate::config::{Devices, Drive};
use crate::devices::virtio::balloon::{Balloon, BalloonError};
use crate::devices::virtio::block::{Block, BlockError};
use crate::devices::virtio::mmio::{Transport, Window};
use crate::devices::virtio::net::{Net, NetError, Taps};
use crate::devices::virtio::rng::{Rng, RngError};
use crate::devices::virtio::vsock::{Vsock, VsockError};
use crate::devices::virtio::{Interrupt, Shared};
use crate::kvm::{CallError, refused};
use crate::layout::VIRTIO_IRQS;
use crate::memory::GuestMemory;

/// Why a device cannot be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AttachError {
    /// The balloon.
    #[error(transparent)]
    Balloon(#[from] BalloonError),
    /// A drive.
    #[error(transparent)]
    Block(#[from] BlockError),
    /// An interface.
    #[error(transparent)]
    Net(#[from] NetError),
    /// The socket device.
    #[error(transparent)]
    Vsock(#[from] VsockError),
    /// The entropy device.
    #[error(transparent)]
    Rng(#[from] RngError),
    /// More devices than interrupts.
    #[error("the microVM has {0} virtio devices, and interrupts for {max}: leave some out", max = VIRTIO_IRQS.len())]
    TooMany(usize),
    /// No descriptors.
    #[error("cannot make the eventfds of device {name}: {source}; raise the limit on open files (ulimit -n)")]
    EventFd {
        /// Which.
        name: String,
        /// What the system said.
        source: std::io::Error,
    },
}

/// A device by the name that its configuration gave it.
pub type Named<T> = (String, Arc<Mutex<T>>);

/// All virtio devices of a machine, by what they are: for those who change them while it runs.
#[derive(Debug, Default)]
pub struct Attached {
    /// The balloon.
    pub balloon: Option<Arc<Mutex<Balloon>>>,
    /// Disks.
    pub blocks: Vec<Named<Block>>,
    /// Interfaces.
    pub nets: Vec<Named<Net>>,
    /// The socket device.
    pub vsock: Option<Arc<Mutex<Vsock>>>,
    /// The entropy device.
    pub entropy: Option<Arc<Mutex<Rng>>>,
}

/// Builds `devices`, interfaces on those of `taps` that are theirs. Beside them their registers, in the order of their windows.
///
/// # Errors
/// See [`AttachError`].
pub fn build(
    devices: &Devices,
    taps: &Taps,
    memory: &Arc<GuestMemory>,
) -> Result<(Attached, Vec<Transport>), AttachError> {
    let mut attached = Attached::default();
    let mut transports = Vec::new();
    let mut add = |name: String, device: Shared| {
        let transport = Interrupt::new()
            .and_then(|interrupt| Transport::new(name.clone(), device, Arc::new(interrupt), Arc::clone(memory)));
        transports.push(transport.map_err(|source| AttachError::EventFd { name, source })?);
        Ok::<_, AttachError>(())
    };
    if let Some(config) = &devices.balloon {
        let balloon = Arc::new(Mutex::new(Balloon::new(config)?));
        add("balloon".into(), balloon.clone())?;
        attached.balloon = Some(balloon);
    }
    for drive in in_order(&devices.drives) {
        let block = Arc::new(Mutex::new(Block::new(drive)?));
        add(format!("drive {}", drive.drive_id), block.clone())?;
        attached.blocks.push((drive.drive_id.clone(), block));
    }
    for interface in &devices.network_interfaces {
        let net = Arc::new(Mutex::new(Net::new(interface, taps)?));
        add(format!("interface {}", interface.iface_id), net.clone())?;
        attached.nets.push((interface.iface_id.clone(), net));
    }
    if let Some(config) = &devices.vsock {
        let vsock = Arc::new(Mutex::new(Vsock::new(config)?));
        add("vsock".into(), vsock.clone())?;
        attached.vsock = Some(vsock);
    }
    if let Some(config) = &devices.entropy {
        let rng = Arc::new(Mutex::new(Rng::new(config)?));
        add("entropy device".into(), rng.clone())?;
        attached.entropy = Some(rng);
    }
    if transports.len() > VIRTIO_IRQS.len() {
        return Err(AttachError::TooMany(transports.len()));
    }
    Ok((attached, transports))
}

/// The root drive first.
fn in_order(drives: &[Drive]) -> impl Iterator<Item = &Drive> {
    let (root, others): (Vec<_>, Vec<_>) = drives.iter().partition(|drive| drive.is_root_device);
    root.into_iter().chain(others)
}

/// The windows of `count` devices.
#[must_use]
pub fn windows(count: usize) -> Vec<Window> {
    (0..count).filter_map(Window::nth).collect()
}

/// What the kernel's command line gets on top: its root, and where the devices are.
#[must_use]
pub fn command_line(devices: &Devices, windows: &[Window]) -> String {
    let root = devices.drives.iter().find(|drive| drive.is_root_device).map(|drive| {
        let root = match &drive.partuuid {
            Some(partuuid) => format!("PARTUUID={partuuid}"),
            None => "/dev/vda".to_owned(),
        };
        format!("root={root} {}", if drive.is_read_only { "ro" } else { "rw" })
    });
    let parts: Vec<_> = root
        .into_iter()
        .chain(windows.iter().map(ToString::to_string))
        .collect();
    parts.join(" ")
}

/// Has KVM raise each device's interrupt, and turn each queue's notification into an eventfd.
///
/// # Errors
/// The call that KVM refused.
pub fn connect(vm: &VmFd, transports: &[Transport]) -> Result<(), CallError> {
    for (transport, window) in transports.iter().zip(windows(transports.len())) {
        vm.register_irqfd(transport.interrupt().line(), window.irq)
            .map_err(refused("connect a device's interrupt"))?;
        let address = IoEventAddress::Mmio(window.base + Transport::NOTIFY);
        for (queue, notification) in (0u32..).zip(transport.notifications()) {
            vm.register_ioevent(notification, &address, queue)
                .map_err(refused("connect a device's queue"))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drive(drive_id: &str, root: bool, read_only: bool, partuuid: Option<&str>) -> Drive {
        serde_json::from_value(serde_json::json!({
            "drive_id": drive_id, "is_root_device": root, "is_read_only": read_only, "partuuid": partuuid,
        }))
        .unwrap()
    }

    fn devices(drives: Vec<Drive>) -> Devices {
        Devices {
            drives,
            ..Devices::default()
        }
    }

    #[test]
    fn the_root_drive_is_the_first_disk_and_named_on_the_command_line() {
        let line = |drives| command_line(&devices(drives), &[]);
        assert_eq!(line(vec![drive("a", false, false, None)]), "");
        assert_eq!(line(vec![drive("a", true, false, None)]), "root=/dev/vda rw");
        assert_eq!(
            line(vec![drive("a", true, true, Some("0eaa91a0-01"))]),
            "root=PARTUUID=0eaa91a0-01 ro"
        );
        let drives = ["a", "b", "root", "c"].map(|id| drive(id, id == "root", false, None));
        let order: Vec<_> = in_order(&drives).map(|drive| drive.drive_id.as_str()).collect();
        assert_eq!(order, ["root", "a", "b", "c"]);
    }

    #[test]
    fn each_device_has_a_page_and_an_interrupt_of_its_own() {
        let windows = windows(VIRTIO_IRQS.len());
        assert_eq!(windows[0].to_string(), "virtio_mmio.device=4K@0xd0000000:5");
        assert_eq!(
            command_line(&Devices::default(), &windows[..2]),
            "virtio_mmio.device=4K@0xd0000000:5 virtio_mmio.device=4K@0xd0001000:6"
        );
        let mut irqs: Vec<_> = windows.iter().map(|window| window.irq).collect();
        irqs.dedup();
        assert_eq!(irqs.len(), VIRTIO_IRQS.len());
        assert_eq!(Window::nth(VIRTIO_IRQS.len()), None);
    }
}
