//! Writes the initial corpus of each target: `seeds DIRECTORY` creates a directory for each target in DIRECTORY.

use std::path::PathBuf;

fn main() -> std::io::Result<()> {
    let Some(directory) = std::env::args_os().nth(1).map(PathBuf::from) else {
        return Err(std::io::Error::other("usage: seeds DIRECTORY"));
    };
    for (name, _, seeds) in slipway_fuzz::targets::ALL {
        let directory = directory.join(name);
        std::fs::create_dir_all(&directory)?;
        for (number, seed) in seeds().into_iter().enumerate() {
            std::fs::write(directory.join(format!("seed-{number:02}")), seed)?;
        }
    }
    Ok(())
}
