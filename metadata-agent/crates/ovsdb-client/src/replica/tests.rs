//! Updates in both formats, and invalid updates.

use proptest::prelude::*;
use serde_json::json;

use super::*;

const TABLES: &[TableSchema] = &[TableSchema {
    name: "T",
    columns: &[("name", ColumnKind::Optional), ("members", ColumnKind::Set), ("ids", ColumnKind::Map)],
}];
const ROW: Uuid = Uuid::from_u128(1);

fn difference(replica: &mut Replica, update: &Value) -> Result<Vec<RowChange>, UpdateError> {
    replica.apply(UpdateFormat::Differences, &json!({ "T": { ROW.to_string(): update } }))
}

fn map(pairs: &[(&str, &str)]) -> Datum {
    Datum::Map(pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect())
}

#[test]
fn differences_accumulate() {
    let mut replica = Replica::new(TABLES);
    let (a, b) = (Uuid::from_u128(0xa), Uuid::from_u128(0xb));
    let row = json!({ "name": "x", "members": ["uuid", a.to_string()], "ids": ["map", [["k", "1"], ["gone", "2"]]] });
    difference(&mut replica, &json!({ "insert": row })).unwrap();
    let change = json!({
        "name": "y",
        "members": ["set", [["uuid", a.to_string()], ["uuid", b.to_string()]]],
        "ids": ["map", [["k", "3"], ["gone", "2"], ["new", "4"]]],
    });
    let changes = difference(&mut replica, &json!({ "modify": change })).unwrap();
    let before = changes.into_iter().next().unwrap().before.unwrap();
    assert_eq!(before["ids"], map(&[("k", "1"), ("gone", "2")]));
    let now = replica.row("T", ROW).unwrap();
    assert_eq!(now["name"], Datum::Set([Atom::String("y".into())].into()));
    assert_eq!(now["members"], Datum::Set([Atom::Uuid(b)].into()));
    assert_eq!(now["ids"], map(&[("k", "3"), ("new", "4")]));

    difference(&mut replica, &json!({ "modify": { "ids": ["map", [["k", "3"]]] } })).unwrap();
    assert_eq!(replica.row("T", ROW).unwrap()["ids"], map(&[("new", "4")]));
    difference(&mut replica, &json!({ "delete": null })).unwrap();
    assert_eq!(replica.row("T", ROW), None);
}

#[test]
fn complete_rows_replace_each_other() {
    let mut replica = Replica::new(TABLES);
    let mut complete = |update: Value| {
        replica.apply(UpdateFormat::Rows, &json!({ "T": { ROW.to_string(): update } })).unwrap();
        replica.row("T", ROW).cloned()
    };
    let row = |value: &str| json!({ "name": "x", "members": ["set", []], "ids": ["map", [["k", value]]] });
    assert_eq!(complete(json!({ "new": row("1") })).unwrap()["ids"], map(&[("k", "1")]));
    let changed = json!({ "old": { "ids": ["map", [["k", "1"]]] }, "new": row("2") });
    assert_eq!(complete(changed).unwrap()["ids"], map(&[("k", "2")]));
    assert_eq!(complete(json!({ "old": row("2") })), None);
}

#[test]
fn invalid_updates_are_rejected() {
    let insert =
        |column: &str, value: Value| json!({ "T": { ROW.to_string(): { "insert": { column: value } } } });
    for bad in [
        json!([]),
        json!({ "U": {} }),
        json!({ "T": [] }),
        json!({ "T": { "no-uuid": { "insert": {} } } }),
        json!({ "T": { ROW.to_string(): null } }),
        json!({ "T": { ROW.to_string(): {} } }),
        json!({ "T": { ROW.to_string(): { "insert": {}, "delete": null } } }),
        json!({ "T": { ROW.to_string(): { "replace": {} } } }),
        json!({ "T": { ROW.to_string(): { "delete": null } } }),
        json!({ "T": { ROW.to_string(): { "modify": {} } } }),
        insert("other", json!("x")),
        insert("name", json!(7.5)),
        insert("name", json!(["set", ["a", "b"]])),
        insert("name", json!(["map", []])),
        insert("members", json!(["uuid", "x"])),
        insert("members", json!({ "set": [] })),
        insert("ids", json!("x")),
        insert("ids", json!(["map", [["k"]]])),
        insert("ids", json!(["map", [["k", 7]]])),
        insert("ids", json!(["map", [], []])),
    ] {
        assert!(Replica::new(TABLES).apply(UpdateFormat::Differences, &bad).is_err(), "{bad}");
    }
    let mut replica = Replica::new(TABLES);
    difference(&mut replica, &json!({ "insert": {} })).unwrap();
    let twice = difference(&mut replica, &json!({ "insert": {} })).unwrap_err();
    assert!(matches!(twice, UpdateError::OutOfOrder { action: "insert", .. }), "{twice}");
}

#[test]
fn an_error_quotes_only_the_beginning_of_a_value() {
    let error = Replica::new(TABLES).apply(UpdateFormat::Rows, &json!("ü".repeat(1_000_000))).unwrap_err();
    assert!(error.to_string().len() < 300);
}

proptest! {
    /// A difference of two maps, computed as the server does, turns the old into the new one.
    #[test]
    fn a_map_difference_turns_old_into_new(
        old in proptest::collection::btree_map("[a-d]", "[xy]", 0..4),
        new in proptest::collection::btree_map("[a-d]", "[xy]", 0..4),
    ) {
        let mut difference = new.clone();
        difference.retain(|key, value| old.get(key) != Some(value));
        difference.extend(old.iter().filter(|(key, _)| !new.contains_key(*key)).map(|(k, v)| (k.clone(), v.clone())));
        prop_assert_eq!(apply_to_value(ColumnKind::Map, Some(Datum::Map(old)), Datum::Map(difference)), Datum::Map(new));
    }
}
