//! `/mmds`: the metadata, at any time; `/mmds/config`: how the guest reaches it, before the start.

use axum::body::Bytes;
use axum::extract::{Path, State};
use axum::response::Response;
use vmm::Action;
use vmm::mmds::config::{MmdsConfig, Version};

use super::{Fault, Shared, act, deprecated, parse};

pub(super) async fn get(State(shared): State<Shared>) -> Result<Response, Fault> {
    act(&shared, Action::GetMmds).await
}

pub(super) async fn put(State(shared): State<Shared>, body: Bytes) -> Result<Response, Fault> {
    act(&shared, Action::PutMmds(parse(&body)?)).await
}

pub(super) async fn patch(State(shared): State<Shared>, body: Bytes) -> Result<Response, Fault> {
    act(&shared, Action::PatchMmds(parse(&body)?)).await
}

/// What is answered: the configuration, or an object without entries.
#[cfg(test)]
#[derive(schemars::JsonSchema)]
#[schemars(untagged, rename = "MmdsConfigOrNone")]
#[expect(dead_code, reason = "a shape, which is answered as one of the two")]
pub(super) enum Answer {
    /// There is none.
    #[schemars(extend("additionalProperties" = false))]
    None {},
    Some(MmdsConfig),
}

pub(super) async fn get_config(State(shared): State<Shared>) -> Result<Response, Fault> {
    act(&shared, Action::GetMmdsConfig).await
}

/// Version 1 is deprecated.
pub(super) async fn put_config(State(shared): State<Shared>, body: Bytes) -> Result<Response, Fault> {
    let config: MmdsConfig = parse(&body)?;
    let old = config.version == Version::V1;
    let response = act(&shared, Action::PutMmdsConfig(config)).await?;
    Ok(if old { deprecated(response) } else { response })
}

/// Firecracker's words for what is below `/mmds` and nothing.
pub(super) async fn put_unknown(Path(path): Path<String>) -> Fault {
    Fault::new(format!("Unrecognized PUT request path `{path}`."))
}
