//! Aliases for nodes of a finished device tree: U-Boot numbers a board's cards by them, and the
//! kernel's own trees lack some. The format is in the Devicetree Specification 0.4, chapter 5.

use anyhow::{Context, Result, bail, ensure};

/// The magic number of a tree.
const MAGIC: u32 = 0xd00d_feed;
/// The tokens: begin of a node, end of a node, property, no operation (section 5.4.1).
const BEGIN_NODE: u32 = 1;
const END_NODE: u32 = 2;
const PROPERTY: u32 = 3;
const NOP: u32 = 4;

/// Bytes of the header.
const HEADER: usize = 40;

/// A parsed tree: the part before the two blocks that change, and these blocks.
struct Tree<'a> {
    header: [u32; 10],
    reserved: &'a [u8],
    structure: &'a [u8],
    strings: &'a [u8],
}

fn read_word(bytes: &[u8], at: usize) -> Result<u32> {
    let part = bytes.get(at..).and_then(|rest| rest.first_chunk::<4>());
    Ok(u32::from_be_bytes(*part.context("the device tree is truncated")?))
}

impl<'a> Tree<'a> {
    fn read(blob: &'a [u8]) -> Result<Self> {
        let mut header = [0; 10];
        for (index, field) in header.iter_mut().enumerate() {
            *field = read_word(blob, index * 4)?;
        }
        let [magic, _, structure, strings, reserved, _, _, _, strings_size, structure_size] =
            header;
        ensure!(magic == MAGIC, "not a device tree");
        let part = |at: u32, size: u32| {
            let part = blob.get(at as usize..).and_then(|rest| rest.get(..size as usize));
            part.context("a block is outside of the device tree")
        };
        ensure!(structure >= reserved, "the blocks of the device tree are not in the order of dtc");
        Ok(Self {
            header,
            reserved: part(reserved, structure - reserved)?,
            structure: part(structure, structure_size)?,
            strings: part(strings, strings_size)?,
        })
    }

    /// The place of the properties of the node `/aliases`, and the paths of all nodes.
    fn walk(&self) -> Result<(Option<usize>, Vec<String>)> {
        let (mut at, mut path, mut aliases) = (0, Vec::new(), None);
        let mut nodes = Vec::new();
        loop {
            let token = read_word(self.structure, at)?;
            at += 4;
            match token {
                BEGIN_NODE => {
                    let rest = self.structure.get(at..).unwrap_or_default();
                    let end =
                        rest.iter().position(|b| *b == 0).context("a name is not terminated")?;
                    let name = std::str::from_utf8(&rest[..end])?;
                    at += (end + 1).next_multiple_of(4);
                    path.push(name);
                    nodes.push(path.join("/"));
                    if path == ["", "aliases"] {
                        aliases = Some(at);
                    }
                }
                END_NODE => {
                    path.pop();
                    if path.is_empty() {
                        return Ok((aliases, nodes));
                    }
                }
                PROPERTY => {
                    at += 8 + (read_word(self.structure, at)? as usize).next_multiple_of(4);
                }
                NOP => {}
                other => bail!("the device tree has the unknown token {other}"),
            }
        }
    }
}

/// Adds `name=/path` for each of `aliases` to the node `/aliases` of a tree.
///
/// # Errors
/// When the bytes are not a tree, it has no such node, or a path is not a node of it.
pub fn add_aliases(blob: &[u8], aliases: &[String]) -> Result<Vec<u8>> {
    let tree = Tree::read(blob)?;
    let (place, nodes) = tree.walk()?;
    let place = place.context("the tree has no node /aliases")?;
    let (mut properties, mut strings) = (Vec::new(), tree.strings.to_vec());
    for alias in aliases {
        let (name, path) = alias.split_once('=').context("an alias is written `name=/path`")?;
        ensure!(nodes.iter().any(|node| node == path), "the tree has no node {path}");
        let value = [path.as_bytes(), &[0]].concat();
        for number in [PROPERTY, u32::try_from(value.len())?, u32::try_from(strings.len())?] {
            properties.extend(number.to_be_bytes());
        }
        strings.extend([name.as_bytes(), &[0]].concat());
        properties.extend(&value);
        properties.resize(properties.len().next_multiple_of(4), 0);
    }
    let (before, behind) = tree.structure.split_at(place);
    let structure = [before, &properties, behind].concat();
    let mut header = tree.header;
    // The reserved memory comes first, aligned to 8 bytes.
    let start = HEADER.next_multiple_of(8);
    header[4] = u32::try_from(start)?;
    header[2] = u32::try_from(start + tree.reserved.len())?;
    header[3] = u32::try_from(start + tree.reserved.len() + structure.len())?;
    header[8] = u32::try_from(strings.len())?;
    header[9] = u32::try_from(structure.len())?;
    header[1] = header[3] + header[8];
    let mut made: Vec<u8> = header.iter().flat_map(|field| field.to_be_bytes()).collect();
    made.resize(start, 0);
    made.extend([tree.reserved, &structure, &strings].concat());
    Ok(made)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `/ { aliases { }; card@1 { }; };`, in the output format of dtc.
    fn tree() -> Vec<u8> {
        let mut structure = Vec::new();
        let mut node = |name: &str| {
            structure.extend(BEGIN_NODE.to_be_bytes());
            structure.extend(name.as_bytes());
            structure.push(0);
            structure.resize(structure.len().next_multiple_of(4), 0);
        };
        node("");
        node("aliases");
        structure.extend(END_NODE.to_be_bytes());
        let mut node = |name: &str| {
            structure.extend(BEGIN_NODE.to_be_bytes());
            structure.extend(name.as_bytes());
            structure.push(0);
            structure.resize(structure.len().next_multiple_of(4), 0);
        };
        node("card@1");
        for token in [END_NODE, END_NODE, 9] {
            structure.extend(token.to_be_bytes());
        }
        let (start, reserved) = (HEADER as u32, 16);
        let size = structure.len() as u32;
        let strings = start + reserved + size;
        let header = [MAGIC, strings, start + reserved, strings, start, 17, 16, 0, 0, size];
        let mut blob: Vec<u8> = header.iter().flat_map(|field| field.to_be_bytes()).collect();
        blob.extend([0; 16]);
        blob.extend(structure);
        blob
    }

    #[test]
    fn a_name_is_added_and_another_after_it() {
        let once = add_aliases(&tree(), &["mmc0=/card@1".to_owned()]).expect("added");
        let twice = add_aliases(&once, &["mmc1=/aliases".to_owned()]).expect("added again");
        assert_eq!(read_word(&twice, 4).expect("a size") as usize, twice.len());
        let read = Tree::read(&twice).expect("a tree");
        assert_eq!(read.strings, b"mmc0\0mmc1\0");
        let (place, nodes) = read.walk().expect("whole");
        assert_eq!(nodes, ["", "/aliases", "/card@1"]);
        let properties = &read.structure[place.expect("aliases")..];
        // The later one first: its name is the second string.
        assert_eq!(properties[..12], [0, 0, 0, 3, 0, 0, 0, 9, 0, 0, 0, 5]);
        assert_eq!(&properties[12..24], b"/aliases\0\0\0\0");
        assert_eq!(properties[24..36], [0, 0, 0, 3, 0, 0, 0, 8, 0, 0, 0, 0]);
        assert_eq!(&properties[36..44], b"/card@1\0");
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        let refused = |blob: &[u8], alias: &str| {
            add_aliases(blob, &[alias.to_owned()]).expect_err("refused").to_string()
        };
        assert_eq!(refused(&tree(), "mmc0=/card@2"), "the tree has no node /card@2");
        assert_eq!(refused(&tree(), "mmc0"), "an alias is written `name=/path`");
        assert_eq!(
            refused(b"nothing of the kind, but long enough for a header", "a=/"),
            "not a device tree"
        );
        for end in 0..tree().len() - 4 {
            add_aliases(&tree()[..end], &["mmc0=/card@1".to_owned()]).expect_err("cut short");
        }
    }
}
