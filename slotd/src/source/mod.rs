//! Sources of a bundle: a file, standard input, or a web server.

mod http;
mod pace;
mod tls;

use std::fs::File;
use std::io::{self, BufReader, Read};
use std::os::fd::AsFd;

use bundle::{BundleInput, SeekableInput, StreamInput};

use crate::refusal::{Refusal, Result};
use crate::root::RootDir;

pub use http::HttpStream;
pub use pace::{Pace, PaceLimits, PacedStream};
pub(crate) use tls::refusal as distrusted;

/// Refuses an address that has a user name or a password: messages and the job's record show the address.
///
/// # Errors
/// `source`, which does not have the address.
pub fn refuse_credentials(name: &str) -> Result<()> {
    let Some((scheme, rest)) = name.split_once("://") else { return Ok(()) };
    let is_web = ["http", "https"].iter().any(|known| scheme.eq_ignore_ascii_case(known));
    // RFC 3986, 3.2: the part with the user and the host ends at the first of these.
    let host = rest.split(['/', '?', '#']).next().unwrap_or_default();
    if !is_web || !host.contains('@') {
        return Ok(());
    }
    Err(Refusal::new(
        "source",
        "the bundle's address has a user name or a password, which messages and the job's record would show",
        "fetch the bundle with another program: `curl --netrc ADDRESS | slotd install -`",
    ))
}

/// An opened source.
#[derive(Debug)]
pub enum BundleSource {
    /// A file: unneeded frames are not read.
    File(SeekableInput<BufReader<File>>),
    /// Standard input, or a file that is not seekable: the sender must keep the pace.
    Pipe(StreamInput<BufReader<PacedStream<File>>>),
    /// A web server: unneeded frames are not sent.
    Http(Box<HttpStream>),
}

impl BundleSource {
    /// Opens a source by name: a path, `-`, or an address that begins with `http://` or `https://`.
    ///
    /// # Errors
    /// `source`: it cannot be opened or reached, or its address has a password. `bad-certificate`: the server's certificate is not trusted.
    pub fn open(name: &str, root: &RootDir) -> Result<Self> {
        refuse_credentials(name)?;
        if name == "-" {
            // A separate handle: Rust's standard input has a buffer, which `poll` does not see.
            let input = io::stdin().as_fd().try_clone_to_owned().map_err(|error| {
                Refusal::new(
                    "source",
                    format!("opening standard input: {error}"),
                    "pass the bundle on standard input",
                )
            })?;
            return Ok(Self::pipe(input.into()));
        }
        if name.starts_with("http://") || name.starts_with("https://") {
            return Ok(Self::Http(Box::new(HttpStream::open(name, root)?)));
        }
        let failed = |error: io::Error| {
            let name = name.escape_debug();
            Refusal::new("source", format!("opening {name}: {error}"), "check the path")
        };
        let file = File::open(name).map_err(failed)?;
        if file.metadata().map_err(failed)?.is_file() {
            Ok(Self::File(SeekableInput(BufReader::with_capacity(1 << 16, file))))
        } else {
            Ok(Self::pipe(file))
        }
    }

    fn pipe(file: File) -> Self {
        let paced = PacedStream::new(file, PaceLimits::default());
        Self::Pipe(StreamInput(BufReader::with_capacity(1 << 16, paced)))
    }

    /// Whether skipping a part saves its transfer, so that it is worth reading the running slot instead. A
    /// local file is read faster than the slot.
    pub fn transfers(&self) -> bool {
        matches!(self, Self::Http(_))
    }
}

impl Read for BundleSource {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::File(input) => input.read(buffer),
            Self::Pipe(input) => input.read(buffer),
            Self::Http(input) => input.read(buffer),
        }
    }
}

impl BundleInput for BundleSource {
    fn skip(&mut self, n: u64) -> io::Result<()> {
        match self {
            Self::File(input) => input.skip(n),
            Self::Pipe(input) => input.skip(n),
            Self::Http(input) => input.skip(n),
        }
    }
}
