//! The image: `.img`, `.img.zst` or `.img.xz`, with or without a block map. A pass over an image
//! only goes forward, since a compressed image cannot be read in another way.

use std::fs::File;
use std::io::{self, BufReader, Read};
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, bail, ensure};
use camino::{Utf8Path, Utf8PathBuf};
use lzma_rust2::XzReader;

use super::frames::{self, FrameUnpacker, ImageFrame};
use crate::artifact::open_regular;
use crate::disk::bmap::{self, BlockMap};
use crate::progress::{ProgressStep, ProgressUnit};

/// How many bytes of an image without a map share a checksum: as in our own maps.
const UNMAPPED_RANGE: u64 = 16 << 20;
/// How many bytes of a compressed image are skipped at once: they fit into a core's cache.
const SKIP: usize = 128 << 10;
/// The largest compressed image in bytes: 1 TiB, more than any card.
const LARGEST: u64 = 1 << 40;
/// The help for a damaged image.
const AGAIN: &str = "help: build or download the image again";
/// Bytes of a compressed file read at once.
const READ: usize = 1 << 20;

/// How an image is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ImageFormat {
    /// Uncompressed.
    Plain,
    /// zstd, one frame or many.
    Zstd,
    /// xz, one stream or many.
    Xz,
}

/// A part of the image that must reach the card.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageRange {
    /// Byte offset.
    pub offset: u64,
    /// Bytes.
    pub size: u64,
    /// SHA-256 from the block map, lower-case hexadecimal; `None` without a map.
    pub sha256: Option<String>,
}

/// An image that was examined.
#[derive(Debug, Clone)]
pub struct ImageSource {
    /// Its file.
    pub path: Utf8PathBuf,
    /// How it is stored.
    pub form: ImageFormat,
    /// Bytes of the image itself.
    pub size: u64,
    /// Whether a block map lists what must reach the card; without one everything must.
    pub mapped: bool,
    /// What must reach the card, in order.
    pub ranges: Vec<ImageRange>,
    /// The frames of a file that is packed in small frames.
    frames: Option<Vec<ImageFrame>>,
}

impl ImageSource {
    /// Examines an image. A compressed image of unknown size without a map is read once to find its
    /// size.
    ///
    /// # Errors
    /// When it cannot be read, has another format, or its block map is damaged or belongs to
    /// another image.
    pub fn open(path: &Utf8Path) -> Result<Self> {
        let context = || format!("reading the image {path}");
        let stem = path.as_str();
        let (form, plain) = match (stem.strip_suffix(".zst"), stem.strip_suffix(".xz")) {
            (Some(plain), _) => (ImageFormat::Zstd, Utf8Path::new(plain)),
            (_, Some(plain)) => (ImageFormat::Xz, Utf8Path::new(plain)),
            _ => (ImageFormat::Plain, path),
        };
        ensure!(
            plain.extension() == Some("img"),
            "{path} is not a card image\nhelp: name a file that ends in .img, .img.zst or .img.xz"
        );
        let file = open_regular(path).with_context(context)?;
        let stored = file.metadata().with_context(context)?;
        let map = [bmap::path_for(plain), bmap::path_for(path)].into_iter().find(|m| m.is_file());
        let map = map.map(|map| BlockMap::read(&map)).transpose()?;
        let frames = match form {
            ImageFormat::Zstd => frames::scan_frames(&file).with_context(context)?,
            ImageFormat::Plain | ImageFormat::Xz => None,
        };
        let unpacked = frames.as_ref().map(|frames| frames.iter().map(|f| f.size).sum::<u64>());
        let size = match (form, &map, unpacked) {
            (ImageFormat::Plain, ..) => stored.len(),
            (_, Some(map), _) => map.image_size,
            (_, None, Some(size)) => size,
            (_, None, None) => measure_image(path, form)?,
        };
        // A size other than the map's is an error that reading the stream reports.
        let frames = frames.filter(|_| unpacked == Some(size));
        ensure!(
            size > 0 && size.is_multiple_of(512),
            "{}: the image has {size} bytes, expected a multiple of 512",
            context()
        );
        let mapped = map.is_some();
        let ranges = match map {
            Some(map) => {
                ensure!(
                    map.image_size == size,
                    "{}: the image has {size} bytes, but its block map is for {}\n\
                     help: keep each image beside its own map, or build the image again",
                    context(),
                    map.image_size
                );
                let range = |r: bmap::BlockRange| {
                    let offset = r.first * map.block_size;
                    let end = ((r.last + 1) * map.block_size).min(size);
                    ImageRange { offset, size: end - offset, sha256: Some(r.sha256) }
                };
                map.ranges.into_iter().map(range).collect()
            }
            None => (0..size)
                .step_by(UNMAPPED_RANGE as usize)
                .map(|offset| ImageRange {
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
    pub fn pass(&self) -> Result<ImagePass> {
        let context = || format!("reading the image {}", self.path);
        let file = File::open(&self.path).with_context(context)?;
        let input = match (self.form, &self.frames) {
            (ImageFormat::Plain, _) => Input::File(file),
            (_, Some(frames)) => Input::Frames(FrameUnpacker::start(file, frames, &self.ranges)),
            (form, None) => Input::Stream(open_decoder(file, form).with_context(context)?),
        };
        Ok(ImagePass { input, path: self.path.clone(), size: self.size, position: 0 })
    }
}

fn open_decoder(file: File, form: ImageFormat) -> io::Result<Box<dyn Read + Send>> {
    let file = BufReader::with_capacity(READ, file);
    Ok(match form {
        ImageFormat::Plain => Box::new(file),
        ImageFormat::Zstd => Box::new(Unpacked(zstd::Decoder::with_buffer(file)?)),
        ImageFormat::Xz => Box::new(XzReader::new(file, true)),
    })
}

/// A zstd stream whose error says what to do when the library rejects the window size.
struct Unpacked<T>(T);

impl<T: Read> Read for Unpacked<T> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer).map_err(|error| {
            // zstd's message for ZSTD_error_frameParameter_windowTooLarge (zstd 1.5,
            // error_private.c).
            if error.to_string().contains("too much memory") {
                return io::Error::other(
                    "the image was packed with a window of more than 128 MiB (`zstd --long=28` or \
                     more)\n\
                     help: unpack the image with `zstd -d --long=31`, or pack it again without \
                     `--long`",
                );
            }
            error
        })
    }
}

/// The unpacked size of a compressed image in bytes.
fn measure_image(path: &Utf8Path, form: ImageFormat) -> Result<u64> {
    let context = || format!("unpacking {path}");
    let mut decoder =
        open_decoder(File::open(path).with_context(context)?, form).with_context(context)?;
    let step = ProgressStep::new(
        "flash",
        "finding the size of the image, since there is no block map",
        0,
        ProgressUnit::Bytes,
    );
    let mut buffer = vec![0; SKIP];
    let mut size = 0;
    loop {
        let count = decoder.read(&mut buffer).with_context(context)?;
        if count == 0 {
            return Ok(size);
        }
        size += count as u64;
        step.note(crate::progress::format_bytes(size));
        ensure!(size <= LARGEST, "{}: the image is larger than 1 TiB", context());
    }
}

enum Input {
    File(File),
    Frames(FrameUnpacker),
    Stream(Box<dyn Read + Send>),
}

/// One pass over an image, forward only.
pub struct ImagePass {
    input: Input,
    path: Utf8PathBuf,
    size: u64,
    position: u64,
}

impl ImagePass {
    /// Fills a buffer from `offset`, which must not be before that of an earlier call.
    ///
    /// # Errors
    /// When the file cannot be read or unpacked, or ends too early.
    pub fn read_at(&mut self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let path = &self.path;
        match &mut self.input {
            Input::File(file) => file.read_exact_at(buffer, offset),
            Input::Frames(frames) => frames.read_at(offset, buffer),
            Input::Stream(stream) => skip_to(stream, &mut self.position, offset)
                .and_then(|()| stream.read_exact(buffer))
                .inspect(|()| self.position += buffer.len() as u64),
        }
        .with_context(|| format!("reading {} bytes at {offset} of {path}\n{AGAIN}", buffer.len()))
    }

    /// Reads a stream to its end: only then its own checksums have been verified. Of frames, those
    /// that were needed have been verified already.
    ///
    /// # Errors
    /// When it is damaged, or shorter or longer than it should be.
    pub fn finish(mut self) -> Result<()> {
        let Input::Stream(mut stream) = self.input else { return Ok(()) };
        let path = &self.path;
        skip_to(&mut stream, &mut self.position, self.size).with_context(|| {
            format!("reading {path} to its end, at {} bytes\n{AGAIN}", self.position)
        })?;
        if stream.read(&mut [0]).with_context(|| format!("reading the end of {path}"))? != 0 {
            bail!(
                "{path} has more than the {} bytes of its block map\n\
                 help: keep each image beside its own map, or build the image again",
                self.size
            );
        }
        Ok(())
    }
}

fn skip_to(stream: &mut dyn Read, position: &mut u64, to: u64) -> io::Result<()> {
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
