//! Sees the `#` that hyper does not show: its parser takes `/a#b`, and its `Uri` silently ends before the `#`.
//!
//! It reads along with each request line whose beginning is known, which is that of every request that does not come
//! in one piece with the end of another. One that is missed is passed on without its fragment, as hyper made it.

/// Reads along with the bytes of one connection.
#[derive(Debug, Default)]
pub(super) struct RequestLineReader {
    at: At,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum At {
    /// The next byte begins a request.
    #[default]
    Start,
    /// In a request line.
    Line,
    /// In headers, a body, or whatever came with them.
    Elsewhere,
}

impl RequestLineReader {
    /// Takes what came while a request's head was awaited; tells whether its request line holds a `#`.
    pub(super) fn read(&mut self, first: bool, bytes: &[u8]) -> bool {
        if first && self.at != At::Start {
            self.at = At::Elsewhere;
        }
        let mut found = false;
        if self.at != At::Elsewhere {
            for byte in bytes {
                match (self.at, byte) {
                    // Empty lines before a request are skipped, as hyper does.
                    (At::Start, b'\r' | b'\n') => {}
                    (_, b'\n') => {
                        self.at = At::Elsewhere;
                        break;
                    }
                    (_, byte) => {
                        self.at = At::Line;
                        found |= *byte == b'#';
                    }
                }
            }
        }
        if self.at == At::Elsewhere && (bytes.ends_with(b"\n\r\n") || bytes.ends_with(b"\n\n")) {
            self.at = At::Start;
        }
        found
    }

    /// Takes what came while a request was answered: its body, or the next request.
    pub(super) fn pass(&mut self) {
        self.at = At::Elsewhere;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether a `#` is seen in each request, given as the pieces it comes in.
    fn read(requests: &[&[&str]]) -> Vec<bool> {
        let mut reader = RequestLineReader::default();
        let mut first = |pieces: &&[&str]| {
            pieces
                .iter()
                .enumerate()
                .map(|(at, piece)| reader.read(at == 0, piece.as_bytes()))
                .fold(false, |seen, now| seen | now)
        };
        requests.iter().map(&mut first).collect()
    }

    #[test]
    fn a_fragment_is_seen_in_the_request_line_alone() {
        let plain = &["GET / HTTP/1.1\r\nX: #\r\n\r\n#"][..];
        assert_eq!(read(&[&["GET /#a HTTP/1.1\r\n\r\n"], &["\r\nGET /#a HTTP/1.1\n\n"]]), [true, true]);
        assert_eq!(read(&[&["GET /", "#", "a HTTP/1.1\r\nX: ", "y\r\n\r\n"], &["GET /#"]]), [true, true]);
        assert_eq!(read(&[plain]), [false]);
    }

    #[test]
    fn a_line_whose_beginning_is_unknown_is_not_judged() {
        // The second request begins in the piece that ends the first.
        assert_eq!(read(&[&["GET / HTTP/1.1\r\n\r\nGET / HTTP/1.1\r\nX: "], &["#\r\n\r\n"]]), [false, false]);
        let mut reader = RequestLineReader::default();
        reader.read(true, b"POST / HTTP/1.1\r\n\r\n");
        reader.pass();
        assert!(!reader.read(true, b"#: # \r\n\r\n"));
        assert!(reader.read(true, b"GET /# HTTP/1.1\r\n\r\n"), "known again after a whole head");
    }
}
