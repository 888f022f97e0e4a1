//! The endpoint: `GET /metrics`, and a word at `/` for who finds the port.
//!
//! One request a connection, and a connection lives as long as a scrape and its reading take: a client that sends half a
//! request, or does not read its answer, is cut off, and holds up nobody meanwhile.

use std::convert::Infallible;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::{ALLOW, CONTENT_TYPE, HeaderMap, RETRY_AFTER};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

use super::round::{Busy, Rounds};
use crate::prometheus;

/// Connections at once; more wait to be accepted.
const CONNECTIONS: usize = 16;

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
        let connection = one(stream, rounds.clone(), &graceful);
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

fn one(
    stream: TcpStream,
    rounds: Arc<Rounds>,
    graceful: &GracefulShutdown,
) -> impl Future<Output = ()> + Send + 'static {
    let service = service_fn(move |request| {
        let rounds = rounds.clone();
        async move { Ok::<_, Infallible>(answer(&request, &rounds).await) }
    });
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIME)
        .keep_alive(false)
        .max_buf_size(16 << 10);
    let connection = graceful.watch(http.serve_connection(TokioIo::new(stream), service));
    async move {
        if let Err(error) = connection.await {
            tracing::debug!("a connection ended early: {error}");
        }
    }
}

async fn answer(request: &Request<Incoming>, rounds: &Rounds) -> Response<Full<Bytes>> {
    if request.method() != Method::GET {
        let mut response = text(StatusCode::METHOD_NOT_ALLOWED, "only GET is answered here\n");
        response
            .headers_mut()
            .insert(ALLOW, Method::GET.as_str().parse().expect("a constant"));
        return response;
    }
    match request.uri().path() {
        "/metrics" => match rounds.page(patience(request.headers())).await {
            Ok(page) => typed(StatusCode::OK, prometheus::CONTENT_TYPE, page),
            Err(Busy) => {
                let mut response = text(StatusCode::SERVICE_UNAVAILABLE, "other scrapes are under way\n");
                response
                    .headers_mut()
                    .insert(RETRY_AFTER, "1".parse().expect("a constant"));
                response
            }
        },
        "/" => typed(StatusCode::OK, "text/html; charset=utf-8", WELCOME),
        // What Prometheus's own programs answer to who asks whether they live.
        "/-/healthy" => text(StatusCode::OK, "OK\n"),
        _ => text(StatusCode::NOT_FOUND, "there is /metrics here\n"),
    }
}

/// How long Prometheus waits, as it says with each scrape; less a fifth, for the way and for writing the page. Whoever claims to
/// wait for next to nothing is not to have all sockets taken for dead.
fn patience(headers: &HeaderMap) -> Option<Duration> {
    const LEAST: Duration = Duration::from_millis(100);
    let told = headers.get("x-prometheus-scrape-timeout-seconds")?.to_str().ok()?;
    let patience = Duration::try_from_secs_f64(told.parse::<f64>().ok()? * 0.8).ok()?;
    Some(patience.max(LEAST))
}

fn text(status: StatusCode, body: &'static str) -> Response<Full<Bytes>> {
    typed(status, "text/plain; charset=utf-8", body)
}

fn typed(status: StatusCode, content_type: &'static str, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    let content_type = content_type.parse().expect("a constant");
    response.headers_mut().insert(CONTENT_TYPE, content_type);
    response
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
        for told in ["0", "0.001", "-0"] {
            assert_eq!(of(told), Some(100), "{told}");
        }
        for told in ["", "soon", "-1", "NaN", "inf"] {
            assert_eq!(of(told), None, "{told}");
        }
        assert_eq!(patience(&HeaderMap::new()), None);
    }
}
