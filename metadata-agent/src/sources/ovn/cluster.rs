//! Acceptance of a server by the state in its database `_Server` (ovsdb-server(5), `_Server`).
//!
//! A standalone server is always accepted. A member of a cluster is accepted while it is connected
//! to the others and not behind the log index that another member had: the rules of Open vSwitch's
//! own clients (lib/ovsdb-cs.c). The index is read once per connection, because it increases with
//! every change to any row.

use std::collections::HashMap;

use ovsdb_client::{
    Atom, ColumnKind, Datum, Monitor, Replica, Row, Session, SessionError, TableSchema, UpdateError,
    UpdateFormat, text,
};
use serde_json::{Value, json};

const DATABASE: &str = "_Server";
const TABLE: &str = "Database";
/// Only the row of the database in question is monitored.
const TABLES: &[TableSchema] = &[TableSchema {
    name: TABLE,
    columns: &[("model", ColumnKind::Optional), ("connected", ColumnKind::Optional)],
}];

pub(super) const MONITOR: Monitor = Monitor { database: DATABASE, id: "server", tables: TABLES };

/// State of a server.
#[derive(Debug)]
pub(super) struct ClusterMember {
    state: Replica,
    /// Cluster id and log index at the time of connection.
    position: Option<(String, i64)>,
}

/// Highest log index seen, by cluster id.
#[derive(Debug, Default)]
pub(super) struct ClusterPositions(HashMap<String, i64>);

impl ClusterMember {
    /// Reads a server's state for one of its databases.
    pub(super) async fn query(session: &mut Session, database: &'static str) -> Result<Self, SessionError> {
        let mut state = Replica::new(TABLES);
        let mut position = None;
        // Open vSwitch before 2.9 has neither this database nor clusters.
        if session.require_database(database, DATABASE).await? {
            let clauses = json!([["name", "==", database]]);
            state.apply(UpdateFormat::Differences, &session.monitor_where(MONITOR, &clauses).await?)?;
            let rows = session.select(DATABASE, TABLE, &clauses, &["cid", "index"]).await?;
            position = cluster_and_index(&rows);
        }
        Ok(Self { state, position })
    }

    /// Applies an update of [`MONITOR`].
    pub(super) fn apply(&mut self, format: UpdateFormat, update: &Value) -> Result<(), UpdateError> {
        self.state.apply(format, update).map(drop)
    }

    fn is_disconnected(&self) -> bool {
        self.state.rows(TABLE).any(|(_, row)| text(row, "model") != "standalone" && !is_connected(row))
    }
}

impl ClusterPositions {
    /// Accepts or rejects a server.
    pub(super) fn accept(&mut self, member: &ClusterMember) -> Result<(), SessionError> {
        if member.is_disconnected() {
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

/// Returns `None` for a standalone server, whose columns are empty.
fn cluster_and_index(rows: &Value) -> Option<(String, i64)> {
    let cluster = rows.pointer("/0/cid/1")?.as_str()?;
    let index = rows.pointer("/0/index")?.as_i64()?;
    Some((cluster.to_owned(), index))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(model: &str, connected: bool, index: Option<i64>) -> ClusterMember {
        let row = json!({ "initial": { "model": model, "connected": connected } });
        let mut state = Replica::new(TABLES);
        let update = json!({ TABLE: { uuid::Uuid::nil().to_string(): row } });
        state.apply(UpdateFormat::Differences, &update).unwrap();
        ClusterMember { state, position: index.map(|index| ("cluster".to_owned(), index)) }
    }

    #[test]
    fn a_member_is_accepted_while_connected_and_not_behind() {
        let mut clusters = ClusterPositions::default();
        assert!(clusters.accept(&member("standalone", true, None)).is_ok());
        assert!(clusters.accept(&member("clustered", true, Some(7))).is_ok());
        assert!(matches!(
            clusters.accept(&member("clustered", false, Some(9))),
            Err(SessionError::ClusterDisconnected)
        ));
        assert!(matches!(
            clusters.accept(&member("relay", false, None)),
            Err(SessionError::ClusterDisconnected)
        ));
        let behind = clusters.accept(&member("clustered", true, Some(6)));
        assert!(matches!(behind, Err(SessionError::Behind { index: 6, seen: 7 })));
        assert!(clusters.accept(&member("clustered", true, Some(7))).is_ok());
        assert!(clusters.accept(&ClusterMember { state: Replica::new(TABLES), position: None }).is_ok());
    }

    #[test]
    fn a_member_may_become_disconnected_by_an_update() {
        let mut member = member("clustered", true, Some(1));
        let update =
            json!({ TABLE: { uuid::Uuid::nil().to_string(): { "modify": { "connected": false } } } });
        member.apply(UpdateFormat::Differences, &update).unwrap();
        assert!(matches!(
            ClusterPositions::default().accept(&member),
            Err(SessionError::ClusterDisconnected)
        ));
    }

    #[test]
    fn only_a_cluster_member_has_a_position() {
        let id = "7d3c6e2e-5e0b-4f0e-8a44-0d4e6c7b1f10";
        let rows = json!([{ "cid": ["uuid", id], "index": 12 }]);
        assert_eq!(cluster_and_index(&rows), Some((id.to_owned(), 12)));
        let rows = json!([{ "cid": ["set", []], "index": ["set", []] }]);
        assert_eq!(cluster_and_index(&rows), None);
        assert_eq!(cluster_and_index(&json!([])), None);
    }
}
