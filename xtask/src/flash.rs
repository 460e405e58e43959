//! Writes an image to a card and verifies it. A card whose flashing was interrupted has no
//! partition table, so that an incomplete image cannot boot.

pub mod card;
pub mod device;
pub mod frames;
pub mod identity;
pub mod seed;
pub mod source;
pub mod write;

use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use serde::Serialize;

use crate::disk::layout::BLOCK;
use crate::progress::{format_bytes, say, warn};
use card::{AlignedMemory, CardIo};
use seed::SeedFile;
use source::ImageSource;
use write::{EDGE, ImagePiece, PIECE, PassResult, PieceChecksum};

/// How often a piece that fails verification is written again.
const RETRIES: usize = 3;

/// What to write, and how.
#[derive(Debug, Clone, Copy)]
pub struct FlashRequest<'a> {
    /// The image.
    pub source: &'a ImageSource,
    /// Whether everything is read back and compared.
    pub read_back: bool,
    /// The settings that the first boot applies.
    pub seed: Option<&'a SeedFile>,
}

/// A place where the card did not return the written data.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct UnreliablePlace {
    /// Byte offset on the card.
    pub offset: u64,
    /// Bytes.
    pub size: usize,
    /// How often reading it back gave other bytes.
    pub times: usize,
}

/// The result.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct FlashOutcome {
    /// Bytes of the image.
    pub image_size: u64,
    /// Bytes written.
    pub bytes: u64,
    /// Whether the card was discarded first.
    pub discarded: bool,
    /// Whether everything was read back.
    pub read_back: bool,
    /// The names of the settings that the first boot applies.
    pub seeded: Vec<&'static str>,
    /// Places that had to be written again. A card with such places is unreliable.
    pub weak: Vec<UnreliablePlace>,
    /// Seconds that it took.
    pub seconds: f64,
}

/// Writes the image.
///
/// # Errors
/// When the image is damaged, the card fails, or it does not return the written data after all
/// retries. The card has no partition table then.
pub fn flash(request: &FlashRequest<'_>, card: &dyn CardIo) -> Result<FlashOutcome> {
    let FlashRequest { source, read_back, seed } = *request;
    let start = Instant::now();
    ensure!(
        card.size() >= source.size,
        "the card has {} bytes, but the image has {}",
        card.size(),
        source.size
    );
    erase_ends(card).context("removing the old partition table")?;
    // Not the edges: discarded blocks may return their old contents.
    let inner = card.size().saturating_sub(2 * EDGE) / BLOCK * BLOCK;
    let discarded = card.discard(EDGE, inner).context("discarding the card")?;
    if !discarded {
        say("flash", "the device does not support discard; unused blocks keep their old contents");
    }
    if !source.mapped {
        say("flash", format!("no block map: writing all {}", format_bytes(source.size)));
    }
    let pieces = write::cut_into_pieces(source);
    let result = write_body(request, card, &pieces).and_then(|(sent, mut weak)| {
        let seeded = match seed {
            Some(seed) => seed::write_seed(seed, card, &sent.held, &pieces)?,
            None => Vec::new(),
        };
        write_held_pieces(card, &pieces, sent, read_back, &mut weak)?;
        Ok((weak, seeded))
    });
    let (weak, seeded) = result.or_else(|error| {
        // Only the last step can have written a partition table.
        erase_ends(card).context("removing the partition table after a failure")?;
        Err(error.context("the card is incomplete and will not boot (partition table not written)"))
    })?;
    if !weak.is_empty() {
        warn(format!(
            "the card is unreliable: some data had to be written again; use another card\n{}",
            describe_unreliable_places(&weak)
        ));
    }
    Ok(FlashOutcome {
        image_size: source.size,
        bytes: source.bytes(),
        discarded,
        read_back,
        seeded,
        weak,
        seconds: start.elapsed().as_secs_f64(),
    })
}

fn describe_unreliable_places(weak: &[UnreliablePlace]) -> String {
    let line = |w: &UnreliablePlace| {
        format!("  {} bytes at {}: wrong {} times", w.size, w.offset, w.times)
    };
    weak.iter().map(line).collect::<Vec<_>>().join("\n")
}

/// Overwrites both ends of the card with zeros: the partition table, what a boot ROM reads, and the
/// backup of a GPT. This detects cards that silently ignore writes.
fn erase_ends(card: &dyn CardIo) -> Result<()> {
    let end = card.size().saturating_sub(EDGE) / BLOCK * BLOCK;
    for (from, to) in [(0, EDGE.min(card.size())), (end, card.size())] {
        let size = (to - from) as usize;
        let mut buffer = AlignedMemory::new(size);
        card.write_at(from, buffer.part(size)).with_context(|| format!("writing at {from}"))?;
    }
    card.flush().context("flushing the card")?;
    let mut buffer = AlignedMemory::new(BLOCK as usize);
    card.read_at(0, buffer.part(BLOCK as usize)).context("reading back at 0")?;
    ensure!(
        buffer.part(BLOCK as usize).iter().all(|byte| *byte == 0),
        "the card ignores writes\n\
         help: the card is locked or worn out: use another card"
    );
    Ok(())
}

/// Writes and verifies all pieces except the held ones, and writes again those that fail
/// verification.
fn write_body(
    request: &FlashRequest<'_>,
    card: &dyn CardIo,
    pieces: &[ImagePiece],
) -> Result<(PassResult, Vec<UnreliablePlace>)> {
    let sent = write::send_pieces(request.source, pieces, card, request.read_back)?;
    let mut weak: Vec<UnreliablePlace> = Vec::new();
    let mut wrong = sent.wrong.clone();
    let mut buffer = AlignedMemory::new(PIECE as usize);
    for _ in 0..RETRIES {
        count_failures(&mut weak, pieces, &wrong);
        if wrong.is_empty() {
            break;
        }
        say("flash", format!("rewriting {} places that failed verification", wrong.len()));
        let mut pass = request.source.pass()?;
        for index in &wrong {
            let (piece, sum) = (&pieces[*index], piece_checksum(&sent, *index)?);
            let bytes = buffer.part(piece.size);
            pass.read_at(piece.offset, bytes)?;
            ensure!(
                PieceChecksum::from_bytes(bytes) == *sum,
                "{} changed while it was being written",
                request.source.path
            );
            match card.write_at(piece.offset, bytes) {
                Err(error) if !write::is_local(&error) => {
                    return Err(error).with_context(|| format!("writing at {}", piece.offset));
                }
                // If this fails again, reading back detects it.
                _ => {}
            }
        }
        card.flush().context("flushing the card")?;
        let mut still = Vec::new();
        for index in wrong {
            if !write::piece_matches(
                card,
                &pieces[index],
                piece_checksum(&sent, index)?,
                &mut buffer,
            )? {
                still.push(index);
            }
        }
        wrong = still;
    }
    if !wrong.is_empty() {
        count_failures(&mut weak, pieces, &wrong);
        weak.retain(|w| wrong.iter().any(|index| pieces[*index].offset == w.offset));
        bail!(
            "the card does not return the data that was written:\n{}\nhelp: use another card",
            describe_unreliable_places(&weak)
        );
    }
    if request.read_back {
        still_there(card, pieces, &sent)?;
    }
    Ok((sent, weak))
}

fn piece_checksum(sent: &PassResult, index: usize) -> Result<&PieceChecksum> {
    sent.sums.get(index).and_then(Option::as_ref).context("a piece was not summed")
}

fn count_failures(weak: &mut Vec<UnreliablePlace>, pieces: &[ImagePiece], wrong: &[usize]) {
    for index in wrong {
        let ImagePiece { offset, size, .. } = pieces[*index];
        match weak.iter_mut().find(|w| w.offset == offset) {
            Some(known) => known.times += 1,
            None => weak.push(UnreliablePlace { offset, size, times: 1 }),
        }
    }
}

/// Pieces were verified while others were still to be written. A counterfeit card (smaller than
/// advertised) has overwritten some of them since: check one block of each again.
fn still_there(card: &dyn CardIo, pieces: &[ImagePiece], sent: &PassResult) -> Result<()> {
    let mut buffer = AlignedMemory::new(BLOCK as usize);
    for (index, piece) in pieces.iter().enumerate().filter(|(_, piece)| !piece.held) {
        ensure!(
            write::first_block_matches(card, piece, piece_checksum(sent, index)?, &mut buffer)?,
            "the data at {} was verified, but has changed since\n\
             help: the card is counterfeit (smaller than advertised) or worn out: use another card",
            piece.offset
        );
    }
    Ok(())
}

/// Writes the held pieces, from the last to the first block of the card, and flushes each before
/// the next.
fn write_held_pieces(
    card: &dyn CardIo,
    pieces: &[ImagePiece],
    sent: PassResult,
    read_back: bool,
    weak: &mut Vec<UnreliablePlace>,
) -> Result<()> {
    let sums = sent.sums;
    let mut back = AlignedMemory::new(PIECE as usize);
    for (index, mut buffer) in sent.held.into_iter().rev() {
        let piece = &pieces[index];
        let sum = sums.get(index).and_then(Option::as_ref).context("a piece was not summed")?;
        let mut tries = 0;
        loop {
            card.write_at(piece.offset, buffer.part(piece.size))
                .with_context(|| format!("writing at {}", piece.offset))?;
            card.flush().context("flushing the card")?;
            if !read_back || write::piece_matches(card, piece, sum, &mut back)? {
                break;
            }
            count_failures(weak, pieces, &[index]);
            tries += 1;
            ensure!(
                tries <= RETRIES,
                "the card does not return the data that was written at {}\nhelp: use another card",
                piece.offset
            );
        }
    }
    Ok(())
}
