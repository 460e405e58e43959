//! The image's description of its own API: `api.toml`, generated from the installed wheels, for the
//! robot's agent.

use anyhow::{Context, Result, ensure};
use contract::api_file::{ApiFile, ApiWheel};

use crate::rootfs::tree::{EntryOrigin, RootTree};
use crate::wheel::InstalledDistribution;

/// Its path in the root.
pub const API: &str = contract::api_file::PATH;

/// The text of `api.toml` for the wheels in a tree, and the C library for which they were locked.
///
/// # Errors
/// When the package is not installed in the tree, or has no module of its name.
pub fn describe_api(
    tree: &RootTree,
    distributions: &[InstalledDistribution],
    minimum_version: Option<&str>,
    libc: Option<&str>,
) -> Result<String> {
    let top =
        distributions.iter().find(|d| d.top_level).context("no wheel is marked as requested")?;
    // The marker of the requested package (PEP 376) is in its directory of modules.
    let mut marked = tree.iter().filter_map(|(path, entry)| {
        let dir = path.strip_suffix(".dist-info/REQUESTED")?;
        (entry.origin == EntryOrigin::Api).then_some(dir)
    });
    let marked = marked.next().with_context(|| format!("{} is not in the tree", top.name))?;
    let (site, _) = marked.rsplit_once('/').context("modules are in a directory")?;
    let python = site
        .split('/')
        .find_map(|part| part.strip_prefix("python").filter(|version| version.contains('.')))
        .with_context(|| format!("/{site} does not contain a version of Python"))?;
    let module = top.name.replace(['-', '.'], "_").to_lowercase();
    let there = ["", ".py"].iter().any(|end| tree.get(&format!("{site}/{module}{end}")).is_some());
    ensure!(
        there,
        "{} installs no module {module}, so a robot could not find its resources\n\
         help: the API's package must have the name of its module",
        top.name
    );
    let wheel = |d: &InstalledDistribution| ApiWheel {
        name: d.name.clone(),
        version: d.version.clone(),
        sha256: d.sha256.clone(),
    };
    let mut wheels: Vec<ApiWheel> = distributions.iter().map(wheel).collect();
    wheels.sort_by_key(|wheel| wheel.name.to_lowercase());
    let file = ApiFile {
        package: top.name.clone(),
        module,
        version: top.version.clone(),
        site_packages: format!("/{site}").into(),
        python: python.to_owned(),
        libc: libc.map(str::to_owned),
        minimum_version: minimum_version.map(str::to_owned),
        wheels,
    };
    file.to_text().context("describing the API")
}
