//! Writes the document from `list.rs` and the types.
//!
//! A type that is both read and written looks different from either side: what may be left out of a request is always
//! in an answer. Where it does, its two shapes are two components, the second `...Answer`. Examples are the rows of
//! kind `good` of `table.txt`, so that none is wrong.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use schemars::generate::{Contract, SchemaSettings};
use schemars::transform::RecursiveTransform;
use schemars::{Schema, SchemaGenerator};
use serde::Serialize;
use serde_json::{Map, Value, json};
use vmm::RunState::Running;

use super::super::fault;
use super::super::list::{Described, described};
use super::super::table::{Row, fits, lines, row};
use super::super::tests::request_of;
use super::super::{FIRECRACKER_API, Limits, STREAM, Shared, router};
use crate::backend::fake::Fake;

const COMMITTED: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../resources/openapi.json");
/// Set by `cargo xtask openapi`: the document is to be written, not compared.
const WRITE: &str = "CHRONOVISOR_WRITE_OPENAPI";
/// Where components are, for `$ref`.
const COMPONENTS: &str = "#/components/schemas/";
/// More would hide the rest.
const EXAMPLES_MAX: usize = 3;

/// Routes that are answered without the VMM's thread: all others may find that as many wait for it as may. Of the
/// stream there is a most too.
const ANSWERED_AT_ONCE: [(&str, &str); 8] = [
    ("GET", "/version"),
    ("GET", "/metrics"),
    ("GET", "/vcpus"),
    ("GET", "/vcpus/{index}/cputime"),
    ("GET", "/vcpus/{index}/histograms"),
    ("GET", "/vcpus/{index}/affinity"),
    ("GET", "/ui"),
    ("GET", "/openapi.json"),
];

type Object = Map<String, Value>;

/// Shapes of types as they are read, or as they are written.
fn shapes(contract: Contract) -> SchemaGenerator {
    let settings = SchemaSettings::draft2020_12().with(|settings| {
        settings.definitions_path = COMPONENTS.trim_start_matches('#').trim_end_matches('/').into();
        settings.meta_schema = None;
        settings.contract = contract;
    });
    settings.with_transform(RecursiveTransform(tidy)).into_generator()
}

/// Says how large an integer may be, and takes rustdoc's brackets out of descriptions.
fn tidy(schema: &mut Schema) {
    let most = match schema.get("format").and_then(Value::as_str) {
        Some("uint32") => Some(u32::MAX.into()),
        Some("uint64" | "uint") => Some(u64::MAX),
        // Of the smaller ones schemars says it.
        _ => None,
    };
    if let (Some(most), None) = (most, schema.get("maximum")) {
        schema.insert("maximum".into(), most.into());
    }
    if let Some(Value::String(text)) = schema.get_mut("description") {
        *text = plain(text);
    }
}

/// Without the brackets that make links in rustdoc, and as lines for an eye.
fn plain(text: &str) -> String {
    text.replace("[`", "`")
        .replace("`]", "`")
        .replace('\n', " ")
        .replace("  ", "\n\n")
}

/// The document.
fn document() -> Value {
    let (mut read, mut written) = (shapes(Contract::Deserialize), shapes(Contract::Serialize));
    let fault = written.subschema_for::<fault::Shape<'_>>();
    let mut paths: BTreeMap<&str, Object> = BTreeMap::new();
    let mut tags = BTreeSet::new();
    for route in described() {
        let operation = operation(&route, &mut read, &mut written);
        tags.insert(tag(route.path));
        paths
            .entry(route.path)
            .or_default()
            .insert(route.method.to_lowercase(), operation);
    }
    let read = read.take_definitions(true);
    let written = written.take_definitions(true);
    let differing = differing(&read, &written);
    let mut schemas = read;
    for (name, mut schema) in written {
        rename(&mut schema, &differing);
        let name = answer_name(&name, &differing);
        if let Some(other) = schemas.get(&name) {
            assert_eq!(
                *other, schema,
                "two types are called {name}: rename one with #[schemars(rename)]"
            );
        }
        schemas.insert(name, schema);
    }
    let mut paths = json!(paths);
    for operation in paths.as_object_mut().into_iter().flat_map(Map::values_mut) {
        for operation in operation.as_object_mut().into_iter().flat_map(Map::values_mut) {
            rename(&mut operation["responses"], &differing);
        }
    }
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Chronovisor",
            "version": env!("CARGO_PKG_VERSION"),
            "summary": "A microVM, and where every nanosecond of its vCPUs went.",
            "description": format!(
                "Firecracker's paths, as of version {FIRECRACKER_API}, with its statuses and bodies; and /vcpus, /host and others \
                 beside them. It is served on a unix socket, and on TCP where that was asked for. A body is read as JSON under \
                 any content type, in 10 s and up to 51,200 bytes unless told otherwise; a GET has none. What cannot be done is \
                 answered 400, paths and methods that there are not included."
            ),
            "license": { "name": "Apache-2.0", "identifier": "Apache-2.0" },
        },
        "tags": tags.iter().map(|name| json!({ "name": name })).collect::<Vec<_>>(),
        "paths": paths,
        "components": {
            "schemas": schemas,
            "responses": {
                "Fault": {
                    "description": "It cannot be done, or not now. Nothing has changed.",
                    "content": { "application/json": { "schema": fault.clone() } },
                },
                "Unauthorized": {
                    "description": "Over TCP, where a token is asked for: the request does not bring it.",
                    "headers": { "WWW-Authenticate": { "schema": { "type": "string", "const": "Bearer" } } },
                    "content": { "application/json": { "schema": fault.clone() } },
                },
                "Busy": {
                    "description": "As many wait for the microVM, or listen, as may. Nothing has changed: try later.",
                    "content": { "application/json": { "schema": fault } },
                },
            },
        },
    })
}

fn operation(route: &Described, read: &mut SchemaGenerator, written: &mut SchemaGenerator) -> Value {
    let good: Vec<Row<'_>> = lines()
        .filter(|line| !line.starts_with("== "))
        .map(row)
        .filter(|row| row.kind == "good" && row.method == route.method && fits(route.path, path_of(row)))
        .collect();
    let words: Vec<&str> = route.words.iter().map(|line| line.trim()).collect();
    let (summary, description) = words.split_first().expect("the macro wants words");

    let mut operation = json!({
        "operationId": operation_id(route),
        "tags": [tag(route.path)],
        "summary": summary,
        "responses": responses(route, &good, written),
    });
    let mut add = |key: &str, value: Value| {
        operation
            .as_object_mut()
            .expect("an object")
            .insert(key.to_owned(), value)
    };
    let description = description.join("\n").trim().to_owned();
    if !description.is_empty() {
        add("description", description.into());
    }
    let mut parameters = path_parameters(route.path, &good);
    parameters.extend(route.query.into_iter().flat_map(|shape| query_parameters(shape, read)));
    if !parameters.is_empty() {
        add("parameters", parameters.into());
    }
    if let Some((shape, required)) = route.body {
        let mut media = json!({ "schema": shape(read) });
        let bodies = good.iter().filter_map(|row| serde_json::from_str(&row.body).ok());
        add_examples(&mut media, bodies);
        add(
            "requestBody",
            json!({ "required": required, "content": { "application/json": media } }),
        );
    }
    operation
}

fn responses(route: &Described, good: &[Row<'_>], written: &mut SchemaGenerator) -> Value {
    let mut responses = Object::new();
    let (status, response) = match (route.answer, route.media) {
        (Some(shape), _) => {
            let mut media = json!({ "schema": shape(written) });
            let answers = good.iter().filter_map(|row| serde_json::from_str(&row.answer).ok());
            add_examples(&mut media, answers);
            (
                200,
                json!({ "description": "Success, with a body.", "content": { "application/json": media } }),
            )
        }
        (None, Some(media)) => {
            let text = json!({ "schema": { "type": "string" } });
            (
                200,
                json!({ "description": "Success, with a body.", "content": { media: text } }),
            )
        }
        (None, None) => (204, json!({ "description": "Success, without a body." })),
    };
    responses.insert(status.to_string(), response);
    for status in route.refusals {
        responses.insert(status.to_string(), json!({ "$ref": "#/components/responses/Fault" }));
    }
    responses.insert("401".into(), json!({ "$ref": "#/components/responses/Unauthorized" }));
    if !ANSWERED_AT_ONCE.contains(&(route.method, route.path)) {
        responses.insert("503".into(), json!({ "$ref": "#/components/responses/Busy" }));
    }
    responses.into()
}

/// Examples by number, those that are there twice once.
fn add_examples(media: &mut Value, values: impl Iterator<Item = Value>) {
    let mut examples: Vec<Value> = Vec::new();
    for value in values {
        if !examples.contains(&value) && examples.len() < EXAMPLES_MAX {
            examples.push(value);
        }
    }
    if !examples.is_empty() {
        let named = (1..)
            .zip(examples)
            .map(|(number, value)| (number.to_string(), json!({ "value": value })));
        media["examples"] = named.collect::<Object>().into();
    }
}

/// The names in braces: what there may be in their place.
fn path_parameters(path: &str, good: &[Row<'_>]) -> Vec<Value> {
    let mut parameters = Vec::new();
    for (place, part) in path.split('/').enumerate() {
        let Some(name) = part.strip_prefix('{').and_then(|part| part.strip_suffix('}')) else {
            continue;
        };
        let example = good.iter().find_map(|row| path_of(row).split('/').nth(place));
        let (description, schema, example) = match name {
            "id" => (
                "The device's name, as in the body.",
                json!({ "type": "string", "pattern": "^[A-Za-z0-9_]+$" }),
                json!(example),
            ),
            "index" => (
                "The vCPU's number, from 0.",
                json!({ "type": "integer", "minimum": 0, "maximum": vmm::config::MAX_VCPUS - 1 }),
                json!(example.and_then(|text| text.parse::<u64>().ok())),
            ),
            other => panic!("{path}: what may there be in the place of {{{other}}}? Say it here."),
        };
        parameters.push(json!({
            "name": name, "in": "path", "required": true, "description": description, "schema": schema, "example": example,
        }));
    }
    parameters
}

/// The fields of a type, each a parameter.
fn query_parameters(shape: super::super::list::Shape, read: &mut SchemaGenerator) -> Vec<Value> {
    let schema = shape(read);
    let name = schema
        .get("$ref")
        .and_then(Value::as_str)
        .and_then(|path| path.strip_prefix(COMPONENTS));
    let name = name.expect("a type of its own").to_owned();
    // Its fields are parameters: the type itself is no component.
    let schema = read.definitions_mut().remove(&name).expect("made just now");
    let required = schema["required"].as_array().cloned().unwrap_or_default();
    let properties = schema["properties"].as_object().cloned().unwrap_or_default();
    let parameter = |(name, mut schema): (String, Value)| {
        let description = schema.as_object_mut().and_then(|schema| schema.remove("description"));
        json!({
            "name": name, "in": "query", "required": required.contains(&json!(name)), "description": description,
            "schema": schema,
        })
    };
    properties.into_iter().map(parameter).collect()
}

/// The names of components that do not look the same from both sides, or lead to one that does not.
fn differing(read: &Object, written: &Object) -> BTreeSet<String> {
    let both = || read.keys().filter(|name| written.contains_key(*name));
    let mut differing: BTreeSet<String> = both().filter(|name| read[*name] != written[*name]).cloned().collect();
    loop {
        let refers = |name: &&String| {
            let text = written[*name].to_string();
            differing
                .iter()
                .any(|other| text.contains(&format!("\"{COMPONENTS}{other}\"")))
        };
        let more: Vec<String> = both()
            .filter(|name| !differing.contains(*name))
            .filter(refers)
            .cloned()
            .collect();
        if more.is_empty() {
            return differing;
        }
        differing.extend(more);
    }
}

fn answer_name(name: &str, differing: &BTreeSet<String>) -> String {
    if differing.contains(name) {
        format!("{name}Answer")
    } else {
        name.to_owned()
    }
}

/// Has the references of `schema` lead to what is written.
fn rename(schema: &mut Value, differing: &BTreeSet<String>) {
    match schema {
        Value::Object(object) => {
            for (key, value) in object {
                match value {
                    Value::String(path) if key == "$ref" => {
                        if let Some(name) = path.strip_prefix(COMPONENTS) {
                            *path = format!("{COMPONENTS}{}", answer_name(name, differing));
                        }
                    }
                    value => rename(value, differing),
                }
            }
        }
        Value::Array(list) => list.iter_mut().for_each(|value| rename(value, differing)),
        _ => {}
    }
}

fn path_of<'a>(row: &Row<'a>) -> &'a str {
    row.path.split('?').next().unwrap_or_default()
}

/// The first part of the path.
fn tag(path: &str) -> &str {
    match path.split('/').nth(1) {
        None | Some("") => "instance",
        Some(first) => first,
    }
}

/// `putMachineConfig` for `PUT /machine-config`: what a generator of clients calls the function.
fn operation_id(route: &Described) -> String {
    let mut id = route.method.to_lowercase();
    if route.path == "/" {
        id += "Instance";
    }
    for word in route.path.split(['/', '-', '.']).filter(|word| !word.starts_with('{')) {
        let (first, rest) = word.split_at(word.len().min(1));
        id += &(first.to_uppercase() + rest);
    }
    id
}

/// As text that is compared well line by line, and served well: indented by one space.
fn lines_of(document: &Value) -> String {
    let mut text = Vec::new();
    let formatter = serde_json::ser::PrettyFormatter::with_indent(b" ");
    let mut writer = serde_json::Serializer::with_formatter(&mut text, formatter);
    document.serialize(&mut writer).unwrap();
    String::from_utf8(text).unwrap() + "\n"
}

#[test]
fn the_committed_document_is_what_the_code_says() {
    let text = lines_of(&document());
    if std::env::var_os(WRITE).is_some() {
        std::fs::write(COMMITTED, text).unwrap();
        return;
    }
    let committed = std::fs::read_to_string(COMMITTED).unwrap_or_default();
    if committed == text {
        return;
    }
    let differs = committed
        .lines()
        .zip(text.lines())
        .enumerate()
        .find(|(_, (is, should_be))| is != should_be);
    let differs = differs.map_or_else(String::new, |(line, (is, should_be))| {
        format!(":\nline {}:\n- {is}\n+ {should_be}", line + 1)
    });
    panic!(
        "resources/openapi.json is not what the code says{differs}\nRun `cargo xtask openapi`, and commit what it writes."
    );
}

/// Collects what `value` refers to.
fn references<'a>(value: &'a Value, found: &mut BTreeSet<&'a str>) {
    match value {
        Value::Object(object) => {
            found.extend(object.get("$ref").and_then(Value::as_str));
            object.values().for_each(|value| references(value, found));
        }
        Value::Array(list) => list.iter().for_each(|value| references(value, found)),
        _ => {}
    }
}

#[test]
fn every_component_is_referred_to_and_every_reference_leads_to_one() {
    let document = document();
    let mut found = BTreeSet::new();
    references(&document, &mut found);
    let components = document["components"].as_object().unwrap().iter();
    let there: BTreeSet<String> = components
        .flat_map(|(kind, of)| {
            of.as_object()
                .unwrap()
                .keys()
                .map(move |name| format!("#/components/{kind}/{name}"))
        })
        .collect();
    assert_eq!(found, there.iter().map(String::as_str).collect());
    // schemars numbers types of one name.
    let numbered: Vec<_> = there
        .iter()
        .filter(|name| name.ends_with(|last: char| last.is_ascii_digit()))
        .collect();
    assert!(
        numbered.is_empty(),
        "of one name with others, to be renamed by #[schemars(rename)]: {numbered:?}"
    );
}

#[tokio::test]
async fn that_too_many_wait_is_said_of_those_that_wait() {
    let document = document();
    let shared = Shared::new(Arc::new(Fake::new(Running)), || {});
    // As many wait as may.
    shared.queue.close();
    let router = router(shared, Limits::default());
    // The stream's is another limit, and a test's of its own.
    for route in described().iter().filter(|route| route.path != STREAM) {
        let good = lines()
            .filter(|line| !line.starts_with("== "))
            .map(row)
            .find(|row| row.kind == "good" && row.method == route.method && fits(route.path, path_of(row)));
        let good = good.expect("there is one of each route");
        let (status, _) = request_of(&router, good.method, good.path, &good.body).await;
        let responses = &document["paths"][route.path][route.method.to_lowercase()]["responses"];
        let (busy, said) = (status == 503, responses.get("503").is_some());
        assert_eq!(busy, said, "{} {}: {status}", route.method, route.path);
    }
}

#[test]
fn no_two_operations_are_of_one_name() {
    let routes = described();
    let names: BTreeSet<_> = routes.iter().map(operation_id).collect();
    assert_eq!(names.len(), routes.len(), "{names:?}");
}
