//! The HTTP client of stores: retries while the service is overloaded or the connection breaks,
//! limits the size of answers, the pace and the total time.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use camino::Utf8Path;
use ureq::http::Response;
use ureq::tls::TlsConfig;
use ureq::{Agent, RequestBuilder, Timeout};

use super::ObjectError;
use super::format::LARGEST_TEXT;
use crate::artifact::hash_reader;
use crate::text::printable;
use crate::tls::load_authorities;

/// The timeouts of a server.
#[derive(Debug, Clone, Copy)]
pub struct ServerTimeouts {
    /// The connection must be established within this time.
    pub connect: Duration,
    /// The server must answer within this time after it has received the request.
    pub answer: Duration,
    /// Attempts when the server is overloaded or the connection breaks.
    pub attempts: u32,
    /// How long the other side may be slower than the minimum rate, or silent, in the middle of a transfer.
    pub silence: Duration,
    /// The minimum rate of a transfer in bytes per second.
    pub rate: u64,
}

impl Default for ServerTimeouts {
    /// Publishing has generous timeouts: it should succeed.
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(20),
            answer: Duration::from_secs(120),
            attempts: 4,
            silence: Duration::from_secs(60),
            // As the robots' agent: the slowest modem (slotd/src/source/pace.rs).
            rate: 1024,
        }
    }
}

impl ServerTimeouts {
    /// The timeout for this number of bytes.
    fn allowed(&self, bytes: u64) -> Duration {
        self.answer.saturating_add(self.needs(bytes))
    }

    /// How long this number of bytes takes at the minimum rate.
    fn needs(&self, bytes: u64) -> Duration {
        Duration::from_millis(bytes.saturating_mul(1000) / self.rate.max(1))
    }
}

/// What to do about a slow server.
const ELSEWHERE: &str = "help: try again, or use another copy of the store";

/// Whether another attempt would be the same.
fn is_final(error: &ureq::Error) -> bool {
    match error {
        ureq::Error::BodyExceedsLimit(_)
        | ureq::Error::RequireHttpsOnly(_)
        | ureq::Error::Timeout(Timeout::PerRead) => true,
        ureq::Error::Io(error) => is_slow(error),
        _ => false,
    }
}

/// An address without its user, password, query and fragment, which may be secret.
fn without_secrets(address: &str) -> String {
    let shown = address.split(['?', '#']).next().unwrap_or_default();
    let (scheme, rest) = shown.split_once("://").unwrap_or(("", shown));
    let (host, path) = rest.split_once('/').unwrap_or((rest, ""));
    let host = host.rsplit('@').next().unwrap_or_default();
    printable(&format!("{scheme}://{host}/{path}"))
}

/// Whether it is [`PacedBody`]'s own error, not the system's.
fn is_slow(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::TimedOut && error.get_ref().is_some()
}

/// A body that must keep the pace. Otherwise a server with a byte now and then would never end. Only waiting for the server
/// counts, not this machine's own work.
struct PacedBody<R> {
    body: R,
    limits: ServerTimeouts,
    /// The remaining time that the server may be slow; each byte adds some, up to the maximum.
    left: Duration,
}

impl<R: Read> PacedBody<R> {
    fn new(body: R, limits: ServerTimeouts) -> Self {
        Self { body, limits, left: limits.silence }
    }
}

impl<R: Read> Read for PacedBody<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let ServerTimeouts { silence, rate, .. } = self.limits;
        let late = || {
            let message = format!(
                "the server has sent less than {rate} bytes per second for {} s\n{ELSEWHERE}",
                silence.as_secs_f32()
            );
            io::Error::new(io::ErrorKind::TimedOut, message)
        };
        let started = Instant::now();
        let count = self.body.read(buffer).map_err(|error| {
            // ureq's own words do not say how long.
            match ureq::Error::from(error) {
                ureq::Error::Timeout(_) => late(),
                other => other.into_io(),
            }
        })?;
        let (waited, earned) = (started.elapsed(), self.limits.needs(count as u64));
        self.left = self.left.saturating_add(earned).saturating_sub(waited).min(silence);
        if count > 0 && self.left.is_zero() {
            return Err(late());
        }
        Ok(count)
    }
}

/// A server and its client.
#[derive(Debug)]
pub(super) struct HttpClient {
    /// Its name in messages.
    pub name: String,
    /// Sends the requests.
    pub agent: Agent,
    timeouts: ServerTimeouts,
}

/// An answer's status, the relevant headers, and its body.
pub(super) struct HttpResponse {
    pub status: u16,
    pub etag: Option<String>,
    pub length: Option<u64>,
    pub checksum: Option<String>,
    pub body: Vec<u8>,
}

/// The body of a request.
pub(super) enum RequestBody {
    Bytes(Vec<u8>),
    File(File),
}

impl HttpClient {
    /// `encrypted`: the store's address is https, and remains so: a redirect to http is refused.
    pub fn new(name: String, encrypted: bool, timeouts: ServerTimeouts) -> Result<Self> {
        // A server that transfers nothing for this time is unreachable.
        let silence = Some(timeouts.silence);
        // For small files; objects have their own limit.
        let body = timeouts.allowed(LARGEST_TEXT);
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .https_only(encrypted)
            .user_agent(concat!("slipway/", env!("CARGO_PKG_VERSION")))
            // The stored bytes, never compressed for the transfer.
            .accept_encoding("identity")
            .timeout_resolve(silence)
            .timeout_connect(Some(timeouts.connect))
            .timeout_recv_response(Some(timeouts.answer))
            .timeout_recv_body(Some(body))
            .timeout_per_read(silence)
            .timeout_per_write(silence)
            .tls_config(TlsConfig::builder().root_certs(load_authorities()?).build())
            .build();
        Ok(Self { name, agent: config.into(), timeouts })
    }

    /// Retries while the service is overloaded or the connection breaks.
    pub fn request(
        &self,
        what: &str,
        mut once: impl FnMut() -> Result<HttpResponse, ureq::Error>,
    ) -> Result<HttpResponse> {
        let mut pause = Duration::from_millis(300);
        let mut attempt = 1;
        loop {
            let error = match once() {
                Ok(answer) if !matches!(answer.status, 408 | 429 | 500..=599) => return Ok(answer),
                Ok(answer) => {
                    let message = format!("the server answered {}\n{ELSEWHERE}", answer.status);
                    anyhow::Error::msg(message)
                }
                // Neither overloaded nor disconnected: it would do the same again, for minutes.
                Err(error) if is_final(&error) => {
                    return Err(self.describe(&error))
                        .with_context(|| format!("reading {what} from {}", self.name));
                }
                Err(error) => self.describe(&error),
            };
            if attempt == self.timeouts.attempts {
                let attempts = match attempt {
                    1 => String::new(),
                    many => format!(" after {many} attempts"),
                };
                return Err(error)
                    .with_context(|| format!("{what}: giving up {}{attempts}", self.name));
            }
            attempt += 1;
            std::thread::sleep(pause);
            pause *= 2;
        }
    }

    /// Sends a request with a body of this size.
    pub fn send(
        &self,
        request: RequestBuilder<ureq::typestate::WithBody>,
        body: RequestBody,
        size: u64,
    ) -> Result<HttpResponse, ureq::Error> {
        // A service may think about what it has received for as long as it may take to answer.
        let request = request
            .config()
            .timeout_send_body(Some(self.timeouts.allowed(size)))
            .timeout_per_read(Some(self.timeouts.answer))
            .build();
        let mut response = match body {
            RequestBody::Bytes(bytes) => request.send(&bytes[..])?,
            RequestBody::File(file) => request.send(file)?,
        };
        self.read(&mut response)
    }

    /// Reads a small file, or what a service has to say.
    pub fn read(&self, response: &mut Response<ureq::Body>) -> Result<HttpResponse, ureq::Error> {
        let mut answer = HttpResponse::head(response);
        // Both what is transferred and what is decoded: a server may compress whatever it was asked for.
        let body = response.body_mut().with_config().limit(LARGEST_TEXT + 1).reader();
        let body = PacedBody::new(body, self.timeouts);
        body.take(LARGEST_TEXT + 1).read_to_end(&mut answer.body)?;
        if answer.body.len() as u64 > LARGEST_TEXT {
            return Err(ureq::Error::BodyExceedsLimit(LARGEST_TEXT));
        }
        Ok(answer)
    }

    /// ureq's own words do not say how long, and an address in them may contain a signature: the server is named instead.
    fn describe(&self, error: &ureq::Error) -> anyhow::Error {
        let ServerTimeouts { silence, answer, .. } = self.timeouts;
        anyhow::Error::msg(match error {
            ureq::Error::Timeout(Timeout::PerRead | Timeout::PerWrite) => {
                format!("the server was silent for {} s\n{ELSEWHERE}", silence.as_secs_f32())
            }
            ureq::Error::Timeout(Timeout::RecvResponse) => {
                format!("the server has not answered for {} s\n{ELSEWHERE}", answer.as_secs_f32())
            }
            ureq::Error::BodyExceedsLimit(_) => format!(
                "the server has sent more than {LARGEST_TEXT} bytes, the maximum for this file\n\
                 help: check that this is the address of a store"
            ),
            ureq::Error::RequireHttpsOnly(target) => format!(
                "{} redirects to {}, which is not encrypted\n\
                 help: use the address of a server that stays with https",
                self.name,
                without_secrets(target)
            ),
            ureq::Error::Io(error) if is_slow(error) => error.to_string(),
            other => {
                let message = other.to_string();
                // The TLS library's own words.
                let help = match message.contains("certificate") {
                    true => {
                        "check the clock of this machine; to trust an authority of your own, set SSL_CERT_FILE to its certificate (PEM)"
                    }
                    false => "check the address and the network, then try again",
                };
                format!("{message}\nhelp: {help}")
            }
        })
    }

    /// Starts to fetch an object of limited size.
    pub fn get(
        &self,
        request: RequestBuilder<ureq::typestate::WithoutBody>,
        limit: u64,
    ) -> Result<Response<ureq::Body>> {
        let allowed = Some(self.timeouts.allowed(limit));
        let request = request.config().timeout_recv_body(allowed).build();
        let response = request.call().map_err(|error| self.describe(&error));
        response.with_context(|| format!("fetching from {}", self.name))
    }

    /// Writes an object to a file while it arrives, and verifies its hash.
    pub fn receive(
        &self,
        response: &mut Response<ureq::Body>,
        (path, sha256): (&str, &str),
        limit: u64,
        into: &Utf8Path,
        received: &dyn Fn(u64),
    ) -> Result<()> {
        let context = || format!("fetching {path} from {}", self.name);
        let body = response.body_mut().with_config().limit(u64::MAX).reader();
        // One additional byte is enough to detect a wrong object.
        let body = body.take(limit.saturating_add(1));
        let mut body = PacedBody::new(body, self.timeouts);
        let mut out = File::create(into).with_context(|| format!("creating {into}"))?;
        let failed = |error| anyhow::Error::new(error).context(context());
        let (_, found) = hash_reader(&mut body, failed, |bytes| {
            out.write_all(bytes).with_context(|| format!("writing {into}"))?;
            received(bytes.len() as u64);
            Ok(())
        })?;
        if found != sha256 {
            drop(fs::remove_file(into));
            return Err(ObjectError::Damaged(format!(
                "{path} of {} is damaged: its SHA-256 is {found}",
                self.name
            ))
            .into());
        }
        Ok(())
    }
}

impl HttpResponse {
    pub fn head(response: &Response<ureq::Body>) -> Self {
        let header = |name: &str| {
            let value = response.headers().get(name)?;
            value.to_str().ok().map(str::to_owned)
        };
        Self {
            status: response.status().as_u16(),
            etag: header("etag"),
            length: header("content-length").and_then(|n| n.parse().ok()),
            checksum: header("x-amz-checksum-sha256"),
            body: Vec::new(),
        }
    }
}
