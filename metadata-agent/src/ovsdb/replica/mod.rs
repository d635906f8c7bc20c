//! A copy of some columns of some tables, kept in step by the server's updates.
//!
//! Input are the updates of `monitor` (RFC 7047, section 4.1.6) and of `monitor_cond` (ovsdb-server(7), section
//! 4.1.14), output is what changed. Columns have one of three kinds; of each value the kind is checked, so whoever
//! reads a row need not. An update that does not fit is an error, after which the copy is of no use: what it would
//! say of any row is unknown.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use serde_json::{Map, Value};
use uuid::Uuid;

/// A table to be copied.
#[derive(Debug)]
pub(crate) struct Table {
    pub(crate) name: &'static str,
    pub(crate) columns: &'static [(&'static str, Kind)],
}

/// What a column holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// At most one atom.
    One,
    /// Any number of atoms.
    Set,
    /// Texts by text.
    Map,
}

/// A value. `One` is a set, too.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Datum {
    Set(BTreeSet<Atom>),
    Map(BTreeMap<String, String>),
}

/// A scalar of the types that the tables have.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Atom {
    Text(String),
    Uuid(Uuid),
    Integer(i64),
    Boolean(bool),
}

/// The columns of a row; what is at its default may be left out.
pub(crate) type Row = HashMap<&'static str, Datum>;

/// One row that is not what it was.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Change {
    pub(crate) table: &'static str,
    pub(crate) row: Uuid,
    /// `None` if it is new. What it is now is in the replica.
    pub(crate) before: Option<Row>,
}

/// In which of its two forms the server sends updates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    /// `update`: rows whole.
    Whole,
    /// `update2`: rows as differences.
    Difference,
}

/// Why an update does not fit.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum UpdateError {
    /// Something is not of the form that the protocol gives it.
    #[error("sends {found} where {wanted} is due")]
    Shape {
        /// What should be there.
        wanted: &'static str,
        /// What is there, cut short.
        found: String,
    },
    /// It speaks of a table or a column that was not asked for.
    #[error("speaks of {name:?}, which was not asked for")]
    NotAskedFor {
        /// The table or column.
        name: String,
    },
    /// It changes or removes a row that is not there, or adds one that is.
    #[error("{action} row {row} of table {table} out of turn")]
    OutOfTurn {
        /// What it does to it.
        action: &'static str,
        /// The table.
        table: &'static str,
        /// The row.
        row: Uuid,
    },
}

/// The copy.
#[derive(Debug)]
pub(crate) struct Replica {
    tables: &'static [Table],
    rows: HashMap<(&'static str, Uuid), Row>,
}

impl Replica {
    pub(crate) fn new(tables: &'static [Table]) -> Self {
        Self { tables, rows: HashMap::new() }
    }

    /// The rows of a table.
    pub(crate) fn rows(&self, table: &'static str) -> impl Iterator<Item = (Uuid, &Row)> {
        self.rows
            .iter()
            .filter(move |((name, _), _)| *name == table)
            .map(|((_, row), columns)| (*row, columns))
    }

    pub(crate) fn row(&self, table: &'static str, row: Uuid) -> Option<&Row> {
        self.rows.get(&(table, row))
    }

    /// Takes an update in.
    pub(crate) fn apply(&mut self, form: Form, updates: &Value) -> Result<Vec<Change>, UpdateError> {
        let mut changes = Vec::new();
        for (name, rows) in object(updates, "an object of tables")? {
            let table = self.tables.iter().find(|table| table.name == name);
            let table = table.ok_or_else(|| UpdateError::NotAskedFor { name: name.clone() })?;
            for (row, update) in object(rows, "an object of rows")? {
                let row =
                    Uuid::try_parse(row).map_err(|_| shape("a row's UUID", &Value::from(row.as_str())))?;
                let update = object(update, "an update of a row")?;
                let before = match form {
                    Form::Whole => self.apply_whole(table, row, update)?,
                    Form::Difference => self.apply_difference(table, row, update)?,
                };
                changes.push(Change { table: table.name, row, before });
            }
        }
        Ok(changes)
    }

    fn apply_whole(
        &mut self,
        table: &Table,
        row: Uuid,
        update: &Map<String, Value>,
    ) -> Result<Option<Row>, UpdateError> {
        let key = (table.name, row);
        let Some(new) = update.get("new") else {
            return self.rows.remove(&key).map(Some).ok_or(out_of_turn("deletes", table, row));
        };
        Ok(self.rows.insert(key, columns(table, new)?))
    }

    fn apply_difference(
        &mut self,
        table: &Table,
        row: Uuid,
        update: &Map<String, Value>,
    ) -> Result<Option<Row>, UpdateError> {
        let key = (table.name, row);
        let mut actions = update.iter();
        let (Some((action, value)), None) = (actions.next(), actions.next()) else {
            return Err(shape("one action on a row", &Value::from(update.clone())));
        };
        match action.as_str() {
            "initial" | "insert" => match self.rows.insert(key, columns(table, value)?) {
                None => Ok(None),
                Some(_) => Err(out_of_turn("inserts", table, row)),
            },
            "delete" => self.rows.remove(&key).map(Some).ok_or(out_of_turn("deletes", table, row)),
            "modify" => {
                let differences = columns(table, value)?;
                let now = self.rows.get_mut(&key).ok_or(out_of_turn("modifies", table, row))?;
                let before = now.clone();
                for &(name, kind) in table.columns {
                    if let Some(difference) = differences.get(name) {
                        let old = now.remove(name);
                        now.insert(name, changed(kind, old, difference.clone()));
                    }
                }
                Ok(Some(before))
            }
            _ => Err(shape("initial, insert, modify or delete", &Value::from(action.as_str()))),
        }
    }
}

/// What a value is after a difference (ovsdb-server(7), section 4.1.14).
fn changed(kind: Kind, old: Option<Datum>, difference: Datum) -> Datum {
    match (kind, old, difference) {
        (Kind::Set, Some(Datum::Set(old)), Datum::Set(flipped)) => {
            Datum::Set(old.symmetric_difference(&flipped).cloned().collect())
        }
        (Kind::Map, Some(Datum::Map(mut old)), Datum::Map(difference)) => {
            for (key, value) in difference {
                // An entry that is there already means that it goes.
                if old.get(&key) == Some(&value) {
                    old.remove(&key);
                } else {
                    old.insert(key, value);
                }
            }
            Datum::Map(old)
        }
        (Kind::One | Kind::Set | Kind::Map, _, new) => new,
    }
}

fn columns(table: &Table, value: &Value) -> Result<Row, UpdateError> {
    let mut row = Row::new();
    for (name, value) in object(value, "an object of columns")? {
        let column = table.columns.iter().find(|(column, _)| column == name);
        let (name, kind) = *column.ok_or_else(|| UpdateError::NotAskedFor { name: name.clone() })?;
        row.insert(name, datum(kind, value)?);
    }
    Ok(row)
}

fn datum(kind: Kind, value: &Value) -> Result<Datum, UpdateError> {
    let tagged = |tag: &str| match value.as_array().map(Vec::as_slice) {
        Some([found, Value::Array(items)]) if found == tag => Some(items),
        _ => None,
    };
    if kind == Kind::Map {
        let wanted = "a map of texts";
        let pairs = tagged("map").ok_or_else(|| shape(wanted, value))?;
        let pairs = pairs.iter().map(|pair| match pair.as_array().map(Vec::as_slice) {
            Some([Value::String(key), Value::String(value)]) => Ok((key.clone(), value.clone())),
            _ => Err(shape(wanted, pair)),
        });
        return pairs.collect::<Result<_, _>>().map(Datum::Map);
    }
    // A set of one may be written as that one.
    let atoms = match tagged("set") {
        Some(items) => items.iter().map(atom).collect::<Result<BTreeSet<_>, _>>()?,
        None => BTreeSet::from([atom(value)?]),
    };
    if kind == Kind::One && atoms.len() > 1 {
        return Err(shape("at most one value", value));
    }
    Ok(Datum::Set(atoms))
}

fn atom(value: &Value) -> Result<Atom, UpdateError> {
    let fault = || shape("a text, a whole number, a truth or a UUID", value);
    match value {
        Value::String(text) => return Ok(Atom::Text(text.clone())),
        Value::Bool(truth) => return Ok(Atom::Boolean(*truth)),
        Value::Number(number) => return number.as_i64().map(Atom::Integer).ok_or_else(fault),
        Value::Null | Value::Array(_) | Value::Object(_) => {}
    }
    match value.as_array().map(Vec::as_slice) {
        Some([tag, Value::String(uuid)]) if tag == "uuid" => {
            Uuid::try_parse(uuid).map(Atom::Uuid).map_err(|_| fault())
        }
        _ => Err(fault()),
    }
}

/// The text under a key of a column of texts by text.
pub(crate) fn entry<'a>(row: &'a Row, column: &str, key: &str) -> Option<&'a str> {
    match row.get(column)? {
        Datum::Map(map) => map.get(key).map(String::as_str),
        Datum::Set(_) => None,
    }
}

/// The texts in a column.
pub(crate) fn texts<'a>(row: &'a Row, column: &str) -> impl Iterator<Item = &'a str> {
    let atoms = match row.get(column) {
        Some(Datum::Set(atoms)) => Some(atoms),
        Some(Datum::Map(_)) | None => None,
    };
    atoms.into_iter().flatten().filter_map(|atom| match atom {
        Atom::Text(text) => Some(text.as_str()),
        Atom::Uuid(_) | Atom::Integer(_) | Atom::Boolean(_) => None,
    })
}

/// The text in a column of at most one; empty where there is none.
pub(crate) fn text<'a>(row: &'a Row, column: &str) -> &'a str {
    texts(row, column).next().unwrap_or_default()
}

/// The whole number in a column of at most one.
pub(crate) fn integer(row: &Row, column: &str) -> Option<i64> {
    match row.get(column)? {
        Datum::Set(atoms) => atoms.iter().find_map(|atom| match atom {
            Atom::Integer(number) => Some(*number),
            Atom::Text(_) | Atom::Uuid(_) | Atom::Boolean(_) => None,
        }),
        Datum::Map(_) => None,
    }
}

/// The rows that a column refers to.
pub(crate) fn references<'a>(row: &'a Row, column: &str) -> impl Iterator<Item = Uuid> + 'a {
    let atoms = match row.get(column) {
        Some(Datum::Set(atoms)) => Some(atoms),
        Some(Datum::Map(_)) | None => None,
    };
    atoms.into_iter().flatten().filter_map(|atom| match atom {
        Atom::Uuid(uuid) => Some(*uuid),
        Atom::Text(_) | Atom::Integer(_) | Atom::Boolean(_) => None,
    })
}

fn object<'a>(value: &'a Value, wanted: &'static str) -> Result<&'a Map<String, Value>, UpdateError> {
    value.as_object().ok_or_else(|| shape(wanted, value))
}

pub(crate) fn shape(wanted: &'static str, value: &Value) -> UpdateError {
    let mut found = value.to_string();
    if let Some((end, _)) = found.char_indices().nth(100) {
        found.truncate(end);
        found.push_str("...");
    }
    UpdateError::Shape { wanted, found }
}

fn out_of_turn(action: &'static str, table: &Table, row: Uuid) -> UpdateError {
    UpdateError::OutOfTurn { action, table: table.name, row }
}

#[cfg(test)]
mod tests;
