//! Path patterns for rules: `*` and `?` stay within a path's component, `**` crosses components,
//! `{a,b}` is either.

use anyhow::{Context, Result};
use globset::{GlobBuilder, GlobSet, GlobSetBuilder};

/// Compiles patterns of relative, `/`-separated paths. `a/**` matches everything below `a`, not `a`
/// itself; `**/x` matches `x` at any depth.
///
/// # Errors
/// A pattern that is malformed, by its text.
pub fn compile_globs<S: AsRef<str>>(patterns: &[S]) -> Result<GlobSet> {
    let mut set = GlobSetBuilder::new();
    for pattern in patterns {
        let pattern = pattern.as_ref();
        let glob = GlobBuilder::new(pattern).literal_separator(true).build();
        set.add(glob.with_context(|| format!("reading the pattern '{pattern}'"))?);
    }
    set.build().context("reading patterns")
}

#[cfg(test)]
mod tests {
    use super::compile_globs;

    fn matches(pattern: &str, path: &str) -> bool {
        compile_globs(&[pattern]).expect("well-formed").is_match(path)
    }

    #[test]
    fn stars_stay_within_a_component_and_double_stars_cross() {
        assert!(matches("broadcom/bcm2837-*.dtb", "broadcom/bcm2837-rpi-3-b.dtb"));
        assert!(!matches("*.dtb", "broadcom/bcm2837-rpi-3-b.dtb"));
        assert!(matches("usr/share/man/**", "usr/share/man/man1/a.1"));
        assert!(!matches("usr/share/man/**", "usr/share/man"));
        assert!(matches("**/__pycache__/*.pyc", "usr/lib/python3/__pycache__/a.pyc"));
        assert!(matches("**/x", "x"));
        assert!(matches("start?.elf", "start4.elf") && !matches("start?.elf", "start.elf"));
        assert!(matches("fs/{ext4,fat}/**", "fs/fat/vfat.ko"));
    }
}
