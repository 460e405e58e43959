//! The names of types: each says what its values are without the name of its module, so no two types share one.

use std::collections::BTreeMap;

use proc_macro2::{TokenStream, TokenTree};

use super::{complain, rust};

/// The sources that share one set of names.
const TREES: [&str; 6] =
    ["bench/src/", "bootmodel/src/", "bundle/src/", "contract/src/", "slotd/src/", "xtask/src/"];

/// Names that a crate may define for its own errors, as the crates of others do.
const IDIOMS: [&str; 2] = ["Error", "Result"];

/// Collects the types that other modules can name, with their lines.
fn public_types(tokens: TokenStream, found: &mut Vec<(String, usize)>) {
    let tokens: Vec<TokenTree> = tokens.into_iter().collect();
    let is_word = |at: usize, words: &[&str]| matches!(tokens.get(at), Some(TokenTree::Ident(word)) if words.iter().any(|one| word == one));
    for (at, token) in tokens.iter().enumerate() {
        if let TokenTree::Group(group) = token {
            public_types(group.stream(), found);
        }
        if !is_word(at, &["pub"]) {
            continue;
        }
        // `pub(crate)`, `pub unsafe trait`
        let mut at = at + 1;
        at += usize::from(matches!(tokens.get(at), Some(TokenTree::Group(_))));
        at += usize::from(is_word(at, &["unsafe"]));
        if is_word(at, &["struct", "enum", "union", "trait", "type"])
            && let Some(TokenTree::Ident(name)) = tokens.get(at + 1)
        {
            found.push((name.to_string(), name.span().start().line));
        }
    }
}

/// Where each name is defined, over all files.
fn definitions<'a>(
    files: impl IntoIterator<Item = (&'a str, &'a str)>,
) -> BTreeMap<String, Vec<String>> {
    let mut names: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (path, text) in files {
        let mut types = Vec::new();
        public_types(text.parse().unwrap_or_else(|error| panic!("{path}: {error}")), &mut types);
        for (name, line) in types {
            names.entry(name).or_default().push(format!("{path}:{line}"));
        }
    }
    names
}

/// A finding for each name that is defined more than once.
fn repeated(names: &BTreeMap<String, Vec<String>>) -> Vec<String> {
    names
        .iter()
        .filter(|(name, places)| places.len() > 1 && !IDIOMS.contains(&name.as_str()))
        .map(|(name, places)| {
            let places = places.join(" and ");
            format!("type `{name}` is defined in {places}: name what each of them is of")
        })
        .collect()
}

#[test]
fn a_public_type_name_is_used_once() {
    let files = rust();
    let sources = files.iter().filter(|(path, _)| TREES.iter().any(|tree| path.starts_with(tree)));
    let names = definitions(sources.map(|(path, text)| (path.as_str(), text.as_str())));
    assert!(names.len() > 400, "too few types were found: {}", names.len());
    complain(repeated(&names));
}

#[test]
fn types_of_one_name_are_found_however_they_are_written() {
    let names = definitions([
        ("a.rs", "pub struct Kind;\npub enum Error {}\nstruct Private;"),
        ("b.rs", "mod inner {\n    pub(crate)\n    enum Kind {}\n}\npub type Error = u8;"),
        (
            "c.rs",
            "pub(in crate::c) unsafe trait Other {}\npub struct Private;\n// pub struct Kind;",
        ),
        ("d.rs", "fn f() { let text = \"pub struct Kind;\"; }\npub union Other { a: u8 }"),
    ]);
    assert_eq!(
        repeated(&names),
        [
            "type `Kind` is defined in a.rs:1 and b.rs:3: name what each of them is of",
            "type `Other` is defined in c.rs:1 and d.rs:2: name what each of them is of",
        ]
    );
}
