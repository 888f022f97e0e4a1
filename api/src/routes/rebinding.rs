//! DNS rebinding: a page of another site, whose name is then made to mean this host's loopback address, may send
//! requests here and read the answers, for its browser takes both for one site. What it cannot change is the name in
//! its requests' `Host`.
//!
//! So whoever asks over TCP has to ask by an address, or as `localhost`, unless it brings a token (`bearer`), which no
//! such page has. Over the unix socket clients send as `Host` whatever they like; but a browser may ask there too, by a
//! port that ssh(1) forwards to it. Browsers tell themselves by headers that a page cannot leave out (Fetch Metadata,
//! and the Origin of Fetch, 3.2), which clients have no reason to send.

use std::net::IpAddr;

use axum::extract::Request;
use axum::http::header::HOST;
use axum::http::uri::Authority;

use super::Fault;
use super::bearer::OverTcp;

/// # Errors
/// `request` came over TCP, or from a browser, and names another host.
pub(super) fn check(request: &Request) -> Result<(), Fault> {
    let browser = ["origin", "sec-fetch-site"]
        .iter()
        .any(|name| request.headers().contains_key(*name));
    if !browser && request.extensions().get::<OverTcp>().is_none() {
        return Ok(());
    }
    let named = request.headers().get_all(HOST).iter().map(|host| host.as_bytes());
    // Where a request's target has a host, that is the one (RFC 9112, 3.2.2).
    let target = request.uri().authority().map(|authority| authority.as_str().as_bytes());
    match named.chain(target).find(|host| !is_here(host)) {
        None => Ok(()),
        Some(host) => Err(Fault::new(format!(
            "The Host is {:?}: over TCP, and to a browser, the API answers to an address, and to localhost.",
            String::from_utf8_lossy(host)
        ))),
    }
}

/// Whether `host`, with a port or without, is an address or `localhost`.
fn is_here(host: &[u8]) -> bool {
    let Ok(authority) = Authority::try_from(host) else {
        return false;
    };
    let name = authority.host();
    let address = name.strip_prefix('[').and_then(|name| name.strip_suffix(']'));
    name.eq_ignore_ascii_case("localhost") || address.unwrap_or(name).parse::<IpAddr>().is_ok()
}

#[cfg(test)]
mod tests {
    use axum::body::Body;
    use tower::ServiceExt;
    use vmm::RunState::NotStarted;

    use super::*;
    use crate::routes::tests::router_in;

    async fn status(target: &str, host: &str, over_tcp: bool) -> u16 {
        let mut request = Request::builder().uri(target).header(HOST, host);
        if over_tcp {
            request = request.extension(OverTcp::default());
        }
        let response = router_in(NotStarted).oneshot(request.body(Body::empty()).unwrap());
        response.await.unwrap().status().as_u16()
    }

    #[tokio::test]
    async fn over_tcp_the_api_answers_to_an_address_and_to_localhost_only() {
        for host in ["127.0.0.1", "127.0.0.1:8080", "[::1]:8080", "localhost", "LocalHost:80"] {
            assert_eq!(status("/version", host, true).await, 200, "{host}");
        }
        let others = [
            "attacker.example",
            "attacker.example:8080",
            "localhost.attacker.example",
            "127.0.0.1.attacker.example",
            "127.0.0.1@attacker.example",
            "chronovisor",
            "",
            "[::1",
        ];
        for host in others {
            assert_eq!(status("/version", host, true).await, 400, "{host}");
            assert_eq!(status("/version", host, false).await, 200, "{host}: not over TCP");
        }
        assert_eq!(status("http://attacker.example/version", "127.0.0.1", true).await, 400);
    }

    #[tokio::test]
    async fn a_browser_is_held_to_it_over_the_unix_socket_too() {
        for header in ["origin", "sec-fetch-site"] {
            let ask = async |host: &str| {
                let request = Request::builder()
                    .uri("/version")
                    .header(HOST, host)
                    .header(header, "x");
                let response = router_in(NotStarted).oneshot(request.body(Body::empty()).unwrap());
                response.await.unwrap().status().as_u16()
            };
            assert_eq!(
                (ask("attacker.example:8080").await, ask("localhost:8080").await),
                (400, 200),
                "{header}"
            );
        }
    }

    #[test]
    fn of_two_hosts_neither_may_be_another() {
        let request = Request::builder()
            .header(HOST, "127.0.0.1")
            .header(HOST, "attacker.example");
        let request = request.extension(OverTcp::default()).body(Body::empty()).unwrap();
        assert!(check(&request).unwrap_err().message().contains("\"attacker.example\""));
    }
}
