//! Handles one request: checks it, forwards it, and relays the response.

pub(super) mod handler;
mod headers;
mod record;
mod rejection;
mod response;
mod target;

pub(super) use handler::RequestHandler;
pub(super) use headers::{AuthHeaders, X_FORWARDED_FOR, set_empty_length, set_upstream_headers};
pub(super) use rejection::{HEAD_TIMEOUT_RESPONSE, MALFORMED_RESPONSE, Rejection};
pub(super) use response::ResponseBody;
