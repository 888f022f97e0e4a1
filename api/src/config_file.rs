//! `--config-file`: Firecracker's JSON, its sections in kebab case, as the actions that a client of the API would ask for.
//!
//! A section that this version cannot do is refused by name rather than ignored: the guest would not be what was asked for.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use vmm::Action;
use vmm::config::{BootSource, CpuConfig, Drive, NetworkInterface};

use crate::step::Step;

#[cfg(feature = "fuzzing")]
#[path = "config_file_fuzz.rs"]
pub(crate) mod fuzz;

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
    /// A section of Firecracker's that there is nothing for here.
    #[error("section {0:?} is not supported by Chronovisor; remove it")]
    Unsupported(String),
    /// A section that nobody has.
    #[error("section {0:?} is none of a configuration's: remove it, or correct its name")]
    Unknown(String),
    /// Something is wrong inside a section.
    #[error("{section}: {source}")]
    Section {
        /// Which one.
        section: &'static str,
        /// What.
        source: serde_json::Error,
    },
    /// Something is wrong with the file that describes the processor.
    #[error("cpu-config: {} {source}", path.display())]
    CpuConfig {
        /// The file.
        path: PathBuf,
        /// What.
        source: Box<ConfigFileError>,
    },
    /// Nothing to boot.
    #[error("has no section \"boot-source\": say which kernel to boot")]
    NoBootSource,
}

/// Firecracker's sections that ask for what we do not have.
const UNSUPPORTED: [&str; 2] = ["pmem", "memory-hotplug"];

/// Reads a configuration that can be started: what to do, each step named by its section.
///
/// # Errors
/// See [`ConfigFileError`].
pub fn read(path: &Path) -> Result<Vec<Step>, ConfigFileError> {
    parse(&read_json(path)?)
}

/// Reads a file of JSON: at most [`MAX_BYTES`] of it.
///
/// # Errors
/// See [`ConfigFileError`].
pub fn read_json(path: &Path) -> Result<Vec<u8>, ConfigFileError> {
    let mut text = Vec::new();
    File::open(path)?.take(MAX_BYTES + 1).read_to_end(&mut text)?;
    if text.len() as u64 > MAX_BYTES {
        return Err(ConfigFileError::TooLarge);
    }
    Ok(text)
}

fn parse(text: &[u8]) -> Result<Vec<Step>, ConfigFileError> {
    let sections: Map<String, Value> = serde_json::from_slice(text).map_err(ConfigFileError::Syntax)?;
    let mut sections = Sections {
        sections,
        steps: Vec::new(),
    };
    // What asks for nothing is not refused: GET /vm/config, Firecracker's too, writes such sections.
    let asks = |value: &Value| !(value.is_null() || value.as_array().is_some_and(Vec::is_empty));
    sections.sections.retain(|_, value| asks(value));
    // The order is Firecracker's: the log before what it may tell of, interfaces before the metadata that names them.
    sections.one("logger", Action::PutLogger)?;
    sections.one("metrics", Action::PutMetrics)?;
    sections.one("machine-config", Action::PutMachineConfig)?;
    // Firecracker takes a description of the processor as well as the path of one.
    match sections.sections.get("cpu-config") {
        Some(Value::Object(_)) => sections.one("cpu-config", Action::PutCpuConfig)?,
        Some(_) => {
            if let Some(path) = sections.take::<PathBuf>("cpu-config")? {
                sections.push("cpu-config", Action::PutCpuConfig(read_cpu_config(path)?));
            }
        }
        None => {}
    }
    let boot: Option<BootSource> = sections.take("boot-source")?;
    sections.push(
        "boot-source",
        Action::PutBootSource(boot.ok_or(ConfigFileError::NoBootSource)?),
    );
    for drive in sections.take::<Vec<Drive>>("drives")?.into_iter().flatten() {
        sections.push(format!("drives: {}", drive.drive_id), Action::PutDrive(drive));
    }
    for interface in sections
        .take::<Vec<NetworkInterface>>("network-interfaces")?
        .into_iter()
        .flatten()
    {
        let name = format!("network-interfaces: {}", interface.iface_id);
        sections.push(name, Action::PutInterface(interface));
    }
    sections.one("mmds-config", Action::PutMmdsConfig)?;
    sections.one("vsock", Action::PutVsock)?;
    sections.one("balloon", Action::PutBalloon)?;
    sections.one("entropy", Action::PutEntropy)?;
    sections.one("serial", Action::PutSerial)?;
    match sections.sections.into_iter().map(|(name, _)| name).next() {
        Some(name) if UNSUPPORTED.contains(&&*name) => Err(ConfigFileError::Unsupported(name)),
        Some(name) => Err(ConfigFileError::Unknown(name)),
        None => Ok(sections.steps),
    }
}

fn read_cpu_config(path: PathBuf) -> Result<CpuConfig, ConfigFileError> {
    let read = read_json(&path).and_then(|text| serde_json::from_slice(&text).map_err(ConfigFileError::Syntax));
    read.map_err(|source| ConfigFileError::CpuConfig {
        path,
        source: Box::new(source),
    })
}

/// What is left of the file, and what came of the rest.
struct Sections {
    sections: Map<String, Value>,
    steps: Vec<Step>,
}

impl Sections {
    fn take<T: DeserializeOwned>(&mut self, section: &'static str) -> Result<Option<T>, ConfigFileError> {
        let value = self.sections.remove(section).map(serde_json::from_value).transpose();
        value.map_err(|source| ConfigFileError::Section { section, source })
    }

    fn push(&mut self, name: impl Into<String>, action: Action) {
        self.steps.push(Step::new(name, action));
    }

    fn one<T: DeserializeOwned>(
        &mut self,
        section: &'static str,
        action: impl FnOnce(T) -> Action,
    ) -> Result<(), ConfigFileError> {
        if let Some(value) = self.take(section)? {
            self.push(section, action(value));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use vmm::Reply;
    use vmm::config::{CpuTemplate, VmConfig};
    use vmm::fake::FakeVm;

    use super::*;

    /// What a microVM is configured as by `text`.
    fn configured(text: &str) -> VmConfig {
        let vm = FakeVm::new();
        for step in parse(text.as_bytes()).unwrap() {
            vm.act(step.action)
                .unwrap_or_else(|error| panic!("{}: {error}", step.name));
        }
        match vm.act(Action::GetConfig) {
            Ok(Reply::Config(config)) => *config,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn firecrackers_example_is_read() {
        let config = configured(
            r#"{"boot-source": {"kernel_image_path": "vmlinux", "boot_args": "console=ttyS0", "initrd_path": null},
                "drives": [], "network-interfaces": [], "vsock": null, "cpu-config": null,
                "machine-config": {"vcpu_count": 2, "mem_size_mib": 1024, "smt": false, "track_dirty_pages": false}}"#,
        );
        assert_eq!(config.machine_config.unwrap().vcpu_count, 2);
        assert_eq!(config.boot_source.unwrap().boot_args.as_deref(), Some("console=ttyS0"));
    }

    #[test]
    fn what_a_microvm_says_it_is_makes_another_one_like_it() {
        let config = configured(
            r#"{"boot-source": {"kernel_image_path": "vmlinux"},
                "logger": {"level": "Debug", "show_level": true}, "metrics": {"metrics_path": "/dev/null"},
                "drives": [{"drive_id": "data", "is_root_device": false, "path_on_host": "d", "io_engine": "Async"},
                           {"drive_id": "rootfs", "is_root_device": true, "path_on_host": "r", "is_read_only": true}],
                "network-interfaces": [{"iface_id": "eth0", "host_dev_name": "tap0", "guest_mac": "06:00:ac:10:00:02"}],
                "mmds-config": {"network_interfaces": ["eth0"], "version": "V2"},
                "vsock": {"guest_cid": 3, "uds_path": "v.sock"}, "entropy": {},
                "balloon": {"amount_mib": 16, "deflate_on_oom": true}, "serial": {"serial_out_path": "/dev/null"},
                "cpu-config": {"kvm_capabilities": ["!14"], "msr_modifiers": [{"addr": "0x10a", "bitmap": "0b1x0"}],
                               "cpuid_modifiers": [{"leaf": "0x7", "subleaf": "0x0", "flags": 1,
                                                    "modifiers": [{"register": "ebx", "bitmap": "0b0xx"}]}]}}"#,
        );
        assert!(config.cpu_config.is_some());
        assert_eq!((config.drives.len(), config.drives[0].drive_id.as_str()), (2, "rootfs"));
        let text = serde_json::to_string(&config).unwrap();
        assert_eq!(configured(&text), config);
    }

    #[test]
    fn of_a_template_and_a_description_of_the_processor_the_latter_holds() {
        let text = |cpu_config: &str| {
            format!(
                r#"{{"boot-source": {{"kernel_image_path": "k"}}, {cpu_config}
                     "machine-config": {{"vcpu_count": 1, "mem_size_mib": 16, "cpu_template": "T2CL"}}}}"#
            )
        };
        let template = |config: VmConfig| config.machine_config.unwrap().cpu_template;
        let config = configured(&text(""));
        assert_eq!(configured(&serde_json::to_string(&config).unwrap()), config);
        assert_eq!(template(config), Some(CpuTemplate::T2CL));
        let config = configured(&text(r#""cpu-config": {"kvm_capabilities": ["1"]},"#));
        assert_eq!(template(config), None);
    }

    #[test]
    fn a_bad_file_is_refused_with_what_is_wrong_in_it() {
        let boot = r#""boot-source": {"kernel_image_path": "k"}"#;
        let table = [
            (String::new(), "JSON"),
            ("[]".to_owned(), "JSON"),
            ("{".to_owned(), "JSON"),
            ("{}".to_owned(), "boot-source"),
            (
                format!(r#"{{{boot}, "drives": [{{"drive_id": "r"}}]}}"#),
                "drives: missing field `is_root_device`",
            ),
            (
                format!(r#"{{{boot}, "pmem": [{{"id": "p"}}]}}"#),
                "\"pmem\" is not supported by Chronovisor",
            ),
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
