//! The devices of one microVM, and what goes together with what. A second PUT of the same id replaces the first.
//!
//! What is wrong with a device by itself (a file that is not there) its device says; here is what is wrong with it beside
//! others. Words are Firecracker's where its are the same refusal; what it puts before them, the API adds.

use super::{Balloon, ConfigError, Drive, Entropy, HugePages, MacAddr, MachineConfig, NetworkInterface, Vsock};

/// The first context id that is a guest's: those below are the hypervisor's, the loopback's and the host's (vsock(7)).
const FIRST_GUEST_CID: u32 = 3;

/// Why a drive cannot be had, or not be changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DriveRefused {
    /// Firecracker's words.
    #[error("A root block device already exists!")]
    SecondRoot,
    /// A back end in another process.
    #[error("drive {0} has a socket, and vhost-user is not supported by Chronovisor: name its image in path_on_host")]
    VhostUser(String),
    /// To be changed, and not there.
    #[error("there is no drive {0}")]
    Unknown(String),
}

/// Why an interface cannot be had, or not be changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum InterfaceRefused {
    /// Firecracker's words.
    #[error("The MAC address is already in use: {0}")]
    MacInUse(MacAddr),
    /// One tap cannot be two interfaces.
    #[error("Could not create the network device: interface {other} uses the tap device {tap} already")]
    TapInUse {
        /// The tap device.
        tap: String,
        /// Who has it.
        other: String,
    },
    /// To be changed, and not there.
    #[error("Unable to update the net device: there is no interface {0}")]
    Unknown(String),
}

/// Why there is no socket device.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum VsockRefused {
    /// A context id that is no guest's.
    #[error("guest_cid is {0}: context ids below {FIRST_GUEST_CID} are not for guests")]
    GuestCid(u32),
}

/// Why there is no balloon. Firecracker's words.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BalloonRefused {
    /// None was put.
    #[error("No balloon device found.")]
    None,
    /// More than the guest has.
    #[error("Amount of pages requested is too large.")]
    TooLarge,
    /// Pages of 2 MiB cannot be given back one by one.
    #[error("Firecracker's huge pages support is incompatible with memory ballooning.")]
    HugePages,
}

/// All devices of a microVM, in the order they are found by the guest.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Devices {
    /// Drives; a root device comes first, as `/dev/vda`.
    pub drives: Vec<Drive>,
    /// Interfaces: `eth0`, `eth1`, and so on.
    pub network_interfaces: Vec<NetworkInterface>,
    /// The socket device.
    pub vsock: Option<Vsock>,
    /// The source of randomness.
    pub entropy: Option<Entropy>,
    /// The balloon.
    pub balloon: Option<Balloon>,
}

impl Devices {
    /// Whether `drive` goes together with the others.
    ///
    /// # Errors
    /// There is another root, or it is of a kind there is none of here.
    pub fn check_drive(&self, drive: &Drive) -> Result<(), DriveRefused> {
        if drive.socket.is_some() {
            return Err(DriveRefused::VhostUser(drive.drive_id.clone()));
        }
        let mut others = self.drives.iter().filter(|other| other.drive_id != drive.drive_id);
        if drive.is_root_device && others.any(|other| other.is_root_device) {
            return Err(DriveRefused::SecondRoot);
        }
        Ok(())
    }

    /// Adds `drive`, or puts it in the place of the one of its id; a root goes first.
    pub fn put_drive(&mut self, drive: Drive) {
        put(&mut self.drives, drive, |drive| &drive.drive_id);
        self.drives.sort_by_key(|drive| !drive.is_root_device);
    }

    /// The drive `id`.
    ///
    /// # Errors
    /// There is none.
    pub fn drive_mut(&mut self, id: &str) -> Result<&mut Drive, DriveRefused> {
        let mut drives = self.drives.iter_mut();
        let found = drives.find(|drive| drive.drive_id == id);
        found.ok_or_else(|| DriveRefused::Unknown(id.to_owned()))
    }

    /// Whether `interface` goes together with the others.
    ///
    /// # Errors
    /// Another has its address, or its tap device.
    pub fn check_interface(&self, interface: &NetworkInterface) -> Result<(), InterfaceRefused> {
        for other in &self.network_interfaces {
            if other.iface_id == interface.iface_id {
                continue;
            }
            if let Some(mac) = interface.guest_mac
                && other.guest_mac == Some(mac)
            {
                return Err(InterfaceRefused::MacInUse(mac));
            }
            if other.host_dev_name == interface.host_dev_name {
                return Err(InterfaceRefused::TapInUse {
                    tap: interface.host_dev_name.clone(),
                    other: other.iface_id.clone(),
                });
            }
        }
        Ok(())
    }

    /// Adds `interface`, or puts it in the place of the one of its id.
    pub fn put_interface(&mut self, interface: NetworkInterface) {
        put(&mut self.network_interfaces, interface, |interface| &interface.iface_id);
    }

    /// The interface `id`.
    ///
    /// # Errors
    /// There is none.
    pub fn interface_mut(&mut self, id: &str) -> Result<&mut NetworkInterface, InterfaceRefused> {
        let mut interfaces = self.network_interfaces.iter_mut();
        let found = interfaces.find(|interface| interface.iface_id == id);
        found.ok_or_else(|| InterfaceRefused::Unknown(id.to_owned()))
    }

    /// Sets the socket device.
    ///
    /// # Errors
    /// Its context id is none of a guest's.
    pub fn put_vsock(&mut self, vsock: Vsock) -> Result<(), VsockRefused> {
        if vsock.guest_cid < FIRST_GUEST_CID {
            return Err(VsockRefused::GuestCid(vsock.guest_cid));
        }
        self.vsock = Some(vsock);
        Ok(())
    }

    /// Sets the balloon of `machine`.
    ///
    /// # Errors
    /// It is to have more than the machine, or the machine's memory cannot be given back.
    pub fn put_balloon(&mut self, balloon: Balloon, machine: &MachineConfig) -> Result<(), BalloonRefused> {
        fits(&balloon, machine)?;
        self.balloon = Some(balloon);
        Ok(())
    }

    /// Whether these devices can be `machine`'s.
    ///
    /// # Errors
    /// The balloon cannot.
    pub fn check_machine(&self, machine: &MachineConfig) -> Result<(), ConfigError> {
        let fits = self.balloon.map_or(Ok(()), |balloon| fits(&balloon, machine));
        fits.map_err(|refused| match refused {
            BalloonRefused::HugePages => ConfigError::BalloonAndHugePages,
            _ => ConfigError::LessThanBalloon(machine.mem_size_mib),
        })
    }
}

fn fits(balloon: &Balloon, machine: &MachineConfig) -> Result<(), BalloonRefused> {
    if machine.huge_pages == HugePages::Hugetlbfs2M {
        return Err(BalloonRefused::HugePages);
    }
    if u64::from(balloon.amount_mib) > machine.mem_size_mib as u64 {
        return Err(BalloonRefused::TooLarge);
    }
    Ok(())
}

fn put<T>(all: &mut Vec<T>, one: T, id: impl Fn(&T) -> &String) {
    match all.iter_mut().find(|other| id(other) == id(&one)) {
        Some(other) => *other = one,
        None => all.push(one),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{from_value, json};

    use super::*;

    fn drive(drive_id: &str, root: bool) -> Drive {
        from_value(json!({ "drive_id": drive_id, "is_root_device": root })).unwrap()
    }

    fn interface(iface_id: &str, tap: &str, mac: Option<&str>) -> NetworkInterface {
        from_value(json!({ "iface_id": iface_id, "host_dev_name": tap, "guest_mac": mac })).unwrap()
    }

    #[test]
    fn one_drive_is_the_root_and_a_second_put_takes_the_place_of_the_first() {
        let mut devices = Devices::default();
        for drive in [drive("a", false), drive("b", true), drive("a", false)] {
            devices.check_drive(&drive).unwrap();
            devices.put_drive(drive);
        }
        assert_eq!(devices.drives, [drive("b", true), drive("a", false)]);
        assert_eq!(devices.check_drive(&drive("a", true)), Err(DriveRefused::SecondRoot));
        assert_eq!(devices.check_drive(&drive("b", true)), Ok(()), "it is itself the root");
        assert!(devices.drive_mut("c").is_err());
    }

    #[test]
    fn no_two_interfaces_have_the_same_address_or_tap() {
        let mut devices = Devices::default();
        let mac = "06:00:ac:10:00:02";
        devices.put_interface(interface("eth0", "tap0", Some(mac)));
        devices.put_interface(interface("eth1", "tap1", None));
        let refused = |interface| devices.check_interface(&interface).unwrap_err();
        assert_eq!(
            refused(interface("eth2", "tap2", Some(mac))),
            InterfaceRefused::MacInUse(mac.parse().unwrap())
        );
        assert!(matches!(
            refused(interface("eth2", "tap1", None)),
            InterfaceRefused::TapInUse { other, .. } if other == "eth1"
        ));
        devices.check_interface(&interface("eth0", "tap0", Some(mac))).unwrap();
        devices.check_interface(&interface("eth2", "tap2", None)).unwrap();
    }

    #[test]
    fn a_balloon_and_its_machine_fit_in_whichever_order_they_are_put() {
        let balloon: Balloon = from_value(json!({ "amount_mib": 129, "deflate_on_oom": true })).unwrap();
        let mut machine = MachineConfig::default();
        let mut devices = Devices::default();
        assert_eq!(devices.put_balloon(balloon, &machine), Err(BalloonRefused::TooLarge));
        machine.mem_size_mib = 129;
        devices.put_balloon(balloon, &machine).unwrap();
        machine.mem_size_mib = 128;
        assert_eq!(devices.check_machine(&machine), Err(ConfigError::LessThanBalloon(128)));
        (machine.mem_size_mib, machine.huge_pages) = (256, HugePages::Hugetlbfs2M);
        assert_eq!(devices.check_machine(&machine), Err(ConfigError::BalloonAndHugePages));
        assert_eq!(devices.put_balloon(balloon, &machine), Err(BalloonRefused::HugePages));
        assert_eq!(devices.balloon, Some(balloon), "what was refused changed nothing");
    }

    #[test]
    fn a_guests_context_id_is_not_the_hosts() {
        let mut devices = Devices::default();
        let vsock = |guest_cid| from_value(json!({ "guest_cid": guest_cid, "uds_path": "v" })).unwrap();
        assert_eq!(devices.put_vsock(vsock(2)), Err(VsockRefused::GuestCid(2)));
        devices.put_vsock(vsock(3)).unwrap();
        devices.put_vsock(vsock(u32::MAX)).unwrap();
    }
}
