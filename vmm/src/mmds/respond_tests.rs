//! The table of requests and their answers, in both versions.

use std::time::Duration;

use serde_json::json;

use super::http::{Parsed, parse};
use super::*;

struct Service {
    mmds: Mmds,
    now: Instant,
}

impl Service {
    fn new(version: Version) -> Self {
        let now = Instant::now();
        let mut mmds = Mmds::new(data::DEFAULT_LIMIT_BYTES, now).unwrap();
        let document =
            json!({ "name": { "first": "John" }, "age": 43, "latest": { "meta-data": { "ami-id": "ami-1" } } });
        mmds.data.put(document).unwrap();
        mmds.configure(&config(version, false));
        Self { mmds, now }
    }

    fn ask(&mut self, text: &str) -> Response {
        match parse(text.as_bytes()) {
            Parsed::Whole(request, _) => self.mmds.respond(&request, self.now),
            other => panic!("{text:?} is {other:?}"),
        }
    }

    fn token(&mut self) -> String {
        let text = "PUT /latest/api/token HTTP/1.1\r\nX-metadata-token-ttl-seconds: 60\r\n\r\n";
        let response = self.ask(text);
        assert_eq!(response.status, Status::Ok);
        response.body
    }
}

fn config(version: Version, imds_compat: bool) -> MmdsConfig {
    MmdsConfig {
        version,
        network_interfaces: vec!["eth0".into()],
        ipv4_address: config::DEFAULT_IPV4,
        imds_compat,
    }
}

const VERSIONS: [Version; 2] = [Version::V1, Version::V2];
const NO_TTL: &str = "Token time to live value not found. Use `X-metadata-token-ttl-seconds` or \
                      `X-aws-ec2-metadata-token-ttl-seconds` header to specify the token's lifetime.";
const NO_TOKEN: &str = "No MMDS token provided. Use `X-metadata-token` or `X-aws-ec2-metadata-token` header to specify the session \
                        token.";

#[test]
fn a_get_with_a_token_is_answered_in_both_versions() {
    for version in VERSIONS {
        let mut service = Service::new(version);
        let token = service.token();
        let json = "Accept: application/json\r\n";
        for (path, accept, status, format, body) in [
            ("/name/first", "", Status::Ok, Format::Imds, "John"),
            ("/name/first", json, Status::Ok, Format::Json, "\"John\""),
            ("//name///first/", "", Status::Ok, Format::Imds, "John"),
            (
                "http://169.254.169.254/latest",
                "",
                Status::Ok,
                Format::Imds,
                "meta-data/",
            ),
            ("/latest/meta-data/", "", Status::Ok, Format::Imds, "ami-id"),
            ("/", "", Status::Ok, Format::Imds, "age\nlatest/\nname/"),
            ("/age", json, Status::Ok, Format::Json, "43"),
            (
                "/age",
                "",
                Status::NotImplemented,
                Format::Imds,
                "Cannot retrieve value. The value has an unsupported type.",
            ),
            (
                "//none",
                json,
                Status::NotFound,
                Format::Imds,
                "Resource not found: //none.",
            ),
            (
                "/latest/api/token",
                "",
                Status::NotFound,
                Format::Imds,
                "Resource not found: /latest/api/token.",
            ),
            ("none", "", Status::BadRequest, Format::Imds, "Invalid URI."),
        ] {
            for name in ["X-metadata-token", "x-aws-ec2-metadata-token"] {
                // A lifetime on a GET is ignored, whatever it is.
                let text = format!(
                    "GET {path} HTTP/1.1\r\n{accept}{name}: {token}\r\nX-metadata-token-ttl-seconds: x\r\n\r\n"
                );
                let response = service.ask(&text);
                assert_eq!(
                    (response.status, response.format),
                    (status, format),
                    "{version:?} {text}"
                );
                assert_eq!(response.body, body, "{version:?} {text}");
            }
        }
    }
}

#[test]
fn without_a_living_token_version_1_answers_and_version_2_does_not() {
    for (headers, why) in [("", NO_TOKEN), ("X-metadata-token: foo\r\n", "MMDS token not valid.")] {
        let text = format!("GET /name/first HTTP/1.1\r\n{headers}\r\n");
        assert_eq!(
            Service::new(Version::V1).ask(&text),
            Response::ok(Format::Imds, "John".into())
        );
        assert_eq!(
            Service::new(Version::V2).ask(&text),
            Response::text(Status::Unauthorized, why)
        );
    }
    // A token that has expired is none; and who has none is not told what exists.
    let mut service = Service::new(Version::V2);
    let token = service.token();
    for path in ["/name", "/none"] {
        let text = format!("GET {path} HTTP/1.1\r\nX-metadata-token: {token}\r\n\r\n");
        assert_ne!(service.ask(&text).status, Status::Unauthorized);
        service.now += Duration::from_secs(60);
        assert_eq!(service.ask(&text).status, Status::Unauthorized);
        service.now -= Duration::from_secs(60);
    }
}

#[test]
fn a_put_makes_a_token_or_says_what_is_missing() {
    let range = "Please provide a value between 1 and 21600.";
    let bad_ttl = |ttl: &str| format!("Invalid time to live value provided for token: {ttl}. {range}");
    let bad_value =
        |name: &str, value: &str| format!("Invalid header. Reason: Invalid value. Key:{name}; Value:{value}");
    for version in VERSIONS {
        let mut service = Service::new(version);
        for (path, headers, status, body) in [
            ("/latest/api/token", "", Status::BadRequest, NO_TTL.to_owned()),
            (
                "/latest/api/token",
                "X-metadata-token-ttl-seconds: 0\r\n",
                Status::BadRequest,
                bad_ttl("0"),
            ),
            (
                "/latest/api/token",
                "X-metadata-token-ttl-seconds: 21601\r\n",
                Status::BadRequest,
                bad_ttl("21601"),
            ),
            (
                "/latest/api/token",
                "X-Metadata-token-ttl-seconds: a day\r\n",
                Status::BadRequest,
                bad_value("X-Metadata-token-ttl-seconds", "a day"),
            ),
            (
                "/latest/api/token",
                "X-aws-ec2-metadata-token-ttl-seconds: 4294967296\r\n",
                Status::BadRequest,
                bad_value("X-aws-ec2-metadata-token-ttl-seconds", "4294967296"),
            ),
            (
                "/latest/api/token",
                "X-metadata-token-ttl-seconds: 60\r\nx-Forwarded-For: 203.0.113.195\r\n",
                Status::BadRequest,
                "Invalid header. Reason: Unsupported header name. Key: x-Forwarded-For".into(),
            ),
            (
                "/latest/api/toke",
                "X-metadata-token-ttl-seconds: 60\r\n",
                Status::NotFound,
                "Resource not found: /latest/api/toke.".into(),
            ),
            (
                "/latest/api/token/",
                "",
                Status::NotFound,
                "Resource not found: /latest/api/token/.".into(),
            ),
            ("/", "", Status::NotFound, "Resource not found: /.".into()),
        ] {
            let text = format!("PUT {path} HTTP/1.1\r\n{headers}\r\n");
            assert_eq!(service.ask(&text), Response::text(status, body), "{version:?} {text}");
        }
        for name in ["X-metadata-token-ttl-seconds", "X-aws-ec2-metadata-token-ttl-seconds"] {
            let response = service.ask(&format!("PUT //latest/api//token HTTP/1.1\r\n{name}: 21600\r\n\r\n"));
            assert_eq!((response.status, response.format), (Status::Ok, Format::Imds));
            let sent = String::from_utf8(response.to_bytes()).unwrap();
            assert!(sent.contains(&format!("\r\n{name}: 21600\r\n")), "{sent}");
            let token = response.body;
            let get = service.ask(&format!(
                "GET /age HTTP/1.1\r\nAccept: application/json\r\nX-metadata-token: {token}\r\n\r\n"
            ));
            assert_eq!(get.body, "43");
        }
    }
}

#[test]
fn a_method_that_is_known_and_not_allowed_is_told_which_are() {
    for version in VERSIONS {
        let response = Service::new(version).ask("PATCH / HTTP/1.1\r\n\r\n");
        assert_eq!(response, Response::method_not_allowed("Not allowed HTTP method."));
    }
}

#[test]
fn in_imds_compatibility_every_answer_is_text() {
    let mut service = Service::new(Version::V1);
    service.mmds.configure(&config(Version::V1, true));
    for (path, status, body) in [
        ("/name", Status::Ok, "first"),
        ("/name/first", Status::Ok, "John"),
        (
            "/age",
            Status::NotImplemented,
            "Cannot retrieve value. The value has an unsupported type.",
        ),
    ] {
        let response = service.ask(&format!("GET {path} HTTP/1.1\r\nAccept: application/json\r\n\r\n"));
        assert_eq!(response, Response::text(status, body), "{path}");
    }
}

#[test]
fn a_token_outlives_a_change_of_version() {
    let mut service = Service::new(Version::V1);
    let token = service.token();
    service.mmds.configure(&config(Version::V2, false));
    let response = service.ask(&format!(
        "GET /name/first HTTP/1.1\r\nX-metadata-token: {token}\r\n\r\n"
    ));
    assert_eq!(response.body, "John");
}
