//! The block map beside an image (`.bmap`, version 2.0 of the format of bmap-tools): which blocks
//! must reach the card, with a SHA-256 for each range of them. Writing, reading and checking.

use std::fmt::Write as _;
use std::fs::File;
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, anyhow, bail, ensure};
use camino::{Utf8Path, Utf8PathBuf};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::layout::BLOCK;
use crate::artifact::{self, Artifact};
use crate::parallel;
use crate::progress::{ProgressStep, ProgressUnit};

/// A run of blocks with one checksum. Runs are at most [`LONGEST_RANGE`] long, so that a check can
/// use every core.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct BlockRange {
    /// The first block.
    pub first: u64,
    /// The last block.
    pub last: u64,
    /// SHA-256 of the blocks, lower-case hexadecimal.
    pub sha256: String,
}

/// How many blocks the longest range that we write has: 16 MiB.
pub const LONGEST_RANGE: u64 = (16 << 20) / BLOCK;
/// The largest map that we read: a map of a full terabyte in single blocks is smaller.
const LARGEST_FILE: u64 = 64 << 20;
/// Bytes read at once in a check.
const READ: usize = 1 << 20;

/// A block map.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockMap {
    /// Bytes of the whole image.
    pub image_size: u64,
    /// Bytes in a block.
    pub block_size: u64,
    /// The mapped ranges, in order.
    pub ranges: Vec<BlockRange>,
}

/// The path of an image's block map.
pub fn path_for(image: &Utf8Path) -> Utf8PathBuf {
    Utf8PathBuf::from(format!("{image}.bmap"))
}

impl BlockMap {
    /// How many blocks are mapped.
    pub fn mapped_blocks(&self) -> u64 {
        self.ranges.iter().map(|r| r.last - r.first + 1).sum()
    }

    /// The file's text, with this checksum of itself.
    fn text(&self, own: &str) -> String {
        let blocks = self.image_size.div_ceil(self.block_size);
        let mut text = format!(
            "<?xml version=\"1.0\" ?>\n\
             <bmap version=\"2.0\">\n    \
             <ImageSize> {} </ImageSize>\n    \
             <BlockSize> {} </BlockSize>\n    \
             <BlocksCount> {blocks} </BlocksCount>\n    \
             <MappedBlocksCount> {} </MappedBlocksCount>\n    \
             <ChecksumType> sha256 </ChecksumType>\n    \
             <BmapFileChecksum> {own} </BmapFileChecksum>\n    \
             <BlockMap>\n",
            self.image_size,
            self.block_size,
            self.mapped_blocks(),
        );
        for BlockRange { first, last, sha256 } in &self.ranges {
            let span = if first == last { first.to_string() } else { format!("{first}-{last}") };
            writeln!(text, "        <Range chksum=\"{sha256}\"> {span} </Range>")
                .expect("writing to a String cannot fail");
        }
        text.push_str("    </BlockMap>\n</bmap>\n");
        text
    }

    /// Writes the map.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write(&self, path: &Utf8Path) -> Result<Artifact> {
        // The file's checksum is made with zeros in its own place.
        let own = artifact::hash_bytes(self.text(&"0".repeat(64)).as_bytes());
        let text = self.text(&own);
        // Not synced, like the image: some filesystems would also sync the image.
        let temporary = artifact::partial_path(path);
        std::fs::write(&temporary, &text).with_context(|| format!("writing {temporary}"))?;
        std::fs::rename(&temporary, path).with_context(|| format!("renaming {temporary}"))?;
        Ok(Artifact {
            path: path.to_owned(),
            size: text.len() as u64,
            sha256: artifact::hash_bytes(text.as_bytes()),
        })
    }

    /// Reads a map and validates it: its checksum, its counts, the order of its ranges.
    ///
    /// # Errors
    /// When the file cannot be read or is not a valid map of version 2.0 with SHA-256.
    pub fn read(path: &Utf8Path) -> Result<Self> {
        let context = || format!("reading the block map {path}");
        let size = std::fs::metadata(path).with_context(context)?.len();
        ensure!(size <= LARGEST_FILE, "{}: too large for a block map ({size} bytes)", context());
        let text = std::fs::read_to_string(path).with_context(context)?;
        Self::parse(&text).with_context(context)
    }

    fn parse(text: &str) -> Result<Self> {
        ensure!(text.contains("<bmap version=\"2.0\">"), "not a block map of version 2.0");
        let kind = find_element(text, "ChecksumType")?;
        ensure!(kind == "sha256", "its checksums are `{kind}`, expected `sha256`");
        let own = find_element(text, "BmapFileChecksum")?;
        ensure!(own.len() == 64, "its own checksum has {} characters, expected 64", own.len());
        let found = artifact::hash_bytes(text.replacen(own, &"0".repeat(64), 1).as_bytes());
        ensure!(found == own, "the map is damaged: its SHA-256 is {found}, but it contains {own}");
        ensure!(
            !text.contains("<Range>"),
            "its ranges have no checksums, so the written data could not be verified\n\
             help: create the map again without `--no-checksum`, or remove it: without a map the \
             whole image is written"
        );
        let mut ranges = Vec::new();
        for piece in text.split("<Range chksum=\"").skip(1) {
            let bad = || anyhow!("range {} cannot be read", ranges.len() + 1);
            let (sha256, rest) = piece.split_once("\">").ok_or_else(bad)?;
            let (span, _) = rest.split_once("</Range>").ok_or_else(bad)?;
            let span = span.trim();
            let (first, last) = span.split_once('-').unwrap_or((span, span));
            let (first, last): (u64, u64) =
                (first.parse().map_err(|_| bad())?, last.parse().map_err(|_| bad())?);
            let after = ranges.last().map_or(0, |r: &BlockRange| r.last + 1);
            ensure!(
                first >= after && last >= first && last < u64::MAX,
                "range {} ({span}) is out of order",
                ranges.len() + 1
            );
            ranges.push(BlockRange { first, last, sha256: sha256.to_owned() });
        }
        let map = Self {
            image_size: parse_number(text, "ImageSize")?,
            block_size: parse_number(text, "BlockSize")?,
            ranges,
        };
        ensure!(
            (512..=1 << 20).contains(&map.block_size),
            "its blocks have {} bytes, expected 512 to 1 MiB",
            map.block_size
        );
        let blocks = map.image_size.div_ceil(map.block_size);
        ensure!(
            map.ranges.last().is_none_or(|r| r.last < blocks),
            "its last range ends beyond the image's {blocks} blocks"
        );
        let counted = parse_number(text, "MappedBlocksCount")?;
        ensure!(
            counted == map.mapped_blocks(),
            "the map counts {counted} mapped blocks, but lists {}",
            map.mapped_blocks()
        );
        Ok(map)
    }
}

fn find_element<'a>(text: &'a str, name: &str) -> Result<&'a str> {
    let missing = || anyhow!("the map has no {name}");
    let (_, rest) = text.split_once(&format!("<{name}>")).ok_or_else(missing)?;
    let (value, _) = rest.split_once(&format!("</{name}>")).ok_or_else(missing)?;
    Ok(value.trim())
}

fn parse_number(text: &str, name: &str) -> Result<u64> {
    let value = find_element(text, name)?;
    value.parse().with_context(|| format!("its {name} is `{value}`, expected a number"))
}

/// Checks every mapped range of an image against its block map, on all cores.
///
/// # Errors
/// When either file cannot be read, the sizes differ, or a range has another checksum; the message
/// names the first damaged ranges by their bytes.
pub fn check_image(image: &Utf8Path, map: &Utf8Path) -> Result<BlockMap> {
    let map = BlockMap::read(map)?;
    let context = || format!("checking {image} against its block map");
    let file = File::open(image).with_context(context)?;
    let size = file.metadata().with_context(context)?.len();
    if size != map.image_size {
        bail!("{}: the image has {size} bytes, but the map is for {}", context(), map.image_size);
    }
    let total = map.mapped_blocks() * map.block_size;
    let step = ProgressStep::new(
        "verify",
        image.file_name().unwrap_or("image"),
        total,
        ProgressUnit::Bytes,
    );
    let buffer = || Ok(vec![0; READ]);
    let intact = parallel::map_with(&map.ranges, parallel::cores(), buffer, |buffer, range| {
        Ok(hash_range(&file, &map, range, buffer, &step)? == range.sha256)
    })
    .with_context(context)?;
    let ranges = map.ranges.iter().zip(intact);
    let damaged: Vec<_> = ranges.filter(|(_, intact)| !intact).map(|(range, _)| range).collect();
    if damaged.is_empty() {
        return Ok(map);
    }
    let count = damaged.len();
    let mut message = format!("{}: {count} of {} ranges are damaged", context(), map.ranges.len());
    for range in damaged.iter().take(8) {
        let (first, after) = (range.first * map.block_size, (range.last + 1) * map.block_size);
        message.push_str(&format!("\n  bytes {first} to {}", after - 1));
    }
    bail!(message)
}

fn hash_range(
    file: &File,
    map: &BlockMap,
    range: &BlockRange,
    buffer: &mut [u8],
    step: &ProgressStep,
) -> Result<String> {
    let mut hasher = Sha256::new();
    let mut offset = range.first * map.block_size;
    let end = ((range.last + 1) * map.block_size).min(map.image_size);
    while offset < end {
        let count = usize::try_from(end - offset).unwrap_or(READ).min(READ);
        file.read_exact_at(&mut buffer[..count], offset)
            .with_context(|| format!("reading {count} bytes at {offset}"))?;
        hasher.update(&buffer[..count]);
        offset += count as u64;
        step.advance(count as u64);
    }
    Ok(artifact::hex(&hasher.finalize()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map() -> BlockMap {
        let range = |first, last| BlockRange { first, last, sha256: "ab".repeat(32) };
        BlockMap { image_size: 40960, block_size: 4096, ranges: vec![range(0, 3), range(5, 5)] }
    }

    #[test]
    fn what_is_written_is_read() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = Utf8PathBuf::from_path_buf(dir.path().join("x.bmap")).expect("UTF-8");
        map().write(&path).expect("writing");
        assert_eq!(BlockMap::read(&path).expect("reading"), map());
    }

    #[test]
    fn each_damage_has_its_message() {
        let own = |text: &str| artifact::hash_bytes(text.as_bytes());
        let zeros = "0".repeat(64);
        let sound = map().text(&zeros);
        // Changes the text, then updates its checksum, so that the later rule reports the error.
        let changed = |from: &str, to: &str| {
            let text = sound.replacen(from, to, 1);
            text.replacen(&zeros, &own(&text), 1)
        };
        let cases = [
            (changed("2.0", "1.3"), "not a block map of version 2.0"),
            (changed("sha256 <", "sha1 <"), "its checksums are `sha1`, expected `sha256`"),
            (
                changed("<ImageSize> 40960", "<ImageSize> 8192"),
                "its last range ends beyond the image's 2 blocks",
            ),
            (
                changed("<BlockSize> 4096", "<BlockSize> 0"),
                "its blocks have 0 bytes, expected 512 to 1 MiB",
            ),
            (
                changed("<ImageSize> 40960", "<ImageSize> x"),
                "its ImageSize is `x`, expected a number",
            ),
            (changed("Count> 5 <", "Count> 6 <"), "the map counts 6 mapped blocks, but lists 5"),
            (
                changed("<Range chksum=", "<Range><!-- "),
                "its ranges have no checksums, so the written data could not be verified\n\
                 help: create the map again without `--no-checksum`, or remove it: without a map \
                 the whole image is written",
            ),
            (changed("> 5 </Range", "> 2 </Range"), "range 2 (2) is out of order"),
            (changed("> 5 </Range", "> z </Range"), "range 2 cannot be read"),
            (changed("BmapFileChecksum", "Other"), "the map has no BmapFileChecksum"),
        ];
        for (text, expected) in cases {
            let error = BlockMap::parse(&text).expect_err(expected);
            assert_eq!(error.to_string(), expected);
        }
        let text = changed("", "").replace("0-3", "0-2");
        let error = BlockMap::parse(&text).expect_err("a damaged map");
        assert!(error.to_string().starts_with("the map is damaged: its SHA-256 is "), "{error}");
    }
}
