//! U-Boot's environment as a file, `uboot.env`: a distribution's U-Boot that looks for this file
//! replaces its compiled-in environment by it. So no key press stops the boot, and nothing boots
//! from USB or the network.

use anyhow::{Result, bail, ensure};

/// Bytes of the file: `CONFIG_ENV_SIZE` of U-Boot's configurations for the Raspberry Pi. A file of
/// another size is ignored.
const SIZE: usize = 0x4000;
/// Bytes of the checksum before the variables: CRC-32, little-endian (`include/env_internal.h`, one copy).
const HEAD: usize = 4;

/// Creates the file from lines `name=value`; empty lines and those that begin with `#` are ignored.
///
/// # Errors
/// A line without a name, a name twice, or more than fits.
pub fn pack_environment(text: &[u8]) -> Result<Vec<u8>> {
    let text = std::str::from_utf8(text)?;
    let mut names = std::collections::BTreeSet::new();
    let mut variables = Vec::new();
    for line in text.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
        let name = line.split_once('=').map(|(name, _)| name);
        let Some(name) = name.filter(|n| !n.is_empty() && !n.contains(char::is_whitespace)) else {
            bail!("`{line}` is not `name=value`");
        };
        ensure!(names.insert(name), "the variable {name} is set twice");
        variables.extend_from_slice(line.as_bytes());
        variables.push(0);
    }
    // An additional zero ends the list; the rest of the file is zero.
    ensure!(
        HEAD + variables.len() < SIZE,
        "the variables have {} bytes, but U-Boot reads only {}",
        variables.len() + 1,
        SIZE - HEAD
    );
    variables.resize(SIZE - HEAD, 0);
    let mut checksum = flate2::Crc::new();
    checksum.update(&variables);
    Ok([&checksum.sum().to_le_bytes(), variables.as_slice()].concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_what_mkenvimage_makes() {
        let dir = tempfile::tempdir().expect("a directory");
        let at = |name: &str| dir.path().join(name).to_str().expect("UTF-8").to_owned();
        std::fs::write(at("text"), "bootdelay=-2\nbootcmd=run a; reset\n").expect("written");
        crate::exec::Tool::new("mkenvimage")
            .args(["-s", "0x4000", "-p", "0", "-o", &at("made"), &at("text")])
            .run()
            .expect("this test needs mkenvimage");
        let made = std::fs::read(at("made")).expect("made");
        let packed =
            pack_environment(b"# ours\nbootdelay=-2\n\nbootcmd=run a; reset\n").expect("packed");
        assert!(packed == made, "another file than mkenvimage's");
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        let refused =
            |text: &str| pack_environment(text.as_bytes()).expect_err("refused").to_string();
        assert_eq!(refused("bootdelay\n"), "`bootdelay` is not `name=value`");
        assert_eq!(refused("=x\n"), "`=x` is not `name=value`");
        assert_eq!(refused("a=1\na=2\n"), "the variable a is set twice");
        let long = format!("a={}\n", "x".repeat(SIZE));
        assert_eq!(refused(&long), "the variables have 16388 bytes, but U-Boot reads only 16380");
    }
}
