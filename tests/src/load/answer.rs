//! The request, its only correct response, and the comparison with the bytes read so far.

use super::Style;
use super::client::Failure;

/// The request and its response.
#[derive(Debug)]
pub(crate) struct Expected {
    /// The request as sent on the wire.
    pub question: Vec<u8>,
    body: Vec<u8>,
}

impl Expected {
    pub fn new(path: &str, style: Style, post: Option<&[u8]>, body: Vec<u8>) -> Self {
        let connection = match style {
            Style::KeepAlive => "",
            Style::NewConnection => "Connection: close\r\n",
        };
        let (method, length) = match post {
            Some(post) => ("POST", format!("Content-Length: {}\r\n", post.len())),
            None => ("GET", String::new()),
        };
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: 169.254.169.254\r\nAccept: */*\r\n{length}{connection}\r\n"
        );
        Self { question: [head.as_bytes(), post.unwrap_or_default()].concat(), body }
    }

    /// Compares `read` with the response. Returns `None` while more bytes may follow.
    pub fn judge(&self, read: &[u8]) -> Option<Result<(), Failure>> {
        let head = read.windows(4).position(|bytes| bytes == b"\r\n\r\n")?;
        let body = &read[head + 4..];
        if !read.starts_with(b"HTTP/1.1 200 ") {
            return Some(Err(Failure::Status));
        }
        if content_length(&read[..head]) != Some(self.body.len()) || body.len() > self.body.len() {
            return Some(Err(Failure::Length));
        }
        if body.len() < self.body.len() {
            return None;
        }
        Some(if body == self.body { Ok(()) } else { Err(Failure::Body) })
    }
}

fn content_length(head: &[u8]) -> Option<usize> {
    const NAME: &[u8] = b"content-length:";
    let mut lines = head.split(|byte| *byte == b'\n');
    let value = lines
        .find_map(|line| {
            line.split_at_checked(NAME.len()).filter(|(name, _)| name.eq_ignore_ascii_case(NAME))
        })?
        .1;
    str::from_utf8(value).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judge(answer: &str) -> Option<Result<(), Failure>> {
        Expected::new("/", Style::KeepAlive, None, b"four".to_vec()).judge(answer.as_bytes())
    }

    #[test]
    fn only_the_complete_correct_answer_is_right() {
        let right = "HTTP/1.1 200 OK\r\nDate: x\r\nContent-Length: 4\r\n\r\nfour";
        for cut in 0..right.len() {
            assert_eq!(judge(&right[..cut]), None, "after {cut} bytes");
        }
        assert_eq!(judge(right), Some(Ok(())));
    }

    #[test]
    fn wrong_answers_are_distinguished() {
        for (answer, failure) in [
            ("HTTP/1.1 503 Busy\r\ncontent-length: 4\r\n\r\nfour", Failure::Status),
            ("HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nfours", Failure::Length),
            ("HTTP/1.1 200 OK\r\n\r\nfour", Failure::Length),
            ("HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nfourHTTP/1.1 200 OK", Failure::Length),
            ("HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nfive", Failure::Body),
        ] {
            assert_eq!(judge(answer), Some(Err(failure)), "{answer}");
        }
    }
}
