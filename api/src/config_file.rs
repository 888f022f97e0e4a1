//! `--config-file`: Firecracker's JSON, its sections in kebab case.
//!
//! A section that this version has no device for is refused by name rather than ignored: the guest would not be what was asked for.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use vmm::config::{BootSource, MachineConfig, VmConfig};

/// No configuration is larger; a path to /dev/zero ends here.
const MAX_BYTES: u64 = 1 << 20;

/// Why a file was refused. The path is its user's to add.
#[derive(Debug, thiserror::Error)]
pub enum ConfigFileError {
    /// It cannot be read.
    #[error("cannot be read: {0}")]
    Read(#[from] io::Error),
    /// It is not a configuration at all.
    #[error("is larger than {MAX_BYTES} bytes: is it a configuration?")]
    TooLarge,
    /// It is not JSON, or not an object.
    #[error("is not a configuration in JSON: {0}")]
    Syntax(serde_json::Error),
    /// A section that is not ours.
    #[error("section {0:?} is not supported: only machine-config and boot-source are; remove it")]
    Unsupported(String),
    /// Something is wrong inside a section.
    #[error("{section}: {source}")]
    Section {
        /// Which one.
        section: &'static str,
        /// What.
        source: serde_json::Error,
    },
    /// Nothing to boot.
    #[error("has no section \"boot-source\": say which kernel to boot")]
    NoBootSource,
}

/// Reads a configuration that can be started.
///
/// # Errors
/// See [`ConfigFileError`].
pub fn read(path: &Path) -> Result<VmConfig, ConfigFileError> {
    let mut text = Vec::new();
    File::open(path)?.take(MAX_BYTES + 1).read_to_end(&mut text)?;
    if text.len() as u64 > MAX_BYTES {
        return Err(ConfigFileError::TooLarge);
    }
    parse(&text)
}

fn parse(text: &[u8]) -> Result<VmConfig, ConfigFileError> {
    let mut sections: Map<String, Value> = serde_json::from_slice(text).map_err(ConfigFileError::Syntax)?;
    // What asks for nothing is not refused: Firecracker's own GET /vm/config writes such sections.
    let asks = |value: &Value| !(value.is_null() || value.as_array().is_some_and(Vec::is_empty));
    sections.retain(|_, value| asks(value));
    let machine_config: Option<MachineConfig> = section(&mut sections, "machine-config")?;
    let boot_source: Option<BootSource> = section(&mut sections, "boot-source")?;
    if let Some(name) = sections.into_iter().map(|(name, _)| name).next() {
        return Err(ConfigFileError::Unsupported(name));
    }
    if boot_source.is_none() {
        return Err(ConfigFileError::NoBootSource);
    }
    Ok(VmConfig {
        machine_config,
        boot_source,
    })
}

fn section<T: DeserializeOwned>(
    sections: &mut Map<String, Value>,
    section: &'static str,
) -> Result<Option<T>, ConfigFileError> {
    let value = sections.remove(section).map(serde_json::from_value).transpose();
    value.map_err(|source| ConfigFileError::Section { section, source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn firecrackers_example_is_read_without_its_devices() {
        let config = parse(
            br#"{"boot-source": {"kernel_image_path": "vmlinux", "boot_args": "console=ttyS0", "initrd_path": null},
                "drives": [], "network-interfaces": [], "vsock": null,
                "machine-config": {"vcpu_count": 2, "mem_size_mib": 1024, "smt": false, "track_dirty_pages": false}}"#,
        )
        .unwrap();
        assert_eq!(config.machine_config.unwrap().vcpu_count, 2);
        assert_eq!(config.boot_source.unwrap().boot_args.as_deref(), Some("console=ttyS0"));
    }

    #[test]
    fn a_bad_file_is_refused_with_what_is_wrong_in_it() {
        let boot = r#""boot-source": {"kernel_image_path": "k"}"#;
        let table = [
            (String::new(), "JSON"),
            ("[]".to_owned(), "JSON"),
            ("{".to_owned(), "JSON"),
            ("{}".to_owned(), "boot-source"),
            (format!(r#"{{{boot}, "drives": [{{"drive_id": "r"}}]}}"#), "\"drives\""),
            (format!(r#"{{{boot}, "frobnicate": 1}}"#), "\"frobnicate\""),
            (
                r#"{"boot-source": {}}"#.to_owned(),
                "boot-source: missing field `kernel_image_path`",
            ),
            (
                r#"{"boot-source": {"kernel_image_path": "k", "x": 1}}"#.to_owned(),
                "unknown field `x`",
            ),
            (
                format!(r#"{{{boot}, "machine-config": {{"vcpu_count": "two"}}}}"#),
                "machine-config: invalid type",
            ),
        ];
        for (text, says) in table {
            let said = parse(text.as_bytes()).expect_err(&text).to_string();
            assert!(said.contains(says) && !said.contains('\n'), "{text}: {said}");
        }
    }

    #[test]
    fn an_endless_file_is_not_read_to_its_end() {
        assert!(matches!(read(Path::new("/dev/zero")), Err(ConfigFileError::TooLarge)));
    }
}
