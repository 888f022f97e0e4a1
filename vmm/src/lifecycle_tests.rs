use super::*;
use crate::affinity::Place;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::HintingStart;
use crate::config::{ConfigError, MachineConfigUpdate, Template};
use crate::fake::{FakeBuilder, Log};
use crate::mmds::data::DEFAULT_LIMIT_BYTES;
use crate::testing::TempFile;

struct Case {
    life: Lifecycle<FakeBuilder>,
    log: Log,
    fails: Arc<AtomicBool>,
    shared: Arc<Shared>,
}

impl Case {
    fn new(builder: FakeBuilder) -> Self {
        let (log, fails, shared) = (
            Arc::clone(&builder.log),
            Arc::clone(&builder.fails),
            Arc::<Shared>::default(),
        );
        Self {
            life: Lifecycle::new("id".into(), builder, Arc::clone(&shared), DEFAULT_LIMIT_BYTES),
            log,
            fails,
            shared,
        }
    }

    fn log(&self) -> Vec<&'static str> {
        self.log.lock().unwrap().clone()
    }

    fn start(&mut self) {
        self.life.act(Action::PutBootSource(source("/kernel"))).unwrap();
        self.life.act(Action::Start).unwrap();
    }
}

fn case() -> Case {
    Case::new(FakeBuilder::default())
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
    case.start();
    case
}

fn state(case: &mut Case) -> RunState {
    match case.life.act(Action::GetInfo) {
        Ok(Reply::Info(info)) => info.state,
        other => panic!("{other:?}"),
    }
}

fn from_json<T: serde::de::DeserializeOwned>(value: serde_json::Value) -> T {
    serde_json::from_value(value).unwrap()
}

/// Each action, and whether it is legal before start, running, and paused.
fn every_action() -> Vec<(Action, [bool; 3])> {
    use serde_json::json;
    const ALWAYS: [bool; 3] = [true; 3];
    const BEFORE: [bool; 3] = [true, false, false];
    const AFTER: [bool; 3] = [false, true, true];
    let drive = json!({ "drive_id": "d", "is_root_device": false, "path_on_host": "/disk" });
    let interface = json!({ "iface_id": "i", "host_dev_name": "tap0" });
    let balloon = json!({ "amount_mib": 1, "deflate_on_oom": false,
        "stats_polling_interval_s": 2, "free_page_hinting": true });
    vec![
        (Action::GetInfo, ALWAYS),
        (Action::GetConfig, ALWAYS),
        (Action::GetMachineConfig, ALWAYS),
        (Action::PutMachineConfig(MachineConfig::default()), BEFORE),
        (Action::PatchMachineConfig(MachineConfigUpdate::default()), BEFORE),
        (Action::PutBootSource(source("/kernel")), BEFORE),
        (Action::PutCpuConfig(CpuConfig::default()), BEFORE),
        (Action::PutDrive(from_json(drive)), BEFORE),
        (Action::PatchDrive(from_json(json!({ "drive_id": "d" }))), AFTER),
        (Action::PutInterface(from_json(interface)), BEFORE),
        (Action::PatchInterface(from_json(json!({ "iface_id": "i" }))), AFTER),
        (
            Action::PutVsock(from_json(json!({ "guest_cid": 3, "uds_path": "v" }))),
            BEFORE,
        ),
        (Action::PutEntropy(from_json(json!({}))), BEFORE),
        (Action::PutBalloon(from_json(balloon)), BEFORE),
        (Action::GetBalloon, ALWAYS),
        (Action::PatchBalloon(from_json(json!({ "amount_mib": 1 }))), AFTER),
        (Action::GetBalloonStats, AFTER),
        (
            Action::PatchBalloonStats(from_json(json!({ "stats_polling_interval_s": 1 }))),
            AFTER,
        ),
        (Action::StartHinting(HintingStart::default()), AFTER),
        (Action::GetHintingStatus, AFTER),
        (Action::StopHinting, AFTER),
        (Action::GetMmds, ALWAYS),
        (Action::PutMmds(Metadata(json!({}))), ALWAYS),
        (Action::GetMmdsConfig, ALWAYS),
        (
            Action::PutMmdsConfig(from_json(json!({ "network_interfaces": ["i"] }))),
            BEFORE,
        ),
        (Action::PutSerial(from_json(json!({}))), BEFORE),
        (Action::PutLogger(from_json(json!({}))), BEFORE),
        (
            Action::PutMetrics(from_json(json!({ "metrics_path": "/dev/null" }))),
            BEFORE,
        ),
        (Action::FlushMetrics, AFTER),
        (Action::SetPinning(Pinning::None), BEFORE),
        (Action::Start, BEFORE),
        (Action::SendCtrlAltDel, AFTER),
        (Action::Pause, AFTER),
        (Action::Resume, AFTER),
        (
            Action::PutAffinity {
                index: 0,
                place: Place::Auto,
            },
            AFTER,
        ),
        (Action::ShutDown, ALWAYS),
        (Action::Stop, ALWAYS),
    ]
}

#[test]
fn every_action_is_legal_exactly_when_its_documentation_says() {
    for (action, legal) in every_action() {
        for (state, legal) in legal.into_iter().enumerate() {
            let mut case = case();
            case.life.act(Action::PutBootSource(source("/kernel"))).unwrap();
            for (action, _) in every_action() {
                if matches!(
                    action,
                    Action::PutDrive(_) | Action::PutInterface(_) | Action::PutBalloon(_)
                ) {
                    case.life.act(action).unwrap();
                }
            }
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
    for (action, _) in every_action() {
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
    case.fails.store(true, Ordering::Relaxed);
    let refusal = case.life.act(Action::Start).unwrap_err().to_string();
    assert!(refusal.starts_with("/dev/kvm does not exist"), "{refusal}");
    assert!(case.log().is_empty() && case.shared.accounts.get().is_none());
    // What a machine that was not finished may still have said.
    case.life.hear(MachineEvent::Reset);
    assert_eq!(case.life.end(), None);
    let config = MachineConfig {
        vcpu_count: 2,
        ..MachineConfig::default()
    };
    case.life.act(Action::PutMachineConfig(config)).unwrap();
    case.fails.store(false, Ordering::Relaxed);
    case.life.act(Action::Start).unwrap();
    assert_eq!((state(&mut case), case.log()), (RunState::Running, vec!["resume"]));
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
    assert_eq!(case.log(), ["resume", "pause", "resume"]);
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
        assert_eq!(case.log().iter().filter(|&&line| line == "stop").count(), 1);
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
        ..VmConfig::default()
    };
    assert_eq!(
        case.life.act(Action::GetConfig).unwrap(),
        Reply::Config(Box::new(whole))
    );
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
    assert!(
        matches!(refusal, ActionError::Config(ConfigError::VcpuCount(33))),
        "{refusal}"
    );
    assert_eq!(
        case.life.act(Action::GetMachineConfig).unwrap(),
        Reply::MachineConfig(MachineConfig::default())
    );
    assert!(case.life.act(Action::PutBootSource(source("/nowhere/kernel"))).is_err());
    assert!(matches!(case.life.act(Action::Start), Err(ActionError::NoKernel)));
}

#[test]
fn warnings_of_the_start_can_be_read_afterwards() {
    assert_eq!(*started().shared.warnings.lock().unwrap(), ["a warning"]);
}

#[test]
fn who_is_to_shut_down_is_asked_and_who_cannot_hear_is_ended() {
    let mut asked = started();
    assert_eq!(asked.life.act(Action::ShutDown).unwrap(), Reply::GuestAsked);
    assert_eq!((asked.life.end(), asked.log()), (None, vec!["resume", "keys"]));

    let mut busy = started();
    busy.life.act(Action::SendCtrlAltDel).unwrap();
    assert_eq!(
        busy.life.act(Action::ShutDown).unwrap(),
        Reply::GuestAsked,
        "it hears, but has the last keys still to read"
    );
    assert_eq!(busy.life.end(), None);

    let mut held = started();
    held.life.act(Action::Pause).unwrap();
    held.life.act(Action::ShutDown).unwrap();
    assert_eq!(held.life.end(), Some(&End::Stopped));

    let mut deaf = Case::new(FakeBuilder {
        deaf: true,
        ..FakeBuilder::default()
    });
    deaf.start();
    deaf.life.act(Action::ShutDown).unwrap();
    assert_eq!(
        (deaf.life.end(), deaf.log()),
        (Some(&End::Stopped), vec!["resume", "stop"])
    );

    let mut not_started = case();
    not_started.life.act(Action::ShutDown).unwrap();
    assert_eq!(not_started.life.end(), Some(&End::Stopped));
}

#[test]
fn the_metrics_have_a_last_line_however_it_ends() {
    for paused in [false, true] {
        for end in 0..3 {
            let file = TempFile::new(b"");
            let mut case = case();
            let metrics = serde_json::json!({ "metrics_path": file.path() });
            case.life.act(Action::PutMetrics(from_json(metrics))).unwrap();
            case.start();
            if paused {
                case.life.act(Action::Pause).unwrap();
            }
            let lines = || std::fs::read_to_string(file.path()).unwrap().lines().count();
            assert_eq!(lines(), 1, "at the start");
            match end {
                0 => drop(case.life.act(Action::Stop).unwrap()),
                1 => case.life.hear(MachineEvent::PowerOff),
                _ => case.life.hear(MachineEvent::Vcpu {
                    index: 0,
                    end: vcpu::VcpuEnd::TripleFault,
                }),
            }
            assert_eq!(lines(), 2, "paused: {paused}, end {end}");
            assert_eq!(case.log(), ["resume", "pause", "stop"], "held before it is told");
        }
    }
}

#[test]
fn a_change_of_a_device_is_seen_in_the_configuration_and_one_refused_is_not() {
    use serde_json::json;
    let mut case = case();
    let drive = json!({ "drive_id": "d", "is_root_device": false, "path_on_host": "/old",
        "rate_limiter": { "ops": { "size": 1, "refill_time": 2 } } });
    case.life.act(Action::PutDrive(from_json(drive))).unwrap();
    case.start();
    let mut patch = |update| {
        let result = case.life.act(Action::PatchDrive(from_json(update)));
        let Ok(Reply::Config(config)) = case.life.act(Action::GetConfig) else {
            panic!("no configuration")
        };
        (result.is_ok(), serde_json::to_value(&config.drives[0]).unwrap())
    };
    let limit = json!({ "bandwidth": { "size": 3, "refill_time": 4 } });
    let (done, drive) = patch(json!({ "drive_id": "d", "path_on_host": "/new", "rate_limiter": limit }));
    assert!(done);
    assert_eq!(drive["path_on_host"], "/new");
    assert_eq!(
        (
            &drive["rate_limiter"]["bandwidth"]["size"],
            &drive["rate_limiter"]["ops"]["size"]
        ),
        (&json!(3), &json!(1))
    );
    let (done, drive) = patch(json!({ "drive_id": "d", "path_on_host": "/nowhere/disk" }));
    assert_eq!((done, &drive["path_on_host"]), (false, &json!("/new")));
    assert!(!patch(json!({ "drive_id": "e" })).0);
}

#[test]
fn of_a_template_and_a_cpu_config_the_one_that_came_last_holds() {
    use serde_json::{Value, json};

    let custom: CpuConfig = from_json(json!({ "kvm_capabilities": ["1"] }));
    let put = |mut body: Value| {
        body["vcpu_count"] = json!(1);
        body["mem_size_mib"] = json!(128);
        Action::PutMachineConfig(from_json(body))
    };
    let t2 = || put(json!({ "cpu_template": "T2" }));
    let patch = |body| Action::PatchMachineConfig(from_json(body));
    let put_custom = || Action::PutCpuConfig(custom.clone());
    let (host, template) = (Processor::Host, Processor::Template(Template::T2));
    let is_custom = Processor::Custom(custom.clone());
    // What is asked, and what holds then.
    let table = [
        (vec![t2()], &template),
        (vec![t2(), put(json!({}))], &template),
        (vec![t2(), put(json!({ "cpu_template": null }))], &template),
        (vec![t2(), patch(json!({ "mem_size_mib": 64 }))], &template),
        (
            vec![t2(), patch(json!({ "cpu_template": "C3" }))],
            &Processor::Template(Template::C3),
        ),
        (vec![t2(), put(json!({ "cpu_template": "None" }))], &host),
        (vec![t2(), patch(json!({ "cpu_template": "None" }))], &host),
        (vec![t2(), put_custom()], &is_custom),
        (vec![t2(), Action::PutCpuConfig(CpuConfig::default())], &host),
        (vec![put_custom(), put(json!({}))], &is_custom),
        (vec![put_custom(), patch(json!({ "vcpu_count": 2 }))], &is_custom),
        (vec![put_custom(), t2()], &template),
        (vec![put_custom(), put(json!({ "cpu_template": "None" }))], &host),
    ];
    for (actions, holds) in table {
        let said = format!("{actions:?}");
        let mut case = case();
        for action in actions {
            case.life.act(action).expect(&said);
        }
        assert_eq!(case.life.cpu, *holds, "{said}");
        // It is told as it was asked for.
        let Ok(Reply::Config(config)) = case.life.act(Action::GetConfig) else {
            panic!("a configuration")
        };
        let told = json!({ "template": config.machine_config.unwrap().cpu_template, "custom": config.cpu_config });
        let expected = match holds {
            Processor::Host => json!({ "template": null, "custom": null }),
            Processor::Template(template) => json!({ "template": format!("{template:?}"), "custom": null }),
            Processor::Custom(custom) => json!({ "template": null, "custom": custom }),
        };
        assert_eq!(told, expected, "{said}");
    }
    // What is refused changes nothing.
    let mut case = case();
    case.life.act(put_custom()).unwrap();
    case.life.act(put(json!({ "cpu_template": "V1N1" }))).unwrap_err();
    assert_eq!(case.life.cpu, is_custom);
}
