use serde_json::json;

use super::*;

fn store(document: Value) -> DataStore {
    let mut store = DataStore::new(DEFAULT_LIMIT_BYTES);
    store.put(document).unwrap();
    store
}

#[test]
fn a_lookup_answers_in_both_formats() {
    let store = store(json!({
        "name": { "first": "John", "second": "Doe" },
        "age": 43,
        "phones": ["+401234567", { "home": "+441234567" }],
        "member": false,
        "share": 12.12,
        "nothing": null,
        "empty": {},
        "text": "two\nlines \"and\" quotes",
        "a/b": "slash",
        "m~n": "tilde",
        "blank": { "": "no name" },
    }));
    let unsupported = || Err(LookupError::UnsupportedValueType);
    let text = |text: &str| Ok(text.to_owned());
    let root = "a/b\nage\nblank/\nempty/\nmember\nm~n\nname/\nnothing\nphones\nshare\ntext";
    for (path, imds, json) in [
        ("/", text(root), None),
        ("", text(root), None),
        (
            "/name",
            text("first\nsecond"),
            Some(r#"{"first":"John","second":"Doe"}"#),
        ),
        (
            "/name/",
            text("first\nsecond"),
            Some(r#"{"first":"John","second":"Doe"}"#),
        ),
        ("/name/first", text("John"), Some(r#""John""#)),
        ("/name/first/", text("John"), Some(r#""John""#)),
        ("/empty", text(""), Some("{}")),
        (
            "/text",
            text("two\nlines \"and\" quotes"),
            Some(r#""two\nlines \"and\" quotes""#),
        ),
        ("/age", unsupported(), Some("43")),
        ("/member", unsupported(), Some("false")),
        ("/share", unsupported(), Some("12.12")),
        ("/nothing", unsupported(), Some("null")),
        (
            "/phones",
            unsupported(),
            Some(r#"["+401234567",{"home":"+441234567"}]"#),
        ),
        ("/phones/0", text("+401234567"), Some(r#""+401234567""#)),
        ("/phones/1/", text("home"), Some(r#"{"home":"+441234567"}"#)),
        ("/a~1b", text("slash"), Some(r#""slash""#)),
        ("/m~0n", text("tilde"), Some(r#""tilde""#)),
        ("/blank//", text("no name"), Some(r#""no name""#)),
    ] {
        assert_eq!(store.get_path(path, Format::Imds), imds, "{path}");
        if let Some(json) = json {
            assert_eq!(store.get_path(path, Format::Json).as_deref(), Ok(json), "{path}");
        }
    }
    for path in [
        "/nobody",
        "/name/first/x",
        "/phones/2",
        "/phones/-",
        "/phones/00",
        "name",
        "/name/first//",
        "/a/b",
    ] {
        for format in [Format::Imds, Format::Json] {
            assert_eq!(store.get_path(path, format), Err(LookupError::NotFound), "{path}");
        }
    }
}

#[test]
fn before_the_first_put_there_is_a_null_root_and_nothing_to_patch() {
    let mut store = DataStore::new(DEFAULT_LIMIT_BYTES);
    assert_eq!(store.get(), None);
    assert_eq!(store.get_path("/", Format::Json).as_deref(), Ok("null"));
    assert_eq!(
        store.get_path("/", Format::Imds),
        Err(LookupError::UnsupportedValueType)
    );
    assert_eq!(store.get_path("/latest", Format::Imds), Err(LookupError::NotFound));
    let error = store.patch(json!({ "a": 1 })).unwrap_err();
    assert_eq!(error.to_string(), "The MMDS data store is not initialized.");
    assert_eq!(store.get(), None);
}

/// The table of RFC 7396, appendix A.
#[test]
fn a_patch_merges_as_its_rfc_says() {
    for (original, patch, result) in [
        (json!({"a":"b"}), json!({"a":"c"}), json!({"a":"c"})),
        (json!({"a":"b"}), json!({"b":"c"}), json!({"a":"b","b":"c"})),
        (json!({"a":"b"}), json!({"a":null}), json!({})),
        (json!({"a":"b","b":"c"}), json!({"a":null}), json!({"b":"c"})),
        (json!({"a":["b"]}), json!({"a":"c"}), json!({"a":"c"})),
        (json!({"a":"c"}), json!({"a":["b"]}), json!({"a":["b"]})),
        (
            json!({"a":{"b":"c"}}),
            json!({"a":{"b":"d","c":null}}),
            json!({"a":{"b":"d"}}),
        ),
        (json!({"a":[{"b":"c"}]}), json!({"a":[1]}), json!({"a":[1]})),
        (json!(["a", "b"]), json!(["c", "d"]), json!(["c", "d"])),
        (json!({"a":"b"}), json!(["c"]), json!(["c"])),
        (json!({"a":"foo"}), json!(null), json!(null)),
        (json!({"a":"foo"}), json!("bar"), json!("bar")),
        (json!({"e":null}), json!({"a":1}), json!({"e":null,"a":1})),
        (json!([1, 2]), json!({"a":"b","c":null}), json!({"a":"b"})),
        (json!({}), json!({"a":{"bb":{"ccc":null}}}), json!({"a":{"bb":{}}})),
    ] {
        let mut store = store(original.clone());
        store.patch(patch.clone()).unwrap();
        assert_eq!(store.get(), Some(&result), "{original} patched with {patch}");
    }
}

#[test]
fn a_document_over_the_limit_is_refused_and_the_old_one_stays() {
    // {"a":"..."} is 8 bytes and the text.
    let sized = |bytes: usize| json!({ "a": "x".repeat(bytes - 8) });
    let mut store = DataStore::new(100);
    store.put(sized(100)).unwrap();
    let over = UpdateError::LimitExceeded {
        size_bytes: 101,
        limit_bytes: 100,
    };
    assert_eq!(store.put(sized(101)), Err(over));
    assert_eq!(store.patch(sized(101)), Err(over));
    assert_eq!(store.get(), Some(&sized(100)));
    assert_eq!(over.to_string(), "The MMDS patch request doesn't fit.");
    // What a patch is measured by is its result.
    let patch = json!({ "a": null, "b": "x".repeat(92) });
    store.patch(patch).unwrap();
    assert!(store.patch(json!({ "c": "" })).is_err());
}
