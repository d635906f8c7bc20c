//! The URL of a service.

use std::fmt;

use hyper::Uri;

use super::rule::{Rejected, Rule};

/// An absolute URL of http or https without query and user, and without a slash at its end.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct HttpUrl(String);

impl HttpUrl {
    /// Reads a URL.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let text = text.trim().trim_end_matches('/');
        let uri: Uri = text.parse().ok()?;
        let known = matches!(uri.scheme_str(), Some("http" | "https"));
        let authority = uri.authority()?;
        let plain = !authority.as_str().contains('@') && !authority.host().is_empty();
        let bare = uri.query().is_none() && !text.contains('#');
        (known && plain && bare).then(|| Self(text.to_owned()))
    }

    /// The URL as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for HttpUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// An [`HttpUrl`].
pub struct Web;

impl Rule<HttpUrl> for Web {
    fn read(&self, text: &str) -> Result<HttpUrl, Rejected> {
        HttpUrl::parse(text).ok_or(Rejected::NotAccepted)
    }

    fn accepts(&self) -> String {
        "a URL that begins with http:// or https://, without user and query".to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_is_absolute_and_says_no_more_than_where() {
        for (text, want) in [
            ("http://controller:5000/v3/", "http://controller:5000/v3"),
            ("https://[fd00::1]:9696", "https://[fd00::1]:9696"),
            ("https://api.example/networking", "https://api.example/networking"),
        ] {
            assert_eq!(HttpUrl::parse(text).unwrap().as_str(), want);
        }
        for bad in
            ["", "controller:5000", "ftp://a", "http://", "http://u:p@a", "http://a/?b", "http://a/#b", "/v3"]
        {
            assert_eq!(HttpUrl::parse(bad), None, "{bad}");
        }
    }
}
