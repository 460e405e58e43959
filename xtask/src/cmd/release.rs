//! `release …`: makes releases and manages their channels.

use std::fs::File;

use anyhow::{Context, Result, bail, ensure};
use bundle::Version;
use camino::{Utf8Path, Utf8PathBuf};
use clap::ValueEnum;
use serde_json::json;

use crate::artifact::hash_file;
use crate::build;
use crate::cli::{Create, Format, Release as Verb, ReleaseCheck, StoreAddress, Which};
use crate::cmd::publish::store_options;
use crate::config::{self, workspace_root};
use crate::diff::{Difference, versions};
use crate::inspect::inventory;
use crate::progress::{bytes, warn};
use crate::publish::{Authority, change, load, manifest};
use crate::release::create::{self, local, put, version};
use crate::release::notes::Past;
use crate::release::{check, gc, get, summary};
use crate::scratch::scratch;
use crate::store::directory::Directory;
use crate::store::format::{Channel, Entry, Index, Manifest, Yanked};
use crate::store::index::Retention;
use crate::store::{self, Store};
use crate::time::now;
use crate::tools::{self, Purpose};
use crate::{out, outln, text};

/// `cargo xtask release …`.
///
/// # Errors
/// As the functions of the subcommand.
pub fn release(verb: &Verb) -> Result<()> {
    match verb {
        Verb::Create(options) => create(options),
        Verb::List { channel, store, format } => list(*channel, store, *format),
        Verb::Show { version, which, notes, format } => show(version, which, *notes, *format),
        Verb::Get { version, which, board, role, into, format } => {
            let request = get::Request { board: board.as_deref(), roles: role, into };
            fetch(version, which, &request, *format)
        }
        Verb::Diff { old, new, which, files, format } => diff([old, new], which, *files, *format),
        Verb::Promote { version, to, which } => promote(version, *to, which),
        Verb::Yank { version, reason, which } => yank(version, reason, which),
        Verb::Check(options) => check(options),
        Verb::Gc { store, dry_run, store_was_restored, format } => {
            let authority = Authority::open(*store_was_restored)?;
            collect(store.as_deref(), &authority, *dry_run, *format)
        }
        Verb::Summary => {
            out!("{}", summary::summary(&workspace_root()?)?);
            Ok(())
        }
    }
}

fn store(address: &StoreAddress) -> Result<Box<dyn Store>> {
    match &address.store {
        Some(named) => {
            if named.starts_with("ssh://") {
                tools::require(&[Purpose::Push], true)?;
            }
            store::open(named, &store_options(&address.access))
        }
        None => Ok(Box::new(local(&workspace_root()?))),
    }
}

fn product(named: Option<&String>) -> Result<String> {
    match named {
        Some(name) => Ok(name.clone()),
        None => config::default_product(&workspace_root()?),
    }
}

fn create(options: &Create) -> Result<()> {
    let root = workspace_root()?;
    let product = product(options.product.as_ref())?;
    let mut authority = Authority::open(options.store_was_restored)?;
    let created = create::create(
        &create::Request {
            root: &root,
            product: &product,
            boards: &options.board,
            channel: options.channel,
            retention: Retention { keep: options.keep },
            allow_changes: options.allow_changes,
            programs: build::programs,
        },
        &mut authority,
    )?;
    match options.format {
        Format::Json => outln!("{}", text::json(&created)?),
        Format::Text => {
            let m = &created.manifest;
            let word = if created.existed { "is there already" } else { "made" };
            let boards: Vec<&str> = m.boards.iter().map(|b| b.board.as_str()).collect();
            let size = m.objects().map(|o| o.size).sum();
            outln!(" release  {} {} for {}: {word}", m.product, m.version, boards.join(", "));
            outln!(" files    {} in {} objects", bytes(size), m.objects().count());
            outln!(" manifest {}/{}", create::local(&root).root(), created.entry.manifest.path);
            outln!(" next     cargo xtask publish TARGET --channel {}", created.channel);
        }
    }
    Ok(())
}

fn list(channel: Option<Channel>, address: &StoreAddress, format: Format) -> Result<()> {
    let store = store(address)?;
    let authority = Authority::open(address.access.store_was_restored)?;
    let mut indices = Vec::new();
    for one in Channel::ALL.into_iter().filter(|c| channel.is_none_or(|only| only == *c)) {
        indices.push(load(store.as_ref(), one, &authority)?.0);
    }
    match format {
        Format::Json => outln!("{}", text::json(&indices)?),
        Format::Text => {
            for index in indices.iter().filter(|index| index.serial > 0) {
                outln!("{} (serial {})", index.channel, index.serial);
                for e in &index.releases {
                    let commit = e.commit.as_deref().and_then(|c| c.get(..12)).unwrap_or("");
                    let yanked = e.yanked.as_ref();
                    let mark = yanked.map_or(String::new(), |y| format!("  YANKED: {}", y.reason));
                    outln!("  {} {}  {commit}{mark}", e.product, e.version);
                }
            }
            if indices.iter().all(|index| index.serial == 0) {
                outln!("no releases in {}", store.name());
            }
        }
    }
    Ok(())
}

/// Finds a release by the given version.
fn find(
    store: &dyn Store,
    text: &str,
    which: &Which,
    authority: &Authority,
) -> Result<(Channel, Entry)> {
    let product = product(which.product.as_ref())?;
    let latest = text == "latest";
    let channels = match (which.channel, latest) {
        (Some(channel), _) => vec![channel],
        (None, true) => vec![Channel::Nightly],
        (None, false) => Channel::ALL.to_vec(),
    };
    let wanted = if latest { None } else { Some(version(text)?) };
    let mut known = Vec::new();
    for channel in channels {
        // A store that is signed by development keys is not evidence about a release product, not
        // even that it has no releases.
        if let Err(error) = authority.pins().may_speak_of(channel, &product) {
            if which.channel.is_some() || latest {
                return Err(error);
            }
            continue;
        }
        let (index, _) = load(store, channel, authority)?;
        let found = match &wanted {
            Some(version) => index.find(&product, version),
            None => index.of(&product).rev().find(|e| e.yanked.is_none()),
        };
        if let Some(entry) = found {
            return Ok((channel, entry.clone()));
        }
        known.extend(index.of(&product).map(|e| e.version.to_string()));
    }
    let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
    bail!("there is no release {text} of {product} in {}\nhelp: known: {known}", store.name())
}

fn show(text: &str, which: &Which, notes: bool, format: Format) -> Result<()> {
    let store = store(&which.store)?;
    let authority = Authority::open(which.store.access.store_was_restored)?;
    let (channel, entry) = find(store.as_ref(), text, which, &authority)?;
    let manifest = manifest(store.as_ref(), &entry, authority.keys())?;
    if format == Format::Json && !notes {
        let value = json!({ "channel": channel, "entry": entry, "manifest": manifest });
        outln!("{}", text::json(&value)?);
        return Ok(());
    }
    let (_keep, dir) = scratch()?;
    let file = dir.join("notes.md");
    store.get(&manifest.notes.sha256, manifest.notes.size, &file, &|_| ())?;
    let written = std::fs::read_to_string(&file).context("reading the notes")?;
    if notes {
        out!("{written}");
        return Ok(());
    }
    outln!("{} {} ({}), channel {channel}", manifest.product, manifest.version, manifest.kind);
    if let Some(yanked) = &entry.yanked {
        outln!("  YANKED: {}", yanked.reason);
    }
    outln!("  commit {}", manifest.commit.as_deref().unwrap_or("unknown"));
    outln!("  manifest {}", entry.manifest.path);
    for board in &manifest.boards {
        outln!("  {} ({})", board.board, board.engine);
        for object in &board.objects {
            outln!("    {:>9}  {}  {}", bytes(object.size), object.name, object.path());
        }
        for component in &board.components {
            let digest = component.digest.get(..12).unwrap_or_default();
            outln!("    {:<9}  {} ({digest})", component.name, component.version);
        }
    }
    if !manifest.programs.is_empty() {
        outln!("  slipway, for machines without a checkout (`release get --role program`)");
    }
    for program in &manifest.programs {
        outln!("    {:>9}  {}  {}", bytes(program.size), program.name, program.path());
    }
    outln!("\n{written}");
    Ok(())
}

fn fetch(text: &str, which: &Which, request: &get::Request<'_>, format: Format) -> Result<()> {
    let store = store(&which.store)?;
    let authority = Authority::open(which.store.access.store_was_restored)?;
    let (_, entry) = find(store.as_ref(), text, which, &authority)?;
    if let Some(yanked) = &entry.yanked {
        warn(format!("{} {} was yanked: {}", entry.product, entry.version, yanked.reason));
    }
    let manifest = manifest(store.as_ref(), &entry, authority.keys())?;
    let files = get::get(store.as_ref(), &manifest, request)?;
    match format {
        Format::Json => outln!("{}", text::json(&files)?),
        Format::Text => {
            for file in &files {
                outln!("{:>9}  {}", bytes(file.size), file.path);
            }
        }
    }
    Ok(())
}

fn diff([old, new]: [&str; 2], which: &Which, files: bool, format: Format) -> Result<()> {
    let store = store(&which.store)?;
    let authority = Authority::open(which.store.access.store_was_restored)?;
    let read = |text: &str| -> Result<Past> {
        let (_, entry) = find(store.as_ref(), text, which, &authority)?;
        Past::read(store.as_ref(), &entry, authority.keys())
    };
    let (old, new) = (read(old)?, read(new)?);
    let changes = old.changes_to(&new);
    let mut inside = Vec::new();
    if files {
        for board in &changes {
            let difference =
                file_changes(store.as_ref(), &board.board, &old.manifest, &new.manifest)
                    .with_context(|| format!("comparing the images for {}", board.board))?;
            inside.push(difference);
        }
    }
    if format == Format::Json {
        let value = json!({
            "old": old.manifest.version, "new": new.manifest.version, "boards": changes,
            "images": inside,
        });
        outln!("{}", text::json(&value)?);
        return Ok(());
    }
    use std::io::Write as _;
    let mut out = Vec::new();
    writeln!(out, "{} -> {}", old.manifest.version, new.manifest.version)?;
    for (at, board) in changes.iter().enumerate() {
        writeln!(out, "{}", board.board)?;
        let short = |digest: &str| digest.get(..12).unwrap_or_default().to_owned();
        for (name, change) in &board.components.changed {
            let (a, b) = (&change.old, &change.new);
            let (x, y) = (short(&a.digest), short(&b.digest));
            writeln!(out, "  ~ {name} {} ({x}) -> {} ({y})", a.version, b.version)?;
        }
        if board.components.is_empty() {
            writeln!(out, "components: no difference")?;
        }
        match inside.get(at) {
            Some(difference) => difference.render_terminal(&mut out)?,
            None => versions("packages", &board.packages, &mut out)?,
        }
    }
    out!("{}", String::from_utf8_lossy(&out));
    Ok(())
}

/// Unpacks the images of both releases for a board, and compares what is in them.
fn file_changes(
    store: &dyn Store,
    board: &str,
    old: &Manifest,
    new: &Manifest,
) -> Result<Difference> {
    let (_keep, dir) = scratch()?;
    let unpacked = |manifest: &Manifest, name: &str| -> Result<Utf8PathBuf> {
        let part = manifest.boards.iter().find(|b| b.board == board).context("the board")?;
        let image =
            part.objects.iter().find(|o| o.role == "image").context("the release has no image")?;
        let packed = dir.join("packed");
        store.get(&image.sha256, image.size, &packed, &|_| ())?;
        let path = dir.join(name);
        unpack(&packed, &path)?;
        if let Some(expected) = &image.unpacked {
            let found = hash_file(&path)?.1;
            ensure!(found == expected.sha256, "{} unpacked has the hash {found}", image.name);
        }
        Ok(path)
    };
    let (old, new) = (unpacked(old, "old.img")?, unpacked(new, "new.img")?);
    Ok(Difference::between(&inventory(&old)?, &inventory(&new)?))
}

/// Decompresses into a sparse file, since an image is mostly zeros.
fn unpack(packed: &Utf8Path, into: &Utf8Path) -> Result<()> {
    use std::io::Read as _;
    use std::os::unix::fs::FileExt as _;
    let file = File::open(packed).with_context(|| format!("opening {packed}"))?;
    let mut decoder = zstd::Decoder::new(file).context("reading zstd frames")?;
    let out = File::create(into).with_context(|| format!("creating {into}"))?;
    let mut piece = vec![0; 64 << 10];
    let mut at = 0;
    loop {
        let n = decoder.read(&mut piece).with_context(|| format!("unpacking {packed}"))?;
        if n == 0 {
            return out.set_len(at).with_context(|| format!("writing {into}"));
        }
        let bytes = piece.get(..n).unwrap_or_default();
        if bytes.iter().any(|b| *b != 0) {
            out.write_all_at(bytes, at).with_context(|| format!("writing {into}"))?;
        }
        at += n as u64;
    }
}

fn promote(text: &str, to: Channel, which: &Which) -> Result<()> {
    let store = store(&which.store)?;
    let mut authority = Authority::open(which.store.access.store_was_restored)?;
    let (from, entry) = find(store.as_ref(), text, which, &authority)?;
    if let Some(yanked) = &entry.yanked {
        bail!("{} {} was yanked: {}", entry.product, entry.version, yanked.reason);
    }
    // Its objects exist and remain: the release is in a channel.
    manifest(store.as_ref(), &entry, authority.keys())?;
    let entry = Entry { added: now()?, ..entry };
    let new = put(store.as_ref(), to, &entry, Retention::default(), &mut authority)?;
    let word = if new { "is now also" } else { "was already" };
    outln!("{} {} of {from} {word} in {to} of {}", entry.product, entry.version, store.name());
    Ok(())
}

fn yank(text: &str, reason: &str, which: &Which) -> Result<()> {
    ensure!(
        !reason.trim().is_empty(),
        "the reason is empty\n\
     help: say what is wrong with the release"
    );
    let store = store(&which.store)?;
    let mut authority = Authority::open(which.store.access.store_was_restored)?;
    let (_, entry) = find(store.as_ref(), text, which, &authority)?;
    let mark = Yanked { reason: reason.trim().to_owned(), at: now()? };
    let (product, version): (&str, &Version) = (&entry.product, &entry.version);
    for channel in Channel::ALL {
        let mark = |current: &Index, _: &mut Authority| -> Result<Option<Index>> {
            if current.find(product, version).is_none_or(|e| e.yanked.is_some()) {
                return Ok(None);
            }
            let mut next = current.clone();
            next.yank(product, version, &mark)?;
            Ok(Some(next))
        };
        if change(store.as_ref(), channel, &mut authority, mark, |_, _| Ok(()))? {
            outln!("{product} {version} is yanked in {channel} of {}", store.name());
        }
    }
    Ok(())
}

fn check(options: &ReleaseCheck) -> Result<()> {
    let root = workspace_root()?;
    let config = config::load(&root, options.product.as_deref(), options.board.as_deref())?;
    let (product, board) = (&config.product.name.value.0, &config.board.name.value.0);
    let comparison = match &options.against {
        Some(folder) => check::compare(&root.join("dist").join(product).join(board), folder)?,
        None => {
            let compression = options.compression.to_possible_value();
            check::rebuild(&check::Request {
                root: &root,
                product,
                board,
                keep_stages: &options.keep_stage,
                compression: compression.as_ref().map_or("fast", |v| v.get_name()),
            })?
        }
    };
    match options.format {
        Format::Json => outln!("{}", text::json(&comparison)?),
        Format::Text => out!("{}", comparison.describe()),
    }
    let different = comparison.outputs.iter().filter(|output| !output.equal).count();
    ensure!(
        comparison.equal,
        "{different} of {} outputs differ\nhelp: the differences above depend on something that is \
         not an input, such as a time, a host file or an order",
        comparison.outputs.len()
    );
    Ok(())
}

fn collect(
    folder: Option<&Utf8Path>,
    authority: &Authority,
    dry_run: bool,
    format: Format,
) -> Result<()> {
    let store = match folder {
        Some(folder) => Directory::new(folder),
        None => local(&workspace_root()?),
    };
    let removed = gc::collect(&store, authority, dry_run)?;
    match format {
        Format::Json => outln!("{}", text::json(&removed)?),
        Format::Text => {
            let word = if dry_run { "would remove" } else { "removed" };
            outln!("{word} {} files, {}", removed.files.len(), bytes(removed.bytes));
        }
    }
    Ok(())
}
