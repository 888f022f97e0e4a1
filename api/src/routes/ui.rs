//! `GET /ui`: one page that draws `GET /vcpus/stream`: the modes of each vCPU over time, the bounds of its guest time, its exits.
//!
//! The page is whole in itself, and part of the program: nothing is built and nothing fetched from elsewhere, which its
//! Content-Security-Policy holds it to. It reads the API that it came from, and changes nothing.

use axum::http::header;
use axum::response::{IntoResponse, Response};

/// The page; its style and its script are files of their own only here.
const PAGE: &str = concat!(
    "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n",
    "<meta name=\"viewport\" content=\"width=device-width\">\n<title>Chronovisor</title>\n",
    // Or browsers would ask for /favicon.ico.
    "<link rel=\"icon\" href=\"data:,\">\n<style>",
    include_str!("ui/page.css"),
    "</style>\n</head>\n",
    include_str!("ui/body.html"),
    "<script>",
    include_str!("ui/page.js"),
    "</script>\n</body>\n</html>\n",
);

/// Nothing but this style, this script, and the API that the page came from (CSP Level 3, 2.3.1: a hash is that of all between
/// the tags). A test names the hashes that belong here.
const POLICY: &str = concat!(
    "default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; ",
    "style-src 'sha256-XFqDAb45OYt2F7XKdRHffSP0qEIuhKShWHyCFvHxSmg='; ",
    "script-src 'sha256-Vq1TE989WyHePhSBRlHEvxhfVQM37YsGybyjbaK2pug='",
);

pub(super) async fn page() -> Response {
    let head = [
        (header::CONTENT_TYPE, "text/html; charset=utf-8"),
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        // Another version of the program may answer at the same address.
        (header::CACHE_CONTROL, "no-cache"),
    ];
    (head, PAGE).into_response()
}

#[cfg(test)]
mod tests {
    use axum::body::to_bytes;
    use sha2::{Digest, Sha256};

    use super::*;

    /// What is between the first `<tag>` of the page and its end.
    fn inside(tag: &str) -> &'static str {
        let (_, rest) = PAGE.split_once(&format!("<{tag}>")).expect("the tag's begin");
        rest.split_once(&format!("</{tag}>")).expect("the tag's end").0
    }

    fn base64(bytes: &[u8]) -> String {
        const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
        let mut text = String::new();
        for chunk in bytes.chunks(3) {
            let bits = (0..3).fold(0, |bits, i| bits << 8 | usize::from(*chunk.get(i).unwrap_or(&0)));
            for i in 0..4 {
                let digit = char::from(ALPHABET[bits >> (18 - 6 * i) & 63]);
                text.push(if i <= chunk.len() { digit } else { '=' });
            }
        }
        text
    }

    #[test]
    fn base64_is_that_of_rfc_4648() {
        for (bytes, text) in [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foob", "Zm9vYg=="),
        ] {
            assert_eq!(base64(bytes.as_bytes()), text);
        }
    }

    #[tokio::test]
    async fn the_policy_lets_in_the_pages_own_style_and_script_and_nothing_else() {
        let response = page().await;
        let policy = response.headers()[header::CONTENT_SECURITY_POLICY]
            .to_str()
            .unwrap()
            .to_owned();
        let page = to_bytes(response.into_body(), usize::MAX).await.unwrap();
        assert_eq!(page, PAGE);
        for tag in ["style", "script"] {
            let allowed = format!("{tag}-src 'sha256-{}'", base64(&Sha256::digest(inside(tag))));
            assert!(
                policy.split(';').any(|directive| directive.trim() == allowed),
                "the page's {tag} has changed: put {allowed} into POLICY, which is {policy}"
            );
            assert_eq!(PAGE.matches(&format!("<{tag}")).count(), 1, "of {tag}");
        }
        assert!(!policy.contains("unsafe"), "{policy}");
    }

    #[test]
    fn the_page_names_nothing_that_would_be_fetched_from_elsewhere() {
        // A namespace is a name, not an address.
        let page = PAGE.replace("http://www.w3.org/2000/svg", "");
        for address in ["http:", "https:", "//fonts", "@import", "src=", "<link rel=\"style"] {
            assert!(!page.contains(address), "{address}");
        }
        for attribute in [
            " style=\"",
            " onclick",
            " onload",
            "innerHTML",
            "outerHTML",
            "insertAdjacentHTML",
            "eval(",
        ] {
            assert!(
                !page.contains(attribute),
                "the policy would forbid it, or markup come of data: {attribute}"
            );
        }
    }

    #[test]
    fn the_page_is_small() {
        assert!(PAGE.len() < 40_000, "{} bytes", PAGE.len());
    }
}
