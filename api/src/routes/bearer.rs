//! Who asks over TCP, where a token is asked for: whoever does not bring it is answered 401, before anything else of
//! the request is looked at.
//!
//! A browser brings none: it has no way to be told one for a page that it opens. The page at `/ui` is had by a port
//! that ssh(1) forwards to the unix socket, or over loopback without a token.

use std::sync::Arc;

use axum::extract::Request;
use axum::http::header::AUTHORIZATION;

use super::Fault;
use crate::token::Token;

/// Goes with each request that came over TCP.
#[derive(Clone, Debug, Default)]
pub(crate) struct OverTcp {
    /// What it has to bring.
    pub token: Option<Arc<Token>>,
}

/// Whether `request` had to bring a token, and has.
///
/// # Errors
/// It had to, and has not.
pub(super) fn check(request: &Request) -> Result<bool, Fault> {
    let over_tcp = request.extensions().get::<OverTcp>();
    let Some(token) = over_tcp.and_then(|over_tcp| over_tcp.token.as_deref()) else {
        return Ok(false);
    };
    let mut brought = request.headers().get_all(AUTHORIZATION).iter();
    match (brought.next(), brought.next()) {
        (Some(header), None) if token.is_in(header.as_bytes()) => Ok(true),
        (None, _) => Err(Fault::unauthorized(
            "Over TCP a token is needed: Authorization: Bearer TOKEN.",
        )),
        _ => Err(Fault::unauthorized("That is not the token.")),
    }
}

#[cfg(test)]
mod tests {
    use axum::body::Body;
    use axum::http::header::{HOST, WWW_AUTHENTICATE};
    use tower::ServiceExt;
    use vmm::RunState::NotStarted;

    use super::*;
    use crate::routes::tests::router_in;

    const SECRET: &str = "c2VjcmV0IG9mIHRoZSB0ZXN0";

    /// The status, and whether it says how to do better.
    async fn ask(host: &str, authorizations: &[&str], over_tcp: Option<OverTcp>) -> (u16, bool) {
        let mut request = Request::builder().uri("/version").header(HOST, host);
        for authorization in authorizations {
            request = request.header(AUTHORIZATION, *authorization);
        }
        if let Some(over_tcp) = over_tcp {
            request = request.extension(over_tcp);
        }
        let response = router_in(NotStarted).oneshot(request.body(Body::empty()).unwrap());
        let response = response.await.unwrap();
        let says = response
            .headers()
            .get(WWW_AUTHENTICATE)
            .is_some_and(|how| how == "Bearer");
        (response.status().as_u16(), says)
    }

    #[tokio::test]
    async fn with_a_token_whoever_brings_it_is_served_under_any_name_and_nobody_else() {
        let token = Arc::new(Token::new(SECRET.as_bytes()).unwrap());
        let over_tcp = || {
            Some(OverTcp {
                token: Some(token.clone()),
            })
        };
        let (good, bad) = (&*format!("Bearer {SECRET}"), &*format!("Bearer {SECRET}x"));
        for host in ["127.0.0.1:80", "vm.example"] {
            assert_eq!(ask(host, &[good], over_tcp()).await, (200, false), "{host}");
            for brought in [&[][..], &[bad], &["Basic dTpw"], &[good, bad], &[bad, good]] {
                assert_eq!(ask(host, brought, over_tcp()).await, (401, true), "{host} {brought:?}");
            }
        }
        assert_eq!(ask("127.0.0.1", &[], Some(OverTcp::default())).await, (200, false));
        assert_eq!(ask("anything", &[], None).await, (200, false), "over the unix socket");
    }
}
