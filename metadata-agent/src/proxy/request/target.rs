//! Turns the request target into the path to request from Nova.
//!
//! Path and query pass byte for byte, except that leading slashes are folded to one: Nova treats
//! them as one, and other readers would take `//x` for an authority. The parser has already
//! answered 400 to bytes below 0x21 and bytes that are not UTF-8.

use hyper::body::Bytes;
use hyper::header::{HOST, HeaderMap};
use hyper::http::uri::{Authority, PathAndQuery};
use hyper::{Method, Uri};

/// A request target that cannot be forwarded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum TargetError {
    #[error("CONNECT is not supported")]
    Connect,
    #[error("more than one Host header")]
    AmbiguousHost,
    #[error("the target's host differs from the Host header")]
    OtherHost,
    #[error("the target has a fragment")]
    Fragment,
    /// This includes `*` for a method other than `OPTIONS`.
    #[error("the target is neither a path nor a URL")]
    NoPath,
}

/// Returns the path to request from Nova.
pub(super) fn upstream_path(
    method: &Method,
    target: &Uri,
    headers: &HeaderMap,
) -> Result<PathAndQuery, TargetError> {
    if *method == Method::CONNECT {
        return Err(TargetError::Connect);
    }
    let mut hosts = headers.get_all(HOST).iter();
    let host = hosts.next();
    if hosts.next().is_some() {
        return Err(TargetError::AmbiguousHost);
    }
    if let Some(authority) = target.authority() {
        if target.scheme().is_none() {
            return Err(TargetError::NoPath);
        }
        if host.is_some_and(|host| !same_host(host.as_bytes(), authority)) {
            return Err(TargetError::OtherHost);
        }
    }
    let Some(path) = target.path_and_query() else { return Ok(PathAndQuery::from_static("/")) };
    match path.as_str().as_bytes() {
        // As haproxy forwards `OPTIONS *`.
        b"*" if *method == Method::OPTIONS => Ok(PathAndQuery::from_static("/*")),
        b"*" => Err(TargetError::NoPath),
        [b'/', b'/', ..] => rebuilt(path.as_str().trim_start_matches('/')),
        [b'/', ..] => Ok(path.clone()),
        // http://host?query
        _ => rebuilt(path.as_str()),
    }
}

fn rebuilt(rest: &str) -> Result<PathAndQuery, TargetError> {
    let mut text = String::with_capacity(1 + rest.len());
    text.push('/');
    text.push_str(rest);
    PathAndQuery::from_maybe_shared(Bytes::from(text)).map_err(|_| TargetError::NoPath)
}

fn same_host(host: &[u8], authority: &Authority) -> bool {
    fn without_default_port(host: &[u8]) -> &[u8] {
        host.strip_suffix(b":80").unwrap_or(host)
    }
    without_default_port(host).eq_ignore_ascii_case(without_default_port(authority.as_str().as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use hyper::header::HeaderValue;

    fn ask(method: &str, target: &str, hosts: &[&str]) -> Result<String, TargetError> {
        let mut headers = HeaderMap::new();
        for host in hosts {
            headers.append(HOST, HeaderValue::from_str(host).unwrap());
        }
        let target = Uri::from_maybe_shared(Bytes::copy_from_slice(target.as_bytes())).unwrap();
        upstream_path(&method.parse().unwrap(), &target, &headers).map(|path| path.as_str().to_owned())
    }

    #[test]
    fn paths_pass_byte_for_byte() {
        for path in [
            "/",
            "/latest/meta-data/",
            "/latest/meta-data",
            "/a%2fb%20c/?x=1&y=%41",
            "/latest?",
            "/a//b/../c/./?//",
            "/%zz/~!$&'()*+,;=:@",
            "/\u{fc}",
        ] {
            assert_eq!(ask("GET", path, &["169.254.169.254"]).as_deref(), Ok(path));
        }
    }

    #[test]
    fn leading_slashes_fold_to_one() {
        for (given, want) in [("//latest//a/", "/latest//a/"), ("///", "/"), ("//?a=//", "/?a=//")] {
            assert_eq!(ask("GET", given, &[]).as_deref(), Ok(want));
        }
    }

    #[test]
    fn any_host_is_accepted_but_only_one() {
        for host in ["169.254.169.254", "[fe80::a9fe:a9fe%25eth0]", "[fe80::a9fe:a9fe%eth0]:80", "", "x y"] {
            assert_eq!(ask("GET", "/x", &[host]).as_deref(), Ok("/x"), "{host:?}");
        }
        assert_eq!(ask("GET", "/x", &[]).as_deref(), Ok("/x"));
        assert_eq!(ask("GET", "/x", &["a", "a"]), Err(TargetError::AmbiguousHost));
    }

    #[test]
    fn absolute_form_must_agree_with_host() {
        let host = &["169.254.169.254"][..];
        assert_eq!(ask("GET", "http://169.254.169.254/x?y", host).as_deref(), Ok("/x?y"));
        assert_eq!(ask("GET", "http://169.254.169.254:80//x", host).as_deref(), Ok("/x"));
        assert_eq!(ask("GET", "http://169.254.169.254", host).as_deref(), Ok("/"));
        assert_eq!(ask("GET", "http://169.254.169.254?y", host).as_deref(), Ok("/?y"));
        assert_eq!(ask("GET", "http://a.example/x", &["A.example:80"]).as_deref(), Ok("/x"));
        assert_eq!(ask("GET", "http://evil.example/x", &[]).as_deref(), Ok("/x"));
        for (target, host) in [
            ("http://evil.example/x", "169.254.169.254"),
            ("http://u@169.254.169.254/x", "169.254.169.254"),
            ("http://169.254.169.254:8775/x", "169.254.169.254"),
        ] {
            assert_eq!(ask("GET", target, &[host]), Err(TargetError::OtherHost), "{target}");
        }
    }

    #[test]
    fn other_target_forms() {
        assert_eq!(ask("OPTIONS", "*", &[]).as_deref(), Ok("/*"));
        assert_eq!(ask("GET", "*", &[]), Err(TargetError::NoPath));
        assert_eq!(ask("GET", "latest", &[]), Err(TargetError::NoPath));
        assert_eq!(ask("CONNECT", "169.254.169.254:80", &[]), Err(TargetError::Connect));
    }
}
