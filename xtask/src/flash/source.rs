//! Where the bytes come from: `.img`, `.img.zst` or `.img.xz`, with or without a block map. A pass
//! over an image goes forward only, since a compressed one can be read in no other way.

use std::fs::File;
use std::io::{self, BufReader, Read};
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, bail, ensure};
use camino::{Utf8Path, Utf8PathBuf};
use lzma_rust2::XzReader;

use super::frames::{self, Frame, Frames};
use crate::disk::bmap::{self, BlockMap};
use crate::progress::{Step, Unit};

/// Bytes of an image without a map that share a checksum: as in our own maps.
const UNMAPPED_RANGE: u64 = 16 << 20;
/// Bytes of what is passed over in a compressed image at once: what stays in a core's cache.
const SKIP: usize = 128 << 10;
/// The most bytes that a compressed image may have: 1 TiB, more than any card.
const LARGEST: u64 = 1 << 40;
/// What to do about a damaged image.
const AGAIN: &str = "help: build or download it again";
/// Bytes of a compressed file read at once.
const READ: usize = 1 << 20;

/// How an image is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// As it is.
    Plain,
    /// zstd, one frame or many.
    Zstd,
    /// xz, one stream or many.
    Xz,
}

/// A part of the image that must reach the card.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Range {
    /// Byte offset.
    pub offset: u64,
    /// Bytes.
    pub size: u64,
    /// SHA-256 from the block map, lower-case hexadecimal; none without a map.
    pub sha256: Option<String>,
}

/// An image that was looked at.
#[derive(Debug, Clone)]
pub struct Source {
    /// Its file.
    pub path: Utf8PathBuf,
    /// How it is stored.
    pub form: Form,
    /// Bytes of the image itself.
    pub size: u64,
    /// Whether a block map says what must reach the card; else all of it must.
    pub mapped: bool,
    /// What must reach the card, in order.
    pub ranges: Vec<Range>,
    /// The frames that it is packed in, where these are small.
    frames: Option<Vec<Frame>>,
}

impl Source {
    /// Looks at an image. One that is compressed, says nowhere how large it is and has no map is read once,
    /// for its size.
    ///
    /// # Errors
    /// When it cannot be read, has another form, or its block map is damaged or of another image.
    pub fn open(path: &Utf8Path) -> Result<Self> {
        let doing = || format!("reading the image {path}");
        let stem = path.as_str();
        let (form, plain) = match (stem.strip_suffix(".zst"), stem.strip_suffix(".xz")) {
            (Some(plain), _) => (Form::Zstd, Utf8Path::new(plain)),
            (_, Some(plain)) => (Form::Xz, Utf8Path::new(plain)),
            _ => (Form::Plain, path),
        };
        ensure!(
            plain.extension() == Some("img"),
            "{path} is no card image\nhelp: name a file that ends in .img, .img.zst or .img.xz"
        );
        let file = File::open(path).with_context(doing)?;
        let stored = file.metadata().with_context(doing)?;
        ensure!(stored.is_file(), "{}: it is not a plain file", doing());
        let map = [bmap::path_for(plain), bmap::path_for(path)].into_iter().find(|m| m.is_file());
        let map = map.map(|map| BlockMap::read(&map)).transpose()?;
        let frames = match form {
            Form::Zstd => frames::scan(&file).with_context(doing)?,
            Form::Plain | Form::Xz => None,
        };
        let unpacked = frames.as_ref().map(|frames| frames.iter().map(|f| f.size).sum::<u64>());
        let size = match (form, &map, unpacked) {
            (Form::Plain, ..) => stored.len(),
            (_, Some(map), _) => map.image_size,
            (_, None, Some(size)) => size,
            (_, None, None) => measure(path, form)?,
        };
        // Another size than the map's is an error, which the stream runs into.
        let frames = frames.filter(|_| unpacked == Some(size));
        ensure!(
            size > 0 && size.is_multiple_of(512),
            "{}: it has {size} bytes, expected whole sectors of 512",
            doing()
        );
        let mapped = map.is_some();
        let ranges = match map {
            Some(map) => {
                ensure!(
                    map.image_size == size,
                    "{}: the image has {size} bytes, its block map is of {}\n\
                     help: keep each image beside its own map, or build it again",
                    doing(),
                    map.image_size
                );
                let range = |r: bmap::Range| {
                    let offset = r.first * map.block_size;
                    let end = ((r.last + 1) * map.block_size).min(size);
                    Range { offset, size: end - offset, sha256: Some(r.sha256) }
                };
                map.ranges.into_iter().map(range).collect()
            }
            None => (0..size)
                .step_by(UNMAPPED_RANGE as usize)
                .map(|offset| Range {
                    offset,
                    size: UNMAPPED_RANGE.min(size - offset),
                    sha256: None,
                })
                .collect(),
        };
        Ok(Self { path: path.to_owned(), form, size, mapped, ranges, frames })
    }

    /// Bytes that must reach the card.
    pub fn bytes(&self) -> u64 {
        self.ranges.iter().map(|range| range.size).sum()
    }

    /// Starts a pass at the image's first byte.
    ///
    /// # Errors
    /// When the file cannot be opened.
    pub fn pass(&self) -> Result<Pass> {
        let doing = || format!("reading the image {}", self.path);
        let file = File::open(&self.path).with_context(doing)?;
        let input = match (self.form, &self.frames) {
            (Form::Plain, _) => Input::File(file),
            (_, Some(frames)) => Input::Frames(Frames::start(file, frames, &self.ranges)),
            (form, None) => Input::Stream(decoder(file, form).with_context(doing)?),
        };
        Ok(Pass { input, path: self.path.clone(), size: self.size, position: 0 })
    }
}

fn decoder(file: File, form: Form) -> io::Result<Box<dyn Read + Send>> {
    let file = BufReader::with_capacity(READ, file);
    Ok(match form {
        Form::Plain => Box::new(file),
        Form::Zstd => Box::new(Unpacked(zstd::Decoder::with_buffer(file)?)),
        Form::Xz => Box::new(XzReader::new(file, true)),
    })
}

/// A stream of zstd that says what to do about a window that the library refuses.
struct Unpacked<T>(T);

impl<T: Read> Read for Unpacked<T> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer).map_err(|error| {
            // zstd's own words for ZSTD_error_frameParameter_windowTooLarge (zstd 1.5, error_private.c).
            if error.to_string().contains("too much memory") {
                return io::Error::other(
                    "it was packed with a window of more than 128 MiB (`zstd --long=28` or more)\n\
                     help: unpack it with `zstd -d --long=31`, or pack it again without `--long`",
                );
            }
            error
        })
    }
}

/// Bytes of a compressed image.
fn measure(path: &Utf8Path, form: Form) -> Result<u64> {
    let doing = || format!("unpacking {path}");
    let mut decoder = decoder(File::open(path).with_context(doing)?, form).with_context(doing)?;
    let step = Step::new("flash", "its size, since there is no block map", 0, Unit::Bytes);
    let mut buffer = vec![0; SKIP];
    let mut size = 0;
    loop {
        let count = decoder.read(&mut buffer).with_context(doing)?;
        if count == 0 {
            return Ok(size);
        }
        size += count as u64;
        step.note(crate::progress::bytes(size));
        ensure!(size <= LARGEST, "{}: it has more than 1 TiB", doing());
    }
}

enum Input {
    File(File),
    Frames(Frames),
    Stream(Box<dyn Read + Send>),
}

/// One pass over an image, forward only.
pub struct Pass {
    input: Input,
    path: Utf8PathBuf,
    size: u64,
    position: u64,
}

impl Pass {
    /// Fills a buffer from `offset`, which no call before has passed.
    ///
    /// # Errors
    /// When the file cannot be read or unpacked, or ends too early.
    pub fn read_at(&mut self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let path = &self.path;
        match &mut self.input {
            Input::File(file) => file.read_exact_at(buffer, offset),
            Input::Frames(frames) => frames.read_at(offset, buffer),
            Input::Stream(stream) => skip(stream, &mut self.position, offset)
                .and_then(|()| stream.read_exact(buffer))
                .inspect(|()| self.position += buffer.len() as u64),
        }
        .with_context(|| format!("reading {} bytes at {offset} of {path}\n{AGAIN}", buffer.len()))
    }

    /// Reads a stream to its end: only then its own checksums have been checked. Of frames each that was
    /// needed has been.
    ///
    /// # Errors
    /// When it is damaged, or shorter or longer than it should be.
    pub fn finish(mut self) -> Result<()> {
        let Input::Stream(mut stream) = self.input else { return Ok(()) };
        let path = &self.path;
        skip(&mut stream, &mut self.position, self.size).with_context(|| {
            format!("reading {path} to its end, at {} bytes\n{AGAIN}", self.position)
        })?;
        if stream.read(&mut [0]).with_context(|| format!("reading the end of {path}"))? != 0 {
            bail!(
                "{path} has more than the {} bytes that its block map says\n\
                 help: keep each image beside its own map, or build it again",
                self.size
            );
        }
        Ok(())
    }
}

fn skip(stream: &mut dyn Read, position: &mut u64, to: u64) -> io::Result<()> {
    let left = to.checked_sub(*position).ok_or(io::ErrorKind::InvalidInput)?;
    if left == 0 {
        return Ok(());
    }
    let mut scratch = vec![0; SKIP.min(usize::try_from(left).unwrap_or(SKIP))];
    while *position < to {
        let count = SKIP.min(usize::try_from(to - *position).unwrap_or(SKIP));
        stream.read_exact(&mut scratch[..count])?;
        *position += count as u64;
    }
    Ok(())
}
