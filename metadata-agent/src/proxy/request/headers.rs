//! Headers that cross the proxy.
//!
//! Upstream: a fixed list, and of the guest's own headers only the type of its body. Nova and
//! Neutron's metadata agent trust these headers, so a guest's headers are never copied.
//! (`X-Metadata-Provider` would switch Nova to its load-balancer branch,
//! nova/api/metadata/handler.py.)
//!
//! Downstream: all headers but the hop-by-hop ones.

use hyper::Method;
use hyper::header::{
    ACCEPT, CONNECTION, CONTENT_LENGTH, CONTENT_TYPE, HOST, HeaderMap, HeaderName, HeaderValue, TE, TRAILER,
    TRANSFER_ENCODING, UPGRADE,
};

use crate::proxy::client::{NetworkIdentity, SignedIdentity};

pub(crate) const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const X_INSTANCE_ID: HeaderName = HeaderName::from_static("x-instance-id");
const X_INSTANCE_ID_SIGNATURE: HeaderName = HeaderName::from_static("x-instance-id-signature");
const X_TENANT_ID: HeaderName = HeaderName::from_static("x-tenant-id");
const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
const PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");

/// Headers that identify the client to the metadata API.
#[derive(Debug, Clone, Copy)]
pub(crate) enum AuthHeaders<'a> {
    /// For Nova, which checks the signature.
    Signed(&'a SignedIdentity, &'a HeaderValue),
    /// For Neutron's metadata agent, which trusts them.
    Network(&'a NetworkIdentity),
    /// For a request on behalf of no client.
    None,
}

/// Writes the headers of a request to the metadata API into an empty map. hyper adds the length of
/// a body. `is_last` asks the server to close the connection after its response.
pub(crate) fn set_upstream_headers(
    headers: &mut HeaderMap,
    host: &HeaderValue,
    auth: AuthHeaders<'_>,
    forwarded_for: Option<&HeaderValue>,
    content_type: Option<&HeaderValue>,
    is_last: bool,
) {
    headers.insert(HOST, host.clone());
    if let Some(forwarded_for) = forwarded_for {
        // Nova chooses the format of its error pages by this; the legacy path always sent it.
        headers.insert(ACCEPT, HeaderValue::from_static("*/*"));
        headers.insert(X_FORWARDED_FOR, forwarded_for.clone());
    }
    match auth {
        AuthHeaders::Signed(signed, signature) => {
            headers.insert(X_INSTANCE_ID, signed.instance_value.clone());
            headers.insert(X_TENANT_ID, signed.project_value.clone());
            headers.insert(X_INSTANCE_ID_SIGNATURE, signature.clone());
        }
        AuthHeaders::Network(network) => {
            headers.insert(network.header.clone(), network.value.clone());
        }
        AuthHeaders::None => {}
    }
    if is_last {
        headers.insert(CONNECTION, HeaderValue::from_static("close"));
    }
    if let Some(content_type) = content_type {
        headers.insert(CONTENT_TYPE, content_type.clone());
    }
}

/// States that a request has an empty body, except with methods that have none, as haproxy does.
/// Nova compares the length of a posted password with a number, and crashes without one
/// (nova/api/metadata/password.py).
pub(crate) fn set_empty_length(headers: &mut HeaderMap, method: &Method) {
    if !matches!(*method, Method::GET | Method::HEAD) {
        headers.insert(CONTENT_LENGTH, HeaderValue::from_static("0"));
    }
}

/// Removes the headers that belong to the hop from Nova to this proxy (RFC 9110, section 7.6.1).
pub(super) fn remove_hop_by_hop(headers: &mut HeaderMap) {
    if headers.contains_key(CONNECTION) {
        let named: Vec<HeaderName> = headers
            .get_all(CONNECTION)
            .iter()
            .filter_map(|value| value.to_str().ok())
            .flat_map(|value| value.split(','))
            .filter_map(|name| name.trim().parse().ok())
            .collect();
        for name in named {
            headers.remove(name);
        }
        headers.remove(CONNECTION);
    }
    for name in [KEEP_ALIVE, PROXY_CONNECTION, TE, TRAILER, TRANSFER_ENCODING, UPGRADE] {
        headers.remove(name);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_that_connection_names_are_removed() {
        let mut headers = HeaderMap::new();
        for (name, value) in [
            ("connection", "Keep-Alive, X-Foo"),
            ("connection", "x-bar ,,\u{fc}"),
            ("keep-alive", "timeout=5"),
            ("proxy-connection", "keep-alive"),
            ("transfer-encoding", "chunked"),
            ("trailer", "x-sum"),
            ("upgrade", "h2c"),
            ("x-foo", "1"),
            ("x-bar", "2"),
            ("x-baz", "3"),
            ("retry-after", "4"),
        ] {
            let value = HeaderValue::from_bytes(value.as_bytes()).unwrap();
            headers.append(name.parse::<HeaderName>().unwrap(), value);
        }
        // A value that is not ASCII names no header; the others are still removed.
        remove_hop_by_hop(&mut headers);
        let mut left: Vec<_> = headers.keys().map(HeaderName::as_str).collect();
        left.sort_unstable();
        assert_eq!(left, ["retry-after", "x-bar", "x-baz"]);
    }
}
