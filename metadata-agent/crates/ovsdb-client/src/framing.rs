//! Splits a byte stream into JSON objects.
//!
//! OVSDB messages have neither a length nor a separator (RFC 7047, section 4), so a message ends
//! where its braces close. Each byte is scanned once, however the stream was split. The content of
//! a message is not validated here.

/// Values that any message may have, and bytes per further value. In memory, each value takes at
/// least 32 bytes, whereas `[]` takes three in a message. A row has about 17 bytes per value.
const VALUES: usize = 1024;
const BYTES_PER_VALUE: usize = 16;
/// Bytes to read at a time.
const CHUNK: usize = 64 * 1024;
/// A buffer that grew beyond this size is shrunk after its message.
const KEEP: usize = 1024 * 1024;

/// The stream is not a sequence of JSON objects. Nothing after this error can be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FramingError {
    #[error("message is longer than {limit} bytes")]
    TooLong { limit: usize },
    #[error("message has more than {limit} values")]
    TooManyValues { limit: usize },
    #[error("message starts with {:?} instead of '{{'", char::from(*byte))]
    NotAnObject { byte: u8 },
}

/// Splits a stream into messages.
#[derive(Debug)]
pub struct Framer {
    buffer: Vec<u8>,
    /// Start of the current message.
    start: usize,
    /// End of the scanned part of the buffer.
    scanned: usize,
    depth: usize,
    /// An upper bound of the values in the current message so far.
    values: usize,
    in_string: bool,
    escaped: bool,
    limit: usize,
}

impl Framer {
    #[must_use]
    pub fn new(limit: usize) -> Self {
        Self {
            buffer: Vec::new(),
            start: 0,
            scanned: 0,
            depth: 0,
            values: 0,
            in_string: false,
            escaped: false,
            limit,
        }
    }

    /// Returns the buffer to which the next bytes of the stream are appended.
    pub fn read_buffer(&mut self) -> &mut Vec<u8> {
        self.buffer.drain(..self.start);
        self.scanned -= self.start;
        self.start = 0;
        if self.buffer.capacity() > KEEP && self.buffer.len() < CHUNK {
            self.buffer.shrink_to(CHUNK);
        }
        self.buffer.reserve(CHUNK);
        &mut self.buffer
    }

    /// Returns the next complete message; `None` if more bytes are needed.
    ///
    /// # Errors
    /// The message is too long or not an object.
    pub fn next_message(&mut self) -> Result<Option<&[u8]>, FramingError> {
        while let Some(&byte) = self.buffer.get(self.scanned) {
            // Between messages, only white space is allowed.
            if self.depth == 0 {
                match byte {
                    b' ' | b'\t' | b'\r' | b'\n' => self.start = self.scanned + 1,
                    b'{' => {
                        self.start = self.scanned;
                        (self.depth, self.values) = (1, 1);
                    }
                    _ => return Err(FramingError::NotAnObject { byte }),
                }
                self.scanned += 1;
                continue;
            }
            self.scanned += 1;
            if self.scanned - self.start > self.limit {
                return Err(FramingError::TooLong { limit: self.limit });
            }
            let ends = self.ends_message(byte);
            if self.values > self.values_limit() {
                return Err(FramingError::TooManyValues { limit: self.values_limit() });
            }
            if ends {
                let start = std::mem::replace(&mut self.start, self.scanned);
                return Ok(Some(&self.buffer[start..self.scanned]));
            }
        }
        Ok(None)
    }

    fn values_limit(&self) -> usize {
        VALUES + self.limit / BYTES_PER_VALUE
    }

    fn ends_message(&mut self, byte: u8) -> bool {
        if self.in_string {
            match byte {
                _ if self.escaped => self.escaped = false,
                b'\\' => self.escaped = true,
                b'"' => self.in_string = false,
                _ => {}
            }
            return false;
        }
        match byte {
            b'"' => self.in_string = true,
            b'{' | b'[' => {
                self.depth += 1;
                self.values += 1;
            }
            b'}' | b']' => self.depth -= 1,
            b',' => self.values += 1,
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

    fn split(framer: &mut Framer, bytes: &[u8]) -> Result<Vec<Vec<u8>>, FramingError> {
        framer.read_buffer().extend_from_slice(bytes);
        let mut messages = Vec::new();
        while let Some(message) = framer.next_message()? {
            messages.push(message.to_vec());
        }
        Ok(messages)
    }

    #[test]
    fn a_message_may_be_as_long_as_the_limit() {
        let message = br#"{"a":"12"}"#;
        assert_eq!(split(&mut Framer::new(message.len()), message).unwrap(), [message]);
        let error = FramingError::TooLong { limit: message.len() - 1 };
        assert_eq!(split(&mut Framer::new(message.len() - 1), message).unwrap_err(), error);
        let endless = [b"{\"".as_slice(), &[b'a'; 100]].concat();
        assert_eq!(split(&mut Framer::new(50), &endless).unwrap_err(), FramingError::TooLong { limit: 50 });
    }

    #[test]
    fn a_message_of_many_short_values_is_too_large_in_memory() {
        let limit = 16 * 1024;
        let message = |values| format!(r#"{{"a":[{}0]}}"#, "0,".repeat(values));
        // The object, the list and its last value are not repeated.
        assert_eq!(split(&mut Framer::new(limit), message(2 * 1024 - 2).as_bytes()).unwrap().len(), 1);
        let error = FramingError::TooManyValues { limit: 2 * 1024 };
        for values in [message(2 * 1024 - 1), format!("{{\"a\":{}", "[".repeat(3_000)), message(5_000)] {
            assert_eq!(split(&mut Framer::new(limit), values.as_bytes()).unwrap_err(), error);
        }
        let text = format!(r#"{{"a":"{}"}}"#, "[,".repeat(5_000));
        assert_eq!(split(&mut Framer::new(limit), text.as_bytes()).unwrap().len(), 1, "text is one value");
    }

    #[test]
    fn anything_but_an_object_is_an_error() {
        for bad in ["[]", "7", "}", "\"\"", "\0", "{} x", "HTTP/1.1 400 Bad Request"] {
            assert!(
                matches!(split(&mut Framer::new(99), bad.as_bytes()), Err(FramingError::NotAnObject { .. })),
                "{bad}"
            );
        }
    }

    #[test]
    fn a_large_buffer_is_shrunk_after_its_message() {
        let mut framer = Framer::new(8 * KEEP);
        let long = format!("{{\"a\":\"{}\"}}", "x".repeat(4 * KEEP));
        assert_eq!(split(&mut framer, long.as_bytes()).unwrap().len(), 1);
        assert!(framer.read_buffer().capacity() <= 2 * CHUNK);
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
        fn messages_do_not_depend_on_how_the_stream_is_split(
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
            let (mut start, mut found) = (0, Vec::new());
            for end in ends {
                found.extend(split(&mut framer, &stream[start..end]).unwrap());
                start = end;
            }
            let found: Vec<Value> = found.iter().map(|message| serde_json::from_slice(message).unwrap()).collect();
            let wanted: Vec<Value> = messages.into_iter().map(|(message, ..)| message).collect();
            prop_assert_eq!(found, wanted);
        }

        #[test]
        fn no_input_causes_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let _messages_or_error = split(&mut Framer::new(32), &bytes);
        }
    }
}
