use super::*;
use std::cell::RefCell;
use std::path::PathBuf;
use std::rc::Rc;

use crate::kvm::KvmError;

/// A machine that writes down what is done to it.
struct Fake(Rc<RefCell<Vec<&'static str>>>);

impl Run for Fake {
    fn resume(&self) {
        self.0.borrow_mut().push("resume");
    }
    fn pause(&self) {
        self.0.borrow_mut().push("pause");
    }
    fn ctrl_alt_del(&self) -> Result<(), KeysUnread> {
        self.0.borrow_mut().push("keys");
        Ok(())
    }
    fn accounts(&self) -> Vec<Arc<Account>> {
        vec![]
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        self.0.borrow_mut().push("stop");
    }
}

struct Builds {
    log: Rc<RefCell<Vec<&'static str>>>,
    fails: Rc<RefCell<bool>>,
}

impl Builder for Builds {
    type Machine = Fake;

    fn check(&self, source: &BootSource) -> Result<(), BootError> {
        match source.kernel_image_path.to_str() {
            Some("/kernel") => Ok(()),
            _ => Err(BootError::Empty {
                what: "kernel",
                path: source.kernel_image_path.clone(),
            }),
        }
    }

    fn build(&self, _plan: &Plan) -> Result<(Fake, Vec<String>), StartError> {
        if *self.fails.borrow() {
            return Err(KvmError::Missing.into());
        }
        Ok((Fake(Rc::clone(&self.log)), vec!["a warning".into()]))
    }
}

struct Case {
    life: Lifecycle<Builds>,
    log: Rc<RefCell<Vec<&'static str>>>,
    fails: Rc<RefCell<bool>>,
    shared: Arc<Shared>,
}

fn case() -> Case {
    let (log, fails, shared) = (Rc::default(), Rc::default(), Arc::<Shared>::default());
    let builder = Builds {
        log: Rc::clone(&log),
        fails: Rc::clone(&fails),
    };
    Case {
        life: Lifecycle::new("id".into(), builder, Arc::clone(&shared)),
        log,
        fails,
        shared,
    }
}

fn source(path: &str) -> BootSource {
    BootSource {
        kernel_image_path: PathBuf::from(path),
        boot_args: None,
        initrd_path: None,
    }
}

fn started() -> Case {
    let mut case = case();
    case.life.act(Action::PutBootSource(source("/kernel"))).unwrap();
    case.life.act(Action::Start).unwrap();
    case
}

fn state(case: &mut Case) -> RunState {
    match case.life.act(Action::GetInfo) {
        Ok(Reply::Info(info)) => info.state,
        other => panic!("{other:?}"),
    }
}

fn every_action() -> Vec<Action> {
    vec![
        Action::GetInfo,
        Action::GetConfig,
        Action::GetMachineConfig,
        Action::PutMachineConfig(MachineConfig::default()),
        Action::PatchMachineConfig(MachineConfigUpdate::default()),
        Action::PutBootSource(source("/kernel")),
        Action::SetPinning(Pinning::None),
        Action::Start,
        Action::SendCtrlAltDel,
        Action::Pause,
        Action::Resume,
        Action::Stop,
    ]
}

/// For each action: whether it is legal before start, running, and paused.
const LEGAL: [[bool; 3]; 12] = [
    [true, true, true],   // GetInfo
    [true, true, true],   // GetConfig
    [true, true, true],   // GetMachineConfig
    [true, false, false], // PutMachineConfig
    [true, false, false], // PatchMachineConfig
    [true, false, false], // PutBootSource
    [true, false, false], // SetPinning
    [true, false, false], // Start
    [false, true, true],  // SendCtrlAltDel
    [false, true, true],  // Pause
    [false, true, true],  // Resume
    [true, true, true],   // Stop
];

#[test]
fn every_action_is_legal_exactly_when_its_documentation_says() {
    for (action, legal) in every_action().into_iter().zip(LEGAL) {
        for (state, legal) in legal.into_iter().enumerate() {
            let mut case = case();
            case.life.act(Action::PutBootSource(source("/kernel"))).unwrap();
            if state >= 1 {
                case.life.act(Action::Start).unwrap();
            }
            if state == 2 {
                case.life.act(Action::Pause).unwrap();
            }
            let refusal = case.life.act(action.clone()).err().map(|e| e.to_string());
            let expected = match (legal, state) {
                (true, _) => None,
                (false, 0) => Some("The requested operation is not supported before starting the microVM.".to_owned()),
                (false, _) => Some("The requested operation is not supported after starting the microVM.".to_owned()),
            };
            assert_eq!(refusal, expected, "{action:?} in state {state}");
        }
    }
}

#[test]
fn after_the_end_everything_is_refused() {
    for action in every_action() {
        let mut case = started();
        case.life.hear(MachineEvent::PowerOff);
        assert_eq!(case.life.end(), Some(&End::PowerOff));
        let refusal = case.life.act(action.clone()).unwrap_err();
        assert!(matches!(refusal, ActionError::Ended), "{action:?}: {refusal}");
    }
}

#[test]
fn a_start_without_a_kernel_says_so() {
    let refusal = case().life.act(Action::Start).unwrap_err();
    assert_eq!(
        refusal.to_string(),
        "Cannot start microvm without kernel configuration."
    );
}

#[test]
fn a_failed_start_leaves_nothing_behind_and_the_vm_configurable() {
    let mut case = case();
    case.life.act(Action::PutBootSource(source("/kernel"))).unwrap();
    *case.fails.borrow_mut() = true;
    let refusal = case.life.act(Action::Start).unwrap_err().to_string();
    assert!(refusal.starts_with("/dev/kvm does not exist"), "{refusal}");
    assert!(case.log.borrow().is_empty() && case.shared.accounts.get().is_none());
    // What a machine that was not finished may still have said.
    case.life.hear(MachineEvent::Reset);
    assert_eq!(case.life.end(), None);
    let config = MachineConfig {
        vcpu_count: 2,
        ..MachineConfig::default()
    };
    case.life.act(Action::PutMachineConfig(config)).unwrap();
    *case.fails.borrow_mut() = false;
    case.life.act(Action::Start).unwrap();
    assert_eq!(
        (state(&mut case), &case.log.borrow()[..]),
        (RunState::Running, &["resume"][..])
    );
}

#[test]
fn pause_and_resume_have_no_effect_where_there_is_none_to_have() {
    let mut case = started();
    for action in [
        Action::Resume,
        Action::Pause,
        Action::Pause,
        Action::Resume,
        Action::Resume,
    ] {
        case.life.act(action).unwrap();
    }
    assert_eq!(*case.log.borrow(), ["resume", "pause", "resume"]);
    case.life.act(Action::Pause).unwrap();
    assert_eq!(state(&mut case), RunState::Paused);
}

#[test]
fn a_guest_can_be_ended_from_every_state_and_its_machine_is_stopped_once() {
    for pause in [false, true] {
        let mut case = started();
        if pause {
            case.life.act(Action::Pause).unwrap();
        }
        case.life.act(Action::Stop).unwrap();
        assert_eq!(case.life.end(), Some(&End::Stopped));
        assert_eq!(case.log.borrow().iter().filter(|&&line| line == "stop").count(), 1);
    }
}

#[test]
fn the_first_reason_to_end_is_the_one_reported() {
    let mut case = started();
    case.life.hear(MachineEvent::Vcpu {
        index: 0,
        end: vcpu::VcpuEnd::Stopped,
    });
    assert_eq!(case.life.end(), None);
    case.life.hear(MachineEvent::Vcpu {
        index: 1,
        end: vcpu::VcpuEnd::TripleFault,
    });
    case.life.hear(MachineEvent::PowerOff);
    assert_eq!(case.life.end(), Some(&End::TripleFault));
}

#[test]
fn what_was_put_can_be_got() {
    let mut case = case();
    let config = MachineConfig {
        vcpu_count: 4,
        mem_size_mib: 512,
        ..MachineConfig::default()
    };
    case.life.act(Action::PutMachineConfig(config.clone())).unwrap();
    case.life.act(Action::PutBootSource(source("/kernel"))).unwrap();
    assert_eq!(
        case.life.act(Action::GetMachineConfig).unwrap(),
        Reply::MachineConfig(config.clone())
    );
    let whole = VmConfig {
        machine_config: Some(config),
        boot_source: Some(source("/kernel")),
    };
    assert_eq!(case.life.act(Action::GetConfig).unwrap(), Reply::Config(whole));
}

#[test]
fn what_was_refused_changes_nothing() {
    let mut case = case();
    let update = MachineConfigUpdate {
        vcpu_count: Some(33),
        mem_size_mib: Some(1),
        ..Default::default()
    };
    let refusal = case.life.act(Action::PatchMachineConfig(update)).unwrap_err();
    assert_eq!(refusal.to_string(), "vcpu_count is 33: a microVM has 1 to 32 vCPUs");
    assert_eq!(
        case.life.act(Action::GetMachineConfig).unwrap(),
        Reply::MachineConfig(MachineConfig::default())
    );
    assert!(case.life.act(Action::PutBootSource(source("/empty"))).is_err());
    assert!(matches!(case.life.act(Action::Start), Err(ActionError::NoKernel)));
}

#[test]
fn warnings_of_the_start_can_be_read_afterwards() {
    assert_eq!(*started().shared.warnings.lock().unwrap(), ["a warning"]);
}
