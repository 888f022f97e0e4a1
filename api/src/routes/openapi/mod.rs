//! `/openapi.json`: what this API is, as OpenAPI 3.1.
//!
//! What is served is `resources/openapi.json`, word for word. It is written from the code by `cargo xtask openapi`: the routes
//! of `list.rs`, and the types that they read and write. A test holds the two against each other, so that no type says one thing
//! and the document another; the program itself has nothing of what writes it.

use axum::http::header;
use axum::response::{IntoResponse, Response};

const DOCUMENT: &str = include_str!("../../../../resources/openapi.json");

pub(super) async fn get() -> Response {
    ([(header::CONTENT_TYPE, "application/json")], DOCUMENT).into_response()
}

#[cfg(test)]
mod document;
