//! `/machine-config`, `/cpu-config` and `/boot-source`: what the microVM is made of, before its start.

use axum::body::Bytes;
use axum::extract::State;
use axum::response::Response;
use serde::Deserialize;
use serde::de::IgnoredAny;
use vmm::Action;
use vmm::config::{MachineConfig, MachineConfigUpdate};

use super::{Fault, Shared, act, deprecated, parse};

pub(super) async fn get(State(shared): State<Shared>) -> Result<Response, Fault> {
    act(&shared, Action::GetMachineConfig).await
}

pub(super) async fn put(State(shared): State<Shared>, body: Bytes) -> Result<Response, Fault> {
    let config: MachineConfig = parse(&body)?;
    let response = act(&shared, Action::PutMachineConfig(config)).await?;
    Ok(by_template(&body, response))
}

pub(super) async fn patch(State(shared): State<Shared>, body: Bytes) -> Result<Response, Fault> {
    let update: MachineConfigUpdate = parse(&body)?;
    if update == MachineConfigUpdate::default() {
        return Err(Fault::new("Empty PATCH request."));
    }
    let response = act(&shared, Action::PatchMachineConfig(update)).await?;
    Ok(by_template(&body, response))
}

/// Naming a template is deprecated, that there be none included.
fn by_template(body: &[u8], response: Response) -> Response {
    #[derive(Deserialize)]
    struct Named {
        cpu_template: Option<IgnoredAny>,
    }
    match serde_json::from_slice(body) {
        Ok(Named { cpu_template: Some(_) }) => deprecated(response),
        _ => response,
    }
}

pub(super) async fn put_boot_source(State(shared): State<Shared>, body: Bytes) -> Result<Response, Fault> {
    act(&shared, Action::PutBootSource(parse(&body)?)).await
}

/// An empty object changes the processor back to what this host offers.
pub(super) async fn put_cpu_config(State(shared): State<Shared>, body: Bytes) -> Result<Response, Fault> {
    act(&shared, Action::PutCpuConfig(parse(&body)?)).await
}
