//! Device trees as the firmware and the kernel read them (Devicetree specification 0.4, chapter 5), without trust:
//! a damaged one is an error, never a panic.

/// A node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// The whole path, `/soc/mmc@7e202000`.
    pub path: String,
    /// The parent's place in [`Tree::nodes`]; the root is its own.
    pub parent: usize,
    /// Name and bytes, in order.
    pub properties: Vec<(String, Vec<u8>)>,
}

/// A device tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tree {
    /// All nodes, each behind its parent.
    pub nodes: Vec<Node>,
}

const MAGIC: u32 = 0xd00d_feed;
const BEGIN: u32 = 1;
const END: u32 = 2;
const PROPERTY: u32 = 3;
const NOP: u32 = 4;
const LAST: u32 = 9;

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    let four = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_be_bytes(four.try_into().ok()?))
}

fn text(bytes: &[u8], at: usize) -> Option<String> {
    let rest = bytes.get(at..)?;
    let end = rest.iter().position(|byte| *byte == 0)?;
    Some(String::from_utf8_lossy(&rest[..end]).into_owned())
}

impl Tree {
    /// Reads one.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn read(bytes: &[u8]) -> Result<Self, String> {
        if word(bytes, 0) != Some(MAGIC) {
            return Err("it does not begin as a device tree".to_owned());
        }
        Self::nodes_of(bytes)
            .ok_or_else(|| "it ends in the midst, or its parts do not fit".to_owned())
    }

    fn nodes_of(bytes: &[u8]) -> Option<Self> {
        let (structure, strings) = (word(bytes, 8)? as usize, word(bytes, 12)? as usize);
        let mut nodes: Vec<Node> = Vec::new();
        let mut open: Vec<usize> = Vec::new();
        let mut at = structure;
        loop {
            let token = word(bytes, at)?;
            at += 4;
            match token {
                BEGIN => {
                    let name = text(bytes, at)?;
                    at = (at + name.len() + 4) & !3;
                    let parent = open.last().copied().unwrap_or(0);
                    let path = match open.last().and_then(|parent| nodes.get(*parent)) {
                        None => "/".to_owned(),
                        Some(parent) => format!("{}/{name}", parent.path.trim_end_matches('/')),
                    };
                    open.push(nodes.len());
                    nodes.push(Node { path, parent, properties: Vec::new() });
                }
                END => {
                    open.pop()?;
                }
                PROPERTY => {
                    let length = word(bytes, at)? as usize;
                    let name = text(bytes, strings.checked_add(word(bytes, at + 4)? as usize)?)?;
                    let value = bytes.get(at + 8..(at + 8).checked_add(length)?)?;
                    nodes.get_mut(*open.last()?)?.properties.push((name, value.to_vec()));
                    at = (at + 8 + length + 3) & !3;
                }
                NOP => {}
                LAST => return (open.is_empty() && !nodes.is_empty()).then_some(Self { nodes }),
                _ => return None,
            }
        }
    }

    /// The node at a path, or under an alias.
    pub fn node(&self, path: &str) -> Option<&Node> {
        self.nodes.iter().find(|node| node.path == path)
    }

    /// What an alias stands for.
    pub fn alias(&self, name: &str) -> Option<&Node> {
        let path = self.node("/aliases")?.text(name)?;
        self.node(&path)
    }

    /// The node that other nodes refer to by this number.
    pub fn phandle(&self, number: u32) -> Option<&Node> {
        self.nodes.iter().find(|node| node.number("phandle") == Some(number))
    }

    /// The node above.
    pub fn parent(&self, node: &Node) -> Option<&Node> {
        (node.path != "/").then(|| self.nodes.get(node.parent)).flatten()
    }

    /// Whether the node and all above it are switched on.
    pub fn enabled(&self, node: &Node) -> bool {
        let own = matches!(node.text("status").as_deref(), None | Some("okay" | "ok"));
        own && self.parent(node).is_none_or(|parent| self.enabled(parent))
    }
}

impl Node {
    /// A property's bytes.
    pub fn property(&self, name: &str) -> Option<&[u8]> {
        self.properties.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_slice())
    }

    /// A property that is a string.
    pub fn text(&self, name: &str) -> Option<String> {
        text(self.property(name)?, 0)
    }

    /// A property that is one number.
    pub fn number(&self, name: &str) -> Option<u32> {
        word(self.property(name)?, 0)
    }

    /// A property that is a list of numbers.
    pub fn numbers(&self, name: &str) -> Vec<u32> {
        let bytes = self.property(name).unwrap_or_default();
        bytes.chunks_exact(4).map(|four| word(four, 0).unwrap_or(0)).collect()
    }

    /// Its `compatible` strings, the most exact first.
    pub fn compatible(&self) -> Vec<String> {
        let bytes = self.property("compatible").unwrap_or_default();
        let parts = bytes.split(|byte| *byte == 0).filter(|part| !part.is_empty());
        parts.map(|part| String::from_utf8_lossy(part).into_owned()).collect()
    }
}
