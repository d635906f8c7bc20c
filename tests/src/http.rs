//! An HTTP client that sends the given bytes unchanged and reads responses as a guest does.
//!
//! It is small and blocking on purpose: a test controls every segment. Deadlines are the timeouts
//! of the stream.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpStream};

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Response {
    /// The status line, such as `HTTP/1.1 200 OK`.
    pub status_line: String,
    pub status: u16,
    /// The headers as sent, in order.
    pub headers: Vec<(String, String)>,
    /// The body without its framing.
    pub body: Vec<u8>,
}

impl Response {
    /// Returns the first header with this name.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(have, _)| have.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }

    /// Returns the body as text. Panics if it is not UTF-8.
    #[must_use]
    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.body)
            .unwrap_or_else(|e| panic!("{}: the body is not text: {e}", self.status_line))
    }
}

/// A connection under the control of a test.
#[derive(Debug)]
pub struct Connection<S: Read + Write> {
    stream: BufReader<S>,
}

impl<S: Read + Write> Connection<S> {
    /// Wraps a connected stream. Its timeouts are the deadlines.
    pub fn new(stream: S) -> Self {
        Self { stream: BufReader::new(stream) }
    }

    pub fn stream(&self) -> &S {
        self.stream.get_ref()
    }

    /// Sends bytes in one write.
    ///
    /// # Errors
    /// Returns the error of the stream.
    pub fn send(&mut self, bytes: impl AsRef<[u8]>) -> io::Result<()> {
        self.stream.get_mut().write_all(bytes.as_ref())?;
        self.stream.get_mut().flush()
    }

    /// Sends a complete HTTP/1.1 request and reads the response. Adds `Host` and, for a body,
    /// `Content-Length`.
    ///
    /// # Errors
    /// Returns the error of the stream, or `InvalidData` if the response is not HTTP.
    pub fn request(
        &mut self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> io::Result<Response> {
        let mut head = format!("{method} {path} HTTP/1.1\r\nHost: 169.254.169.254\r\n");
        for (name, value) in headers {
            head.extend([name, ": ", value, "\r\n"]);
        }
        if !body.is_empty() {
            head.extend(["Content-Length: ", &body.len().to_string(), "\r\n"]);
        }
        head.push_str("\r\n");
        self.send([head.as_bytes(), body].concat())?;
        if method == "HEAD" { self.receive_head() } else { self.receive() }
    }

    /// Reads one response with its body.
    ///
    /// # Errors
    /// Returns the errors of [`Self::request`].
    pub fn receive(&mut self) -> io::Result<Response> {
        let mut response = self.receive_head()?;
        if response.status == 204 || response.status == 304 || response.status < 200 {
            return Ok(response);
        }
        let chunked =
            response.header("transfer-encoding").is_some_and(|coding| coding.eq_ignore_ascii_case("chunked"));
        let length = response.header("content-length").map(str::to_owned);
        if chunked {
            self.read_chunks(&mut response.body)?;
        } else if let Some(length) = length {
            let length = length.parse().map_err(|_| garbage("Content-Length", &length))?;
            response.body.resize(length, 0);
            self.stream.read_exact(&mut response.body)?;
        } else {
            self.stream.read_to_end(&mut response.body)?;
        }
        Ok(response)
    }

    /// Reads a response without a body: to HEAD, or an interim response.
    ///
    /// # Errors
    /// Returns the errors of [`Self::request`].
    pub fn receive_head(&mut self) -> io::Result<Response> {
        let status_line = self.line()?;
        let status = status_line
            .strip_prefix("HTTP/1.")
            .and_then(|rest| rest.split(' ').nth(1)?.parse().ok())
            .ok_or_else(|| garbage("status line", &status_line))?;
        let mut headers = Vec::new();
        loop {
            let line = self.line()?;
            if line.is_empty() {
                return Ok(Response { status_line, status, headers, body: Vec::new() });
            }
            let (name, value) = line.split_once(':').ok_or_else(|| garbage("header", &line))?;
            headers.push((name.to_owned(), value.trim().to_owned()));
        }
    }

    /// Reads until the peer has closed the connection.
    ///
    /// # Errors
    /// Returns the error of the stream.
    pub fn receive_rest(&mut self) -> io::Result<Vec<u8>> {
        let mut rest = Vec::new();
        self.stream.read_to_end(&mut rest)?;
        Ok(rest)
    }

    fn read_chunks(&mut self, body: &mut Vec<u8>) -> io::Result<()> {
        loop {
            let line = self.line()?;
            let size = u64::from_str_radix(line.split(';').next().unwrap_or_default().trim(), 16)
                .map_err(|_| garbage("chunk size", &line))?;
            if size == 0 {
                while !self.line()?.is_empty() {}
                return Ok(());
            }
            let read = self.stream.by_ref().take(size).read_to_end(body)?;
            if read as u64 != size || !self.line()?.is_empty() {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }

    fn line(&mut self) -> io::Result<String> {
        let mut line = String::new();
        if self.stream.read_line(&mut line)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let text = line.strip_suffix("\r\n").ok_or_else(|| garbage("line end", &line))?;
        Ok(text.to_owned())
    }
}

impl Connection<TcpStream> {
    /// Shuts down the sending side.
    ///
    /// # Errors
    /// Returns the error of the stream.
    pub fn finish(&mut self) -> io::Result<()> {
        self.stream().shutdown(Shutdown::Write)
    }
}

fn garbage(what: &str, text: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("invalid HTTP {what}: {text:?}"))
}
