//! Sources of a bundle: a file, standard input, or a web server.

mod http;
mod pace;
mod tls;

use std::fs::File;
use std::io::{self, BufReader, Read};
use std::os::fd::AsFd;

use bundle::{Input, Seekable, Stream};

use crate::refusal::{Refusal, Result};
use crate::root::Root;

pub use http::Http;
pub use pace::{Limits, Pace, Paced};
pub(crate) use tls::refusal as distrusted;

/// An opened source.
#[derive(Debug)]
pub enum Source {
    /// A file: unneeded frames are not read.
    File(Seekable<BufReader<File>>),
    /// Standard input, or a file that is not seekable: the sender must keep the pace.
    Pipe(Stream<BufReader<Paced<File>>>),
    /// A web server: unneeded frames are not sent.
    Http(Box<Http>),
}

impl Source {
    /// Opens a source by name: a path, `-`, or an address that begins with `http://` or `https://`.
    ///
    /// # Errors
    /// `source`: it cannot be opened or reached. `bad-certificate`: the server's certificate is not trusted.
    pub fn open(name: &str, root: &Root) -> Result<Self> {
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
            return Ok(Self::Http(Box::new(Http::open(name, root)?)));
        }
        let failed = |error: io::Error| {
            Refusal::new("source", format!("opening {name}: {error}"), "check the path")
        };
        let file = File::open(name).map_err(failed)?;
        if file.metadata().map_err(failed)?.is_file() {
            Ok(Self::File(Seekable(BufReader::with_capacity(1 << 16, file))))
        } else {
            Ok(Self::pipe(file))
        }
    }

    fn pipe(file: File) -> Self {
        let paced = Paced::new(file, Limits::default());
        Self::Pipe(Stream(BufReader::with_capacity(1 << 16, paced)))
    }

    /// Whether skipping a part saves its transfer, so that it is worth reading the running slot instead. A
    /// local file is read faster than the slot.
    pub fn transfers(&self) -> bool {
        matches!(self, Self::Http(_))
    }
}

impl Read for Source {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::File(input) => input.read(buffer),
            Self::Pipe(input) => input.read(buffer),
            Self::Http(input) => input.read(buffer),
        }
    }
}

impl Input for Source {
    fn skip(&mut self, n: u64) -> io::Result<()> {
        match self {
            Self::File(input) => input.skip(n),
            Self::Pipe(input) => input.skip(n),
            Self::Http(input) => input.skip(n),
        }
    }
}
