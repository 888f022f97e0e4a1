use proptest::prelude::*;

use super::*;

fn whole(text: &str) -> Request<'_> {
    match parse(text.as_bytes()) {
        Parsed::Whole(request, length) if length == text.len() => request,
        other => panic!("{text:?} is {other:?}"),
    }
}

fn get(path: &str) -> Request<'_> {
    Request {
        method: Method::Get,
        path,
        accept: Format::Imds,
        token: None,
        ttl: None,
        forwarded_for: None,
        keep_alive: true,
    }
}

#[test]
fn a_request_is_read_for_what_the_service_needs() {
    for (text, request) in [
        ("GET / HTTP/1.1\r\n\r\n", get("/")),
        (
            "GET /a?b=c HTTP/1.1\r\nHost: 169.254.169.254\r\nUser-Agent: curl\r\n\r\n",
            get("/a?b=c"),
        ),
        ("GET http://169.254.169.254/a/b HTTP/1.1\r\n\r\n", get("/a/b")),
        ("GET http://169.254.169.254:80/ HTTP/1.1\r\n\r\n", get("/")),
        ("GET http://169.254.169.254 HTTP/1.1\r\n\r\n", get("")),
        ("GET http:// HTTP/1.1\r\n\r\n", get("")),
        ("GET a HTTP/1.1\r\n\r\n", get("")),
        ("GET * HTTP/1.1\r\n\r\n", get("")),
        ("GET / HTTP/1.1\n\n", get("/")),
        ("GET / HTTP/1.1\r\nContent-Length: 0\r\n\r\n", get("/")),
    ] {
        assert_eq!(whole(text), request, "{text:?}");
    }
    assert_eq!(whole("PUT / HTTP/1.1\r\n\r\n").method, Method::Put);
    assert_eq!(whole("PATCH / HTTP/1.1\r\n\r\n").method, Method::Patch);
}

#[test]
fn a_header_is_known_by_its_name_in_any_case_and_aws_names_are_known_too() {
    for name in ["X-metadata-token", "x-METADATA-token", "X-aws-ec2-metadata-token"] {
        let text = format!("GET / HTTP/1.1\r\n{name}:  abc \r\n\r\n");
        assert_eq!(whole(&text).token, Some("abc"), "{name}");
    }
    for name in ["X-metadata-token-ttl-seconds", "x-aws-EC2-metadata-token-ttl-seconds"] {
        let text = format!("PUT / HTTP/1.1\r\n{name}: 60\r\n\r\n");
        assert_eq!(whole(&text).ttl, Some((name, "60")));
    }
    for name in ["X-Forwarded-For", "x-forwarded-for", "X-fOrWaRdEd-FoR"] {
        let text = format!("PUT / HTTP/1.1\r\n{name}: 203.0.113.195\r\n\r\n");
        assert_eq!(whole(&text).forwarded_for, Some(name));
    }
    // Of two the first counts; what is no text is no token.
    assert_eq!(
        whole("GET / HTTP/1.1\r\nX-metadata-token: a\r\nX-metadata-token: b\r\n\r\n").token,
        Some("a")
    );
    let Parsed::Whole(request, _) = parse(b"GET / HTTP/1.1\r\nX-metadata-token: \xff\r\n\r\n") else {
        panic!()
    };
    assert_eq!(request.token, Some(""));
}

#[test]
fn json_is_for_who_asks_for_it_alone() {
    for (accept, format) in [
        ("application/json", Format::Json),
        ("  application/json ", Format::Json),
        ("text/plain", Format::Imds),
        ("plain/text", Format::Imds),
        ("*/*", Format::Imds),
        ("", Format::Imds),
        ("application/json, */*", Format::Imds),
    ] {
        let text = format!("GET / HTTP/1.1\r\nAccept:{accept}\r\n\r\n");
        assert_eq!(whole(&text).accept, format, "{accept:?}");
    }
}

#[test]
fn a_connection_stays_as_its_version_and_header_say() {
    for (version, connection, keep_alive) in [
        ("HTTP/1.1", "", true),
        ("HTTP/1.1", "Connection: close\r\n", false),
        ("HTTP/1.1", "Connection: TE, Close\r\n", false),
        ("HTTP/1.0", "", false),
        ("HTTP/1.0", "connection: Keep-Alive\r\n", true),
    ] {
        let text = format!("GET / {version}\r\n{connection}\r\n");
        assert_eq!(whole(&text).keep_alive, keep_alive, "{text:?}");
    }
}

#[test]
fn what_cannot_be_served_is_refused_and_ends_the_connection() {
    let many = format!("GET / HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(MAX_HEADERS + 1));
    for (text, status, body) in [
        (
            "POST / HTTP/1.1\r\n\r\n",
            Status::NotImplemented,
            "Unsupported HTTP method.",
        ),
        (
            "HEAD / HTTP/1.1\r\n\r\n",
            Status::NotImplemented,
            "Unsupported HTTP method.",
        ),
        (
            "get / HTTP/1.1\r\n\r\n",
            Status::NotImplemented,
            "Unsupported HTTP method.",
        ),
        (
            "GET / HTTP/2.0\r\n\r\n",
            Status::NotImplemented,
            "Unsupported HTTP version.",
        ),
        (
            "GET / HTTP/0.9\r\n\r\n",
            Status::NotImplemented,
            "Unsupported HTTP version.",
        ),
        ("GET /\r\n\r\n", Status::BadRequest, "Invalid request."),
        ("GET  HTTP/1.1\r\n\r\n", Status::BadRequest, "Invalid request."),
        ("\0\r\n\r\n", Status::BadRequest, "Invalid request."),
        (
            "GET / HTTP/1.1\r\nno colon\r\n\r\n",
            Status::BadRequest,
            "Invalid request.",
        ),
        (&many, Status::BadRequest, "Invalid request."),
        (
            "PUT / HTTP/1.1\r\nContent-Length: 1\r\n\r\nx",
            Status::BadRequest,
            "Invalid request.",
        ),
        (
            "PUT / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            Status::BadRequest,
            "Invalid request.",
        ),
        (
            "PUT / HTTP/1.1\r\nContent-length: -1\r\n\r\n",
            Status::BadRequest,
            "Invalid header. Reason: Invalid value. Key:Content-length; Value:-1",
        ),
    ] {
        assert_eq!(
            parse(text.as_bytes()),
            Parsed::Refused(Response::last(status, body)),
            "{text:?}"
        );
    }
}

#[test]
fn a_request_is_partial_until_its_last_byte_and_takes_no_byte_of_the_next() {
    let text = "GET /a HTTP/1.1\r\nHost: x\r\n\r\n";
    for end in 0..text.len() {
        assert_eq!(parse(&text.as_bytes()[..end]), Parsed::Partial, "{end}");
    }
    let two = [text, text].concat();
    assert_eq!(parse(two.as_bytes()), Parsed::Whole(get("/a"), text.len()));
}

#[test]
fn a_response_says_what_it_is() {
    let text = |response: Response| String::from_utf8(response.to_bytes()).unwrap();
    assert_eq!(
        text(Response::ok(Format::Json, "{\"é\":1}".into())),
        "HTTP/1.1 200 OK\r\nConnection: keep-alive\r\nContent-Type: application/json\r\nContent-Length: 8\r\n\r\n{\"é\":1}"
    );
    assert_eq!(
        text(Response::method_not_allowed("Not allowed HTTP method.")),
        "HTTP/1.1 405 Method Not Allowed\r\nConnection: keep-alive\r\nAllow: GET, PUT\r\nContent-Type: text/plain\r\n\
         Content-Length: 24\r\n\r\nNot allowed HTTP method."
    );
    assert_eq!(
        text(Response::last(Status::BadRequest, "")),
        "HTTP/1.1 400 Bad Request\r\nConnection: close\r\nContent-Type: text/plain\r\nContent-Length: 0\r\n\r\n"
    );
}

proptest! {
    #[test]
    fn any_bytes_are_a_request_a_beginning_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        if let Parsed::Whole(_, length) = parse(&bytes) {
            prop_assert!(length <= bytes.len());
        }
    }
}
