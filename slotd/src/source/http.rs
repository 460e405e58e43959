//! A bundle from a web server, as a stream that survives broken connections: it resumes with a range
//! request (RFC 9110, 14), if the server still has the same file.

use std::fmt;
use std::io::{self, Read};
use std::time::{Duration, Instant};

use bundle::BundleInput;
use ureq::Agent;
use ureq::http::header::{
    ACCEPT_ENCODING, ACCEPT_RANGES, CONTENT_RANGE, ETAG, HeaderName, IF_RANGE, LAST_MODIFIED, RANGE,
};
use ureq::http::{HeaderMap, StatusCode};

use super::pace::{GRACE, Pace, PaceLimits};
use super::tls;
use crate::refusal::{Refusal, Result};
use crate::root::RootDir;

/// Longest wait for an answer, or for its next bytes.
const PATIENCE: Duration = Duration::from_secs(30);

/// Maximum number of consecutive failed attempts; with the pauses below, a minute.
const ATTEMPTS: u32 = 8;

/// How long one answer may take if a later request can resume: the pace within a TLS record cannot be observed.
const ANSWER: Duration = Duration::from_secs(600);

/// How many times the same bytes may be sent again, by a server that does not support ranges.
const AGAIN: u64 = 8;

/// Maximum number of redirects. One leads from a name to a file store, one from there to a mirror.
const REDIRECTS: u32 = 5;

/// Maximum bytes of an answer's headers.
const HEAD: usize = 64 << 10;

/// Bytes that are read and skipped at a time.
const CHUNK: usize = 64 << 10;

/// The pause after the first failed attempt; it doubles, up to [`LONGEST_PAUSE`].
const PAUSE: Duration = Duration::from_millis(500);

/// The longest pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(16);

/// A new request costs one to three round trips; gaps shorter than this are read and discarded.
const WORTH_A_REQUEST: u64 = 1 << 20;

/// The stream.
pub struct HttpStream {
    agent: Agent,
    address: String,
    position: u64,
    /// The file's length, if the server has sent it.
    length: Option<u64>,
    /// The server's identifier of this version of the file.
    version: Option<String>,
    body: Option<Box<dyn Read + Send + Sync>>,
    /// How often the connection was made again.
    pub reconnections: u32,
    pause: Duration,
    pace: Pace,
    /// The server ignores ranges and always sends the file from its start.
    no_ranges: bool,
    /// Bytes that were sent again.
    again: u64,
}

impl fmt::Debug for HttpStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Http")
            .field("address", &self.address)
            .field("position", &self.position)
            .finish_non_exhaustive()
    }
}

/// A failed request: whether to try again or not.
enum Failure {
    Passing(io::Error),
    Final(io::Error),
}

impl HttpStream {
    /// Sends the first request.
    ///
    /// # Errors
    /// `source`: the server cannot be reached, or does not have the file. `bad-certificate`: its certificate is not
    /// trusted.
    pub fn open(address: &str, root: &RootDir) -> Result<Self> {
        Self::open_with(address, root, PaceLimits::default())
    }

    /// [`HttpStream::open`] with other limits.
    ///
    /// # Errors
    /// As [`HttpStream::open`].
    pub fn open_with(address: &str, root: &RootDir, limits: PaceLimits) -> Result<Self> {
        let config = Agent::config_builder()
            .tls_config(tls::tls_config(root)?)
            .timeout_connect(Some(PATIENCE))
            .timeout_recv_response(Some(PATIENCE))
            .timeout_per_read(Some(PATIENCE))
            .http_status_as_error(false)
            // A file requested over https is only accepted over https, even after a redirect.
            .https_only(address.starts_with("https://"))
            .max_redirects(REDIRECTS)
            .max_response_header_size(HEAD)
            // A robot in a closed network has no proxy; environment variables are ignored.
            .proxy(None)
            .build();
        let mut http = Self {
            agent: config.into(),
            address: address.to_owned(),
            position: 0,
            length: None,
            version: None,
            body: None,
            reconnections: 0,
            pause: PAUSE,
            pace: Pace::new(limits),
            no_ranges: false,
            again: 0,
        };
        match http.connect() {
            Ok(()) => Ok(http),
            Err(Failure::Passing(error) | Failure::Final(error)) => {
                let action = format!("reading {}", address.escape_debug());
                Err(tls::refusal(&action, &error).unwrap_or_else(|| {
                    let help = "check the address and the network";
                    Refusal::new("source", format!("{action}: {error}"), help)
                }))
            }
        }
    }

    /// The longest that one answer may take.
    fn answer_time(&self) -> Duration {
        let left = self.length.unwrap_or(u64::MAX).saturating_sub(self.position);
        let at_slowest = Duration::from_secs(left / u64::from(self.pace.slowest().max(1)));
        // An answer that cannot be resumed must arrive at once.
        if self.no_ranges { at_slowest.saturating_add(GRACE).max(ANSWER) } else { ANSWER }
    }

    fn connect(&mut self) -> std::result::Result<(), Failure> {
        let request = self.agent.get(&self.address).header(ACCEPT_ENCODING, "identity");
        let mut request = request.config().timeout_recv_body(Some(self.answer_time())).build();
        if self.position > 0 {
            request = request.header(RANGE, format!("bytes={}-", self.position));
            if let Some(version) = &self.version {
                request = request.header(IF_RANGE, version);
            }
        }
        let started = Instant::now();
        let answer = request.call();
        self.pace.count(started.elapsed(), 0).map_err(Failure::Final)?;
        let answer = answer.map_err(|error| {
            if let ureq::Error::RequireHttpsOnly(to) = &error {
                return Failure::Final(io::Error::other(format!(
                    "the server redirects from https to {}, which is not encrypted: \
                     use an address that stays on https",
                    to.escape_debug()
                )));
            }
            if let Some(distrust) = tls::distrust_error(&error) {
                return Failure::Final(distrust);
            }
            let passing = matches!(
                error,
                ureq::Error::Io(_) | ureq::Error::Timeout(_) | ureq::Error::ConnectionFailed
            );
            let error = io::Error::other(error.to_string());
            if passing { Failure::Passing(error) } else { Failure::Final(error) }
        })?;
        let (status, headers) = (answer.status(), answer.headers());
        let start = match status {
            StatusCode::OK => 0,
            StatusCode::PARTIAL_CONTENT => first_byte(headers).ok_or_else(|| {
                Failure::Final(io::Error::other("invalid Content-Range header from the server"))
            })?,
            // Overloaded, or just starting: try again.
            _ if status.is_server_error() => {
                return Err(Failure::Passing(io::Error::other(format!(
                    "the server answers {status}"
                ))));
            }
            _ => {
                return Err(Failure::Final(io::Error::other(format!(
                    "the server answers {status}"
                ))));
            }
        };
        // A strong ETag, otherwise the date (RFC 9110, 13.1.5).
        let word = |name: HeaderName| Some(headers.get(name)?.to_str().ok()?.to_owned());
        let version =
            word(ETAG).filter(|tag| !tag.starts_with("W/")).or_else(|| word(LAST_MODIFIED));
        let length = match answer.body().content_length() {
            Some(length) => Some(start.checked_add(length).ok_or_else(|| {
                Failure::Final(io::Error::other("invalid Content-Range header from the server"))
            })?),
            None => None,
        };
        let refuses_ranges = word(ACCEPT_RANGES).is_some_and(|unit| unit == "none");
        let same = |known: &Option<String>| known.is_none() || *known == version;
        if start > self.position
            || !same(&self.version)
            || self.length.is_some_and(|known| length != Some(known))
        {
            return Err(Failure::Final(io::Error::other("the file on the server has changed")));
        }
        (self.version, self.length) = (version, length);
        let mut body = answer.into_body().into_with_config().limit(u64::MAX).reader();
        // A server without support for ranges sends the file from its start.
        let mut before = self.position - start;
        self.no_ranges |= (self.position > 0 && start == 0) || refuses_ranges;
        let mut chunk = vec![0; CHUNK];
        while before > 0 {
            let most = usize::try_from(before).unwrap_or(CHUNK).min(CHUNK);
            let into = chunk.get_mut(..most).unwrap_or_default();
            let n = self.paced(|| body.read(into))?;
            if n == 0 {
                return Err(Failure::Passing(io::ErrorKind::UnexpectedEof.into()));
            }
            before = before.saturating_sub(n as u64);
            self.again += n as u64;
            if self.again > AGAIN * self.position.max(WORTH_A_REQUEST) {
                return Err(Failure::Final(io::Error::other(
                    "the connection breaks repeatedly, and the server does not support resuming",
                )));
            }
        }
        self.body = Some(Box::new(body));
        Ok(())
    }

    /// Reads, and counts the time that it takes.
    fn paced(
        &mut self,
        read: impl FnOnce() -> io::Result<usize>,
    ) -> std::result::Result<usize, Failure> {
        let started = Instant::now();
        let read = read();
        let bytes = read.as_ref().map_or(0, |n| *n as u64);
        self.pace.count(started.elapsed(), bytes).map_err(Failure::Final)?;
        read.map_err(Failure::Passing)
    }

    fn at_end(&self) -> bool {
        self.length.is_some_and(|length| self.position >= length)
    }
}

/// Where a partial answer starts: `bytes 1000-1999/5000`.
fn first_byte(headers: &HeaderMap) -> Option<u64> {
    let range = headers.get(CONTENT_RANGE)?.to_str().ok()?;
    range.strip_prefix("bytes ")?.split('-').next()?.parse().ok()
}

impl Read for HttpStream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut failures = 0;
        while !buffer.is_empty() && !self.at_end() {
            let attempt = match self.body.take() {
                Some(mut body) => {
                    let read = self.paced(|| body.read(buffer));
                    self.body = Some(body);
                    read
                }
                None => {
                    self.reconnections += 1;
                    match self.connect() {
                        Ok(()) => continue,
                        Err(failure) => Err(failure),
                    }
                }
            };
            let error = match attempt {
                Ok(0) if self.length.is_none() => return Ok(0),
                Ok(0) => io::ErrorKind::UnexpectedEof.into(),
                Ok(n) => {
                    self.position += n as u64;
                    self.pause = PAUSE;
                    return Ok(n);
                }
                Err(Failure::Final(error)) => return Err(error),
                Err(Failure::Passing(error)) => error,
            };
            self.body = None;
            failures += 1;
            if failures == ATTEMPTS {
                return Err(error);
            }
            if failures > 1 {
                std::thread::sleep(self.pause);
                self.pace.count(self.pause, 0)?;
                self.pause = (self.pause * 2).min(LONGEST_PAUSE);
            }
        }
        Ok(0)
    }
}

impl BundleInput for HttpStream {
    fn skip(&mut self, n: u64) -> io::Result<()> {
        let end = self.position.checked_add(n).ok_or(io::ErrorKind::InvalidInput)?;
        if self.length.is_some_and(|length| end > length) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        // Without a version it is unknown whether a later answer is from the same file. A server without support for
        // ranges would also send everything before the position again.
        let resumes = self.version.is_some() && self.length.is_some() && !self.no_ranges;
        if n >= WORTH_A_REQUEST && resumes {
            self.position = end;
            self.body = None;
            return Ok(());
        }
        let copied = io::copy(&mut self.by_ref().take(n), &mut io::sink())?;
        if copied == n { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test may fail by panicking")]
mod tests {
    use super::*;

    /// Answers one request with this text; the address.
    fn answering(text: &'static str) -> String {
        let server = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}/", server.local_addr().unwrap());
        std::thread::spawn(move || {
            let mut client = server.accept().unwrap().0;
            let (mut asked, mut byte) = (Vec::new(), [0]);
            while !asked.ends_with(b"\r\n\r\n") {
                client.read_exact(&mut byte).unwrap();
                asked.extend(byte);
            }
            std::io::Write::write_all(&mut client, text.as_bytes()).unwrap();
        });
        address
    }

    #[test]
    fn a_range_beyond_all_numbers_is_refused() {
        let address = answering(
            "HTTP/1.1 206 Partial Content\r\nContent-Range: bytes 18446744073709551615-5/9\r\nContent-Length: 9\r\n\r\n123456789",
        );
        let refusal = HttpStream::open(&address, &RootDir::new("/nowhere")).unwrap_err();
        assert_eq!(refusal.code, "source");
        assert!(refusal.message.contains("invalid Content-Range"), "{}", refusal.message);
    }
}
