//! Files that may be configurations: see [`crate::fuzz`].

use vmm::Reply;
use vmm::config::VmConfig;
use vmm::fake::FakeVm;

use super::*;
use crate::fuzz::tame;

pub(crate) fn run(data: &[u8]) {
    if reads_another(data) {
        return;
    }
    match configured(data) {
        Ok(Some(config)) => makes_another(&config),
        Ok(None) => {}
        Err(error) => assert!(!error.to_string().contains('\n'), "{error}"),
    }
}

/// Whether the file has another one read, which may be any of this host.
fn reads_another(data: &[u8]) -> bool {
    let sections = serde_json::from_slice::<Map<String, Value>>(data);
    sections.is_ok_and(|sections| sections.get("cpu-config").is_some_and(Value::is_string))
}

/// What a microVM is configured as by `text`, if it takes all of it.
fn configured(text: &[u8]) -> Result<Option<VmConfig>, ConfigFileError> {
    let vm = FakeVm::new();
    for step in parse(text)? {
        if let Err(error) = vm.act(tame(step.action)) {
            let words = Step::in_words(&step.name, &error.to_string());
            assert!(!words.is_empty());
            return Ok(None);
        }
    }
    match vm.act(Action::GetConfig) {
        Ok(Reply::Config(config)) => Ok(Some(*config)),
        other => panic!("{other:?}"),
    }
}

/// What a microVM says it is makes another one like it.
pub(crate) fn makes_another(config: &VmConfig) {
    let text = serde_json::to_string(config).expect("a configuration can be written");
    match configured(text.as_bytes()) {
        Ok(Some(other)) => assert_eq!(&other, config, "{text}"),
        other => panic!("{other:?} from {text}"),
    }
}
