//! Runs the fuzz targets on stable Rust in every test run: their seeds, each seed with single bytes changed and
//! truncated, and every input that was found (`fuzz/corpus/TARGET/`).
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

#[path = "../../fuzz/src/targets.rs"]
mod targets;

use std::fs;
use std::path::Path;

#[test]
fn seeds_their_neighbours_and_everything_found_are_harmless() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus");
    for (name, target, seeds) in targets::ALL {
        let mut inputs = seeds();
        assert!(inputs.len() >= 2, "{name}: too few seeds");
        let found = fs::read_dir(corpus.join(name)).into_iter().flatten();
        inputs.extend(found.map(|entry| fs::read(entry.unwrap().path()).unwrap()));
        let mut runs = 0;
        for input in &inputs {
            target(input);
            let step = (input.len() / 24).max(1);
            for at in (0..input.len()).step_by(step) {
                let mut changed = input.clone();
                changed[at] ^= 1 << (at % 8);
                target(&changed);
                target(&input[..at]);
                runs += 2;
            }
        }
        println!("{name}: {} inputs, {runs} neighbours", inputs.len());
    }
}
