//! The bundle benchmark alone: `cargo run --example bench_bundle -- PAYLOAD SCRATCH [--slow]`.

use anyhow::{Result, bail};
use xtask::bench::bundle::{CHILD, Settings, child, run, table};

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.as_slice() {
        [first, rest @ ..] if first == CHILD => child(rest),
        [payload, scratch, rest @ ..] => {
            let slow = rest.iter().any(|arg| arg == "--slow");
            let settings =
                Settings { payload: payload.into(), scratch: scratch.into(), runs: 3, slow };
            print!("{}", table(&run(&settings)?));
            Ok(())
        }
        _ => bail!("expected a payload and a scratch directory"),
    }
}
