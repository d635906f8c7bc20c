//! Which headers cross the proxy.
//!
//! Towards Nova, and towards Neutron's metadata agent: a fixed list and nothing of the guest's but the type of its body. Both
//! believe these headers, so a guest's own are not filtered but never copied; `X-Metadata-Provider` would switch Nova to
//! its load-balancer branch (nova/api/metadata/handler.py). Towards the guest: all but those that belong to one hop.

use hyper::header::{
    ACCEPT, CONNECTION, CONTENT_TYPE, HOST, HeaderMap, HeaderName, HeaderValue, TE, TRAILER,
    TRANSFER_ENCODING, UPGRADE,
};

use super::requester::{Network, Signed};

pub(super) const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const X_INSTANCE_ID: HeaderName = HeaderName::from_static("x-instance-id");
const X_INSTANCE_ID_SIGNATURE: HeaderName = HeaderName::from_static("x-instance-id-signature");
const X_TENANT_ID: HeaderName = HeaderName::from_static("x-tenant-id");
const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
const PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");

/// What the metadata API is told of who asks.
#[derive(Debug, Clone, Copy)]
pub(super) enum Told<'a> {
    /// To Nova, which checks the signature.
    Instance(&'a Signed, &'a HeaderValue),
    /// To Neutron's metadata agent, which believes it.
    Network(&'a Network),
}

/// Replaces whatever is in `headers` by what the metadata API is told; `Content-Length` follows from the body.
pub(super) fn address(
    headers: &mut HeaderMap,
    host: &HeaderValue,
    told: Told<'_>,
    forwarded_for: HeaderValue,
    content_type: Option<&HeaderValue>,
) {
    // The guest's map is emptied and used again: that saves the allocations of a new one.
    headers.clear();
    headers.insert(HOST, host.clone());
    // Nova chooses the format of its error pages by this; the legacy path always sent it.
    headers.insert(ACCEPT, HeaderValue::from_static("*/*"));
    headers.insert(X_FORWARDED_FOR, forwarded_for);
    match told {
        Told::Instance(signed, signature) => {
            headers.insert(X_INSTANCE_ID, signed.instance_value.clone());
            headers.insert(X_TENANT_ID, signed.project_value.clone());
            headers.insert(X_INSTANCE_ID_SIGNATURE, signature.clone());
        }
        Told::Network(network) => {
            headers.insert(network.header.clone(), network.value.clone());
            // As haproxy's http-server-close does. The agent has a thread for each connection, or one for all.
            headers.insert(CONNECTION, HeaderValue::from_static("close"));
        }
    }
    if let Some(content_type) = content_type {
        headers.insert(CONTENT_TYPE, content_type.clone());
    }
}

/// Removes what belonged to the hop from Nova to us (RFC 9110, section 7.6.1).
pub(super) fn end_hop(headers: &mut HeaderMap) {
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
    fn what_connection_names_ends_with_the_hop() {
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
        // A value that is not ASCII names nothing, and the rest still goes.
        end_hop(&mut headers);
        let mut left: Vec<_> = headers.keys().map(HeaderName::as_str).collect();
        left.sort_unstable();
        assert_eq!(left, ["retry-after", "x-bar", "x-baz"]);
    }
}
