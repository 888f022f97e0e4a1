//! The ids that paths end in: which there may be, and that a body names the same.

use axum::extract::{FromRequestParts, Path};
use axum::http::request::Parts;

use super::Fault;

/// The last part of a path: letters, digits and underscores.
#[derive(Debug)]
pub(super) struct Id(String);

impl Id {
    fn new(text: String) -> Result<Self, Fault> {
        if text.is_empty() {
            return Err(Fault::new("The ID cannot be empty."));
        }
        if !text.bytes().all(|byte| byte == b'_' || byte.is_ascii_alphanumeric()) {
            return Err(Fault::new(
                "API Resource IDs can only contain alphanumeric characters and underscores.",
            ));
        }
        Ok(Self(text))
    }

    /// Whether a drive's body has the same id. Firecracker's words for drives.
    pub fn is_drive(&self, id: &str) -> Result<(), Fault> {
        if self.0 == id {
            return Ok(());
        }
        Err(Fault::new("The id from the path does not match the id from the body!"))
    }

    /// Whether an interface's body has the same id. Firecracker's words for interfaces.
    pub fn is_interface(&self, id: &str) -> Result<(), Fault> {
        if self.0 == id {
            return Ok(());
        }
        Err(Fault::new(format!(
            "The id from the path [{}] does not match the id from the body [{id}]!",
            self.0
        )))
    }
}

impl<S: Send + Sync> FromRequestParts<S> for Id {
    type Rejection = Fault;

    /// A path without its last part has an empty id.
    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Fault> {
        let id = Option::<Path<String>>::from_request_parts(parts, state).await;
        let id =
            id.map_err(|_| Fault::new("API Resource IDs can only contain alphanumeric characters and underscores."))?;
        Self::new(id.map_or_else(String::new, |Path(id)| id))
    }
}
