//! The modules of a crate, and which of them names which: read from the sources as the compiler splits them into tokens.
//!
//! A path counts wherever it is: in `use`, in expressions and types, in the arguments of macros. What is behind
//! `#[cfg(test)]` does not count. What is not named is not seen: a method of a value whose type another module names.

use std::collections::{BTreeMap, BTreeSet};

use proc_macro2::{Delimiter, Group, TokenStream, TokenTree};

/// A place in a module that names something.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Use {
    /// The module that names it, such as `plan::resolve`.
    pub from: String,
    /// The module that has what is named.
    pub to: String,
    /// Its file, relative to the crate's `src`.
    pub file: String,
    /// The line in it.
    pub line: usize,
    /// Only passed on by `pub use`, and not used in the module itself.
    pub passed_on: bool,
}

/// A path that leads out of the crate, such as `std::fs::read`; or a method that looks at a file system, as `.is_file`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outside {
    /// The module that names it.
    pub from: String,
    /// The path.
    pub path: String,
    /// Its file, relative to the crate's `src`.
    pub file: String,
    /// The line in it.
    pub line: usize,
}

/// The modules of a crate.
#[derive(Debug, Default)]
pub struct Graph {
    /// All of them, with their file; the crate's root is the empty name.
    pub modules: BTreeMap<String, String>,
    /// What they name of each other.
    pub uses: Vec<Use>,
    /// What they name of other crates.
    pub outside: Vec<Outside>,
    /// `impl` blocks for types of other modules, whose methods hide who uses whom.
    pub foreign_impls: Vec<Use>,
}

/// One path of a `use`, or of an expression.
#[derive(Debug, Clone)]
struct Path {
    segments: Vec<String>,
    line: usize,
}

/// What a `use` brings into a module.
#[derive(Debug, Clone)]
struct Import {
    path: Path,
    /// The name that it has here; `None`: all names of a module.
    name: Option<String>,
    passed_on: bool,
}

/// A module's text, taken apart.
#[derive(Debug, Default)]
struct Parsed {
    file: String,
    children: BTreeSet<String>,
    imports: Vec<Import>,
    paths: Vec<Path>,
    methods: Vec<(String, usize)>,
    inherent: Vec<Path>,
    /// Every word outside of `use` that may be a name of something.
    words: BTreeSet<String>,
}

/// Methods of paths that ask the file system.
const ASKING: [&str; 12] = [
    "canonicalize",
    "canonicalize_utf8",
    "exists",
    "is_dir",
    "is_file",
    "metadata",
    "read_dir",
    "read_dir_utf8",
    "read_link",
    "read_link_utf8",
    "symlink_metadata",
    "try_exists",
];

impl Graph {
    /// Reads a crate, whose library begins at `root`; `read` has the text of each file below `src`.
    ///
    /// # Errors
    /// When a file is missing or is not Rust.
    pub fn new(root: &str, read: &dyn Fn(&str) -> Option<String>) -> Result<Self, String> {
        let mut all = BTreeMap::new();
        let mut macros = BTreeMap::new();
        parse_file(String::new(), root, root, read, &mut all, &mut macros)?;
        let mut graph = Self::default();
        for (name, parsed) in &all {
            graph.modules.insert(name.clone(), parsed.file.clone());
            let names = Names { all: &all, macros: &macros };
            names.collect(name, parsed, &mut graph);
        }
        graph.uses.sort();
        graph.uses.dedup_by(|a, b| (&a.from, &a.to, a.line) == (&b.from, &b.to, b.line));
        Ok(graph)
    }

    /// The modules directly below the root.
    pub fn top(&self) -> BTreeSet<&str> {
        self.modules.keys().map(|name| top(name)).filter(|name| !name.is_empty()).collect()
    }

    /// Modules directly below `parent` that use each other in a circle, and each other's uses.
    pub fn circles(&self, parent: &str) -> Vec<Vec<String>> {
        let child = |name: &str| -> Option<String> {
            let inner = match parent {
                "" => name,
                _ => name.strip_prefix(parent)?.strip_prefix("::")?,
            };
            Some(top(inner).to_owned()).filter(|child| !child.is_empty())
        };
        let mut edges: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        for used in &self.uses {
            if let (Some(from), Some(to)) = (child(&used.from), child(&used.to))
                && from != to
            {
                edges.entry(from).or_default().insert(to);
            }
        }
        // Two are in one circle when each reaches the other; modules are few.
        let reach: BTreeMap<&String, BTreeSet<&String>> =
            edges.keys().map(|from| (from, reached(&edges, from))).collect();
        let mut circles: Vec<Vec<String>> = Vec::new();
        for (from, there) in &reach {
            if !there.contains(from) || circles.iter().any(|circle| circle.contains(from)) {
                continue;
            }
            let back = |to: &&&String| reach.get(**to).is_some_and(|back| back.contains(from));
            circles.push(there.iter().filter(back).map(|name| (*name).clone()).collect());
        }
        circles
    }

    /// What a module reaches over all that it uses, itself included; each with the way to it.
    pub fn reach(&self, from: &str) -> BTreeMap<&str, Vec<&Use>> {
        let mut found: BTreeMap<&str, Vec<&Use>> = BTreeMap::new();
        let Some((start, _)) = self.modules.get_key_value(from) else { return found };
        found.insert(start, Vec::new());
        let mut queue = vec![start.as_str()];
        while let Some(at) = queue.pop() {
            let way = found.get(at).cloned().unwrap_or_default();
            for used in self.uses.iter().filter(|used| used.from == at && !used.passed_on) {
                if !found.contains_key(used.to.as_str()) {
                    let way = way.iter().copied().chain([used]).collect();
                    found.insert(&used.to, way);
                    queue.push(&used.to);
                }
            }
        }
        found
    }
}

/// The first part of a module's name.
pub fn top(name: &str) -> &str {
    name.split("::").next().unwrap_or_default()
}

fn reached<'a>(
    edges: &'a BTreeMap<String, BTreeSet<String>>,
    from: &'a String,
) -> BTreeSet<&'a String> {
    let mut found = BTreeSet::new();
    let mut queue = vec![from];
    while let Some(at) = queue.pop() {
        for to in edges.get(at).into_iter().flatten() {
            if found.insert(to) {
                queue.push(to);
            }
        }
    }
    found
}

fn join(parent: &str, name: &str) -> String {
    if parent.is_empty() { name.to_owned() } else { format!("{parent}::{name}") }
}

fn parse_file(
    module: String,
    file: &str,
    root: &str,
    read: &dyn Fn(&str) -> Option<String>,
    all: &mut BTreeMap<String, Parsed>,
    macros: &mut BTreeMap<String, String>,
) -> Result<(), String> {
    let text = read(file).ok_or_else(|| format!("{file} is not there"))?;
    let tokens: TokenStream = text.parse().map_err(|error| format!("{file}: {error}"))?;
    let mut walk = Walk { file, macros, found: BTreeMap::new(), files: Vec::new() };
    walk.module(&module, tokens);
    let Walk { found, files, .. } = walk;
    all.extend(found);
    for child in files {
        // `a.rs` and `a/mod.rs` have their children in `a/`, the root beside itself.
        let own = [
            format!("{}.rs", child.replace("::", "/")),
            format!("{}/mod.rs", child.replace("::", "/")),
        ];
        let file = own.iter().find(|file| *file != root && read(file).is_some());
        let file = file.ok_or_else(|| format!("neither {} nor {} is there", own[0], own[1]))?;
        parse_file(child, file, root, read, all, macros)?;
    }
    Ok(())
}

/// Takes one file apart.
struct Walk<'a> {
    file: &'a str,
    macros: &'a mut BTreeMap<String, String>,
    found: BTreeMap<String, Parsed>,
    /// Modules with a file of their own.
    files: Vec<String>,
}

impl Walk<'_> {
    fn module(&mut self, module: &str, tokens: TokenStream) {
        let mut parsed = Parsed { file: self.file.to_owned(), ..Parsed::default() };
        self.tokens(module, tokens, &mut parsed);
        self.found.insert(module.to_owned(), parsed);
    }

    fn tokens(&mut self, module: &str, tokens: TokenStream, parsed: &mut Parsed) {
        let tokens: Vec<TokenTree> = tokens.into_iter().collect();
        let (mut at, mut visible, mut exported) = (0, false, false);
        while let Some(token) = tokens.get(at) {
            match token {
                TokenTree::Punct(punct) if punct.as_char() == '#' => {
                    let (group, next) = attribute(&tokens, at);
                    at = next;
                    match group {
                        Some(group) if is_for_tests(&group) => at = after_item(&tokens, at),
                        Some(group) => exported |= has_word(&group, "macro_export"),
                        None => {}
                    }
                    continue;
                }
                TokenTree::Ident(word) if word == "pub" => {
                    visible = true;
                    at += 1;
                    // `pub(crate)`
                    if let Some(TokenTree::Group(group)) = tokens.get(at)
                        && group.delimiter() == Delimiter::Parenthesis
                    {
                        at += 1;
                    }
                    continue;
                }
                TokenTree::Ident(word) if word == "use" && !follows(&tokens, at, '.') => {
                    let end = (at..tokens.len()).find(|n| is_punct(tokens.get(*n), ';'));
                    let end = end.unwrap_or(tokens.len());
                    // `impl Trait + use<'a>` is not an import.
                    if !is_punct(tokens.get(at + 1), '<') {
                        imports(&tokens[at + 1..end], Vec::new(), visible, &mut parsed.imports);
                        at = end + 1;
                    } else {
                        at += 1;
                    }
                }
                TokenTree::Ident(word) if word == "mod" => {
                    match (tokens.get(at + 1), tokens.get(at + 2)) {
                        (Some(TokenTree::Ident(name)), Some(TokenTree::Punct(end)))
                            if end.as_char() == ';' =>
                        {
                            parsed.children.insert(name.to_string());
                            self.files.push(join(module, &name.to_string()));
                            at += 3;
                        }
                        (Some(TokenTree::Ident(name)), Some(TokenTree::Group(body))) => {
                            parsed.children.insert(name.to_string());
                            self.module(&join(module, &name.to_string()), body.stream());
                            at += 3;
                        }
                        _ => at += 1,
                    }
                }
                TokenTree::Ident(word) if word == "macro_rules" => {
                    if let (true, Some(TokenTree::Ident(name))) = (exported, tokens.get(at + 2)) {
                        self.macros.insert(name.to_string(), module.to_owned());
                    }
                    at += 1;
                }
                TokenTree::Ident(word) if word == "impl" => {
                    parsed.inherent.extend(inherent(&tokens, at + 1));
                    at += 1;
                }
                TokenTree::Ident(_) => at = word(&tokens, at, parsed),
                TokenTree::Group(group) => {
                    self.tokens(module, group.stream(), parsed);
                    at += 1;
                }
                _ => at += 1,
            }
            (visible, exported) = (false, false);
        }
    }
}

/// A word and what follows it with `::`.
fn word(tokens: &[TokenTree], start: usize, parsed: &mut Parsed) -> usize {
    let Some(TokenTree::Ident(first)) = tokens.get(start) else { return start + 1 };
    let line = first.span().start().line;
    if follows(tokens, start, '.') {
        parsed.methods.push((first.to_string(), line));
        return start + 1;
    }
    // A field's or an argument's own name does not use an import of that name.
    if !is_punct(tokens.get(start + 1), ':') || is_path_separator(tokens, start + 1) {
        parsed.words.insert(first.to_string());
    }
    let mut segments = vec![first.to_string()];
    let mut at = start + 1;
    while is_path_separator(tokens, at) {
        match tokens.get(at + 2) {
            Some(TokenTree::Ident(next)) => segments.push(next.to_string()),
            _ => break,
        }
        at += 3;
    }
    parsed.paths.push(Path { segments, line });
    at
}

/// Whether something in the body of an `impl` block is visible further than in the module above.
fn is_open(body: &Group) -> bool {
    let tokens: Vec<TokenTree> = body.stream().into_iter().collect();
    tokens.iter().enumerate().any(|(at, token)| {
        let narrow =
            matches!(tokens.get(at + 1), Some(TokenTree::Group(to)) if has_word(to, "super"));
        matches!(token, TokenTree::Ident(word) if word == "pub") && !narrow
    })
}

/// The type of an `impl` block that is of no trait, when others can call its functions.
fn inherent(tokens: &[TokenTree], start: usize) -> Option<Path> {
    let mut at = start;
    let mut depth = 0i32;
    let mut path: Option<Path> = None;
    loop {
        match tokens.get(at)? {
            TokenTree::Group(body) if body.delimiter() == Delimiter::Brace => {
                return path.filter(|_| is_open(body));
            }
            TokenTree::Punct(punct) if punct.as_char() == '<' => depth += 1,
            TokenTree::Punct(punct) if punct.as_char() == '>' => depth -= 1,
            TokenTree::Punct(punct)
                if matches!(punct.as_char(), ';' | ',' | '=' | '+') && depth == 0 =>
            {
                return None;
            }
            TokenTree::Ident(word) if depth == 0 && word == "for" => return None,
            // What is bounded is another matter: to the body.
            TokenTree::Ident(word) if depth == 0 && word == "where" => {
                let body = tokens[at..].iter().find_map(|token| match token {
                    TokenTree::Group(body) if body.delimiter() == Delimiter::Brace => Some(body),
                    _ => None,
                })?;
                return path.filter(|_| is_open(body));
            }
            TokenTree::Ident(word) if depth == 0 && path.is_none() => {
                let mut parsed = Parsed::default();
                at = self::word(tokens, at, &mut parsed);
                let line = word.span().start().line;
                path = parsed.paths.pop().or(Some(Path { segments: vec![word.to_string()], line }));
                continue;
            }
            _ => {}
        }
        at += 1;
    }
}

/// The paths of a `use`, from its tokens without `use` and `;`.
fn imports(tokens: &[TokenTree], before: Vec<String>, passed_on: bool, out: &mut Vec<Import>) {
    let mut segments = before;
    let mut at = 0;
    let mut line = 0;
    let mut name = None;
    while let Some(token) = tokens.get(at) {
        match token {
            TokenTree::Ident(word) if word == "as" => {
                if let Some(TokenTree::Ident(alias)) = tokens.get(at + 1) {
                    name = Some(alias.to_string());
                }
                at += 2;
                continue;
            }
            TokenTree::Ident(word) => {
                line = word.span().start().line;
                segments.push(word.to_string());
            }
            TokenTree::Group(group) => {
                let inner: Vec<TokenTree> = group.stream().into_iter().collect();
                for part in
                    inner.split(|token| is_punct(Some(token), ',')).filter(|p| !p.is_empty())
                {
                    imports(part, segments.clone(), passed_on, out);
                }
                return;
            }
            TokenTree::Punct(punct) if punct.as_char() == '*' => {
                line = punct.span().start().line;
                out.push(Import { path: Path { segments, line }, name: None, passed_on });
                return;
            }
            _ => {}
        }
        at += 1;
    }
    // `a::{self}` is `a`.
    if segments.len() > 1 && segments.last().is_some_and(|last| last == "self") {
        segments.pop();
    }
    let name = name.or_else(|| segments.last().cloned());
    out.push(Import { path: Path { segments, line }, name, passed_on });
}

fn is_punct(token: Option<&TokenTree>, wanted: char) -> bool {
    matches!(token, Some(TokenTree::Punct(punct)) if punct.as_char() == wanted)
}

fn is_path_separator(tokens: &[TokenTree], at: usize) -> bool {
    is_punct(tokens.get(at), ':') && is_punct(tokens.get(at + 1), ':')
}

/// Whether the token before is this one alone: `.` of a method, not `..` of a range.
fn follows(tokens: &[TokenTree], at: usize, wanted: char) -> bool {
    let before = |n: usize| at.checked_sub(n).and_then(|n| tokens.get(n));
    is_punct(before(1), wanted) && !is_punct(before(2), wanted)
}

/// An attribute's content, and what comes after it.
fn attribute(tokens: &[TokenTree], at: usize) -> (Option<Group>, usize) {
    let inner = usize::from(is_punct(tokens.get(at + 1), '!'));
    match tokens.get(at + 1 + inner) {
        Some(TokenTree::Group(group)) if group.delimiter() == Delimiter::Bracket => {
            (Some(group.clone()), at + 2 + inner)
        }
        _ => (None, at + 1),
    }
}

fn has_word(group: &Group, wanted: &str) -> bool {
    group.stream().into_iter().any(|token| match token {
        TokenTree::Ident(word) => word == wanted,
        TokenTree::Group(inner) => has_word(&inner, wanted),
        _ => false,
    })
}

/// `#[cfg(test)]`, also among other conditions; not `#[cfg(not(test))]`.
fn is_for_tests(group: &Group) -> bool {
    let first = group.stream().into_iter().next();
    let is_cfg = matches!(first, Some(TokenTree::Ident(word)) if word == "cfg");
    is_cfg && has_word(group, "test") && !has_word(group, "not")
}

/// What comes after the item that begins here, with its other attributes.
fn after_item(tokens: &[TokenTree], start: usize) -> usize {
    let mut at = start;
    while let Some(token) = tokens.get(at) {
        match token {
            TokenTree::Punct(punct) if punct.as_char() == '#' => at = attribute(tokens, at).1,
            TokenTree::Punct(punct) if punct.as_char() == ';' => return at + 1,
            TokenTree::Group(group) if group.delimiter() == Delimiter::Brace => return at + 1,
            _ => at += 1,
        }
    }
    at
}

/// How deep names may lead to names; more is a circle.
const DEEPEST: usize = 16;

/// Finds out which module has what a path names.
struct Names<'a> {
    all: &'a BTreeMap<String, Parsed>,
    macros: &'a BTreeMap<String, String>,
}

impl Names<'_> {
    fn collect(&self, module: &str, parsed: &Parsed, graph: &mut Graph) {
        let file = &parsed.file;
        let mut note = |path: &Path, passed_on: bool| {
            let (from, file, line) = (module.to_owned(), file.clone(), path.line);
            match self.resolve(module, &path.segments, 0) {
                Some(to) if to != module => {
                    graph.uses.push(Use { from, to, file, line, passed_on });
                }
                Some(_) => {}
                None => {
                    graph.outside.push(Outside { from, path: path.segments.join("::"), file, line })
                }
            }
        };
        for import in &parsed.imports {
            let used = import.name.as_ref().is_none_or(|name| parsed.words.contains(name));
            note(&import.path, import.passed_on && !used);
        }
        for path in parsed.paths.iter().filter(|path| path.segments.len() > 1) {
            note(path, false);
        }
        for path in &parsed.inherent {
            let (from, file, line) = (module.to_owned(), file.clone(), path.line);
            if let Some(to) = self.resolve(module, &path.segments, 0)
                && top(&to) != top(module)
            {
                graph.foreign_impls.push(Use { from, to, file, line, passed_on: false });
            }
        }
        for (method, line) in &parsed.methods {
            if ASKING.contains(&method.as_str()) {
                let (from, path) = (module.to_owned(), format!(".{method}"));
                graph.outside.push(Outside { from, path, file: file.clone(), line: *line });
            }
        }
    }

    /// The module that has what a path names in a module; `None`: another crate, or a name of the language.
    fn resolve(&self, module: &str, segments: &[String], depth: usize) -> Option<String> {
        let (first, rest) = segments.split_first()?;
        let parsed = self.all.get(module)?;
        if depth > DEEPEST {
            return None;
        }
        match first.as_str() {
            "crate" => Some(self.walk(module, String::new(), rest, depth)),
            "self" => Some(self.walk(module, module.to_owned(), rest, depth)),
            "super" => {
                let parent = module.rsplit_once("::").map_or("", |(parent, _)| parent);
                match rest.first().map(String::as_str) {
                    Some("super") => self.resolve(parent, rest, depth + 1),
                    _ => Some(self.walk(module, parent.to_owned(), rest, depth)),
                }
            }
            "Self" => None,
            name if parsed.children.contains(name) => {
                Some(self.walk(module, join(module, name), rest, depth))
            }
            name => {
                let import = parsed.imports.iter().find(|import| {
                    import.name.as_deref() == Some(name) && import.path.segments != segments
                })?;
                let whole: Vec<String> = import.path.segments.iter().chain(rest).cloned().collect();
                self.resolve(module, &whole, depth + 1)
            }
        }
    }

    /// From a module along the rest of a path, through what modules pass on to the one that asks.
    fn walk(&self, asking: &str, start: String, rest: &[String], depth: usize) -> String {
        let mut at = start;
        for (n, name) in rest.iter().enumerate() {
            let Some(parsed) = self.all.get(&at) else { break };
            if parsed.children.contains(name) {
                let inner = join(&at, name);
                if !self.all.contains_key(&inner) {
                    break;
                }
                at = inner;
                continue;
            }
            if let (true, Some(module)) = (at.is_empty(), self.macros.get(name)) {
                return module.clone();
            }
            // What a module imports for itself is visible to the modules in it.
            let inside = at.is_empty() || asking == at || asking.starts_with(&format!("{at}::"));
            let passed = parsed
                .imports
                .iter()
                .find(|import| import.name.as_ref() == Some(name) && (import.passed_on || inside));
            if let Some(import) = passed {
                let whole: Vec<String> =
                    import.path.segments.iter().chain(&rest[n + 1..]).cloned().collect();
                // A name of another crate that is passed on here is taken from here.
                return self.resolve(&at, &whole, depth + 1).unwrap_or(at);
            }
            break;
        }
        at
    }
}
