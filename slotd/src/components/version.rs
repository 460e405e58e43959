//! Compares versions of Python distributions (PEP 440).

use std::cmp::Ordering;

/// A version's parts, in the order in which they are compared. A local part (`+…`) is ignored.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Pep440Version {
    epoch: u64,
    release: Vec<u64>,
    /// Pre-releases sort below final releases, and development releases below both.
    stage: (u8, u64),
    post: u64,
    /// `u64::MAX`: not a development release.
    dev: u64,
}

impl Pep440Version {
    /// Reads a version in its normal form, such as `10.1.0`, `8.3.0a2`, `1!2.0.post1.dev3`.
    pub fn parse(text: &str) -> Option<Self> {
        let text = text.trim().trim_start_matches(['v', 'V']).to_ascii_lowercase();
        let text = text.split('+').next()?;
        let (epoch, text) = match text.split_once('!') {
            Some((epoch, rest)) => (epoch.parse().ok()?, rest),
            None => (0, text),
        };
        let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
        let (release, mut rest) = text.split_at_checked(end)?;
        let mut release = release
            .trim_end_matches('.')
            .split('.')
            .map(|part| part.parse().ok())
            .collect::<Option<Vec<u64>>>()?;
        // 1.0 and 1.0.0 are equal.
        while release.len() > 1 && release.last() == Some(&0) {
            release.pop();
        }
        let (mut stage, mut post, mut dev) = (None, None, None);
        loop {
            rest = rest.trim_start_matches(['.', '-', '_']);
            if rest.is_empty() {
                break;
            }
            let word_end = rest.find(|c: char| !c.is_ascii_alphabetic()).unwrap_or(rest.len());
            let (word, after) = rest.split_at_checked(word_end)?;
            let after = after.trim_start_matches(['.', '-', '_']);
            let number_end = after.find(|c: char| !c.is_ascii_digit()).unwrap_or(after.len());
            let (number, after) = after.split_at_checked(number_end)?;
            let number = if number.is_empty() { 0 } else { number.parse().ok()? };
            let slot = match word {
                "a" | "alpha" => stage.replace((1, number)).is_some(),
                "b" | "beta" => stage.replace((2, number)).is_some(),
                "rc" | "c" | "pre" | "preview" => stage.replace((3, number)).is_some(),
                "post" | "rev" | "r" => post.replace(number).is_some(),
                "dev" => dev.replace(number).is_some(),
                _ => return None,
            };
            if slot {
                return None;
            }
            rest = after;
        }
        let stage = match (stage, post, dev) {
            (Some(stage), _, _) => stage,
            (None, None, Some(_)) => (0, 0),
            (None, _, _) => (4, 0),
        };
        // A post-release of number 0 is above the release itself.
        let post = post.map_or(0, |n: u64| n.saturating_add(1));
        Some(Self { epoch, release, stage, post, dev: dev.unwrap_or(u64::MAX) })
    }
}

/// Compares two versions; `None` when one cannot be read.
pub(super) fn compare(one: &str, other: &str) -> Option<Ordering> {
    Some(Pep440Version::parse(one)?.cmp(&Pep440Version::parse(other)?))
}

#[cfg(test)]
#[expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test may fail by panicking")]
mod tests {
    use super::*;

    #[test]
    fn versions_sort_as_pep_440_says() {
        let sorted = [
            "1.0.dev1",
            "1.0a1.dev1",
            "1.0a1",
            "1.0a2",
            "1.0b1",
            "1.0rc1.dev2",
            "1.0rc1",
            "1.0",
            "1.0.post0.dev1",
            "1.0.post0",
            "1.0.post1",
            "1.0.1",
            "1.2",
            "1.10",
            "9.9.9",
            "10.0.0a0",
            "10.0.0",
            "10.1.0",
            "1!0.1",
        ];
        for pair in sorted.windows(2) {
            assert_eq!(compare(pair[0], pair[1]), Some(Ordering::Less), "{pair:?}");
        }
        for (one, other) in [("1.0", "1.0.0"), ("v1.0-RC.1", "1.0rc1"), ("1.0+x.1", "1.0")] {
            assert_eq!(compare(one, other), Some(Ordering::Equal), "{one} {other}");
        }
        for none in ["", "x", "1.0x", "1..0", "1.0a1a2", "1.0 0"] {
            assert_eq!(Pep440Version::parse(none), None, "{none}");
        }
        assert_eq!(Pep440Version::parse("2.36").unwrap(), Pep440Version::parse("2.36.0").unwrap());
    }
}
