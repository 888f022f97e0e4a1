//! A refusal, as Firecracker's clients read it: a status, and `{"fault_message": "..."}`.
//!
//! What is wrong, whoever refuses says; what Firecracker puts before that, on the wire only, is here.

use axum::http::{Method, StatusCode};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use vmm::ActionError;
use vmm::config::DriveRefused;
use vmm::mmds::data::UpdateError;

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

    /// No such path, or not with this method. As Firecracker, by the path's first part.
    pub fn unknown(method: &Method, path: &str) -> Self {
        let first = path.trim_start_matches('/').split('/').next().unwrap_or_default();
        Self::new(format!("Invalid request method and/or path: {method} {first}."))
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
            E::BootSource(_) => "Boot source error: ",
            E::PatchDrive(_) | E::Drive(DriveRefused::Unknown(_)) => {
                return Self::new(format!(
                    "Drive config error: Unable to patch the block device: {error}. Please verify the request arguments."
                ));
            }
            E::Drive(_) => "Drive config error: ",
            E::Block(_) => "Drive config error: Unable to create the virtio block device: ",
            E::Interface(_) => "Network config error: ",
            E::Net(_) => "Network config error: Could not create the network device: ",
            E::Mmds(UpdateError::LimitExceeded { .. }) => {
                return Self {
                    status: StatusCode::PAYLOAD_TOO_LARGE,
                    message: format!("MMDS limit exceeded error: {error}"),
                };
            }
            E::Mmds(_) => "MMDS error: ",
            E::MmdsConfig(_) => "MMDS config error: ",
            E::AskBalloon(_) => "Balloon update error: ",
            E::Vsock(_) => "Vsock config error: ",
            E::Balloon(_) => "Balloon config error: ",
            E::Log(_) => "Logger error: ",
            E::Metrics(_) => "Metrics error: ",
            E::NoKernel | E::Start(_) => "Start microvm error: ",
            E::Keys(_) => "Internal VMM error: ",
            _ => "",
        };
        Self::new(format!("{what}{error}"))
    }
}

impl IntoResponse for Fault {
    fn into_response(self) -> Response {
        #[derive(Serialize)]
        struct Shape<'a> {
            fault_message: &'a str,
        }
        let mut response = axum::Json(Shape {
            fault_message: &self.message,
        })
        .into_response();
        *response.status_mut() = self.status;
        response.extensions_mut().insert(self);
        response
    }
}
