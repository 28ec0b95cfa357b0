//! Serialization to JSON text that decodes to the same value.
//!
//! serde_json alone writes a number that is not finite as `null`, so no later call can decode or update the conversation.
//! Here such a number is an error. serde_json also parses integers beyond 64 bits as floats. `untouched.rs` restores their
//! digits if an update leaves them alone.
//!
//! Why not serde_json's feature `arbitrary_precision`? A feature holds for the whole daemon. With this one, serde_json cannot
//! decode floats inside tagged enums, untagged enums and flattened structs.

use std::fmt::Display;
use std::io;

use serde::Serialize;
use serde::ser::{
    Error as _, SerializeMap, SerializeSeq, SerializeStruct, SerializeStructVariant, SerializeTuple,
    SerializeTupleStruct, SerializeTupleVariant, Serializer,
};
use serde_json::ser::{CompactFormatter, Formatter};

/// Writes a value as JSON text.
///
/// # Errors
/// A number is not finite, or JSON cannot express the value, such as a map with keys that are not strings.
pub(crate) fn text<T: Serialize + ?Sized>(value: &T) -> serde_json::Result<String> {
    // Most conversations are larger than the first steps in which a vector grows.
    let mut text = Vec::with_capacity(2_048);
    value.serialize(Finite(&mut serde_json::Serializer::with_formatter(&mut text, PointFormatter)))?;
    String::from_utf8(text).map_err(serde_json::Error::custom)
}

/// Writes floats so that `jsonb` returns floats. `jsonb` turns `1e16` into an integer of 17 digits, and keeps
/// `10000000000000000.0`. From 2e19 on, serde_json reads integers as floats anyway.
struct PointFormatter;

impl PointFormatter {
    fn needs_point(value: f64) -> bool {
        const MIN_WITH_EXPONENT: f64 = 1e16;
        const MAX_INTEGER: f64 = 2e19;
        (MIN_WITH_EXPONENT..MAX_INTEGER).contains(&value.abs())
    }
}

impl Formatter for PointFormatter {
    fn write_f64<W: io::Write + ?Sized>(&mut self, writer: &mut W, value: f64) -> io::Result<()> {
        match Self::needs_point(value) {
            true => write!(writer, "{value:.1}"),
            false => CompactFormatter.write_f64(writer, value),
        }
    }

    fn write_f32<W: io::Write + ?Sized>(&mut self, writer: &mut W, value: f32) -> io::Result<()> {
        match Self::needs_point(value.into()) {
            true => write!(writer, "{value:.1}"),
            false => CompactFormatter.write_f32(writer, value),
        }
    }
}

/// Rejects numbers that are not finite, and passes all else to the inner serializer, or to that of a sequence, map, tuple or
/// struct.
struct Finite<S>(S);

/// Wraps a nested value, so that the check reaches its numbers too.
struct Nested<'a, T: ?Sized>(&'a T);

impl<T: Serialize + ?Sized> Serialize for Nested<'_, T> {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        self.0.serialize(Finite(to))
    }
}

fn not_finite<E: serde::ser::Error>(number: impl Display) -> E {
    E::custom(format_args!("it has a number that is not finite ({number})"))
}

/// Forwards the methods of a serializer. A nested value gets wrapped, and so does the serializer of several values.
macro_rules! forward {
    (values { $($value:ident($($arg:ident: $type:ty),*);)* }
     nested { $($nested:ident($($before:ident: $before_type:ty),*);)* }
     several { $($several:ident($($of:ident: $of_type:ty),*) -> $inner:ident;)* }) => {
        $(fn $value(self, $($arg: $type),*) -> Result<S::Ok, S::Error> {
            self.0.$value($($arg),*)
        })*
        $(fn $nested<T: Serialize + ?Sized>(self, $($before: $before_type,)* value: &T) -> Result<S::Ok, S::Error> {
            self.0.$nested($($before,)* &Nested(value))
        })*
        $(fn $several(self, $($of: $of_type),*) -> Result<Self::$inner, S::Error> {
            self.0.$several($($of),*).map(Finite)
        })*
    };
}

impl<S: Serializer> Serializer for Finite<S> {
    type Ok = S::Ok;
    type Error = S::Error;
    type SerializeSeq = Finite<S::SerializeSeq>;
    type SerializeTuple = Finite<S::SerializeTuple>;
    type SerializeTupleStruct = Finite<S::SerializeTupleStruct>;
    type SerializeTupleVariant = Finite<S::SerializeTupleVariant>;
    type SerializeMap = Finite<S::SerializeMap>;
    type SerializeStruct = Finite<S::SerializeStruct>;
    type SerializeStructVariant = Finite<S::SerializeStructVariant>;

    fn serialize_f32(self, value: f32) -> Result<S::Ok, S::Error> {
        if value.is_finite() { self.0.serialize_f32(value) } else { Err(not_finite(value)) }
    }

    fn serialize_f64(self, value: f64) -> Result<S::Ok, S::Error> {
        if value.is_finite() { self.0.serialize_f64(value) } else { Err(not_finite(value)) }
    }

    forward! {
        values {
            serialize_bool(value: bool);
            serialize_i8(value: i8);
            serialize_i16(value: i16);
            serialize_i32(value: i32);
            serialize_i64(value: i64);
            serialize_i128(value: i128);
            serialize_u8(value: u8);
            serialize_u16(value: u16);
            serialize_u32(value: u32);
            serialize_u64(value: u64);
            serialize_u128(value: u128);
            serialize_char(value: char);
            serialize_str(value: &str);
            serialize_bytes(value: &[u8]);
            serialize_none();
            serialize_unit();
            serialize_unit_struct(name: &'static str);
            serialize_unit_variant(name: &'static str, index: u32, variant: &'static str);
        }
        nested {
            serialize_some();
            serialize_newtype_struct(name: &'static str);
            serialize_newtype_variant(name: &'static str, index: u32, variant: &'static str);
        }
        several {
            serialize_seq(len: Option<usize>) -> SerializeSeq;
            serialize_tuple(len: usize) -> SerializeTuple;
            serialize_tuple_struct(name: &'static str, len: usize) -> SerializeTupleStruct;
            serialize_tuple_variant(name: &'static str, index: u32, variant: &'static str, len: usize) -> SerializeTupleVariant;
            serialize_map(len: Option<usize>) -> SerializeMap;
            serialize_struct(name: &'static str, len: usize) -> SerializeStruct;
            serialize_struct_variant(name: &'static str, index: u32, variant: &'static str, len: usize) -> SerializeStructVariant;
        }
    }

    fn collect_str<T: Display + ?Sized>(self, value: &T) -> Result<S::Ok, S::Error> {
        self.0.collect_str(value)
    }
}

/// Forwards the elements of a value. Each element gets wrapped.
macro_rules! forward_elements {
    ($($trait:ident { $($method:ident($($name:ident: $type:ty)?);)* })*) => { $(
        impl<S: $trait> $trait for Finite<S> {
            type Ok = S::Ok;
            type Error = S::Error;

            $(fn $method<T: Serialize + ?Sized>(&mut self, $($name: $type,)? value: &T) -> Result<(), S::Error> {
                self.0.$method($($name,)? &Nested(value))
            })*

            fn end(self) -> Result<S::Ok, S::Error> {
                self.0.end()
            }
        }
    )* };
}

forward_elements! {
    SerializeSeq { serialize_element(); }
    SerializeTuple { serialize_element(); }
    SerializeTupleStruct { serialize_field(); }
    SerializeTupleVariant { serialize_field(); }
    SerializeStruct { serialize_field(name: &'static str); }
    SerializeStructVariant { serialize_field(name: &'static str); }
    SerializeMap { serialize_key(); serialize_value(); }
}
