//! The floor under `first_answer`: `bare_server SOCKET` serves one constant on a unix socket, by the HTTP stack that the API
//! stands on (axum, hyper, one current-thread tokio runtime) and nothing beside it.

use anyhow::{Context, Result};
use axum::Router;
use axum::http::header;
use axum::routing::get;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;

fn main() -> Result<()> {
    let socket = std::env::args_os().nth(1).context("usage: bare_server SOCKET")?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .build()?;
    let answer = async || {
        (
            [(header::CONTENT_TYPE, "application/json")],
            r#"{"firecracker_version":"0"}"#,
        )
    };
    let router = Router::new().route("/version", get(answer));
    runtime.block_on(async {
        let listener = tokio::net::UnixListener::bind(socket)?;
        loop {
            let (stream, _) = listener.accept().await?;
            let service = TowerToHyperService::new(router.clone());
            let mut builder = http1::Builder::new();
            builder.timer(TokioTimer::new());
            tokio::spawn(builder.serve_connection(TokioIo::new(stream), service));
        }
    })
}
