//! Local copy of some columns of some tables, kept current by the server's updates.
//!
//! Input are the updates of `monitor` (RFC 7047, section 4.1.6) and of `monitor_cond`
//! (ovsdb-server(7), section 4.1.14); output are the changed rows. Every value is checked against
//! the [`ColumnKind`] of its column, so readers of a row need not check again. After an error the
//! copy must be discarded, because the state of every row is unknown.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use serde_json::{Map, Value};
use uuid::Uuid;

/// Table and columns to copy.
#[derive(Debug)]
pub struct TableSchema {
    pub name: &'static str,
    pub columns: &'static [(&'static str, ColumnKind)],
}

/// Shape of a column's value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ColumnKind {
    /// At most one atom.
    Optional,
    /// Any number of atoms.
    Set,
    /// Strings by string.
    Map,
}

/// Value of a column. An optional value is a set, too.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Datum {
    Set(BTreeSet<Atom>),
    Map(BTreeMap<String, String>),
}

/// Scalar value. Real numbers are not supported.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Atom {
    String(String),
    Uuid(Uuid),
    Integer(i64),
    Boolean(bool),
}

/// Columns of a row. A column with its default value may be absent.
pub type Row = HashMap<&'static str, Datum>;

/// Row that was inserted, modified or deleted.
#[derive(Debug, PartialEq, Eq)]
pub struct RowChange {
    pub table: &'static str,
    pub row: Uuid,
    /// `None` for a new row. The present columns are in the replica.
    pub before: Option<Row>,
}

/// Format of the server's updates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UpdateFormat {
    /// `update`: complete rows.
    Rows,
    /// `update2`: differences between rows.
    Differences,
}

/// Update that violates the protocol or contradicts the replica.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum UpdateError {
    /// `found` is shortened.
    #[error("expected {expected}, got {found}")]
    Unexpected { expected: &'static str, found: String },
    #[error("table or column {name:?} was not requested")]
    NotRequested { name: String },
    /// A row is modified or deleted that does not exist, or inserted although it exists.
    #[error("cannot {action} row {row} of table {table}")]
    OutOfOrder { action: &'static str, table: &'static str, row: Uuid },
}

impl UpdateError {
    /// Creates an error that quotes the beginning of an unexpected value.
    #[must_use]
    pub fn unexpected(expected: &'static str, value: &Value) -> Self {
        let mut found = value.to_string();
        if let Some((end, _)) = found.char_indices().nth(100) {
            found.truncate(end);
            found.push_str("...");
        }
        Self::Unexpected { expected, found }
    }

    fn out_of_order(action: &'static str, table: &TableSchema, row: Uuid) -> Self {
        Self::OutOfOrder { action, table: table.name, row }
    }
}

/// Local copy of the monitored rows.
#[derive(Debug)]
pub struct Replica {
    tables: &'static [TableSchema],
    rows: HashMap<(&'static str, Uuid), Row>,
}

impl Replica {
    #[must_use]
    pub fn new(tables: &'static [TableSchema]) -> Self {
        Self { tables, rows: HashMap::new() }
    }

    /// Returns the rows of a table.
    pub fn rows(&self, table: &'static str) -> impl Iterator<Item = (Uuid, &Row)> {
        self.rows
            .iter()
            .filter(move |((name, _), _)| *name == table)
            .map(|((_, row), columns)| (*row, columns))
    }

    #[must_use]
    pub fn row(&self, table: &'static str, row: Uuid) -> Option<&Row> {
        self.rows.get(&(table, row))
    }

    /// Applies an update.
    ///
    /// # Errors
    /// The update is invalid. The replica must be discarded.
    pub fn apply(&mut self, format: UpdateFormat, updates: &Value) -> Result<Vec<RowChange>, UpdateError> {
        let mut changes = Vec::new();
        for (name, rows) in object(updates, "an object of tables")? {
            let table = self.tables.iter().find(|table| table.name == name);
            let table = table.ok_or_else(|| UpdateError::NotRequested { name: name.clone() })?;
            for (row, update) in object(rows, "an object of rows")? {
                let row = Uuid::try_parse(row)
                    .map_err(|_| UpdateError::unexpected("a row's UUID", &Value::from(row.as_str())))?;
                let update = object(update, "an update of a row")?;
                let before = match format {
                    UpdateFormat::Rows => self.apply_row(table, row, update)?,
                    UpdateFormat::Differences => self.apply_difference(table, row, update)?,
                };
                changes.push(RowChange { table: table.name, row, before });
            }
        }
        Ok(changes)
    }

    fn apply_row(
        &mut self,
        table: &TableSchema,
        row: Uuid,
        update: &Map<String, Value>,
    ) -> Result<Option<Row>, UpdateError> {
        let key = (table.name, row);
        let Some(new) = update.get("new") else {
            return self.rows.remove(&key).map(Some).ok_or(UpdateError::out_of_order("delete", table, row));
        };
        Ok(self.rows.insert(key, columns(table, new)?))
    }

    fn apply_difference(
        &mut self,
        table: &TableSchema,
        row: Uuid,
        update: &Map<String, Value>,
    ) -> Result<Option<Row>, UpdateError> {
        let key = (table.name, row);
        let mut actions = update.iter();
        let (Some((action, value)), None) = (actions.next(), actions.next()) else {
            return Err(UpdateError::unexpected("one action on a row", &Value::from(update.clone())));
        };
        match action.as_str() {
            "initial" | "insert" => match self.rows.insert(key, columns(table, value)?) {
                None => Ok(None),
                Some(_) => Err(UpdateError::out_of_order("insert", table, row)),
            },
            "delete" => {
                self.rows.remove(&key).map(Some).ok_or(UpdateError::out_of_order("delete", table, row))
            }
            "modify" => {
                let differences = columns(table, value)?;
                let now = self.rows.get_mut(&key).ok_or(UpdateError::out_of_order("modify", table, row))?;
                let before = now.clone();
                for &(name, kind) in table.columns {
                    if let Some(difference) = differences.get(name) {
                        let old = now.remove(name);
                        now.insert(name, apply_to_value(kind, old, difference.clone()));
                    }
                }
                Ok(Some(before))
            }
            _ => Err(UpdateError::unexpected(
                "initial, insert, modify or delete",
                &Value::from(action.as_str()),
            )),
        }
    }
}

/// Applies a difference to a value (ovsdb-server(7), section 4.1.14).
fn apply_to_value(kind: ColumnKind, old: Option<Datum>, difference: Datum) -> Datum {
    match (kind, old, difference) {
        (ColumnKind::Set, Some(Datum::Set(old)), Datum::Set(toggled)) => {
            Datum::Set(old.symmetric_difference(&toggled).cloned().collect())
        }
        (ColumnKind::Map, Some(Datum::Map(mut old)), Datum::Map(difference)) => {
            for (key, value) in difference {
                // A difference that repeats an entry removes it.
                if old.get(&key) == Some(&value) {
                    old.remove(&key);
                } else {
                    old.insert(key, value);
                }
            }
            Datum::Map(old)
        }
        (ColumnKind::Optional | ColumnKind::Set | ColumnKind::Map, _, new) => new,
    }
}

fn columns(table: &TableSchema, value: &Value) -> Result<Row, UpdateError> {
    let mut row = Row::new();
    for (name, value) in object(value, "an object of columns")? {
        let column = table.columns.iter().find(|(column, _)| column == name);
        let (name, kind) = *column.ok_or_else(|| UpdateError::NotRequested { name: name.clone() })?;
        row.insert(name, datum(kind, value)?);
    }
    Ok(row)
}

fn datum(kind: ColumnKind, value: &Value) -> Result<Datum, UpdateError> {
    let tagged = |tag: &str| match value.as_array().map(Vec::as_slice) {
        Some([found, Value::Array(items)]) if found == tag => Some(items),
        _ => None,
    };
    if kind == ColumnKind::Map {
        let expected = "a map of strings";
        let pairs = tagged("map").ok_or_else(|| UpdateError::unexpected(expected, value))?;
        let pairs = pairs.iter().map(|pair| match pair.as_array().map(Vec::as_slice) {
            Some([Value::String(key), Value::String(value)]) => Ok((key.clone(), value.clone())),
            _ => Err(UpdateError::unexpected(expected, pair)),
        });
        return pairs.collect::<Result<_, _>>().map(Datum::Map);
    }
    // A set with one member may be written as that member.
    let atoms = match tagged("set") {
        Some(items) => items.iter().map(atom).collect::<Result<BTreeSet<_>, _>>()?,
        None => BTreeSet::from([atom(value)?]),
    };
    if kind == ColumnKind::Optional && atoms.len() > 1 {
        return Err(UpdateError::unexpected("at most one value", value));
    }
    Ok(Datum::Set(atoms))
}

fn atom(value: &Value) -> Result<Atom, UpdateError> {
    let invalid = || UpdateError::unexpected("a string, an integer, a boolean or a UUID", value);
    match value {
        Value::String(text) => return Ok(Atom::String(text.clone())),
        Value::Bool(value) => return Ok(Atom::Boolean(*value)),
        Value::Number(number) => return number.as_i64().map(Atom::Integer).ok_or_else(invalid),
        Value::Null | Value::Array(_) | Value::Object(_) => {}
    }
    match value.as_array().map(Vec::as_slice) {
        Some([tag, Value::String(uuid)]) if tag == "uuid" => {
            Uuid::try_parse(uuid).map(Atom::Uuid).map_err(|_| invalid())
        }
        _ => Err(invalid()),
    }
}

/// Returns the value of a key in a map column.
#[must_use]
pub fn map_value<'a>(row: &'a Row, column: &str, key: &str) -> Option<&'a str> {
    match row.get(column)? {
        Datum::Map(map) => map.get(key).map(String::as_str),
        Datum::Set(_) => None,
    }
}

/// Returns the strings in a set column.
pub fn texts<'a>(row: &'a Row, column: &str) -> impl Iterator<Item = &'a str> {
    let atoms = match row.get(column) {
        Some(Datum::Set(atoms)) => Some(atoms),
        Some(Datum::Map(_)) | None => None,
    };
    atoms.into_iter().flatten().filter_map(|atom| match atom {
        Atom::String(text) => Some(text.as_str()),
        Atom::Uuid(_) | Atom::Integer(_) | Atom::Boolean(_) => None,
    })
}

/// Returns the string in an optional column; empty without one.
#[must_use]
pub fn text<'a>(row: &'a Row, column: &str) -> &'a str {
    texts(row, column).next().unwrap_or_default()
}

/// Returns the integer in an optional column.
#[must_use]
pub fn integer(row: &Row, column: &str) -> Option<i64> {
    match row.get(column)? {
        Datum::Set(atoms) => atoms.iter().find_map(|atom| match atom {
            Atom::Integer(number) => Some(*number),
            Atom::String(_) | Atom::Uuid(_) | Atom::Boolean(_) => None,
        }),
        Datum::Map(_) => None,
    }
}

/// Returns the rows that a column refers to.
pub fn references<'a>(row: &'a Row, column: &str) -> impl Iterator<Item = Uuid> + 'a {
    let atoms = match row.get(column) {
        Some(Datum::Set(atoms)) => Some(atoms),
        Some(Datum::Map(_)) | None => None,
    };
    atoms.into_iter().flatten().filter_map(|atom| match atom {
        Atom::Uuid(uuid) => Some(*uuid),
        Atom::String(_) | Atom::Integer(_) | Atom::Boolean(_) => None,
    })
}

fn object<'a>(value: &'a Value, expected: &'static str) -> Result<&'a Map<String, Value>, UpdateError> {
    value.as_object().ok_or_else(|| UpdateError::unexpected(expected, value))
}

#[cfg(test)]
mod tests;
