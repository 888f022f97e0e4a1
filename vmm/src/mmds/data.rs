//! The metadata document: what the host puts and patches, what the guest looks up.
//!
//! A lookup is a JSON pointer (RFC 6901), answered as JSON or in the format of EC2's IMDS: a string is its text, an object is the
//! list of its keys, one a line, `/` behind those that hold an object; nothing else has an IMDS form. Error texts are Firecracker's.

use serde_json::{Map, Value};
use thiserror::Error;

/// Largest document without `--mmds-size-limit`, in bytes of compact JSON: Firecracker's `HTTP_MAX_PAYLOAD_SIZE`.
pub const DEFAULT_LIMIT_BYTES: usize = 51_200;

/// How a lookup is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// `application/json`.
    Json,
    /// `text/plain`, as EC2's instance metadata service.
    Imds,
}

/// Why the document did not change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum UpdateError {
    /// The document would be too large. REST answers this one with 413, every other with 400.
    #[error("The MMDS patch request doesn't fit.")]
    LimitExceeded {
        /// What it would take as compact JSON.
        size_bytes: usize,
        /// What it may take.
        limit_bytes: usize,
    },
    /// A patch came before the first put.
    #[error("The MMDS data store is not initialized.")]
    NotInitialized,
}

/// Why a lookup has no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum LookupError {
    /// Nothing is there.
    #[error("The MMDS resource does not exist.")]
    NotFound,
    /// What is there is neither a string nor an object, so IMDS has no form for it.
    #[error("Cannot retrieve value. The value has an unsupported type.")]
    UnsupportedValueType,
}

/// The document.
#[derive(Debug)]
pub struct DataStore {
    /// `None` before the first put.
    document: Option<Value>,
    limit_bytes: usize,
}

impl DataStore {
    /// No document yet; one of at most `limit_bytes` of compact JSON may come.
    #[must_use]
    pub fn new(limit_bytes: usize) -> Self {
        Self {
            document: None,
            limit_bytes,
        }
    }

    /// Replaces the document.
    ///
    /// # Errors
    /// [`UpdateError::LimitExceeded`]; the document is as it was.
    pub fn put(&mut self, document: Value) -> Result<(), UpdateError> {
        self.check_size(&document)?;
        self.document = Some(document);
        Ok(())
    }

    /// Merges `patch` into the document (RFC 7396).
    ///
    /// # Errors
    /// [`UpdateError::NotInitialized`] before the first put, or [`UpdateError::LimitExceeded`]; the document is as it was.
    pub fn patch(&mut self, patch: Value) -> Result<(), UpdateError> {
        let mut patched = self.document.clone().ok_or(UpdateError::NotInitialized)?;
        merge(&mut patched, patch);
        self.put(patched)
    }

    /// The document, `None` before the first put: `GET /mmds` then answers `{}`.
    #[must_use]
    pub fn get(&self) -> Option<&Value> {
        self.document.as_ref()
    }

    /// What `path` points to, in `format`. One trailing slash is ignored.
    ///
    /// # Errors
    /// See [`LookupError`].
    pub fn get_path(&self, path: &str, format: Format) -> Result<String, LookupError> {
        // Before the first put there is a root, and it is null: Firecracker's answer to `/` is then 501, or the JSON null.
        let root = self.document.as_ref().unwrap_or(&Value::Null);
        let value = root
            .pointer(path.strip_suffix('/').unwrap_or(path))
            .ok_or(LookupError::NotFound)?;
        match (format, value) {
            (Format::Json, value) => Ok(value.to_string()),
            (Format::Imds, Value::String(text)) => Ok(text.clone()),
            (Format::Imds, Value::Object(entries)) => Ok(listing(entries)),
            (Format::Imds, _) => Err(LookupError::UnsupportedValueType),
        }
    }

    fn check_size(&self, document: &Value) -> Result<(), UpdateError> {
        let size_bytes = document.to_string().len();
        if size_bytes > self.limit_bytes {
            return Err(UpdateError::LimitExceeded {
                size_bytes,
                limit_bytes: self.limit_bytes,
            });
        }
        Ok(())
    }
}

fn listing(entries: &Map<String, Value>) -> String {
    let line = |(key, value): (&String, &Value)| {
        if value.is_object() {
            format!("{key}/")
        } else {
            key.clone()
        }
    };
    entries.iter().map(line).collect::<Vec<_>>().join("\n")
}

/// RFC 7396, section 2. As deep as `patch` is nested, which its parser bounds.
fn merge(target: &mut Value, patch: Value) {
    let Value::Object(changes) = patch else {
        *target = patch;
        return;
    };
    if !target.is_object() {
        *target = Value::Object(Map::new());
    }
    let Value::Object(entries) = target else {
        unreachable!("the line above made it an object")
    };
    for (key, change) in changes {
        if change.is_null() {
            entries.remove(&key);
        } else {
            merge(entries.entry(key).or_insert(Value::Null), change);
        }
    }
}

#[cfg(test)]
#[path = "data_tests.rs"]
mod data_tests;
