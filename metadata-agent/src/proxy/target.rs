//! The request target: which path Nova is asked for.
//!
//! Path and query go through byte for byte, but for leading slashes, which are folded to one: Nova would take them
//! for one, and other readers would take `//x` for an authority. Bytes below 0x21 and such that are not UTF-8
//! never come this far; the parser answers 400.

use hyper::body::Bytes;
use hyper::header::{HOST, HeaderMap};
use hyper::http::uri::{Authority, PathAndQuery};
use hyper::{Method, Uri};

/// Why a request target cannot be passed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TargetFault {
    /// `CONNECT`: this is no such proxy.
    #[error("CONNECT is not served")]
    Connect,
    /// More than one `Host` header.
    #[error("more than one Host header")]
    AmbiguousHost,
    /// An absolute-form target whose host is not that of the `Host` header.
    #[error("the target names another host than the Host header")]
    OtherHost,
    /// A `#`, which belongs to the client alone.
    #[error("the target holds a fragment")]
    Fragment,
    /// Neither a path nor a URL, or `*` for another method than `OPTIONS`.
    #[error("the target is neither a path nor a URL")]
    NoPath,
}

/// Reads the path to ask Nova for.
pub(super) fn path_to_ask(
    method: &Method,
    target: &Uri,
    headers: &HeaderMap,
) -> Result<PathAndQuery, TargetFault> {
    if *method == Method::CONNECT {
        return Err(TargetFault::Connect);
    }
    let mut hosts = headers.get_all(HOST).iter();
    let host = hosts.next();
    if hosts.next().is_some() {
        return Err(TargetFault::AmbiguousHost);
    }
    if let Some(authority) = target.authority() {
        if target.scheme().is_none() {
            return Err(TargetFault::NoPath);
        }
        if host.is_some_and(|host| !same_host(host.as_bytes(), authority)) {
            return Err(TargetFault::OtherHost);
        }
    }
    let Some(path) = target.path_and_query() else { return Ok(PathAndQuery::from_static("/")) };
    match path.as_str().as_bytes() {
        // As haproxy passes `OPTIONS *` on.
        b"*" if *method == Method::OPTIONS => Ok(PathAndQuery::from_static("/*")),
        b"*" => Err(TargetFault::NoPath),
        [b'/', b'/', ..] => rebuilt(path.as_str().trim_start_matches('/')),
        [b'/', ..] => Ok(path.clone()),
        // http://host?query
        _ => rebuilt(path.as_str()),
    }
}

fn rebuilt(rest: &str) -> Result<PathAndQuery, TargetFault> {
    let mut text = String::with_capacity(1 + rest.len());
    text.push('/');
    text.push_str(rest);
    PathAndQuery::from_maybe_shared(Bytes::from(text)).map_err(|_| TargetFault::NoPath)
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

    fn ask(method: &str, target: &str, hosts: &[&str]) -> Result<String, TargetFault> {
        let mut headers = HeaderMap::new();
        for host in hosts {
            headers.append(HOST, HeaderValue::from_str(host).unwrap());
        }
        let target = Uri::from_maybe_shared(Bytes::copy_from_slice(target.as_bytes())).unwrap();
        path_to_ask(&method.parse().unwrap(), &target, &headers).map(|path| path.as_str().to_owned())
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
    fn every_host_is_welcome_but_only_one() {
        for host in ["169.254.169.254", "[fe80::a9fe:a9fe%25eth0]", "[fe80::a9fe:a9fe%eth0]:80", "", "x y"] {
            assert_eq!(ask("GET", "/x", &[host]).as_deref(), Ok("/x"), "{host:?}");
        }
        assert_eq!(ask("GET", "/x", &[]).as_deref(), Ok("/x"));
        assert_eq!(ask("GET", "/x", &["a", "a"]), Err(TargetFault::AmbiguousHost));
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
            assert_eq!(ask("GET", target, &[host]), Err(TargetFault::OtherHost), "{target}");
        }
    }

    #[test]
    fn the_other_forms() {
        assert_eq!(ask("OPTIONS", "*", &[]).as_deref(), Ok("/*"));
        assert_eq!(ask("GET", "*", &[]), Err(TargetFault::NoPath));
        assert_eq!(ask("GET", "latest", &[]), Err(TargetFault::NoPath));
        assert_eq!(ask("CONNECT", "169.254.169.254:80", &[]), Err(TargetFault::Connect));
    }
}
