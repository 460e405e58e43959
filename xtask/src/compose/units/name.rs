//! Names of systemd units, by the rules of systemd.unit(5): `prefix@instance.type`.

use std::fmt;

/// The kinds of units.
const TYPES: [&str; 11] = [
    "service",
    "socket",
    "target",
    "device",
    "mount",
    "automount",
    "swap",
    "timer",
    "path",
    "slice",
    "scope",
];

/// The longest name in bytes: systemd's `UNIT_NAME_MAX` is 256 with the final zero.
pub const MAX: usize = 255;

/// The kind of a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UnitNameForm {
    /// `a.service`
    Plain,
    /// `a@b.service`
    Instance,
    /// `a@.service`
    Template,
}

/// A valid name of a unit.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct UnitName(String);

impl UnitName {
    /// `None` for an invalid unit name.
    pub fn new(text: &str) -> Option<Self> {
        let (stem, kind) = text.rsplit_once('.')?;
        let good = |c: char| c.is_ascii_alphanumeric() || ":-_.\\@".contains(c);
        let prefix = stem.split('@').next().unwrap_or_default();
        let valid = !prefix.is_empty() && text.len() <= MAX && stem.chars().all(good);
        (valid && TYPES.contains(&kind)).then(|| Self(text.to_owned()))
    }

    /// The whole name.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Everything but the type: `a@b` of `a@b.service`.
    pub fn stem(&self) -> &str {
        self.0.rsplit_once('.').map_or("", |(stem, _)| stem)
    }

    /// `service` of `a@b.service`.
    pub fn kind(&self) -> &str {
        self.0.rsplit_once('.').map_or("", |(_, kind)| kind)
    }

    /// `a` of `a@b.service`.
    pub fn prefix(&self) -> &str {
        self.stem().split('@').next().unwrap_or_default()
    }

    /// `b` of `a@b.service`; empty for a template and a plain name.
    pub fn instance(&self) -> &str {
        self.stem().split_once('@').map_or("", |(_, instance)| instance)
    }

    /// Its kind.
    pub fn form(&self) -> UnitNameForm {
        match self.stem().split_once('@') {
            None => UnitNameForm::Plain,
            Some((_, "")) => UnitNameForm::Template,
            Some(_) => UnitNameForm::Instance,
        }
    }

    /// `a@.service` of `a@b.service` and of itself; a plain name has none.
    pub fn template(&self) -> Option<Self> {
        (self.form() != UnitNameForm::Plain)
            .then(|| Self(format!("{}@.{}", self.prefix(), self.kind())))
    }

    /// `a@NEW.service` of `a@b.service` or `a@.service`; `None` when that is not a valid name.
    pub fn with_instance(&self, new: &str) -> Option<Self> {
        (self.form() != UnitNameForm::Plain && !new.is_empty())
            .then(|| Self::new(&format!("{}@{new}.{}", self.prefix(), self.kind())))?
    }

    /// Whether units of its type can be templates.
    pub fn may_template(&self) -> bool {
        ["service", "socket", "target", "timer", "path"].contains(&self.kind())
    }

    /// Whether units of its type can have aliases.
    pub fn may_alias(&self) -> bool {
        self.may_template() || self.kind() == "device"
    }
}

impl fmt::Display for UnitName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Why `alias` cannot be an alias of `unit`, as the end of a sentence.
pub fn why_no_alias(alias: &UnitName, unit: &UnitName) -> Option<String> {
    if alias.kind() != unit.kind() {
        return Some(format!("a {} is not a {}", alias.kind(), unit.kind()));
    }
    if !alias.may_alias() {
        return Some(format!("a {} cannot have aliases", alias.kind()));
    }
    if alias.form() != UnitNameForm::Plain && !alias.may_template() {
        return Some(format!("units of type {} cannot be templates", alias.kind()));
    }
    match (alias.form(), unit.form()) {
        (UnitNameForm::Instance, UnitNameForm::Instance) if alias.instance() != unit.instance() => {
            Some("their instances differ".to_owned())
        }
        (UnitNameForm::Instance, UnitNameForm::Template) => None,
        (one, other) if one == other => None,
        _ => Some("only one of them is a template or an instance".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_taken_apart() {
        let name = UnitName::new(r"a-b\x2d@c@d.e.service").expect("valid");
        assert_eq!((name.prefix(), name.instance(), name.kind()), (r"a-b\x2d", "c@d.e", "service"));
        assert_eq!(name.form(), UnitNameForm::Instance);
        assert_eq!(name.template().expect("has one").as_str(), r"a-b\x2d@.service");
        assert!(UnitName::new("a@.timer").is_some_and(|n| n.form() == UnitNameForm::Template));
        let long = format!("{}.service", "a".repeat(MAX));
        for wrong in ["", ".service", "a", "a.conf", "@a.service", "a b.service", "a/b.path", &long]
        {
            assert!(UnitName::new(wrong).is_none(), "{wrong}");
        }
    }
}
