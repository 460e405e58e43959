//! Reads a program's output line by line in bounded memory, whatever the length of the lines.

use std::io::{self, BufRead};

/// The longest line that is kept: 64 KiB. No message of a program is that long; a longer line is
/// data or an attack.
pub(super) const LONGEST: usize = 64 << 10;

/// Reads the next line into `line`, without its end: at most [`LONGEST`] bytes of it, the rest is
/// skipped. `all` gets every byte as it arrives. Returns `None` at the end, else whether the line
/// was longer.
///
/// # Errors
/// When the reader fails, or `all` does.
pub(super) fn read_line(
    reader: &mut impl BufRead,
    line: &mut Vec<u8>,
    mut all: impl FnMut(&[u8]) -> io::Result<()>,
) -> io::Result<Option<bool>> {
    line.clear();
    let (mut any, mut longer) = (false, false);
    loop {
        let piece = match reader.fill_buf() {
            Ok(piece) => piece,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        if piece.is_empty() {
            return Ok(any.then_some(longer));
        }
        any = true;
        let end = piece.iter().position(|byte| *byte == b'\n');
        let taken = end.map_or(piece.len(), |at| at + 1);
        all(piece.get(..taken).unwrap_or(piece))?;
        let text = piece.get(..end.unwrap_or(piece.len())).unwrap_or_default();
        let room = LONGEST - line.len();
        longer |= text.len() > room;
        line.extend_from_slice(text.get(..room).unwrap_or(text));
        reader.consume(taken);
        if end.is_some() {
            return Ok(Some(longer));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufReader, Read as _};

    #[test]
    fn lines_are_whole_or_said_to_be_longer() {
        let endless = io::repeat(b'x').take(1 << 20);
        let rest: &[u8] = b"\nshort\n\nlast";
        let mut reader = BufReader::with_capacity(1000, endless.chain(rest));
        let (mut line, mut bytes) = (Vec::new(), 0);
        let mut found = Vec::new();
        while let Some(longer) = read_line(&mut reader, &mut line, |piece| {
            bytes += piece.len();
            Ok(())
        })
        .expect("memory")
        {
            assert!(line.capacity() <= 2 * LONGEST);
            found.push((line.len(), longer));
        }
        assert_eq!(found, [(LONGEST, true), (5, false), (0, false), (4, false)]);
        assert_eq!(bytes, (1 << 20) + rest.len());
    }
}
