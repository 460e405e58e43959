//! Reads a workspace: which products and boards it has, and every file that one build depends on.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail};
use camino::{Utf8Path, Utf8PathBuf};

use super::file::read_source;
use super::{Config, InputFile, board, content, product, reader, tree};
use crate::artifact::hash_file;
use crate::config::board::BoardConfig;
use crate::config::product::ProductConfig;
use crate::program;

/// The workspace's root: the nearest parent directory that contains both `configs` and `board`.
///
/// # Errors
/// When there is none, or this is the program for machines without a checkout: what is trusted must not depend on the
/// directory in which a technician types a command.
pub fn workspace_root() -> Result<Utf8PathBuf> {
    if program::is_standalone() {
        bail!(
            "this needs a checkout of Slipway, which `{}` does not use\n\
             help: name product, board and store with options",
            program::STANDALONE
        );
    }
    let here = std::env::current_dir().context("looking up the current directory")?;
    let here = Utf8PathBuf::try_from(here).context("the current directory's path is not UTF-8")?;
    here.ancestors()
        .find(|dir| dir.join("configs").is_dir() && dir.join("board").is_dir())
        .map(Utf8Path::to_owned)
        .with_context(|| {
            format!(
                "finding the workspace: neither {here} nor a directory above it has `configs` and \
                 `board`\n\
                 help: run this inside a checkout of Slipway"
            )
        })
}

/// The names of all products, sorted.
///
/// # Errors
/// When `configs` cannot be read.
pub fn list_products(root: &Utf8Path) -> Result<Vec<String>> {
    list_names(&root.join("configs"), product_name)
}

/// The name of the product that a file defines. A link to a product file is accepted; a lock file
/// or an editor's copy is not a product.
fn product_name(entry: &camino::Utf8DirEntry) -> Option<String> {
    let name = entry.file_name().strip_suffix(".toml")?;
    let is_file = std::fs::metadata(entry.path()).map_or(true, |about| about.is_file());
    (is_file && !content::is_junk(entry.file_name())).then(|| name.to_owned())
}

/// The directory of products that are built only by name: they are examples, and some of them need
/// files that the repository cannot contain.
const EXAMPLES: &str = "configs/examples";

/// The names of the example products, sorted.
///
/// # Errors
/// When their directory cannot be read.
pub fn list_examples(root: &Utf8Path) -> Result<Vec<String>> {
    let dir = root.join(EXAMPLES);
    if dir.is_dir() { list_names(&dir, product_name) } else { Ok(Vec::new()) }
}

/// The path of a product's file, relative to the workspace.
pub fn product_file(root: &Utf8Path, name: &str) -> Utf8PathBuf {
    let own = Utf8Path::new("configs").join(format!("{name}.toml"));
    let example = Utf8Path::new(EXAMPLES).join(format!("{name}.toml"));
    if !root.join(&own).is_file() && root.join(&example).is_file() { example } else { own }
}

/// The names of all boards, sorted.
///
/// # Errors
/// When `board` cannot be read.
pub fn list_boards(root: &Utf8Path) -> Result<Vec<String>> {
    let names = |entry: &camino::Utf8DirEntry| {
        entry.path().join("board.toml").is_file().then(|| entry.file_name().to_owned())
    };
    list_names(&root.join("board"), names)
}

fn list_names(
    dir: &Utf8Path,
    name: impl Fn(&camino::Utf8DirEntry) -> Option<String>,
) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for entry in dir.read_dir_utf8().with_context(|| format!("reading {dir}"))? {
        found.extend(name(&entry.with_context(|| format!("reading {dir}"))?));
    }
    found.sort();
    Ok(found)
}

/// The default product: the one with `default = true`.
///
/// # Errors
/// When there is none, or more than one.
pub fn default_product(root: &Utf8Path) -> Result<String> {
    let (mut defaults, mut broken) = (Vec::new(), Vec::new());
    for name in list_products(root)? {
        match read_product(root, &name) {
            Ok(product) => defaults.extend(product.default.then_some(name)),
            Err(error) => broken.push(error),
        }
    }
    match defaults.as_slice() {
        [only] => Ok(only.clone()),
        // A product with mistakes may be the default: then report the mistakes, not a missing
        // default.
        [] if !broken.is_empty() => {
            let messages: Vec<String> = broken.iter().map(|error| format!("{error:#}")).collect();
            bail!("looking for the default product\n{}", messages.join("\n"))
        }
        [] => bail!(
            "no product was given, and there is no default product\n\
             help: use --product ({}), or write `default = true` in the file of one product",
            list_products(root)?.join(", ")
        ),
        several => bail!(
            "no product was given, and several products have `default = true`: {}\n\
             help: keep `default = true` in one of their files only",
            several.join(", ")
        ),
    }
}

/// Reads a product (the default one when `product` is `None`) and the board it is built for (the
/// product's default when `board` is `None`).
///
/// # Errors
/// Unknown names, with the known ones; all findings of the first file with errors.
pub fn load(root: &Utf8Path, product: Option<&str>, board: Option<&str>) -> Result<Config> {
    let name = match product {
        // Shells complete file names, so accept the ending.
        Some(name) => {
            let name = name.strip_prefix("./").unwrap_or(name);
            let name = name.strip_prefix("configs/").unwrap_or(name);
            let name = name.strip_prefix("examples/").unwrap_or(name);
            name.strip_suffix(".toml").unwrap_or(name).to_owned()
        }
        None => default_product(root)?,
    };
    require_known("product", &name, &[list_products(root)?, list_examples(root)?].concat())?;
    let product = read_product(root, &name)?;
    let board_name = board.unwrap_or(&product.default_board.value.0);
    let default = &product.default_board;
    if !product.boards.iter().any(|b| b.value == default.value) {
        let message =
            format!("`default-board` is {}, which is not among `boards`", default.value.0);
        let help = "add it to `boards`, or choose one of them";
        reader::ConfigFindings(vec![reader::ConfigFinding::new(&default.place, message, help)])
            .check()?;
    }
    let all = list_boards(root)?;
    require_known("board", board_name, &all)?;
    if !product.boards.iter().any(|b| b.value.0 == board_name) {
        let names: Vec<_> = product.boards.iter().map(|b| b.value.0.as_str()).collect();
        bail!(
            "the product {} does not support the board {board_name}, only {}\n\
             help: choose another with --board, or add it to `boards` in {}",
            product.name.value.0,
            names.join(", "),
            product.place.file
        );
    }
    let board = read_board(root, board_name)?;
    let overlays = product
        .overlays
        .iter()
        .map(|name| tree::read_overlay(root, name))
        .collect::<Result<Vec<_>>>()?;
    let extra_packages = extra_packages(root, &product)?;
    let mut config = Config {
        root: root.to_owned(),
        templates: template_paths(root, &board),
        product,
        board,
        boards: all,
        overlays,
        extra_packages,
        fragments: Vec::new(),
        source_keys: Vec::new(),
        authorized_keys: Vec::new(),
        inputs: Vec::new(),
    };
    let mut texts = Vec::new();
    for path in fragment_paths(&config) {
        let full = root.join(path);
        if full.is_file() {
            let text = std::fs::read_to_string(&full).with_context(|| format!("reading {path}"))?;
            texts.push((path.clone(), text));
        }
    }
    config.fragments = texts;
    let sources = &config.product.rootfs.sources;
    config.source_keys = read_contents(root, sources.iter().map(|source| &source.key.value))?;
    let users = config.product.users.iter().flat_map(|user| &user.authorized_keys);
    config.authorized_keys = read_contents(root, users.map(|path| &path.value))?;
    config.inputs = collect_inputs(&config)?;
    Ok(config)
}

/// Reads a product's file.
///
/// # Errors
/// When it cannot be read; all findings in it.
pub fn read_product(root: &Utf8Path, name: &str) -> Result<ProductConfig> {
    product::parse_product(read_source(root, &product_file(root, name))?, name)
}

/// Reads a board's file, and those that it includes.
///
/// # Errors
/// When one cannot be read; all findings in them.
pub fn read_board(root: &Utf8Path, name: &str) -> Result<BoardConfig> {
    board::parse_board(name, &|path| read_source(root, path))
}

/// One package lock covers all boards of a product, so it contains every board's packages.
fn extra_packages(root: &Utf8Path, product: &ProductConfig) -> Result<Vec<String>> {
    let unpacked = product.rootfs.unpacked.iter().map(|p| p.value.clone());
    let mut packages: std::collections::BTreeSet<String> = unpacked.collect();
    let known = list_boards(root)?;
    for name in product.boards.iter().filter(|b| known.contains(&b.value.0)) {
        if let Some(debian) = read_board(root, &name.value.0)?.debian {
            packages.extend(debian.packages.into_iter().map(|p| p.value));
        }
    }
    Ok(packages.into_iter().collect())
}

fn require_known(noun: &str, name: &str, names: &[String]) -> Result<()> {
    if names.iter().any(|n| n == name) {
        return Ok(());
    }
    let near = reader::nearest_name(name, names.iter().map(String::as_str));
    let hint = near.map_or(String::new(), |n| format!("; did you mean {n}?"));
    bail!("there is no {noun} {name}{hint}\nhelp: known: {}", names.join(", "))
}

/// The paths of the templates that a board's boot files name.
fn template_paths(root: &Utf8Path, board: &BoardConfig) -> BTreeMap<Utf8PathBuf, Utf8PathBuf> {
    let dir = Utf8Path::new("board").join(&board.name.value.0);
    let names = board.boot_files.iter().filter_map(|file| match &file.source {
        board::BootSourceConfig::Template { source, .. } => Some(&source.value),
        _ => None,
    });
    names.map(|name| (name.clone(), template_path(root, &dir, name))).collect()
}

/// The path of a board's template: in its own directory, else in `board/common`, relative to the
/// workspace.
fn template_path(root: &Utf8Path, board_dir: &Utf8Path, name: &Utf8Path) -> Utf8PathBuf {
    let own = board_dir.join(name);
    if root.join(&own).is_file() { own } else { Utf8Path::new("board/common").join(name) }
}

/// The paths of the defconfig's fragments, in order; none for another engine.
fn fragment_paths(config: &Config) -> Vec<&Utf8PathBuf> {
    let product = &config.product.rootfs;
    if product.engine.value != product::Engine::Buildroot {
        return Vec::new();
    }
    let board = config.board.buildroot.iter().flat_map(|b| &b.fragments);
    board.chain(product.buildroot.iter().flat_map(|b| &b.fragments)).map(|l| &l.value).collect()
}

/// The contents of those files that exist.
fn read_contents<'a>(
    root: &Utf8Path,
    paths: impl Iterator<Item = &'a Utf8PathBuf>,
) -> Result<Vec<(Utf8PathBuf, Vec<u8>)>> {
    let mut found = Vec::new();
    for path in paths.filter(|path| root.join(path).is_file()) {
        let bytes = std::fs::read(root.join(path)).with_context(|| format!("reading {path}"))?;
        found.push((path.clone(), bytes));
    }
    Ok(found)
}

fn collect_inputs(config: &Config) -> Result<Vec<InputFile>> {
    let product = &config.product;
    let mut paths = vec![product.place.file.clone(), config.board.place.file.clone()];
    paths.extend(config.board.include.iter().map(|path| path.value.clone()));
    paths.extend(product.rootfs.lock.iter().map(|l| l.value.clone()));
    paths.extend(product.rootfs.sources.iter().map(|source| source.key.value.clone()));
    paths.extend(fragment_paths(config).into_iter().cloned());
    paths.extend(product.api.iter().map(|api| api.lock.value.clone()));
    paths.extend(product.users.iter().flat_map(|u| &u.authorized_keys).map(|k| k.value.clone()));
    paths.extend(config.templates.values().cloned());
    let mut inputs = Vec::new();
    for path in paths {
        let full = config.root.join(&path);
        // A missing file is reported by the plan, which knows the line that names it.
        if full.is_file() {
            inputs.push(InputFile { sha256: hash_file(&full)?.1, path });
        }
    }
    for file in config.overlays.iter().flat_map(|o| &o.files) {
        inputs.push(InputFile { path: file.source.clone(), sha256: file.sha256.clone() });
    }
    inputs.sort();
    inputs.dedup();
    Ok(inputs)
}
