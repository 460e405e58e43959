//! Bytes that do not compress, for every test that needs some.

/// Bytes that are never the same for two seeds.
pub fn noise(length: usize, seed: impl ToString) -> Vec<u8> {
    let hash = bundle::index::sha256(seed.to_string().as_bytes());
    let mut state = u64::from_le_bytes(hash[..8].try_into().unwrap()) | 1;
    // A plain loop: this is compiled without optimisation, and iterators over bytes are slow there.
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}
