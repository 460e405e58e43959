//! Sizes with units, percentages, versions and names as the configuration writes them.

use toml::de::DeValue;

use super::reader::FromToml;

/// A size in bytes, written with a binary unit: `"512B"`, `"8KiB"`, `"64MiB"`, `"4GiB"`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct BinarySize(pub u64);

impl FromToml for BinarySize {
    const EXPECTED: &'static str = "a size with its unit, such as \"64MiB\" or \"4GiB\"";
    fn from_toml(value: &DeValue<'_>) -> Result<Self, String> {
        let text = value.as_str().ok_or(String::new())?;
        parse_size(text).map(BinarySize)
    }
}

/// Bytes are counted in 64 bits.
const TOO_LARGE: &str = "it must be below 16777216TiB";

fn parse_size(text: &str) -> Result<u64, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let number: u64 = match number {
        "" => return Err(String::new()),
        // Digits only: it is too long.
        _ => number.parse().map_err(|_| TOO_LARGE.to_owned())?,
    };
    let factor: u64 = match unit.trim_start() {
        "B" => 1,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        "TiB" => 1 << 40,
        "" => return Err("the unit is missing (B, KiB, MiB, GiB or TiB)".to_owned()),
        other => return Err(format!("unknown unit `{other}` (use B, KiB, MiB, GiB or TiB)")),
    };
    number.checked_mul(factor).ok_or_else(|| TOO_LARGE.to_owned())
}

/// A share in whole percent, written `"95%"`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Percent(pub u32);

impl FromToml for Percent {
    const EXPECTED: &'static str = "a percentage from \"0%\" to \"100%\"";
    fn from_toml(value: &DeValue<'_>) -> Result<Self, String> {
        let text = value.as_str().ok_or(String::new())?;
        let number = text.strip_suffix('%').ok_or(String::new())?;
        match number.trim().parse() {
            Ok(n @ 0..=100) => Ok(Self(n)),
            _ => Err(String::new()),
        }
    }
}

impl FromToml for bundle::Version {
    const EXPECTED: &'static str = "a version such as \"1.4.0\" or \"2.0.0-rc.1\"";
    fn from_toml(value: &DeValue<'_>) -> Result<Self, String> {
        let text = value.as_str().ok_or(String::new())?;
        Self::parse(text).map_err(|_| String::new())
    }
}

/// A name that is safe in file names, host names and labels: `[a-z0-9][a-z0-9-]*`, at most 32 long,
/// the same rule as in a bundle's manifest.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct SafeName(pub String);

impl FromToml for SafeName {
    const EXPECTED: &'static str = "a name of lower-case letters, digits and `-`";
    fn from_toml(value: &DeValue<'_>) -> Result<Self, String> {
        let text = value.as_str().ok_or(String::new())?;
        let plain = text.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-');
        if text.is_empty() || !plain || text.starts_with('-') || text.ends_with('-') {
            return Err(String::new());
        }
        if text.len() > bundle::MAX_NAME {
            let (found, most) = (text.len(), bundle::MAX_NAME);
            return Err(format!("has {found} characters, at most {most} are allowed"));
        }
        Ok(Self(text.to_owned()))
    }
}

/// A day, written `"2024-05-13"`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct CalendarDay(pub String);

impl FromToml for CalendarDay {
    const EXPECTED: &'static str = "a day from \"2000-01-01\" to \"2999-12-31\"";
    fn from_toml(value: &DeValue<'_>) -> Result<Self, String> {
        let text = value.as_str().ok_or(String::new())?;
        let parts: Vec<u32> = text.split('-').filter_map(|part| part.parse().ok()).collect();
        let form = text.len() == 10 && text.bytes().all(|b| b.is_ascii_digit() || b == b'-');
        match parts.as_slice() {
            [2000..=2999, 1..=12, 1..=31] if form => Ok(Self(text.to_owned())),
            _ => Err(String::new()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_need_a_unit() {
        assert_eq!(parse_size("64MiB"), Ok(64 << 20));
        assert_eq!(parse_size("4 GiB"), Ok(4 << 30));
        assert!(parse_size("64").is_err_and(|e| e.contains("unit is missing")));
        assert!(parse_size("64MB").is_err_and(|e| e.contains("unknown unit `MB`")));
        assert!(parse_size("99999999999TiB").is_err_and(|e| e == TOO_LARGE));
        assert!(parse_size("99999999999999999999B").is_err_and(|e| e == TOO_LARGE));
        assert_eq!(parse_size("16777215TiB"), Ok(16_777_215 << 40));
    }
}
