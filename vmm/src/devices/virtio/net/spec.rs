//! Numbers of the network device (5.1).

/// Its number (5).
pub const DEVICE_TYPE: u32 = 1;

/// The queue of what the driver receives.
pub const RX: usize = 0;
/// The queue of what the driver sends.
pub const TX: usize = 1;

/// Feature: the driver may leave checksums to the device.
pub const F_CSUM: u64 = 1 << 0;
/// Feature: the device may leave checksums to the driver.
pub const F_GUEST_CSUM: u64 = 1 << 1;
/// Feature: the configuration space has an MTU.
pub const F_MTU: u64 = 1 << 3;
/// Feature: the configuration space has the driver's address.
pub const F_MAC: u64 = 1 << 5;
/// Feature: the driver takes TCP over IPv4 in frames of up to 64 KiB.
pub const F_GUEST_TSO4: u64 = 1 << 7;
/// Feature: and over IPv6.
pub const F_GUEST_TSO6: u64 = 1 << 8;
/// Feature: and UDP.
pub const F_GUEST_UFO: u64 = 1 << 10;
/// Feature: the device takes TCP over IPv4 in frames of up to 64 KiB.
pub const F_HOST_TSO4: u64 = 1 << 11;
/// Feature: and over IPv6.
pub const F_HOST_TSO6: u64 = 1 << 12;
/// Feature: and UDP.
pub const F_HOST_UFO: u64 = 1 << 14;
/// Feature: a frame may come in several chains.
pub const F_MRG_RXBUF: u64 = 1 << 15;

/// Any frame longer than the MTU may come to a driver that took one of these.
pub const LONG_FRAMES: u64 = F_GUEST_TSO4 | F_GUEST_TSO6 | F_GUEST_UFO;

/// `struct virtio_net_hdr` of a device of version 1, with `num_buffers` (5.1.6).
pub const HEADER_LEN: usize = 12;
/// Where `num_buffers` is in it: how many chains the frame is in.
pub const NUM_BUFFERS: usize = 10;

/// The longest frame with its header (5.1.6.3.1).
pub const MAX_FRAME_LEN: usize = 65_562;
/// What a driver that takes no long frames has to have room for, the header counted (5.1.6.3.1).
pub const PLAIN_FRAME_LEN: usize = 1526;
/// What precedes the payload of an Ethernet frame.
pub const ETHERNET_LEN: usize = 14;

/// Of memory, for one `readv` or `writev`: what Linux takes (`UIO_MAXIOV`), less one for our own use.
pub const MAX_PIECES: usize = 1023;
