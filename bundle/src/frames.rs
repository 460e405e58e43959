//! zstd frames: one-shot compression, bounded streaming decompression, and frames of zeros.

use zstd::zstd_safe::{CCtx, CParameter, DCtx, DParameter, InBuffer, OutBuffer, ResetDirective};
use zstd::zstd_safe::{compress_bound, get_error_name};

use crate::error::{Error, Result};
use crate::limits::{BLOCK_SIZE, MAX_WINDOW_LOG};

/// Maximum number of bytes that the decoder passes on at once: zstd's largest block.
const CHUNK: usize = 128 * 1024;

/// How hard to compress.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CompressionLevel {
    /// For development: as fast as `zstd -3`.
    #[default]
    Fast,
    /// For releases: as small and as fast as `zstd -9`.
    Release,
    /// For releases that many devices download: as small as `zstd -19`, in minutes.
    Slow,
}

impl CompressionLevel {
    /// Payload bytes in one frame. Larger frames compress better, because frames share nothing. Smaller
    /// frames need less memory here, and let a device skip more of the data that it has.
    pub(crate) fn unit(self) -> usize {
        match self {
            Self::Fast | Self::Release => 16 << 20,
            Self::Slow => 64 << 20,
        }
    }

    /// Chosen by measurement, see `docs/reference/bundle-format.md`. A window larger than zstd's default for the
    /// level makes up for the size of the index and of the division into frames. A larger hash table
    /// (fast) and a shorter search (release) make up for the time that hashing takes.
    fn parameters(self) -> &'static [CParameter] {
        use CParameter::{CompressionLevel, HashLog, MinMatch, SearchLog, WindowLog};
        match self {
            Self::Fast => &[CompressionLevel(2), WindowLog(23), HashLog(18), MinMatch(6)],
            Self::Release => &[CompressionLevel(9), WindowLog(23), SearchLog(3)],
            Self::Slow => &[CompressionLevel(22), WindowLog(24)],
        }
    }
}

/// A compressor that keeps its tables from frame to frame.
pub(crate) struct FrameEncoder {
    context: CCtx<'static>,
}

fn zstd_error(code: usize) -> Error {
    Error::Io(std::io::Error::other(format!("zstd: {}", get_error_name(code))))
}

fn no_memory() -> Error {
    Error::Io(std::io::Error::new(std::io::ErrorKind::OutOfMemory, "zstd: no memory"))
}

impl FrameEncoder {
    pub fn new(level: CompressionLevel) -> Result<Self> {
        let mut context = CCtx::try_create().ok_or_else(no_memory)?;
        for parameter in level.parameters() {
            context.set_parameter(*parameter).map_err(zstd_error)?;
        }
        Ok(Self { context })
    }

    /// Compresses `content` into one frame, which replaces what is in `out`.
    pub fn encode(&mut self, content: &[u8], out: &mut Vec<u8>) -> Result<()> {
        out.clear();
        out.reserve_exact(compress_bound(content.len()));
        self.context.compress2(out, content).map(|_| ()).map_err(zstd_error)
    }
}

/// A frame of `size` zeros, written without compressing anything: run-length blocks of at most
/// 128 KiB each (RFC 8878, 3.1.1).
pub(crate) fn zeros(size: u32, out: &mut Vec<u8>) {
    out.clear();
    out.extend_from_slice(&[0x28, 0xb5, 0x2f, 0xfd]);
    // Content size in four bytes; window descriptor 7 << 3: 2^(10+7) bytes.
    out.extend_from_slice(&[0x80, 7 << 3]);
    out.extend_from_slice(&size.to_le_bytes());
    let mut left = size;
    loop {
        let run = left.min(CHUNK as u32);
        left -= run;
        let [a, b, c, _] = (run << 3 | 1 << 1 | u32::from(left == 0)).to_le_bytes();
        out.extend_from_slice(&[a, b, c, 0]);
        if left == 0 {
            return;
        }
    }
}

/// A decompressor with bounded memory: its window and one chunk of output.
pub(crate) struct FrameDecoder {
    context: DCtx<'static>,
    chunk: Vec<u8>,
    filled: usize,
    frame: u32,
    left: u64,
}

impl std::fmt::Debug for FrameDecoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Decoder").field("frame", &self.frame).finish_non_exhaustive()
    }
}

impl FrameDecoder {
    pub fn new() -> Result<Self> {
        let mut context = DCtx::try_create().ok_or_else(no_memory)?;
        context.set_parameter(DParameter::WindowLogMax(MAX_WINDOW_LOG)).map_err(zstd_error)?;
        Ok(Self { context, chunk: vec![0; CHUNK], filled: 0, frame: 0, left: 0 })
    }

    /// Starts a frame that must yield exactly `size` bytes.
    pub fn begin(&mut self, frame: u32, size: u64) -> Result<()> {
        self.context.reset(ResetDirective::SessionOnly).map_err(zstd_error)?;
        (self.filled, self.frame, self.left) = (0, frame, size);
        Ok(())
    }

    /// Decompresses the next piece of the stored frame. `each` gets whole blocks (and the payload's last,
    /// short one), never more than the frame's size in total. The frame must end with the `last` piece,
    /// not before it.
    pub fn push(
        &mut self,
        stored: &[u8],
        last: bool,
        each: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        let frame = self.frame;
        let bad = |reason: &str| Error::BadFrame { frame, reason: reason.to_owned() };
        let mut input = InBuffer::around(stored);
        loop {
            let before = (input.pos(), self.filled);
            let mut output = OutBuffer::around_pos(self.chunk.as_mut_slice(), self.filled);
            let hint = self
                .context
                .decompress_stream(&mut output, &mut input)
                .map_err(|code| bad(get_error_name(code)))?;
            self.filled = output.pos();
            let ended = hint == 0;
            let full = self.filled == self.chunk.len();
            if ended || full {
                self.flush(ended, each)?;
            }
            if ended {
                let all = last && input.pos() == stored.len();
                return if all {
                    Ok(())
                } else {
                    Err(bad("unexpected bytes after the frame's end"))
                };
            }
            // After a full chunk there may be more output; without progress the decoder needs input.
            if !full && (input.pos() == stored.len() || (input.pos(), self.filled) == before) {
                break;
            }
        }
        if last || input.pos() != stored.len() {
            return Err(bad("the frame ends too early"));
        }
        Ok(())
    }

    fn flush(&mut self, ended: bool, each: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
        let (frame, length) = (self.frame, self.filled as u64);
        if length > self.left {
            return Err(Error::FrameLength { frame, more: true });
        }
        self.left -= length;
        if ended && self.left != 0 {
            return Err(Error::FrameLength { frame, more: false });
        }
        each(self.chunk.get(..self.filled).unwrap_or_default())?;
        self.filled = 0;
        Ok(())
    }
}

/// Checks at compile time the relation that `decode` relies on.
const _: () = assert!(CHUNK.is_multiple_of(BLOCK_SIZE));
