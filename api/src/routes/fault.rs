//! A refusal, as Firecracker's clients read it: a status, and `{"fault_message": "..."}`.
//!
//! What is wrong, whoever refuses says; what Firecracker puts before that, and what it says instead where clients look for its
//! words, is here: on the wire only. Its words come first, whole, as its 1.14 has them (the Display of its errors, from
//! `VmmActionError` down); what there is to do about it, which is ours, follows.

use axum::http::header::WWW_AUTHENTICATE;
use axum::http::{HeaderValue, Method, StatusCode};
use axum::response::{IntoResponse, Response};
use rustix::io::Errno;
use serde::Serialize;
use vmm::attach::AttachError;
use vmm::boot::BootError;
use vmm::config::{DriveRefused, InterfaceRefused};
use vmm::machine::StartError;
use vmm::memory::MemoryError;
use vmm::mmds::data::UpdateError;
use vmm::{ActionError, BalloonError, BlockError, NetError, TapError, VsockError};

/// The refusal, and why.
#[derive(Clone, Debug)]
pub(super) struct Fault {
    status: StatusCode,
    message: String,
}

impl Fault {
    /// 400.
    pub fn new(message: impl Into<String>) -> Self {
        Self {
            status: StatusCode::BAD_REQUEST,
            message: message.into(),
        }
    }

    /// 503: as many are served as can be.
    pub fn too_many(message: impl Into<String>) -> Self {
        Self {
            status: StatusCode::SERVICE_UNAVAILABLE,
            message: message.into(),
        }
    }

    /// 401: who asks has to bring a token.
    pub fn unauthorized(message: impl Into<String>) -> Self {
        Self {
            status: StatusCode::UNAUTHORIZED,
            message: message.into(),
        }
    }

    /// No such path, or not with this method. As Firecracker, by the path's first part.
    pub fn unknown(method: &Method, path: &str) -> Self {
        let first = path.trim_start_matches('/').split('/').next().unwrap_or_default();
        Self::new(format!("Invalid request method and/or path: {method} {first}."))
    }

    /// Another method than GET, PUT and PATCH. Firecracker 1.14's words, which it finds before it looks at the path; there they
    /// are the `error` of an answer that is no JSON, for it has a line feed in a string.
    pub fn no_method() -> Self {
        Self::new("Invalid HTTP Method: Unsupported HTTP method.")
    }

    /// What Firecracker has and we do not.
    pub fn unsupported(what: &str) -> Self {
        Self::new(format!("{what} not supported by Chronovisor."))
    }

    /// Why.
    pub fn message(&self) -> &str {
        &self.message
    }
}

impl From<ActionError> for Fault {
    fn from(error: ActionError) -> Self {
        use ActionError as E;
        let what = match &error {
            E::Config(_) => "Machine config error: ",
            E::BootSource(refused) => return Self::new(format!("Boot source error: {}", boot_source(refused))),
            E::PatchDrive(refused) => {
                let end = if matches!(refused, BlockError::Open { .. }) {
                    ""
                } else {
                    "."
                };
                return Self::patch_drive(&format!("Block: {}{end}", block(refused)));
            }
            E::Drive(DriveRefused::Unknown(id)) => {
                return Self::patch_drive(&format!("{NO_DEVICE}; there is no drive {id}."));
            }
            E::Drive(_) => "Drive config error: ",
            E::Block(refused) => {
                let what = "Drive config error: Unable to create the virtio block device: ";
                return Self::new(format!("{what}{}", block(refused)));
            }
            E::Interface(InterfaceRefused::Unknown(id)) => {
                let what = "Network config error: Unable to update the net device: ";
                return Self::new(format!("{what}{NO_DEVICE}; there is no interface {id}"));
            }
            E::Interface(InterfaceRefused::TapInUse { tap, other }) => {
                let busy = attach(&Errno::BUSY.into(), tap);
                let ours = format!("it is interface {other}'s already");
                return Self::new(format!("{NO_INTERFACE}{}", and(&busy, ours)));
            }
            E::Interface(_) => "Network config error: ",
            E::Net(refused) => return Self::new(format!("{NO_INTERFACE}{}", net(refused))),
            E::Mmds(UpdateError::LimitExceeded { .. }) => {
                return Self {
                    status: StatusCode::PAYLOAD_TOO_LARGE,
                    message: format!("MMDS limit exceeded error: {error}"),
                };
            }
            E::Mmds(_) => "MMDS error: ",
            E::MmdsConfig(_) => "MMDS config error: ",
            E::AskBalloon(BalloonError::Missing) => "Balloon update error: ",
            E::AskBalloon(_) => "Balloon update error: Balloon: ",
            E::ReadBalloon(BalloonError::Missing) => "Internal VMM error: ",
            E::ReadBalloon(_) => "Internal VMM error: Balloon: ",
            E::Vsock(_) => "Vsock config error: ",
            E::Balloon(_) => "Balloon config error: ",
            E::Log(_) => "Logger error: ",
            E::Metrics(_) => "Metrics error: ",
            E::NoKernel => "Start microvm error: ",
            E::Start(refused) => return Self::new(format!("Start microvm error: {}", start(refused))),
            E::Keys(_) => "Internal VMM error: ",
            _ => "",
        };
        Self::new(format!("{what}{error}"))
    }
}

const NO_DEVICE: &str = "Failed perform action on device: Device not found";
const NO_INTERFACE: &str = "Network config error: Could not create the network device: ";

impl Fault {
    fn patch_drive(why: &str) -> Self {
        Self::new(format!(
            "Drive config error: Unable to patch the block device: {why} Please verify the request arguments."
        ))
    }
}

/// Firecracker's words, then ours.
fn and(theirs: &str, ours: impl std::fmt::Display) -> String {
    let between = if theirs.ends_with('.') { " " } else { "; " };
    format!("{theirs}{between}{ours}")
}

/// Firecracker's `BootSourceConfigError`.
fn boot_source(error: &BootError) -> String {
    match error {
        BootError::Open { what, path, source } => {
            let theirs = match *what {
                "kernel" => "The kernel file cannot be opened:",
                _ => "The initrd file cannot be opened due to invalid path or invalid permissions.",
            };
            format!(
                "{theirs} {source}; check the path {} and its permissions",
                path.display()
            )
        }
        BootError::CmdlineTooLong { .. } | BootError::CmdlineNul { .. } => {
            format!("The kernel command line is invalid: {error}")
        }
        _ => error.to_string(),
    }
}

/// Firecracker's `BlockError`.
fn block(error: &BlockError) -> String {
    match error {
        // Nothing behind the path: that is where clients look for it.
        BlockError::Open { path, source, .. } => format!(
            "Virtio backend error: Error manipulating the backing file: {source} {}",
            path.display()
        ),
        BlockError::NoPath { .. } => and("Invalid block config.", error),
        _ => error.to_string(),
    }
}

/// Firecracker's `NetError`.
fn net(error: &NetError) -> String {
    let theirs = match error {
        NetError::Tap(TapError::Name { .. }) => "Open tap device failed: Invalid interface name".to_owned(),
        NetError::Tap(TapError::Tun { source, .. }) => {
            format!("Open tap device failed: Couldn't open /dev/net/tun: {source}")
        }
        NetError::Tap(TapError::Attach { tap, source, .. }) => attach(source, tap),
        NetError::Tap(TapError::Header { source, .. }) => {
            format!("Setting vnet header size failed: Error while setting size of the vnet header: {source}")
        }
        _ => return error.to_string(),
    };
    and(&theirs, error)
}

fn attach(source: &std::io::Error, tap: &str) -> String {
    format!(
        "Open tap device failed: Error while creating ifreq structure: {source}. Invalid TUN/TAP Backend provided by {tap}. \
         Check our documentation on setting up the network devices."
    )
}

/// Firecracker's `StartMicrovmError`; and, as we bind the socket device's socket no earlier, its `VsockConfigError`.
fn start(error: &StartError) -> String {
    match error {
        StartError::Memory(refused) => {
            let theirs = "Invalid Memory Configuration: ";
            match refused {
                MemoryError::Map { source, .. } => and(&format!("{theirs}Cannot create mmap region: {source}"), error),
                _ => format!("{theirs}{error}"),
            }
        }
        StartError::Boot(refused) => match refused {
            BootError::NotAKernel { .. }
            | BootError::Truncated { .. }
            | BootError::Damaged { .. }
            | BootError::Unsupported { .. }
            | BootError::KernelTooLarge { .. } => format!(
                "System configuration error: Cannot load kernel due to invalid memory configuration or invalid kernel \
                 image: {error}"
            ),
            BootError::InitrdTooLarge { .. } => and(
                "Error with initrd initialization: Failed to compute the initrd address.",
                error,
            ),
            _ => error.to_string(),
        },
        StartError::Attach(AttachError::Vsock(refused)) => {
            let said = match refused {
                VsockError::InUse(_) | VsockError::Stale(_) | VsockError::NotASocket(_) => {
                    std::io::Error::from(Errno::ADDRINUSE).to_string()
                }
                VsockError::NoDirectory(_) => std::io::Error::from(Errno::NOENT).to_string(),
                VsockError::Socket { source, .. } => source.to_string(),
                // What Rust's standard library says of it, which Firecracker passes on.
                VsockError::TooLong { .. } => "path must be shorter than SUN_LEN".to_owned(),
                _ => return error.to_string(),
            };
            let theirs = "Cannot create backend for vsock device: Error binding to the host-side Unix socket: ";
            and(&format!("{theirs}{said}"), error)
        }
        _ => error.to_string(),
    }
}

/// What is answered.
#[derive(Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[cfg_attr(test, schemars(rename = "Fault"))]
pub(super) struct Shape<'a> {
    /// What is wrong, on which input; and where there is something to do about it, what.
    fault_message: &'a str,
}

impl IntoResponse for Fault {
    fn into_response(self) -> Response {
        let mut response = axum::Json(Shape {
            fault_message: &self.message,
        })
        .into_response();
        *response.status_mut() = self.status;
        if self.status == StatusCode::UNAUTHORIZED {
            // RFC 9110, 11.6.1; RFC 6750, 3.
            let challenge = HeaderValue::from_static("Bearer");
            response.headers_mut().insert(WWW_AUTHENTICATE, challenge);
        }
        response.extensions_mut().insert(self);
        response
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    fn error(errno: Errno) -> std::io::Error {
        errno.into()
    }

    fn tap(error: TapError) -> ActionError {
        NetError::from(error).into()
    }

    fn started(error: impl Into<StartError>) -> ActionError {
        ActionError::Start(error.into())
    }

    /// What of this the fake cannot refuse. Each line is what a client of Firecracker may look for.
    #[test]
    fn refusals_that_clients_meet_begin_with_firecrackers_words() {
        let (iface, name) = (|| "eth0".to_owned(), || "tap0".to_owned());
        let image = || PathBuf::from("/k");
        let tap_failed = "Network config error: Could not create the network device: Open tap device failed: ";
        let no_kernel = "Start microvm error: System configuration error: Cannot load kernel due to invalid memory \
                         configuration or invalid kernel image: ";
        let no_socket =
            "Start microvm error: Cannot create backend for vsock device: Error binding to the host-side Unix socket: ";
        let told = [
            (
                tap(TapError::Attach { iface: iface(), tap: name(), source: error(Errno::PERM) }),
                format!(
                    "{tap_failed}Error while creating ifreq structure: Operation not permitted (os error 1). Invalid TUN/TAP \
                     Backend provided by tap0. Check our documentation on setting up the network devices. interface eth0: "
                ),
            ),
            (
                tap(TapError::Name { iface: iface(), tap: name() }),
                format!("{tap_failed}Invalid interface name; interface eth0: "),
            ),
            (
                tap(TapError::Tun { iface: iface(), source: error(Errno::NOENT) }),
                format!("{tap_failed}Couldn't open /dev/net/tun: No such file or directory (os error 2); interface eth0: "),
            ),
            (
                started(MemoryError::Map { mib: 1, source: error(Errno::NOMEM) }),
                "Start microvm error: Invalid Memory Configuration: Cannot create mmap region: Cannot allocate memory (os \
                 error 12); cannot map 1 MiB "
                    .to_owned(),
            ),
            (
                started(MemoryError::MoreThanHost { asked_mib: 2, host_mib: 1 }),
                "Start microvm error: Invalid Memory Configuration: 2 MiB ".to_owned(),
            ),
            (
                started(BootError::NotAKernel { path: image(), found: "text".to_owned() }),
                format!("{no_kernel}/k is not a kernel: "),
            ),
            (
                started(BootError::InitrdTooLarge { path: image(), len: 2, room: 1, needed_mib: 3 }),
                "Start microvm error: Error with initrd initialization: Failed to compute the initrd address. initrd /k "
                    .to_owned(),
            ),
            (
                started(AttachError::from(VsockError::Stale("/v".into()))),
                format!("{no_socket}Address already in use (os error 98); vsock: uds_path "),
            ),
            (
                started(AttachError::from(VsockError::NoDirectory("/v/w".into()))),
                format!("{no_socket}No such file or directory (os error 2); vsock: uds_path /v/w: "),
            ),
        ];
        for (refused, begins) in told {
            let fault = Fault::from(refused);
            assert!(
                fault.message().starts_with(&begins),
                "{}\nnot {begins}",
                fault.message()
            );
            assert!(
                fault.message().len() > begins.len(),
                "{}: what to do about it?",
                fault.message()
            );
        }
    }
}
