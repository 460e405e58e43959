//! Reads untrusted device trees as the firmware and the kernel do (Devicetree specification 0.4, chapter 5). A
//! damaged tree is an error, never a panic, and a malicious tree takes no more time and memory than a large one.

use std::collections::BTreeMap;

/// A node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceTreeNode {
    /// The whole path, `/soc/mmc@7e202000`.
    pub path: String,
    /// The parent's index in [`DeviceTree::nodes`]; the root is its own parent.
    pub parent: usize,
    /// Name and bytes, in order.
    pub properties: Vec<(String, Vec<u8>)>,
}

/// A device tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceTree {
    /// All nodes, each after its parent.
    pub nodes: Vec<DeviceTreeNode>,
    /// Indices of nodes: the first one with each path, and the first one with each phandle.
    paths: BTreeMap<String, usize>,
    phandles: BTreeMap<u32, usize>,
}

const MAGIC: u32 = 0xd00d_feed;
const BEGIN: u32 = 1;
const END: u32 = 2;
const PROPERTY: u32 = 3;
const NOP: u32 = 4;
const LAST: u32 = 9;

/// The largest tree that the kernel accepts (Linux, Documentation/arch/arm64/booting.rst, "must not exceed 2 megabytes").
const LARGEST: usize = 2 << 20;
/// The deepest node (Linux, drivers/of/fdt.c: FDT_MAX_DEPTH).
const DEEPEST: usize = 64;
/// The longest name of a node or property. The specification allows 31, but some trees have longer names.
const LONGEST: usize = 127;
/// The most nodes. A Raspberry Pi 5's tree has some 800.
const MOST_NODES: usize = 8192;

fn read_word(bytes: &[u8], at: usize) -> Option<u32> {
    let four = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_be_bytes(four.try_into().ok()?))
}

fn read_text(bytes: &[u8], at: usize) -> Option<String> {
    let rest = bytes.get(at..)?;
    let end = rest.iter().position(|byte| *byte == 0)?;
    Some(String::from_utf8_lossy(&rest[..end]).into_owned())
}

/// A name and the number of bytes that it occupies.
fn name(bytes: &[u8], at: usize) -> Option<(String, usize)> {
    let rest = bytes.get(at..)?;
    let end = rest.iter().take(LONGEST + 1).position(|byte| *byte == 0)?;
    Some((String::from_utf8_lossy(&rest[..end]).into_owned(), end))
}

impl DeviceTree {
    /// Reads a device tree.
    ///
    /// # Errors
    /// When the tree is malformed.
    pub fn read(bytes: &[u8]) -> Result<Self, String> {
        if read_word(bytes, 0) != Some(MAGIC) {
            return Err("not a device tree (wrong magic)".to_owned());
        }
        if bytes.len() > LARGEST {
            return Err(format!(
                "the tree has {} bytes, the kernel accepts at most {LARGEST}",
                bytes.len()
            ));
        }
        let nodes = Self::nodes_of(bytes)
            .ok_or_else(|| "the tree is truncated, or its parts are inconsistent".to_owned())?;
        let mut tree = Self { nodes, paths: BTreeMap::new(), phandles: BTreeMap::new() };
        for (index, node) in tree.nodes.iter().enumerate() {
            tree.paths.entry(node.path.clone()).or_insert(index);
            if let Some(number) = node.number("phandle") {
                tree.phandles.entry(number).or_insert(index);
            }
        }
        Ok(tree)
    }

    fn nodes_of(bytes: &[u8]) -> Option<Vec<DeviceTreeNode>> {
        let (structure, strings) = (read_word(bytes, 8)? as usize, read_word(bytes, 12)? as usize);
        let mut nodes: Vec<DeviceTreeNode> = Vec::new();
        let mut open: Vec<usize> = Vec::new();
        let mut at = structure;
        loop {
            let token = read_word(bytes, at)?;
            at += 4;
            match token {
                BEGIN => {
                    let (name, length) = name(bytes, at)?;
                    if open.len() >= DEEPEST || nodes.len() >= MOST_NODES {
                        return None;
                    }
                    at = (at + length + 4) & !3;
                    let parent = open.last().copied().unwrap_or(0);
                    let path = match open.last().and_then(|parent| nodes.get(*parent)) {
                        None => "/".to_owned(),
                        Some(parent) => format!("{}/{name}", parent.path.trim_end_matches('/')),
                    };
                    open.push(nodes.len());
                    nodes.push(DeviceTreeNode { path, parent, properties: Vec::new() });
                }
                END => {
                    open.pop()?;
                }
                PROPERTY => {
                    let length = read_word(bytes, at)? as usize;
                    let place = strings.checked_add(read_word(bytes, at + 4)? as usize)?;
                    let (name, _) = name(bytes, place)?;
                    let value = bytes.get(at + 8..(at + 8).checked_add(length)?)?;
                    nodes.get_mut(*open.last()?)?.properties.push((name, value.to_vec()));
                    at = (at + 8 + length + 3) & !3;
                }
                NOP => {}
                LAST => return (open.is_empty() && !nodes.is_empty()).then_some(nodes),
                _ => return None,
            }
        }
    }

    /// The node at a path, or under an alias.
    pub fn node(&self, path: &str) -> Option<&DeviceTreeNode> {
        self.nodes.get(*self.paths.get(path)?)
    }

    /// The node that an alias names.
    pub fn alias(&self, name: &str) -> Option<&DeviceTreeNode> {
        let path = self.node("/aliases")?.text(name)?;
        self.node(&path)
    }

    /// The node with this phandle.
    pub fn phandle(&self, number: u32) -> Option<&DeviceTreeNode> {
        self.nodes.get(*self.phandles.get(&number)?)
    }

    /// The node above.
    pub fn parent(&self, node: &DeviceTreeNode) -> Option<&DeviceTreeNode> {
        (node.path != "/").then(|| self.nodes.get(node.parent)).flatten()
    }

    /// Whether the node and all its parents are enabled.
    pub fn enabled(&self, node: &DeviceTreeNode) -> bool {
        let own = matches!(node.text("status").as_deref(), None | Some("okay" | "ok"));
        own && self.parent(node).is_none_or(|parent| self.enabled(parent))
    }
}

impl DeviceTreeNode {
    /// A property's bytes.
    pub fn property(&self, name: &str) -> Option<&[u8]> {
        self.properties.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_slice())
    }

    /// A property that is a string.
    pub fn text(&self, name: &str) -> Option<String> {
        read_text(self.property(name)?, 0)
    }

    /// A property that is one number.
    pub fn number(&self, name: &str) -> Option<u32> {
        read_word(self.property(name)?, 0)
    }

    /// A property that is a list of numbers.
    pub fn numbers(&self, name: &str) -> Vec<u32> {
        let bytes = self.property(name).unwrap_or_default();
        bytes.chunks_exact(4).map(|four| read_word(four, 0).unwrap_or(0)).collect()
    }

    /// Its `compatible` strings, the most exact first.
    pub fn compatible(&self) -> Vec<String> {
        let bytes = self.property("compatible").unwrap_or_default();
        let parts = bytes.split(|byte| *byte == 0).filter(|part| !part.is_empty());
        parts.map(|part| String::from_utf8_lossy(part).into_owned()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A tree of these tokens, with this text as its names of properties.
    fn tree(tokens: &[u32], strings: &[u8]) -> Vec<u8> {
        let length = tokens.len() as u32 * 4;
        let head = [MAGIC, 0, 16, 16 + length];
        let words = head.iter().chain(tokens).flat_map(|word| word.to_be_bytes());
        words.chain(strings.iter().copied()).collect()
    }

    #[test]
    fn nodes_without_end_and_names_without_end_are_refused() {
        assert!(DeviceTree::read(&tree(&[BEGIN, 0, END, LAST], b"")).is_ok());
        let deep = |count: usize| {
            let begins = [BEGIN, 0].repeat(count);
            tree(&[begins, vec![END; count], vec![LAST]].concat(), b"")
        };
        assert!(DeviceTree::read(&deep(DEEPEST)).is_ok());
        assert!(DeviceTree::read(&deep(DEEPEST + 1)).is_err());
        assert!(DeviceTree::read(&deep(40_000)).is_err());
        let wide = [vec![BEGIN, 0], [BEGIN, 0, END].repeat(100_000), vec![END, LAST]].concat();
        assert!(DeviceTree::read(&tree(&wide, b"")).is_err());
        // Each property names all of a long text.
        let property = [PROPERTY, 0, 0].repeat(10_000);
        let named = [vec![BEGIN, 0], property, vec![END, LAST]].concat();
        assert!(DeviceTree::read(&tree(&named, &[&[b'x'; 1 << 20][..], &[0]].concat())).is_err());
        assert!(DeviceTree::read(&tree(&named, b"x\0")).is_ok());
        let large = tree(&[vec![BEGIN, 0], vec![NOP; 1 << 19], vec![END, LAST]].concat(), b"");
        assert!(
            DeviceTree::read(&large).is_err_and(|reason| reason.contains("the kernel accepts"))
        );
    }

    #[test]
    fn a_name_that_is_no_text_takes_its_own_bytes() {
        // Each byte that is not UTF-8 becomes three bytes.
        let words = tree(&[BEGIN, 0xfffe_fd00, END, LAST], b"");
        assert_eq!(DeviceTree::read(&words).map(|tree| tree.nodes.len()), Ok(1));
    }
}
