//! The record of one request: counted and logged when its answer has been handed over, or when the guest left.

use std::sync::Arc;

use hyper::http::uri::PathAndQuery;
use hyper::{Method, StatusCode};
use metadata_ebpf::identity::AttachmentId;
use tokio::time::Instant;
use tracing::{Level, enabled, event};

use super::pulse::Pulse;
use crate::ids::InstanceId;
use crate::proxy::metrics::Metrics;

/// What the log shows for a request whose guest left before its answer, as other proxies write it.
const GUEST_LEFT: u16 = 499;

/// One request and its answer, from the end of the head to the end of the body.
#[derive(Debug)]
pub(super) struct Exchange {
    metrics: Arc<Metrics>,
    pulse: Arc<Pulse>,
    began: Instant,
    attachment: Option<AttachmentId>,
    /// Only kept if somebody reads the access log.
    line: Option<Line>,
    status: StatusCode,
    bytes: u64,
}

#[derive(Debug)]
struct Line {
    method: Method,
    path: Option<PathAndQuery>,
    instance: Option<InstanceId>,
}

impl Exchange {
    /// Begins a record; the connection counts as busy until it is dropped.
    pub(super) fn begin(
        metrics: &Arc<Metrics>,
        pulse: &Arc<Pulse>,
        attachment: Option<AttachmentId>,
        method: &Method,
        path: Option<&PathAndQuery>,
    ) -> Self {
        pulse.busy();
        let line = enabled!(target: "access", Level::DEBUG).then(|| Line {
            method: method.clone(),
            path: path.cloned(),
            instance: None,
        });
        let status = StatusCode::from_u16(GUEST_LEFT).unwrap_or(StatusCode::BAD_REQUEST);
        Self {
            metrics: Arc::clone(metrics),
            pulse: Arc::clone(pulse),
            began: Instant::now(),
            attachment,
            line,
            status,
            bytes: 0,
        }
    }

    pub(super) fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    pub(super) fn identified(&mut self, instance: Option<InstanceId>) {
        if let Some(line) = &mut self.line {
            line.instance = instance;
        }
    }

    pub(super) fn answered(&mut self, status: StatusCode) {
        self.status = status;
    }

    pub(super) fn sent(&mut self, bytes: usize) {
        self.bytes += bytes as u64;
    }

    pub(super) fn leave_request_unread(&self) {
        self.pulse.leave_unread();
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        let duration = self.began.elapsed();
        self.pulse.idle();
        self.metrics.request(self.status, duration);
        if let Some(line) = &self.line {
            event!(
                target: "access",
                Level::DEBUG,
                method = %line.method,
                // Quoted and escaped: it is the guest's text.
                path = ?line.path.as_ref().map_or("", PathAndQuery::as_str),
                status = self.status.as_u16(),
                bytes = self.bytes,
                duration = ?duration,
                instance = line.instance.map(tracing::field::display),
                attachment = self.attachment.map(tracing::field::display),
            );
        }
    }
}
