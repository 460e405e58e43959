//! Every bound of the format, in one place. The reader checks each bound before it allocates, and the
//! writer obeys them. `docs/reference/bundle-format.md` repeats them for other implementers.

/// Format version that this crate writes and reads.
pub const FORMAT: u32 = 1;

/// Bytes of one payload block, the unit of the block index: ext4's and the SD card's natural page.
pub const BLOCK_SIZE: usize = 4096;

/// Most bytes of `manifest.json`. A manifest with [`MAX_PAYLOADS`] payloads needs three quarters of this.
pub const MAX_MANIFEST: u64 = 64 * 1024;

/// Most bytes of one signature file; minisign itself allows a trusted comment of 8 KiB.
pub const MAX_SIGNATURE: u64 = 2 * 1024;

/// Most signatures on one manifest.
pub const MAX_SIGNATURES: usize = 8;

/// Most components in one bundle.
pub const MAX_COMPONENTS: usize = 16;

/// Most payloads in one component. The component `api` has one for each of its wheels.
pub const MAX_PAYLOADS: usize = 128;

/// Most bytes of `component.json`: some 300 for each wheel, and room for many console scripts.
pub const MAX_LOCK: u64 = 256 * 1024;

/// Most bytes of one wheel's installed tree, as a tar archive; the largest wheels in use are below 1 GiB.
pub const MAX_TREE: u64 = 2 * 1024 * 1024 * 1024;

/// Most files of one wheel's installed tree.
pub const MAX_TREE_FILES: u64 = 64 * 1024;

/// Most parts of a path in a wheel's tree: `site/foo/a.py` has three. No package has deeper ones.
pub const MAX_TREE_DEPTH: usize = 32;

/// Most bytes of a path in a wheel's tree. With its prefix on a robot, a path stays far below Linux's 4096.
pub const MAX_TREE_PATH: usize = 512;

/// Most entries of each list of names in the manifest (boards, required features).
pub const MAX_NAMES: usize = 64;

/// Most characters of a name (product, board, component, role, feature) and of a version.
pub const MAX_NAME: usize = 32;

/// Most bytes of one block index. The index is held in memory while its payload is read, and a device
/// may use 32 MiB in total. 8 MiB are enough for about 2.6 GiB of blocks that are not zero.
pub const MAX_INDEX: u64 = 8 * 1024 * 1024;

/// Most bytes of a payload, zero blocks included.
pub const MAX_PAYLOAD: u64 = 64 * 1024 * 1024 * 1024;

/// Most bytes of a payload's stored frames: the largest number of eleven octal digits in a tar header.
pub const MAX_DATA: u64 = 0o77_777_777_777;

/// Stored frames are hashed in pieces of this many bytes (the last is shorter): a device holds one
/// piece in memory, and hashes it in full before a byte of it reaches the decompressor.
pub const PIECE: usize = 512 * 1024;

/// Most blocks that one frame decompresses to (64 MiB).
pub const MAX_FRAME_BLOCKS: u32 = 16 * 1024;

/// Most bytes of one stored frame: 64 MiB that do not compress, and room for zstd's headers.
pub const MAX_STORED_FRAME: u32 = 65 * 1024 * 1024;

/// Largest zstd window (16 MiB): the decompressor's memory on the device.
pub const MAX_WINDOW_LOG: u32 = 24;

/// Most frames of one payload.
pub const MAX_FRAMES: u32 = 16 * 1024;

/// Bytes of each block's SHA-256 that the index keeps. The module `index` says why.
pub const BLOCK_HASH: usize = 12;
