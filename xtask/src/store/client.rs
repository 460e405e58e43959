//! The HTTP client of stores: retries while the service is overloaded or the connection breaks,
//! limits the size of answers and the total time.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::time::Duration;

use anyhow::{Context, Result};
use camino::Utf8Path;
use ureq::http::Response;
use ureq::tls::TlsConfig;
use ureq::{Agent, RequestBuilder};

use super::ObjectError;
use super::format::LARGEST_TEXT;
use crate::artifact::hash_reader;
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
    /// The minimum rate of an object's transfer in bytes per second; 0: no minimum.
    pub rate: u64,
}

impl Default for ServerTimeouts {
    /// Publishing has generous timeouts: it should succeed.
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(20),
            answer: Duration::from_secs(120),
            attempts: 4,
            rate: 0,
        }
    }
}

impl ServerTimeouts {
    /// The timeout for this number of bytes.
    fn allowed(&self, bytes: u64) -> Option<Duration> {
        let seconds = bytes.checked_div(self.rate)?;
        Some(self.answer + Duration::from_secs(seconds))
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
    pub fn new(name: String, timeouts: ServerTimeouts) -> Result<Self> {
        // A server that sends nothing for this time, in the middle of an object, is unreachable.
        let silence = (timeouts.rate > 0).then_some(timeouts.answer);
        // For small files; objects have their own limit.
        let body = timeouts.allowed(LARGEST_TEXT);
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .user_agent(concat!("slipway/", env!("CARGO_PKG_VERSION")))
            .timeout_resolve(silence)
            .timeout_connect(Some(timeouts.connect))
            .timeout_recv_response(Some(timeouts.answer))
            .timeout_recv_body(body)
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
                Ok(answer) => anyhow::Error::msg(format!("the server answered {}", answer.status)),
                // The address may contain a signature, so it is not shown.
                Err(error) => anyhow::Error::msg(error.to_string()),
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
        let request = request.config().timeout_send_body(self.timeouts.allowed(size)).build();
        let mut response = match body {
            RequestBody::Bytes(bytes) => request.send(&bytes[..])?,
            RequestBody::File(file) => request.send(file)?,
        };
        HttpResponse::read(&mut response)
    }

    /// Starts to fetch an object of limited size.
    pub fn get(
        &self,
        request: RequestBuilder<ureq::typestate::WithoutBody>,
        limit: u64,
    ) -> Result<Response<ureq::Body>> {
        // Fetch the stored bytes, never compressed for the transfer.
        let request = request.header("Accept-Encoding", "identity");
        let request = request.config().timeout_recv_body(self.timeouts.allowed(limit)).build();
        let response = request.call().map_err(|error| anyhow::Error::msg(error.to_string()));
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
        let mut body = body.take(limit.saturating_add(1));
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

    pub fn read(response: &mut Response<ureq::Body>) -> Result<Self, ureq::Error> {
        let mut answer = Self::head(response);
        answer.body = response.body_mut().with_config().limit(LARGEST_TEXT).read_to_vec()?;
        Ok(answer)
    }
}
