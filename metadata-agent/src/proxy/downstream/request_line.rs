//! Detects a `#` in the request line. hyper hides it: its parser accepts `/a#b`, and its `Uri`
//! silently ends before the `#`.
//!
//! The detector reads each request line whose beginning is known. It misses a request that arrives
//! in one piece with the end of another. Such a request is forwarded without its fragment, as hyper
//! parsed it.

/// Reads the bytes of one connection as they arrive.
#[derive(Debug, Default)]
pub(super) struct FragmentDetector {
    position: Position,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Position {
    /// The next byte begins a request.
    #[default]
    Start,
    /// Inside a request line.
    Line,
    /// Inside headers, a body, or bytes that arrived with them.
    Elsewhere,
}

impl FragmentDetector {
    /// Reads bytes of a request head, and returns whether its request line has a `#`. `first` marks
    /// the first bytes after a pause between requests.
    pub(super) fn read(&mut self, first: bool, bytes: &[u8]) -> bool {
        if first && self.position != Position::Start {
            self.position = Position::Elsewhere;
        }
        let mut found = false;
        if self.position != Position::Elsewhere {
            for byte in bytes {
                match (self.position, byte) {
                    // Empty lines before a request are skipped, as in hyper.
                    (Position::Start, b'\r' | b'\n') => {}
                    (_, b'\n') => {
                        self.position = Position::Elsewhere;
                        break;
                    }
                    (_, byte) => {
                        self.position = Position::Line;
                        found |= *byte == b'#';
                    }
                }
            }
        }
        if self.position == Position::Elsewhere && (bytes.ends_with(b"\n\r\n") || bytes.ends_with(b"\n\n")) {
            self.position = Position::Start;
        }
        found
    }

    /// Skips bytes that arrive while a request is handled: its body, or the next request.
    pub(super) fn skip(&mut self) {
        self.position = Position::Elsewhere;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns for each request, given in pieces, whether a `#` is detected.
    fn read(requests: &[&[&str]]) -> Vec<bool> {
        let mut detector = FragmentDetector::default();
        let mut first = |pieces: &&[&str]| {
            pieces
                .iter()
                .enumerate()
                .map(|(at, piece)| detector.read(at == 0, piece.as_bytes()))
                .fold(false, |seen, now| seen | now)
        };
        requests.iter().map(&mut first).collect()
    }

    #[test]
    fn a_fragment_is_detected_in_the_request_line_only() {
        let plain = &["GET / HTTP/1.1\r\nX: #\r\n\r\n#"][..];
        assert_eq!(read(&[&["GET /#a HTTP/1.1\r\n\r\n"], &["\r\nGET /#a HTTP/1.1\n\n"]]), [true, true]);
        assert_eq!(read(&[&["GET /", "#", "a HTTP/1.1\r\nX: ", "y\r\n\r\n"], &["GET /#"]]), [true, true]);
        assert_eq!(read(&[plain]), [false]);
    }

    #[test]
    fn a_line_without_a_known_beginning_is_skipped() {
        // The second request begins in the piece that ends the first.
        assert_eq!(read(&[&["GET / HTTP/1.1\r\n\r\nGET / HTTP/1.1\r\nX: "], &["#\r\n\r\n"]]), [false, false]);
        let mut detector = FragmentDetector::default();
        detector.read(true, b"POST / HTTP/1.1\r\n\r\n");
        detector.skip();
        assert!(!detector.read(true, b"#: # \r\n\r\n"));
        assert!(detector.read(true, b"GET /# HTTP/1.1\r\n\r\n"), "known again after a whole head");
    }
}
