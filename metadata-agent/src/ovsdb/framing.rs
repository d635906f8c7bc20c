//! Cuts a stream into JSON objects. OVSDB puts neither lengths nor separators between its messages (RFC 7047,
//! section 4), so the end of one is where its braces close.
//!
//! Each byte is looked at once, however the stream was split. A message that is longer than the limit, and
//! anything between messages but white space, is an error, after which the stream is of no use. Whether a message
//! is well-formed inside is for its parser to say.

/// What is asked of the stream at a time.
const CHUNK: usize = 64 * 1024;
/// A buffer that grew beyond this for one message is given back after it.
const KEEP: usize = 1024 * 1024;

/// Why a stream cannot be cut.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FramingError {
    /// A message has no end within the limit.
    #[error("sends a message of more than {limit} bytes")]
    TooLong {
        /// The limit.
        limit: usize,
    },
    /// A message is no object.
    #[error("sends {:?} where a message should begin", char::from(*byte))]
    NoObject {
        /// What is there instead.
        byte: u8,
    },
}

/// A stream that is being cut.
#[derive(Debug)]
pub(crate) struct Framer {
    buffer: Vec<u8>,
    /// Where the message begins that is not handed out yet.
    begin: usize,
    /// What was looked at.
    seen: usize,
    depth: usize,
    in_text: bool,
    escaped: bool,
    limit: usize,
}

impl Framer {
    pub(crate) fn new(limit: usize) -> Self {
        Self { buffer: Vec::new(), begin: 0, seen: 0, depth: 0, in_text: false, escaped: false, limit }
    }

    /// Where what the stream brings next is to be appended.
    pub(crate) fn room(&mut self) -> &mut Vec<u8> {
        self.buffer.drain(..self.begin);
        self.seen -= self.begin;
        self.begin = 0;
        if self.buffer.capacity() > KEEP && self.buffer.len() < CHUNK {
            self.buffer.shrink_to(CHUNK);
        }
        self.buffer.reserve(CHUNK);
        &mut self.buffer
    }

    /// The next whole message; `None` if the stream has to bring more first.
    pub(crate) fn next(&mut self) -> Result<Option<&[u8]>, FramingError> {
        while let Some(&byte) = self.buffer.get(self.seen) {
            if self.depth == 0 {
                match byte {
                    b' ' | b'\t' | b'\r' | b'\n' => self.begin = self.seen + 1,
                    b'{' => {
                        self.begin = self.seen;
                        self.depth = 1;
                    }
                    _ => return Err(FramingError::NoObject { byte }),
                }
                self.seen += 1;
                continue;
            }
            self.seen += 1;
            if self.seen - self.begin > self.limit {
                return Err(FramingError::TooLong { limit: self.limit });
            }
            if self.closes(byte) {
                let begin = std::mem::replace(&mut self.begin, self.seen);
                return Ok(Some(&self.buffer[begin..self.seen]));
            }
        }
        Ok(None)
    }

    /// Whether a byte inside a message is its last.
    fn closes(&mut self, byte: u8) -> bool {
        if self.in_text {
            match byte {
                _ if self.escaped => self.escaped = false,
                b'\\' => self.escaped = true,
                b'"' => self.in_text = false,
                _ => {}
            }
            return false;
        }
        match byte {
            b'"' => self.in_text = true,
            b'{' | b'[' => self.depth += 1,
            b'}' | b']' => self.depth -= 1,
            _ => {}
        }
        self.depth == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::Value;

    fn cut(framer: &mut Framer, bytes: &[u8]) -> Result<Vec<Vec<u8>>, FramingError> {
        framer.room().extend_from_slice(bytes);
        let mut messages = Vec::new();
        while let Some(message) = framer.next()? {
            messages.push(message.to_vec());
        }
        Ok(messages)
    }

    #[test]
    fn a_message_may_be_as_long_as_the_limit() {
        let message = br#"{"a":"12"}"#;
        assert_eq!(cut(&mut Framer::new(message.len()), message).unwrap(), [message]);
        let error = FramingError::TooLong { limit: message.len() - 1 };
        assert_eq!(cut(&mut Framer::new(message.len() - 1), message).unwrap_err(), error);
        let endless = [b"{\"".as_slice(), &[b'a'; 100]].concat();
        assert_eq!(cut(&mut Framer::new(50), &endless).unwrap_err(), FramingError::TooLong { limit: 50 });
    }

    #[test]
    fn what_is_no_object_is_an_error() {
        for bad in ["[]", "7", "}", "\"\"", "\0", "{} x", "HTTP/1.1 400 Bad Request"] {
            assert!(
                matches!(cut(&mut Framer::new(99), bad.as_bytes()), Err(FramingError::NoObject { .. })),
                "{bad}"
            );
        }
    }

    #[test]
    fn a_buffer_that_grew_is_given_back() {
        let mut framer = Framer::new(8 * KEEP);
        let long = format!("{{\"a\":\"{}\"}}", "x".repeat(4 * KEEP));
        assert_eq!(cut(&mut framer, long.as_bytes()).unwrap().len(), 1);
        assert!(framer.room().capacity() <= 2 * CHUNK);
    }

    fn json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<i64>().prop_map(Value::from),
            "[\"\\\\{}\\[\\]a ü]{0,6}".prop_map(Value::from)
        ];
        let tree = leaf.prop_recursive(4, 24, 4, |inner| {
            prop_oneof![
                proptest::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                proptest::collection::hash_map("[\"\\\\{}a]{0,4}", inner, 0..4)
                    .prop_map(|map| Value::Object(map.into_iter().collect())),
            ]
        });
        tree.prop_map(|inner| serde_json::json!({ "x": inner }))
    }

    proptest! {
        #[test]
        fn a_stream_is_cut_alike_wherever_it_is_split(
            messages in proptest::collection::vec((json(), "[ \n\r\t]{0,3}", any::<bool>()), 0..5),
            splits in proptest::collection::vec(any::<proptest::sample::Index>(), 0..8),
        ) {
            let mut stream = Vec::new();
            for (message, space, pretty) in &messages {
                let text = if *pretty { serde_json::to_string_pretty(message) } else { serde_json::to_string(message) };
                stream.extend(text.unwrap().bytes().chain(space.bytes()));
            }
            let mut ends: Vec<usize> = splits.iter().map(|split| split.index(stream.len() + 1)).collect();
            ends.push(stream.len());
            ends.sort_unstable();

            let mut framer = Framer::new(1 << 20);
            let (mut begin, mut found) = (0, Vec::new());
            for end in ends {
                found.extend(cut(&mut framer, &stream[begin..end]).unwrap());
                begin = end;
            }
            let found: Vec<Value> = found.iter().map(|message| serde_json::from_slice(message).unwrap()).collect();
            let wanted: Vec<Value> = messages.into_iter().map(|(message, ..)| message).collect();
            prop_assert_eq!(found, wanted);
        }

        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let _messages_or_error = cut(&mut Framer::new(32), &bytes);
        }
    }
}
