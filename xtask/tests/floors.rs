//! Which modules may use which: each is on a floor, and uses only what is on floors below. The floors are the tables
//! in `docs/contributing/architecture.md`, the modules are read from the sources.

mod drawing;
mod graph;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use graph::{Graph, top};

/// The page with the tables.
const PAGE: &str = "docs/contributing/architecture.md";

/// The crates whose modules have floors.
const CRATES: [&str; 2] = ["xtask", "slotd"];

/// What may reach no file, program, network or clock, over whatever it uses: crate, module with all modules below it, and
/// whether methods with names such as `is_file` ask the machine there; `bootmodel` asks volumes that it reads itself.
const PURE: [(&str, &str, bool); 6] = [
    ("xtask", "plan", true),
    ("xtask", "disk::layout", true),
    ("bundle", "", true),
    ("contract", "", true),
    ("slotd", "policy", true),
    ("bootmodel", "chain", false),
];

/// Circles of parts that are older than this test: crate, module, parts. The list only gets shorter.
const CIRCLES: [(&str, &str, &str); 8] = [
    ("xtask", "build", "base buildroot"),
    ("xtask", "disk", "fat table"),
    ("xtask", "flash", "frames source"),
    ("xtask", "rootfs::debian", "apt download host lock repo sources"),
    ("slotd", "components", "retention tree whole"),
    ("slotd", "components", "settle switch"),
    ("slotd", "data", "migrate pending"),
    ("slotd", "health", "check probe"),
];

/// What is neither: paths that begin like this, and methods that ask a file system.
const IMPURE: [&str; 9] = [
    "std::fs",
    "std::process",
    "std::net",
    "std::env",
    "std::os::unix::fs",
    "std::time::SystemTime",
    "rustix",
    "tempfile",
    "ureq",
];

fn read(path: &str) -> Option<String> {
    std::fs::read_to_string(super::root().join(path)).ok()
}

/// The modules of a crate; each is read once.
fn graph_of(name: &str) -> Arc<Graph> {
    static READ: Mutex<BTreeMap<String, Arc<Graph>>> = Mutex::new(BTreeMap::new());
    let mut graphs = READ.lock().unwrap_or_else(PoisonError::into_inner);
    let graph = graphs.entry(name.to_owned()).or_insert_with(|| {
        let read = |file: &str| read(&format!("{name}/src/{file}"));
        Arc::new(Graph::new("lib.rs", &read).expect("the crate's modules"))
    });
    Arc::clone(graph)
}

/// The table below the heading `Floors of NAME`: each module's floor, in the page's order.
fn table(page: &str, name: &str) -> Vec<(String, u32)> {
    let heading = format!("Floors of `{name}`");
    let below = page.lines().skip_while(|line| !line.trim_start_matches('#').trim().eq(&heading));
    let section = below.skip(1).take_while(|line| !line.starts_with('#'));
    let mut rows = Vec::new();
    for line in section.filter(|line| line.starts_with('|')) {
        let mut cells = line.split('|').map(str::trim).skip(1);
        let (Some(floor), Some(modules)) = (cells.next(), cells.next()) else { continue };
        let Ok(floor) = floor.parse() else { continue };
        rows.extend(modules.split('`').skip(1).step_by(2).map(|module| (module.to_owned(), floor)));
    }
    rows
}

/// Everything in a crate that contradicts its table.
fn contradictions(name: &str, graph: &Graph, rows: &[(String, u32)]) -> Vec<String> {
    let floors: BTreeMap<&str, u32> =
        rows.iter().map(|(module, floor)| (module.as_str(), *floor)).collect();
    let mut found = Vec::new();
    for (n, (module, _)) in rows.iter().enumerate() {
        if rows[..n].iter().any(|(other, _)| other == module) {
            found.push(format!("{PAGE}: `{module}` is on two floors of {name}"));
        }
        if !graph.top().contains(module.as_str()) {
            found.push(format!("{PAGE}: {name} has no module `{module}`"));
        }
    }
    for module in graph.top().iter().filter(|module| !floors.contains_key(**module)) {
        found.push(format!(
            "{PAGE}: the module `{module}` of {name} is on no floor: add it above all that it uses"
        ));
    }
    for used in &graph.uses {
        let (from, to) = (top(&used.from), top(&used.to));
        let (Some(high), Some(low)) = (floors.get(from), floors.get(to)) else { continue };
        if from != to && high <= low {
            found.push(format!(
                "{name}/src/{}:{}: `{from}` on floor {high} uses `{to}` on floor {low}: move what both need below \
                 them, or pass it in from above",
                used.file, used.line
            ));
        }
    }
    for used in &graph.foreign_impls {
        found.push(format!(
            "{name}/src/{}:{}: methods for a type of `{}`: callers do not name `{}`; make them functions",
            used.file, used.line, used.to, used.from
        ));
    }
    found
}

#[test]
fn no_module_uses_another_on_its_own_floor_or_above() {
    let page = read(PAGE).expect("the page");
    let mut found = Vec::new();
    for name in CRATES {
        let (graph, rows) = (graph_of(name), table(&page, name));
        assert!(graph.uses.len() > 100 && rows.len() > 15, "{name}: too little was found");
        found.extend(contradictions(name, &graph, &rows));
    }
    super::complain(found);
}

#[test]
fn the_drawings_of_the_floors_are_the_tables() {
    let page = read(PAGE).expect("the page");
    for name in CRATES {
        let path = format!("docs/images/floors-{name}.svg");
        let drawn = drawing::draw(name, &table(&page, name));
        if std::env::var_os("SLIPWAY_BLESS").is_some() {
            std::fs::write(super::root().join(&path), &drawn).expect("written");
        }
        assert!(
            read(&path).as_deref() == Some(drawn.as_str()),
            "{path} differs from the table in {PAGE}\n\
             help: SLIPWAY_BLESS=1 cargo test --package xtask --test tidy floors:: draws it again"
        );
    }
}

/// A module's own file is what its parts have in common, so that parts and it may use each other.
#[test]
fn no_parts_of_a_module_use_each_other_in_a_circle() {
    let mut found = Vec::new();
    let mut known: Vec<_> = CIRCLES.to_vec();
    for name in CRATES {
        let graph = graph_of(name);
        for parent in graph.modules.keys().filter(|parent| !parent.is_empty()) {
            for circle in graph.circles(parent) {
                let parts = circle.join(" ");
                match known.iter().position(|one| *one == (name, parent.as_str(), parts.as_str())) {
                    Some(at) => drop(known.remove(at)),
                    None => {
                        found.push(format!("{name}: parts of `{parent}` use each other: {parts}"))
                    }
                }
            }
        }
    }
    found.extend(
        known.iter().map(|gone| format!("{gone:?}: this circle has ended: take it out of CIRCLES")),
    );
    super::complain(found);
}

fn impure(name: &str, graph: &Graph, module: &str, methods: bool) -> Vec<String> {
    // One way to each place is enough.
    let mut found: BTreeMap<String, String> = BTreeMap::new();
    let roots = graph.modules.keys().filter(|one| {
        module.is_empty() || *one == module || one.starts_with(&format!("{module}::"))
    });
    for root in roots {
        for (reached, way) in graph.reach(root) {
            for outside in graph.outside.iter().filter(|outside| outside.from == reached) {
                let path = outside.path.as_str();
                let bad = (methods && path.starts_with('.'))
                    || IMPURE.iter().any(|word| {
                        path.strip_prefix(word)
                            .is_some_and(|rest| rest.is_empty() || rest.starts_with("::"))
                    });
                if bad {
                    let way: String = way.iter().map(|used| format!(" -> {}", used.to)).collect();
                    let (file, line) = (&outside.file, outside.line);
                    let place = format!("{name}/src/{file}:{line}: {path}");
                    found.entry(place).or_insert_with(|| format!("{root}{way}"));
                }
            }
        }
    }
    found.into_iter().map(|(place, way)| format!("{place}, reached as {way}")).collect()
}

#[test]
fn pure_code_reaches_no_file_and_no_program() {
    let mut found = Vec::new();
    for (name, module, methods) in PURE {
        let graph = graph_of(name);
        assert!(graph.modules.contains_key(module), "{name} has no module `{module}`");
        found.extend(impure(name, &graph, module, methods));
    }
    super::complain(found);
}

/// A crate of a few files, by path and text.
fn small(files: &[(&str, &str)]) -> Graph {
    let read = |wanted: &str| {
        files.iter().find(|(path, _)| *path == wanted).map(|(_, text)| (*text).to_owned())
    };
    Graph::new("lib.rs", &read).expect("Rust")
}

fn named(graph: &Graph) -> Vec<String> {
    graph.uses.iter().map(|used| format!("{} {}:{}", used.from, used.to, used.line)).collect()
}

#[test]
fn every_form_of_naming_a_module_is_seen() {
    let lib = "mod low; mod high; mod side;\n#[macro_export] macro_rules! out { () => {} }";
    let below = |text: &str| {
        let graph = small(&[
            ("lib.rs", lib),
            ("low/mod.rs", "pub fn f() {} pub struct T;"),
            ("side.rs", ""),
            ("high.rs", text),
        ]);
        named(&graph)
    };
    for text in [
        "use crate::low;",
        "use crate::low::T;",
        "use super::{low::{self, T}};",
        "use crate::{low as other};",
        "pub(crate) use crate::low::*;",
        "fn g() { crate::low::f() }",
        "fn g() { println!(\"{}\", [crate::low::f()][0]); }",
        "fn g(_: &super::low::T) {}",
        "mod inner { fn g() { super::super::low::f() } }",
        "fn g() { use crate::low::f; f() }",
        "impl From<crate::low::T> for u8 { fn from(_: crate::low::T) -> u8 { 0 } }",
        "#[cfg(not(test))] use crate::low;",
        "fn g() -> std::ops::Range<u8> { 0..crate::low::f() }",
    ] {
        let seen = below(text);
        assert!(
            seen.iter().all(|used| used.contains(" low:1")) && !seen.is_empty(),
            "{text}: {seen:?}"
        );
    }
    for text in [
        "",
        "// use crate::low;\n/* crate::low::f() */",
        "const A: &str = \"crate::low::f()\";",
        "#[cfg(test)] use crate::low;",
        "#[cfg(test)] mod tests { use crate::low; }",
        "#[cfg(all(test, unix))]\n#[allow(unused)]\nfn f() { crate::low::f() }",
        "fn g(low: &str) { low.f() }",
        "use std::low;",
    ] {
        assert_eq!(below(text), Vec::<String>::new(), "{text}");
    }
}

#[test]
fn a_name_that_is_passed_on_is_where_it_comes_from() {
    let graph = small(&[
        ("lib.rs", "mod face; mod user; pub use face::Thing;"),
        ("face.rs", "mod inner; mod other; pub use inner::Thing; pub use other::read;"),
        ("face/inner.rs", "pub struct Thing;"),
        ("face/other.rs", "pub fn read() { std::fs::read(\"\"); }"),
        ("user.rs", "use crate::face; use crate::Thing;\nfn f() { face::read(); }"),
    ]);
    let seen = named(&graph);
    for wanted in ["user face::inner:1", "user face:1", "user face::other:2"] {
        assert!(seen.iter().any(|used| used == wanted), "{wanted}: {seen:?}");
    }
    // Who takes the type does not reach what else is passed on beside it.
    assert!(impure("a", &graph, "face::inner", true).is_empty());
    let graph = small(&[
        ("lib.rs", "mod face; mod user;"),
        ("face.rs", "mod other; pub use other::read; pub struct Thing;"),
        ("face/other.rs", "pub fn read() { std::fs::read(\"\"); }"),
        ("user.rs", "use crate::face::Thing;"),
    ]);
    assert!(impure("a", &graph, "user", true).is_empty());
    let graph = small(&[
        ("lib.rs", "mod face; mod user;"),
        (
            "face.rs",
            "mod other; use other::read; pub struct Thing; impl Thing { fn f() { read() } }",
        ),
        ("face/other.rs", "pub fn read() { std::fs::read(\"\"); }"),
        ("user.rs", "use crate::face::Thing;"),
    ]);
    let found = impure("a", &graph, "user", true);
    assert_eq!(found.len(), 1, "{found:?}");
    assert!(
        found[0].contains("face/other.rs:1: std::fs::read, reached as user -> face -> face::other")
    );
}

#[test]
fn asking_the_file_system_of_a_path_is_impure() {
    let of =
        |text: &str| impure("a", &small(&[("lib.rs", "mod m;"), ("m.rs", text)]), "m", true).len();
    assert_eq!(of("fn f(p: &camino::Utf8Path) -> bool { p.is_file() }"), 1);
    assert_eq!(of("use std::fs; fn f() { fs::read(\"a\"); }"), 1);
    assert_eq!(of("use std::time::{Duration, SystemTime};"), 1);
    assert_eq!(of("fn is_file() {} fn f() { is_file(); std::fsx::f(); }"), 0);
}

#[test]
fn a_use_upwards_a_missing_row_and_a_row_too_many_are_found() {
    let files =
        [("lib.rs", "mod low; mod high;"), ("low.rs", ""), ("high.rs", "use crate::low::x;")];
    let rows = |page: &str| table(page, "a");
    let page = "### Floors of `b`\n\n| 7 | `low` |\n\n### Floors of `a`\n\n| | |\n|--|--|\n| 1 | `high` |\n| 0 | `low` | text |\n\n## x\n| 5 | `no` |";
    let all = rows(page);
    assert_eq!(all, [("high".to_owned(), 1), ("low".to_owned(), 0)]);
    let check =
        |files: &[(&str, &str)], rows: &[(String, u32)]| contradictions("a", &small(files), rows);
    assert!(check(&files, &all).is_empty());
    let one = |found: Vec<String>, wanted: &str| {
        assert!(found.len() == 1 && found[0].contains(wanted), "{wanted}: {found:?}");
    };
    let upwards = [files[0], ("low.rs", "\nfn f() { crate::high::g() }"), ("high.rs", "")];
    one(check(&upwards, &all), "a/src/low.rs:2: `low` on floor 0 uses `high` on floor 1");
    let level = [("high".to_owned(), 0), ("low".to_owned(), 0)];
    one(check(&files, &level), "`high` on floor 0 uses `low` on floor 0");
    one(check(&files, &all[..1]), "the module `low` of a is on no floor");
    one(
        check(
            &files[..1]
                .iter()
                .copied()
                .chain([("low.rs", ""), ("high.rs", "")])
                .collect::<Vec<_>>(),
            &[all.clone(), vec![("gone".to_owned(), 0)]].concat(),
        ),
        "a has no module `gone`",
    );
    one(check(&files, &[all.clone(), vec![all[1].clone()]].concat()), "`low` is on two floors");
    let methods = [
        files[0],
        ("low.rs", "pub struct T;"),
        ("high.rs", "use crate::low::T; impl<'a> T { pub fn f() {} }"),
    ];
    one(check(&methods, &all), "methods for a type of `low`");
    let of_trait = [
        files[0],
        ("low.rs", "pub struct T;"),
        ("high.rs", "use crate::low::T; impl Drop for T { fn drop(&mut self) {} }"),
    ];
    assert!(check(&of_trait, &all).is_empty());
}

#[test]
fn a_circle_of_parts_is_found() {
    let circle = [
        ("lib.rs", "mod m;"),
        ("m.rs", "mod a; mod b; mod c; mod d;"),
        ("m/a.rs", "use super::b::x;"),
        ("m/b.rs", "use super::c::x;"),
        ("m/c.rs", "fn f() { crate::m::a::x() }"),
        ("m/d.rs", "use super::a; use super::x;"),
    ];
    assert_eq!(small(&circle).circles("m"), [["a", "b", "c"].map(str::to_owned).to_vec()]);
    assert!(
        small(&[&circle[..3], &[("m/b.rs", ""), ("m/c.rs", ""), ("m/d.rs", "")]].concat())
            .circles("m")
            .is_empty()
    );
}
