//! The endpoint: `GET /metrics`, and a word at `/` for who finds the port.
//!
//! One request a connection, and a connection lives as long as a scrape and its reading take: a client that sends half a
//! request, or does not read its answer, is cut off. Until then it holds one of [`CONNECTIONS`] places.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::header::{CONTENT_TYPE, RETRY_AFTER};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{Html, IntoResponse, Response};
use axum::routing::get;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

use super::round::{Busy, Rounds};
use crate::prometheus;

/// Connections at once; more wait to be accepted.
const CONNECTIONS: usize = 256;

/// How long a request's head may take.
const HEAD_TIME: Duration = Duration::from_secs(5);

/// How long a client may take to read its answer: a megabyte a second and a fleet of 200 is 6 s.
const READ_TIME: Duration = Duration::from_secs(30);

const WELCOME: &str = "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>Chronovisor exporter</title></head>\
    <body><h1>Chronovisor exporter</h1><p>Where the time of this machine's vCPUs goes, for Prometheus: \
    <a href=\"/metrics\">/metrics</a></p></body></html>\n";

/// Serves until `stop` is done; scrapes under way may finish.
pub(super) async fn serve(listener: TcpListener, rounds: Arc<Rounds>, stop: impl Future<Output = ()>) {
    let graceful = GracefulShutdown::new();
    let room = Arc::new(Semaphore::new(CONNECTIONS));
    let router = router(rounds.clone());
    let mut stop = std::pin::pin!(stop);
    loop {
        let next = async {
            let permit = room.clone().acquire_owned().await;
            (listener.accept().await, permit)
        };
        let (accepted, permit) = tokio::select! {
            next = next => next,
            () = &mut stop => break,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Out of descriptors, as a rule: give scrapes the time to end.
                tracing::warn!("a connection could not be accepted: {error}");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        let connection = one(stream, router.clone(), &graceful);
        let longest = HEAD_TIME + rounds.timeout() + READ_TIME;
        tokio::spawn(async move {
            let _permit = permit;
            if tokio::time::timeout(longest, connection).await.is_err() {
                tracing::debug!("a client that did not read its answer was cut off");
            }
        });
    }
    drop(listener);
    // A scrape that has begun has its deadline, and then its answer is written in an instant.
    let patience = rounds.timeout() + Duration::from_secs(1);
    if tokio::time::timeout(patience, graceful.shutdown()).await.is_err() {
        tracing::debug!("connections with a request under way were closed");
    }
}

/// Served as the API's connections are (`server.rs`), types included: a program has room for one of each of hyper's machines.
fn one(stream: TcpStream, router: Router, graceful: &GracefulShutdown) -> impl Future<Output = ()> + Send + 'static {
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIME)
        .keep_alive(false);
    let connection = http.serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    let connection = graceful.watch(connection);
    async move {
        if let Err(error) = connection.await {
            tracing::debug!("a connection ended early: {error}");
        }
    }
}

fn router(rounds: Arc<Rounds>) -> Router {
    Router::new()
        .route("/metrics", get(page))
        .route("/", get(Html(WELCOME)))
        // What Prometheus's own programs answer to who asks whether they live.
        .route("/-/healthy", get("OK\n"))
        .fallback((StatusCode::NOT_FOUND, "there is /metrics here\n"))
        .method_not_allowed_fallback(async || (StatusCode::METHOD_NOT_ALLOWED, "only GET is answered here\n"))
        .with_state(rounds)
}

async fn page(State(rounds): State<Arc<Rounds>>, headers: HeaderMap) -> Response {
    match rounds.page(patience(&headers)).await {
        Ok(page) => ([(CONTENT_TYPE, prometheus::CONTENT_TYPE)], page).into_response(),
        Err(Busy) => {
            let again = [(RETRY_AFTER, "1")];
            (StatusCode::SERVICE_UNAVAILABLE, again, "other scrapes are under way\n").into_response()
        }
    }
}

/// How long Prometheus waits, as it says with each scrape: less a fifth, for the way and for writing the page. Whoever claims to
/// wait for next to nothing is not to have all sockets taken for dead.
fn patience(headers: &HeaderMap) -> Option<Duration> {
    const LEAST: Duration = Duration::from_millis(100);
    let told = headers.get("x-prometheus-scrape-timeout-seconds")?.to_str().ok()?;
    Some((seconds(told)? * 4 / 5).max(LEAST))
}

/// Seconds as Prometheus writes them: digits, and perhaps more behind a point, of which those beyond milliseconds are not read.
/// Whoever waits longer than can be counted is answered sooner.
fn seconds(text: &str) -> Option<Duration> {
    let (whole, part) = text.split_once('.').unwrap_or((text, "0"));
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    if !digits(whole) || !digits(part) {
        return None;
    }
    let thousandths = part.bytes().chain(*b"000").take(3);
    let ms = thousandths.fold(0, |ms, digit| ms * 10 + u64::from(digit - b'0'));
    let whole = whole.parse().unwrap_or(u32::MAX);
    Some(Duration::from_millis(u64::from(whole) * 1000 + ms))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scrape_takes_less_than_prometheus_waits_for_it() {
        let of = |told: &str| {
            let mut headers = HeaderMap::new();
            headers.insert("x-prometheus-scrape-timeout-seconds", told.parse().unwrap());
            patience(&headers).map(|patience| patience.as_millis())
        };
        assert_eq!(of("10"), Some(8_000));
        assert_eq!(of("0.5"), Some(400));
        assert_eq!(of("1.2345"), Some(987));
        assert!(of("99999999999999999999").is_some_and(|ms| ms > 1_000_000_000));
        for told in ["0", "0.001", "0.0001"] {
            assert_eq!(of(told), Some(100), "{told}");
        }
        for told in ["", "soon", "-1", "NaN", "inf", "1.", ".5", "1.x", "1e3"] {
            assert_eq!(of(told), None, "{told}");
        }
        assert_eq!(patience(&HeaderMap::new()), None);
    }
}
