//! The record of one request. It is counted and logged when the response has been sent, or when the
//! guest has left.

use std::sync::Arc;

use hyper::http::uri::PathAndQuery;
use hyper::{Method, StatusCode};
use metadata_ebpf::identity::AttachmentId;
use tokio::time::Instant;
use tracing::{Level, enabled, event};

use crate::ids::InstanceId;
use crate::proxy::downstream::ConnectionActivity;
use crate::proxy::large_buffers::LONG;
use crate::proxy::metrics::Metrics;

/// Status in the log if the guest closed the connection before the response, as in nginx.
const CLIENT_CLOSED_REQUEST: u16 = 499;

/// A request and its response, from the end of the request head to the end of the response body.
#[derive(Debug)]
pub(super) struct RequestRecord {
    metrics: Arc<Metrics>,
    activity: Arc<ConnectionActivity>,
    began: Instant,
    attachment: Option<AttachmentId>,
    /// Kept only if the access log is enabled.
    access: Option<AccessLine>,
    status: StatusCode,
    bytes: u64,
}

#[derive(Debug)]
struct AccessLine {
    method: Method,
    path: Option<PathAndQuery>,
    instance: Option<InstanceId>,
}

impl RequestRecord {
    /// Begins a record. The connection counts as busy until the record is dropped.
    pub(super) fn begin(
        metrics: &Arc<Metrics>,
        activity: &Arc<ConnectionActivity>,
        attachment: Option<AttachmentId>,
        method: &Method,
        path: Option<&PathAndQuery>,
    ) -> Self {
        activity.set_busy();
        let access = enabled!(target: "access", Level::DEBUG).then(|| AccessLine {
            method: method.clone(),
            path: path.cloned(),
            instance: None,
        });
        let status = StatusCode::from_u16(CLIENT_CLOSED_REQUEST).unwrap_or(StatusCode::BAD_REQUEST);
        Self {
            metrics: Arc::clone(metrics),
            activity: Arc::clone(activity),
            began: Instant::now(),
            attachment,
            access,
            status,
            bytes: 0,
        }
    }

    pub(super) fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    pub(super) fn identified(&mut self, instance: Option<InstanceId>) {
        if let Some(access) = &mut self.access {
            access.instance = instance;
        }
    }

    pub(super) fn responded(&mut self, status: StatusCode) {
        self.status = status;
    }

    pub(super) fn sent(&mut self, bytes: usize) {
        self.bytes += bytes as u64;
        if self.is_long() {
            self.activity.set_long();
        }
    }

    /// Returns whether the response is a long one, and its connection has larger buffers.
    pub(super) fn has_large_buffers(&self) -> bool {
        self.is_long() && self.activity.has_large_buffers()
    }

    const fn is_long(&self) -> bool {
        self.bytes >= LONG
    }

    pub(super) fn leave_request_unread(&self) {
        self.activity.set_request_unread();
    }
}

impl Drop for RequestRecord {
    fn drop(&mut self) {
        let duration = self.began.elapsed();
        if !self.is_long() {
            self.activity.set_short();
        }
        self.activity.set_idle();
        self.metrics.request(self.status, duration);
        if let Some(access) = &self.access {
            event!(
                target: "access",
                Level::DEBUG,
                method = %access.method,
                // Quoted and escaped, because the guest chose it.
                path = ?access.path.as_ref().map_or("", PathAndQuery::as_str),
                status = self.status.as_u16(),
                bytes = self.bytes,
                duration = ?duration,
                instance = access.instance.map(tracing::field::display),
                attachment = self.attachment.map(tracing::field::display),
            );
        }
    }
}
