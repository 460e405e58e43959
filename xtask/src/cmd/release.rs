//! `release …`: makes releases and manages their channels.

use std::collections::BTreeMap;
use std::fs::File;

use anyhow::{Context, Result, bail, ensure};
use bundle::Version;
use camino::{Utf8Path, Utf8PathBuf};
use clap::ValueEnum;
use serde_json::json;

use crate::artifact::hash_file;
use crate::build;
use crate::cli::{
    OutputFormat, ReleaseArgs, ReleaseCheckArgs, ReleaseCommand, ReleaseCreateArgs, StoreArgs,
};
use crate::cmd::publish::store_options;
use crate::config::{self, workspace_root};
use crate::diff::{InventoryDifference, describe_versions};
use crate::inspect::read_inventory;
use crate::progress::{format_bytes, warn};
use crate::publish::{SigningAuthority, change_channel, load_channel, load_manifest};
use crate::release::create::{self, add_to_channel, local_store, parse_version};
use crate::release::notes::PastRelease;
use crate::release::{check, gc, get, summary};
use crate::scratch::create_scratch_dir;
use crate::store::directory::DirectoryStore;
use crate::store::format::{Channel, ChannelEntry, ChannelIndex, ReleaseManifest, YankNotice};
use crate::store::index::Retention;
use crate::store::{self, ReleaseStore};
use crate::text::printable;
use crate::time::now;
use crate::tools::{self, ToolPurpose};
use crate::{out, outln, program, text};

/// `cargo xtask release …`.
///
/// # Errors
/// As the functions of the subcommand.
pub fn release(verb: &ReleaseCommand) -> Result<()> {
    match verb {
        ReleaseCommand::Create(options) => create_release(options),
        ReleaseCommand::List { channel, store, format } => list_releases(*channel, store, *format),
        ReleaseCommand::Show { version, which, notes, format } => {
            show_release(version, which, *notes, *format)
        }
        ReleaseCommand::Get { version, which, board, role, into, format } => {
            let request = get::Request { board: board.as_deref(), roles: role, into };
            fetch(version, which, &request, *format)
        }
        ReleaseCommand::Diff { old, new, which, files, format } => {
            diff_releases([old, new], which, *files, *format)
        }
        ReleaseCommand::Promote { version, to, which } => promote_release(version, *to, which),
        ReleaseCommand::Yank { version, reason, which } => yank_release(version, reason, which),
        ReleaseCommand::Check(options) => check_release(options),
        ReleaseCommand::Gc { store, dry_run, store_was_restored, format } => {
            let authority = SigningAuthority::open(*store_was_restored)?;
            collect_garbage(store.as_deref(), &authority, *dry_run, *format)
        }
        ReleaseCommand::Summary => {
            out!("{}", summary::summarise_builds(&workspace_root()?)?);
            Ok(())
        }
    }
}

fn open_store(address: &StoreArgs) -> Result<Box<dyn ReleaseStore>> {
    match &address.store {
        Some(named) => {
            if named.starts_with("ssh://") {
                tools::require_tools(&[ToolPurpose::Push], true)?;
            }
            store::open_store(named, &store_options(&address.access))
        }
        None => Ok(Box::new(local_store(&workspace_root()?))),
    }
}

fn choose_product(named: Option<&String>) -> Result<String> {
    match named {
        Some(name) => Ok(name.clone()),
        None => config::default_product(&workspace_root()?),
    }
}

fn create_release(options: &ReleaseCreateArgs) -> Result<()> {
    let root = workspace_root()?;
    let product = choose_product(options.product.as_ref())?;
    let mut authority = SigningAuthority::open(options.store_was_restored)?;
    let created = create::create_release(
        &create::ReleaseRequest {
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
        OutputFormat::Json => outln!("{}", text::to_json(&created)?),
        OutputFormat::Text => {
            let m = &created.manifest;
            let word = if created.existed { "is there already" } else { "made" };
            let boards: Vec<&str> = m.boards.iter().map(|b| b.board.as_str()).collect();
            let size = m.objects().map(|o| o.size).sum();
            outln!(" release  {} {} for {}: {word}", m.product, m.version, boards.join(", "));
            outln!(" files    {} in {} objects", format_bytes(size), m.objects().count());
            outln!(
                " manifest {}/{}",
                create::local_store(&root).root(),
                created.entry.manifest.path
            );
            outln!(" next     cargo xtask publish TARGET --channel {}", created.channel);
        }
    }
    Ok(())
}

fn list_releases(
    channel: Option<Channel>,
    address: &StoreArgs,
    format: OutputFormat,
) -> Result<()> {
    let store = open_store(address)?;
    let authority = SigningAuthority::open(address.access.store_was_restored)?;
    let mut indices = Vec::new();
    for one in Channel::ALL.into_iter().filter(|c| channel.is_none_or(|only| only == *c)) {
        indices.push(load_channel(store.as_ref(), one, &authority)?.0);
    }
    if indices.iter().all(|index| index.serial == 0) {
        check_has_channels(store.as_ref())?;
    }
    match format {
        OutputFormat::Json => outln!("{}", text::to_json(&indices)?),
        OutputFormat::Text => {
            for index in indices.iter().filter(|index| index.serial > 0) {
                outln!("{} (serial {})", index.channel, index.serial);
                for e in &index.releases {
                    let commit = e.commit.as_deref().and_then(|c| c.get(..12)).unwrap_or("");
                    let commit = printable(commit);
                    let yanked = e.yanked.as_ref();
                    let mark = yanked
                        .map_or(String::new(), |y| format!("  YANKED: {}", printable(&y.reason)));
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

/// A mistyped address is not a store without releases.
///
/// # Errors
/// When there is no file of any channel.
fn check_has_channels(store: &dyn ReleaseStore) -> Result<()> {
    for channel in Channel::ALL {
        if store.index(channel)?.0.is_some() {
            return Ok(());
        }
    }
    let paths: Vec<String> = Channel::ALL.into_iter().map(Channel::path).collect();
    bail!(
        "there is no release store at {}: it has none of {}\n\
         help: check the address; a store is the directory that contains `channels`",
        store.name(),
        paths.join(", ")
    )
}

/// The channels that are searched for a release, in this order. A version is taken from the most stable channel that has
/// it: development keys may sign the others, and must not replace what release keys have signed.
fn channels_to_search(channel: Option<Channel>, latest: bool) -> Result<Vec<Channel>> {
    match (channel, latest) {
        (Some(channel), _) => Ok(vec![channel]),
        (None, true) if program::is_standalone() => bail!(
            "which channel's latest release?\n\
             help: add --channel stable, or another of: stable, beta, nightly"
        ),
        (None, true) => Ok(vec![Channel::Nightly]),
        (None, false) => Ok(Channel::ALL.into_iter().rev().collect()),
    }
}

/// Finds a release by the given version.
fn find_release(
    store: &dyn ReleaseStore,
    text: &str,
    which: &ReleaseArgs,
    authority: &SigningAuthority,
) -> Result<(Channel, ChannelEntry)> {
    let product = choose_product(which.product.as_ref())?;
    let latest = text == "latest";
    let channels = channels_to_search(which.channel, latest)?;
    let wanted = if latest { None } else { Some(parse_version(text)?) };
    let mut known = BTreeMap::new();
    for channel in channels {
        // A store that is signed by development keys is not evidence about a release product, not
        // even that it has no releases.
        if let Err(error) = authority.pins().may_speak_of(channel, &product) {
            if which.channel.is_some() || latest {
                return Err(error);
            }
            continue;
        }
        let (index, _) = load_channel(store, channel, authority)?;
        let found = match &wanted {
            Some(version) => index.find(&product, version),
            None => index.releases_of(&product).rev().find(|e| e.yanked.is_none()),
        };
        if let Some(entry) = found {
            return Ok((channel, entry.clone()));
        }
        known.extend(index.releases_of(&product).map(|e| (e.version.clone(), e.yanked.is_some())));
    }
    check_has_channels(store)?;
    let why = if latest && !known.is_empty() { ": each was yanked" } else { "" };
    let known: Vec<String> = known
        .into_iter()
        .map(|(version, yanked)| format!("{version}{}", if yanked { " (yanked)" } else { "" }))
        .collect();
    let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
    bail!("there is no release {text} of {product} in {}{why}\nhelp: known: {known}", store.name())
}

fn show_release(text: &str, which: &ReleaseArgs, notes: bool, format: OutputFormat) -> Result<()> {
    let store = open_store(&which.store)?;
    let authority = SigningAuthority::open(which.store.access.store_was_restored)?;
    let (channel, entry) = find_release(store.as_ref(), text, which, &authority)?;
    let manifest = load_manifest(store.as_ref(), &entry, authority.keys())?;
    if format == OutputFormat::Json && !notes {
        let value = json!({ "channel": channel, "entry": entry, "manifest": manifest });
        outln!("{}", text::to_json(&value)?);
        return Ok(());
    }
    let (_keep, dir) = create_scratch_dir()?;
    let file = dir.join("notes.md");
    store.get(&manifest.notes.sha256, manifest.notes.size, &file, &|_| ())?;
    let written = std::fs::read_to_string(&file).context("reading the notes")?;
    if notes {
        out!("{written}");
        return Ok(());
    }
    outln!("{} {} ({}), channel {channel}", manifest.product, manifest.version, manifest.kind);
    if let Some(yanked) = &entry.yanked {
        outln!("  YANKED: {}", printable(&yanked.reason));
    }
    outln!("  commit {}", printable(manifest.commit.as_deref().unwrap_or("unknown")));
    outln!("  manifest {}", entry.manifest.path);
    for board in &manifest.boards {
        outln!("  {} ({})", board.board, printable(&board.engine));
        for object in &board.objects {
            outln!("    {:>9}  {}  {}", format_bytes(object.size), object.name, object.path());
        }
        for component in &board.components {
            let digest = component.digest.get(..12).unwrap_or_default();
            let line = format!("{:<9}  {} ({digest})", component.name, component.version);
            outln!("    {}", printable(&line));
        }
    }
    if !manifest.programs.is_empty() {
        outln!("  slipway, for machines without a checkout (`release get --role program`)");
    }
    for program in &manifest.programs {
        outln!("    {:>9}  {}  {}", format_bytes(program.size), program.name, program.path());
    }
    outln!("\n{written}");
    Ok(())
}

fn fetch(
    text: &str,
    which: &ReleaseArgs,
    request: &get::Request<'_>,
    format: OutputFormat,
) -> Result<()> {
    let store = open_store(&which.store)?;
    let authority = SigningAuthority::open(which.store.access.store_was_restored)?;
    let (channel, entry) = find_release(store.as_ref(), text, which, &authority)?;
    if let Some(yanked) = &entry.yanked {
        let reason = printable(&yanked.reason);
        warn(format!("{} {} was yanked: {reason}", entry.product, entry.version));
    }
    let manifest = load_manifest(store.as_ref(), &entry, authority.keys())?;
    let files = get::get(store.as_ref(), &manifest, request)?;
    match format {
        OutputFormat::Json => outln!("{}", text::to_json(&files)?),
        OutputFormat::Text => {
            outln!("{} {} ({}), channel {channel}", entry.product, entry.version, entry.kind);
            for file in &files {
                outln!("{:>9}  {}", format_bytes(file.size), file.path);
            }
        }
    }
    Ok(())
}

fn diff_releases(
    [old, new]: [&str; 2],
    which: &ReleaseArgs,
    files: bool,
    format: OutputFormat,
) -> Result<()> {
    let store = open_store(&which.store)?;
    let authority = SigningAuthority::open(which.store.access.store_was_restored)?;
    let read = |text: &str| -> Result<PastRelease> {
        let (_, entry) = find_release(store.as_ref(), text, which, &authority)?;
        PastRelease::read(store.as_ref(), &entry, authority.keys())
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
    if format == OutputFormat::Json {
        let value = json!({
            "old": old.manifest.version, "new": new.manifest.version, "boards": changes,
            "images": inside,
        });
        outln!("{}", text::to_json(&value)?);
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
            let line = format!("{name} {} ({x}) -> {} ({y})", a.version, b.version);
            writeln!(out, "  ~ {}", printable(&line))?;
        }
        if board.components.is_empty() {
            writeln!(out, "components: no difference")?;
        }
        match inside.get(at) {
            Some(difference) => difference.render_terminal(&mut out)?,
            None => describe_versions("packages", &board.packages, &mut out)?,
        }
    }
    out!("{}", String::from_utf8_lossy(&out));
    Ok(())
}

/// Unpacks the images of both releases for a board, and compares what is in them.
fn file_changes(
    store: &dyn ReleaseStore,
    board: &str,
    old: &ReleaseManifest,
    new: &ReleaseManifest,
) -> Result<InventoryDifference> {
    let (_keep, dir) = create_scratch_dir()?;
    let unpacked = |manifest: &ReleaseManifest, name: &str| -> Result<Utf8PathBuf> {
        let part = manifest.boards.iter().find(|b| b.board == board).context("the board")?;
        let image =
            part.objects.iter().find(|o| o.role == "image").context("the release has no image")?;
        let packed = dir.join("packed");
        store.get(&image.sha256, image.size, &packed, &|_| ())?;
        let path = dir.join(name);
        unpack_image(&packed, &path)?;
        if let Some(expected) = &image.unpacked {
            let found = hash_file(&path)?.1;
            ensure!(found == expected.sha256, "{} unpacked has the hash {found}", image.name);
        }
        Ok(path)
    };
    let (old, new) = (unpacked(old, "old.img")?, unpacked(new, "new.img")?);
    Ok(InventoryDifference::between(&read_inventory(&old)?, &read_inventory(&new)?))
}

/// Decompresses into a sparse file, since an image is mostly zeros.
fn unpack_image(packed: &Utf8Path, into: &Utf8Path) -> Result<()> {
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

fn promote_release(text: &str, to: Channel, which: &ReleaseArgs) -> Result<()> {
    let store = open_store(&which.store)?;
    let mut authority = SigningAuthority::open(which.store.access.store_was_restored)?;
    let (from, entry) = find_release(store.as_ref(), text, which, &authority)?;
    if let Some(yanked) = &entry.yanked {
        let reason = printable(&yanked.reason);
        bail!("{} {} was yanked: {reason}", entry.product, entry.version);
    }
    // Its objects exist and remain: the release is in a channel.
    load_manifest(store.as_ref(), &entry, authority.keys())?;
    let entry = ChannelEntry { added: now()?, ..entry };
    let new = add_to_channel(store.as_ref(), to, &entry, Retention::default(), &mut authority)?;
    let word = if new { "is now also" } else { "was already" };
    outln!("{} {} of {from} {word} in {to} of {}", entry.product, entry.version, store.name());
    Ok(())
}

fn yank_release(text: &str, reason: &str, which: &ReleaseArgs) -> Result<()> {
    ensure!(
        !reason.trim().is_empty(),
        "the reason is empty\n\
     help: say what is wrong with the release"
    );
    let store = open_store(&which.store)?;
    let mut authority = SigningAuthority::open(which.store.access.store_was_restored)?;
    let (_, entry) = find_release(store.as_ref(), text, which, &authority)?;
    let mark = YankNotice { reason: reason.trim().to_owned(), at: now()? };
    let (product, version): (&str, &Version) = (&entry.product, &entry.version);
    for channel in Channel::ALL {
        let mark =
            |current: &ChannelIndex, _: &mut SigningAuthority| -> Result<Option<ChannelIndex>> {
                if current.find(product, version).is_none_or(|e| e.yanked.is_some()) {
                    return Ok(None);
                }
                let mut next = current.clone();
                next.yank(product, version, &mark)?;
                Ok(Some(next))
            };
        if change_channel(store.as_ref(), channel, &mut authority, mark, |_, _| Ok(()))? {
            outln!("{product} {version} is yanked in {channel} of {}", store.name());
        }
    }
    Ok(())
}

fn check_release(options: &ReleaseCheckArgs) -> Result<()> {
    let root = workspace_root()?;
    let config = config::load(&root, options.product.as_deref(), options.board.as_deref())?;
    let (product, board) = (&config.product.name.value.0, &config.board.name.value.0);
    let authority = SigningAuthority::open(false)?;
    let programs = check::released_programs(&root, product, board, &authority)?;
    let comparison = match &options.against {
        Some(dir) => {
            let dist = root.join("dist").join(product).join(board);
            let mut comparison = check::compare_builds(&dist, dir)?;
            comparison.add(check::compare_programs(&local_store(&root), &programs, None)?);
            comparison
        }
        None => {
            let compression = options.compression.to_possible_value();
            check::rebuild_and_compare(&check::RebuildRequest {
                root: &root,
                product,
                board,
                keep_stages: &options.keep_stage,
                compression: compression.as_ref().map_or("fast", |v| v.get_name()),
                programs: &programs,
            })?
        }
    };
    match options.format {
        OutputFormat::Json => outln!("{}", text::to_json(&comparison)?),
        OutputFormat::Text => out!("{}", comparison.describe()),
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

fn collect_garbage(
    dir: Option<&Utf8Path>,
    authority: &SigningAuthority,
    dry_run: bool,
    format: OutputFormat,
) -> Result<()> {
    let store = match dir {
        Some(dir) => DirectoryStore::new(dir),
        None => local_store(&workspace_root()?),
    };
    let removed = gc::collect_garbage(&store, authority, dry_run)?;
    match format {
        OutputFormat::Json => outln!("{}", text::to_json(&removed)?),
        OutputFormat::Text => {
            let word = if dry_run { "would remove" } else { "removed" };
            outln!("{word} {} files, {}", removed.files.len(), format_bytes(removed.bytes));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_is_taken_from_the_most_stable_channel() {
        use Channel::{Beta, Nightly, Stable};
        assert_eq!(channels_to_search(None, false).expect("all"), [Stable, Beta, Nightly]);
        assert_eq!(channels_to_search(None, true).expect("one"), [Nightly]);
        assert_eq!(channels_to_search(Some(Beta), true).expect("one"), [Beta]);
    }
}
