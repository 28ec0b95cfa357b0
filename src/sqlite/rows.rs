//! The columns that the tables of conversations, queue and dead letters share.

use rusqlite::Row;
use rusqlite::types::Type;

use crate::model::append::Append;
use crate::model::json::Json;
use crate::model::key::Key;
use crate::model::record::Record;
use crate::model::version::{Timestamp, Version};

pub(crate) const COLUMNS: &str = "key, version, value, expires_at, user, metadata";

/// Reads a record from the columns of [`COLUMNS`]. Skips the check of its JSON, because a commit implies one.
pub(crate) fn record(row: &Row<'_>) -> rusqlite::Result<Record> {
    let text = |column: usize| row.get::<_, Option<String>>(column);
    Ok(Record {
        key: key(row)?,
        version: Version::from_raw(row.get(1)?),
        value: text(2)?.map(Json::trusted),
        expires_at: Timestamp(row.get(3)?),
        user: text(4)?.map(Into::into),
        metadata: Json::trusted(row.get::<_, String>(5)?),
    })
}

pub(crate) fn key(row: &Row<'_>) -> rusqlite::Result<Key> {
    Key::new(row.get_ref(0)?.as_str()?)
        .map_err(|e| rusqlite::Error::FromSqlConversionFailure(0, Type::Text, Box::new(e)))
}

/// Reads the target of an append from a column. A write that is no append has none.
pub(crate) fn append(row: &Row<'_>, column: usize) -> rusqlite::Result<Option<Append>> {
    let parse = |text: String| serde_json::from_str(&text);
    let append = row.get::<_, Option<String>>(column)?.map(parse).transpose();
    append.map_err(|e| rusqlite::Error::FromSqlConversionFailure(column, Type::Text, Box::new(e)))
}

/// Writes the target of an append for its column.
pub(crate) fn append_text(append: Option<&Append>) -> rusqlite::Result<Option<String>> {
    let text = append.map(serde_json::to_string).transpose();
    text.map_err(|e| rusqlite::Error::ToSqlConversionFailure(Box::new(e)))
}
