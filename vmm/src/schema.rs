//! What JSON Schema is told of a field that is read otherwise than its type says. With the feature `schema`.

use std::borrow::Cow;
use std::marker::PhantomData;

use schemars::{JsonSchema, Schema, SchemaGenerator};

/// A `T` that may be null where it is read, for its default, and never is where it is written.
pub(crate) struct NullOr<T>(PhantomData<T>);

impl<T: JsonSchema> JsonSchema for NullOr<T> {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        format!("NullOr{}", T::schema_name()).into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        if generator.contract().is_deserialize() {
            generator.subschema_for::<Option<T>>()
        } else {
            generator.subschema_for::<T>()
        }
    }
}
