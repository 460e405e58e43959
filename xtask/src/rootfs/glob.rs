//! Path patterns for rules: `*` and `?` stay within a path's component, `**` crosses components.

/// Whether `path` (relative, `/`-separated) matches `pattern`.
///
/// `a/**` matches everything below `a`, not `a` itself; `**/x` matches `x` at any depth.
pub fn matches(pattern: &str, path: &str) -> bool {
    let pattern: Vec<&str> = pattern.split('/').collect();
    let path: Vec<&str> = path.split('/').collect();
    components(&pattern, &path)
}

/// Whether any of the patterns matches.
pub fn any<S: AsRef<str>>(patterns: &[S], path: &str) -> bool {
    patterns.iter().any(|p| matches(p.as_ref(), path))
}

fn components(pattern: &[&str], path: &[&str]) -> bool {
    match (pattern.split_first(), path.split_first()) {
        (None, None) => true,
        (Some((&"**", [])), _) => !path.is_empty(),
        (Some((&"**", rest)), _) => (0..=path.len()).any(|skip| components(rest, &path[skip..])),
        (Some((first, rest)), Some((name, below))) => {
            component(first.as_bytes(), name.as_bytes()) && components(rest, below)
        }
        _ => false,
    }
}

fn component(pattern: &[u8], name: &[u8]) -> bool {
    match (pattern.split_first(), name.split_first()) {
        (None, None) => true,
        (Some((b'*', rest)), _) => (0..=name.len()).any(|skip| component(rest, &name[skip..])),
        (Some((b'?', rest)), Some((_, below))) => component(rest, below),
        (Some((a, rest)), Some((b, below))) => a == b && component(rest, below),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::matches;

    #[test]
    fn stars_stay_within_a_component_and_double_stars_cross() {
        assert!(matches("broadcom/bcm2837-*.dtb", "broadcom/bcm2837-rpi-3-b.dtb"));
        assert!(!matches("*.dtb", "broadcom/bcm2837-rpi-3-b.dtb"));
        assert!(matches("usr/share/man/**", "usr/share/man/man1/a.1"));
        assert!(!matches("usr/share/man/**", "usr/share/man"));
        assert!(matches("**/__pycache__/*.pyc", "usr/lib/python3/__pycache__/a.pyc"));
        assert!(matches("**/x", "x"));
        assert!(matches("start?.elf", "start4.elf") && !matches("start?.elf", "start.elf"));
    }
}
