//! Error responses as webob renders them, in a form that the request accepts.

use crate::http_server::{Answer, Recorded};
use crate::nova::json::Json;

/// An error response of Nova.
#[derive(Clone, Copy)]
pub(super) enum Fault {
    /// 400 with its reason.
    BadRequest(&'static str),
    /// 403 with its reason.
    Forbidden(&'static str),
    NotFound,
    Conflict,
    /// An exception that nothing catches.
    Crash,
}

impl Fault {
    fn parts(self) -> Option<(u16, &'static str, &'static str)> {
        Some(match self {
            Self::BadRequest(reason) => (400, "Bad Request", reason),
            Self::Forbidden(reason) => (403, "Forbidden", reason),
            Self::NotFound => (404, "Not Found", "The resource could not be found."),
            Self::Conflict => (409, "Conflict", "There was a conflict when trying to complete your request."),
            Self::Crash => return None,
        })
    }

    /// Renders the page for a request: HTML or JSON if accepted, otherwise plain text.
    pub(super) fn page(self, request: &Recorded) -> Answer {
        let Some((status, title, reason)) = self.parts() else { return Answer::none() };
        let accept = request.header("accept").unwrap_or_default();
        let accepts = |offers: &[&str]| {
            accept
                .split(',')
                .filter_map(|range| range.split(';').next())
                .any(|range| offers.contains(&range.trim()))
        };
        if accepts(&["*/*", "text/*", "text/html"]) {
            let page = format!(
                "<html>\n <head>\n  <title>{status} {title}</title>\n </head>\n <body>\n  \
                 <h1>{status} {title}</h1>\n  {reason}<br /><br />\n\n\n\n </body>\n</html>"
            );
            return Answer::new(status, "text/html; charset=UTF-8", page);
        }
        // webob strips the tags from the page, which leaves line breaks and empty lines.
        let text = format!("{reason}\n\n   ");
        if accepts(&["application/*", "application/json"]) {
            let page = Json::object([
                ("message", Json::text(text)),
                ("code", Json::text(format_args!("{status} {title}"))),
                ("title", Json::text(title)),
            ]);
            return Answer::new(status, "application/json", page.to_string());
        }
        Answer::new(status, "text/plain; charset=UTF-8", format!("{status} {title}\n\n{text}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hyper::body::Bytes;

    fn length(fault: Fault, accept: Option<&str>) -> usize {
        let headers = accept.map(|accept| ("accept".to_owned(), accept.to_owned()));
        let request = Recorded {
            connection: 0,
            peer: ([127, 0, 0, 1], 1).into(),
            method: "GET".to_owned(),
            path: "/".to_owned(),
            headers: headers.into_iter().collect(),
            body: Bytes::new(),
        };
        fault.page(&request).body.len()
    }

    #[test]
    fn pages_have_the_length_of_webob_pages() {
        let any = Some("*/*");
        assert_eq!(length(Fault::NotFound, any), 154);
        assert_eq!(length(Fault::NotFound, None), 52);
        assert_eq!(length(Fault::Forbidden("Invalid proxy request signature."), any), 154);
        assert_eq!(length(Fault::Conflict, any), 178);
        assert_eq!(length(Fault::BadRequest("X-Instance-ID header is missing from request."), any), 171);
    }
}
