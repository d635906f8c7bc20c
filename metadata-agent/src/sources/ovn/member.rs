//! Whether a server is one to believe: what it says of itself in its database `_Server` (ovsdb-server(5), `_Server`).
//!
//! A server that stands alone always is. A member of a cluster is while it is connected to the others, and while it is not
//! behind what another member of that cluster has told before: as Open vSwitch's own clients judge (lib/ovsdb-cs.c). How far
//! it is, is asked at the beginning alone, since the log of a cluster moves with every change to any row of it.

use std::collections::HashMap;

use ovsdb_client::{
    Atom, ColumnKind, Datum, Monitor, Replica, Row, Session, SessionError, TableSchema, UpdateError,
    UpdateFormat, text,
};
use serde_json::{Value, json};

const DATABASE: &str = "_Server";
const TABLE: &str = "Database";
/// It is asked for one row alone, that of the database in question.
const TABLES: &[TableSchema] = &[TableSchema {
    name: TABLE,
    columns: &[("model", ColumnKind::Optional), ("connected", ColumnKind::Optional)],
}];

pub(super) const MONITOR: Monitor = Monitor { database: DATABASE, id: "server", tables: TABLES };

/// A server, by what it says of itself.
#[derive(Debug)]
pub(super) struct Member {
    itself: Replica,
    /// Its cluster and how far in its log it was at the beginning.
    position: Option<(String, i64)>,
}

/// How far the clusters were that members told of.
#[derive(Debug, Default)]
pub(super) struct Clusters(HashMap<String, i64>);

impl Member {
    /// Asks a server for itself and a database of it.
    pub(super) async fn ask(session: &mut Session, database: &'static str) -> Result<Self, SessionError> {
        let mut itself = Replica::new(TABLES);
        let mut position = None;
        // Open vSwitch before 2.9 has no such database, and no clusters.
        if session.require_database(database, DATABASE).await? {
            let clauses = json!([["name", "==", database]]);
            itself.apply(UpdateFormat::Differences, &session.monitor_where(MONITOR, &clauses).await?)?;
            let rows = session.select(DATABASE, TABLE, &clauses, &["cid", "index"]).await?;
            position = cluster_and_index(&rows);
        }
        Ok(Self { itself, position })
    }

    /// Takes an update of [`MONITOR`] in.
    pub(super) fn apply(&mut self, format: UpdateFormat, update: &Value) -> Result<(), UpdateError> {
        self.itself.apply(format, update).map(drop)
    }

    fn is_cut_off(&self) -> bool {
        self.itself.rows(TABLE).any(|(_, row)| text(row, "model") != "standalone" && !is_connected(row))
    }
}

impl Clusters {
    /// Makes sure that a server is one to believe.
    pub(super) fn admit(&mut self, member: &Member) -> Result<(), SessionError> {
        if member.is_cut_off() {
            return Err(SessionError::ClusterDisconnected);
        }
        let Some((cluster, index)) = &member.position else { return Ok(()) };
        let seen = self.0.entry(cluster.clone()).or_insert(*index);
        if index < seen {
            return Err(SessionError::Behind { index: *index, seen: *seen });
        }
        *seen = *index;
        Ok(())
    }
}

fn is_connected(row: &Row) -> bool {
    match row.get("connected") {
        Some(Datum::Set(atoms)) => atoms.contains(&Atom::Boolean(true)),
        Some(Datum::Map(_)) | None => false,
    }
}

/// `None` of a server that stands alone, where both columns are empty.
fn cluster_and_index(rows: &Value) -> Option<(String, i64)> {
    let cluster = rows.pointer("/0/cid/1")?.as_str()?;
    let index = rows.pointer("/0/index")?.as_i64()?;
    Some((cluster.to_owned(), index))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(model: &str, connected: bool, index: Option<i64>) -> Member {
        let row = json!({ "initial": { "model": model, "connected": connected } });
        let mut itself = Replica::new(TABLES);
        let update = json!({ TABLE: { uuid::Uuid::nil().to_string(): row } });
        itself.apply(UpdateFormat::Differences, &update).unwrap();
        Member { itself, position: index.map(|index| ("cluster".to_owned(), index)) }
    }

    #[test]
    fn a_member_is_believed_while_it_is_in_its_cluster_and_not_behind_it() {
        let mut clusters = Clusters::default();
        assert!(clusters.admit(&member("standalone", true, None)).is_ok());
        assert!(clusters.admit(&member("clustered", true, Some(7))).is_ok());
        assert!(matches!(
            clusters.admit(&member("clustered", false, Some(9))),
            Err(SessionError::ClusterDisconnected)
        ));
        assert!(matches!(
            clusters.admit(&member("relay", false, None)),
            Err(SessionError::ClusterDisconnected)
        ));
        let behind = clusters.admit(&member("clustered", true, Some(6)));
        assert!(matches!(behind, Err(SessionError::Behind { index: 6, seen: 7 })));
        assert!(clusters.admit(&member("clustered", true, Some(7))).is_ok());
        assert!(clusters.admit(&Member { itself: Replica::new(TABLES), position: None }).is_ok());
    }

    #[test]
    fn a_member_that_is_cut_off_later_says_so_by_a_difference() {
        let mut member = member("clustered", true, Some(1));
        let update =
            json!({ TABLE: { uuid::Uuid::nil().to_string(): { "modify": { "connected": false } } } });
        member.apply(UpdateFormat::Differences, &update).unwrap();
        assert!(matches!(Clusters::default().admit(&member), Err(SessionError::ClusterDisconnected)));
    }

    #[test]
    fn a_position_is_read_from_members_alone() {
        let id = "7d3c6e2e-5e0b-4f0e-8a44-0d4e6c7b1f10";
        let rows = json!([{ "cid": ["uuid", id], "index": 12 }]);
        assert_eq!(cluster_and_index(&rows), Some((id.to_owned(), 12)));
        let rows = json!([{ "cid": ["set", []], "index": ["set", []] }]);
        assert_eq!(cluster_and_index(&rows), None);
        assert_eq!(cluster_and_index(&json!([])), None);
    }
}
