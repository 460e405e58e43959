//! UUIDs and volume ids that are the same in every build of one product, version and board.

use serde::Serialize;
use sha2::{Digest, Sha256};
use uuid::{Builder, Uuid};

/// All identifiers on the disk that other tools choose at random.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct DiskIdentifiers {
    /// GPT disk GUID.
    pub disk: Uuid,
    /// MBR disk signature; never 0, which means "none".
    pub disk_signature: u32,
    /// ext4 UUID of the root filesystem, the same in both slots.
    pub root: Uuid,
    /// Seed of ext4's directory hash.
    pub root_hash_seed: Uuid,
    /// ext4 UUID of the data filesystem.
    pub data: Uuid,
    /// Seed of its directory hash.
    pub data_hash_seed: Uuid,
    seed: String,
}

impl DiskIdentifiers {
    /// Derives all of them.
    pub fn derive(product: &str, version: &str, board: &str) -> Self {
        let seed = format!("{product}\n{version}\n{board}");
        Self {
            disk: derive_uuid(&seed, "disk"),
            disk_signature: derive_number(&seed, "disk-signature"),
            root: derive_uuid(&seed, "root"),
            root_hash_seed: derive_uuid(&seed, "root-hash-seed"),
            data: derive_uuid(&seed, "data"),
            data_hash_seed: derive_uuid(&seed, "data-hash-seed"),
            seed,
        }
    }

    /// GUID of the partition with this role.
    pub fn partition(&self, role: &str) -> Uuid {
        derive_uuid(&self.seed, &format!("partition {role}"))
    }

    /// FAT volume id of the partition with this role.
    pub fn volume_id(&self, role: &str) -> u32 {
        derive_number(&self.seed, &format!("volume {role}"))
    }
}

fn hash_label(seed: &str, label: &str) -> [u8; 32] {
    Sha256::new()
        .chain_update("slipway identifiers 1\n")
        .chain_update(label)
        .chain_update("\n")
        .chain_update(seed)
        .finalize()
        .into()
}

/// RFC 9562 section 5.8: version 8 is for vendor-specific values.
fn derive_uuid(seed: &str, label: &str) -> Uuid {
    let mut bytes = [0; 16];
    for (to, from) in bytes.iter_mut().zip(hash_label(seed, label)) {
        *to = from;
    }
    Builder::from_custom_bytes(bytes).into_uuid()
}

fn derive_number(seed: &str, label: &str) -> u32 {
    let [a, b, c, d, ..] = hash_label(seed, label);
    u32::from_le_bytes([a, b, c, d]).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn same_names_same_identifiers() {
        let one = DiskIdentifiers::derive("robot", "1.0.0", "x");
        assert_eq!(one, DiskIdentifiers::derive("robot", "1.0.0", "x"));
        assert_ne!(one.disk, DiskIdentifiers::derive("robot", "1.0.1", "x").disk);
        assert_ne!(one.partition("root-a"), one.partition("root-b"));
        assert_eq!(one.disk.get_version_num(), 8);
    }
}
