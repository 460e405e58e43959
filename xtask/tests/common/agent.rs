//! The agent for this machine, built by cargo as a developer would.

use std::sync::OnceLock;

use camino::{Utf8Path, Utf8PathBuf};
use xtask::exec::Tool;

/// The program. Cargo must not get the variables that it set for this test about its package:
/// [`xtask::exec::of_cargo_run`].
pub fn slotd() -> &'static Utf8Path {
    static SLOTD: OnceLock<Utf8PathBuf> = OnceLock::new();
    SLOTD.get_or_init(|| {
        Tool::cargo().args(["build", "--quiet", "--workspace", "--bin", "slotd"]).run().unwrap();
        // A test is `<target>/debug/deps/NAME-…`.
        let own = Utf8PathBuf::try_from(std::env::current_exe().unwrap()).unwrap();
        let built = own.parent().and_then(Utf8Path::parent).unwrap().join("slotd");
        assert!(built.is_file(), "{built} was not built");
        built
    })
}
