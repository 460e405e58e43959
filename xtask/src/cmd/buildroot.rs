//! `buildroot …`: checks the defconfig, opens Buildroot's menus, shows what would be built again, runs make.

mod sources;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::time::Instant;

use anyhow::{Context, Result, bail};

use crate::build::output_name;
use crate::cache::Cache;
use crate::cli::{BuildrootCommand, BuildrootTargetArgs, OutputFormat};
use crate::config::product::Engine;
use crate::config::{self, workspace_root};
use crate::facts;
use crate::plan::fragment::SymbolValue;
use crate::plan::{self, BuildrootPlan, OverridePlan, Plan};
use crate::progress::{format_duration, list_names, say};
use crate::render::defconfig_title;
use crate::rootfs::buildroot::check::{LostRequest, check_defconfig};
use crate::rootfs::buildroot::engine::{self, BuildrootRequest};
use crate::rootfs::buildroot::expr::KconfigValues;
use crate::rootfs::buildroot::info::BuildrootInfo;
use crate::rootfs::buildroot::make::{BuildrootSetup, BuildrootSite};
use crate::rootfs::buildroot::menus::{self, MenuChange};
use crate::rootfs::buildroot::overrides::{self, apply_overrides};
use crate::rootfs::buildroot::pending::PendingRebuild;
use crate::rootfs::buildroot::rebuild::{OutputState, RebuildAction};
use crate::rootfs::buildroot::tree::{self, BuildrootTree, TreeChoice};
use crate::tools::{self, ToolPurpose};
use crate::{outln, text};

/// `cargo xtask buildroot …`.
///
/// # Errors
/// Whatever the verb returns.
pub fn buildroot(verb: &BuildrootCommand) -> Result<()> {
    match verb {
        BuildrootCommand::Check { target, packages, format } => {
            check_boards(target, *packages, *format)
        }
        BuildrootCommand::Menuconfig(target) => menuconfig(target),
        BuildrootCommand::LinuxMenuconfig(target) => package_menuconfig(target, "linux"),
        BuildrootCommand::UbootMenuconfig(target) => package_menuconfig(target, "uboot"),
        BuildrootCommand::Diff(target) => diff(target),
        BuildrootCommand::Why { target, format } => why(target, *format),
        BuildrootCommand::Sources(options) => sources::sources(options),
        BuildrootCommand::Make { target, arguments } => make(target, arguments),
    }
}

/// A product's plan for one board, with the Buildroot tree that builds it.
struct Case {
    plan: Plan,
    buildroot: BuildrootPlan,
    tree: BuildrootTree,
    cache: Cache,
}

/// The named product, else the only one whose engine is `buildroot`.
fn product_name(target: &BuildrootTargetArgs) -> Result<String> {
    if let Some(name) = &target.product {
        return Ok(name.clone());
    }
    let root = workspace_root()?;
    let mut names = config::list_products(&root)?;
    names.retain(|name| {
        config::read_product(&root, name).is_ok_and(|p| p.rootfs.engine.value == Engine::Buildroot)
    });
    match names.as_slice() {
        [only] => Ok(only.clone()),
        [] => bail!("no product in configs/ has `engine = \"buildroot\"`"),
        several => bail!("name one with --product: {}", several.join(", ")),
    }
}

/// The named board, else all boards of the product.
fn board_names(target: &BuildrootTargetArgs, product: &str) -> Result<Vec<String>> {
    if let Some(board) = &target.board {
        return Ok(vec![board.clone()]);
    }
    let boards = config::read_product(&workspace_root()?, product)?.boards;
    Ok(boards.into_iter().map(|board| board.value.0).collect())
}

/// Resolves the build of one board, or of the product's default board.
fn resolve_case(target: &BuildrootTargetArgs, product: &str, board: Option<&str>) -> Result<Case> {
    let mut plan = resolve_releases(product, board)?;
    let cache = Cache::locate()?;
    apply_overrides(
        &mut plan,
        &workspace_root()?,
        || Ok(cache.root.clone()),
        &target.tree.overrides,
    )?;
    Case::new(target, plan, cache)
}

/// The plan of one board, with the releases of all packages.
fn resolve_releases(product: &str, board: Option<&str>) -> Result<Plan> {
    let config = config::load(&workspace_root()?, Some(product), board)?;
    plan::resolve(&config, &facts::collect(&config.root)?)
}

impl Case {
    fn new(target: &BuildrootTargetArgs, plan: Plan, cache: Cache) -> Result<Self> {
        let buildroot = plan.rootfs.buildroot.clone().with_context(|| {
            format!(
                "the engine of {} is not buildroot\n\
             help: choose another product with --product",
                plan.product.name
            )
        })?;
        let choice = TreeChoice {
            own: target.tree.buildroot.clone(),
            allow_changes: target.tree.allow_changes,
            offline: target.offline,
        };
        let tree = tree::obtain_tree(&buildroot, &cache.root, &choice)?;
        Ok(Self { plan, buildroot, tree, cache })
    }

    /// Directories of the build.
    fn setup(&self) -> Result<BuildrootSetup> {
        let root = workspace_root()?;
        let name = output_name(&root, &self.plan.product.name, &self.plan.board.name);
        let mut setup = BuildrootSetup::new(&self.cache.root, &self.tree.path, &root, &name)?;
        setup.overrides.clone_from(&self.buildroot.overrides);
        Ok(setup)
    }

    /// Directories for checks, with these source directories, and the lock that keeps others out.
    fn check_setup(&self, overrides: &[OverridePlan]) -> Result<(BuildrootSetup, File)> {
        let root = workspace_root()?;
        let (mut setup, lock) =
            BuildrootSetup::for_check(&self.cache.root, &self.tree.path, &root)?;
        setup.overrides = overrides.to_vec();
        overrides::write_local_mk(&setup)?;
        Ok((setup, lock))
    }

    /// Directories for Buildroot's own menus: a copy, so that a build depends on the fragments
    /// only.
    fn menu(&self) -> Result<BuildrootSetup> {
        let root = workspace_root()?;
        let name = output_name(&root, &self.plan.product.name, &self.plan.board.name);
        BuildrootSetup::new(&self.cache.root, &self.tree.path, &root, &format!("{name}-menu"))
    }

    /// Applies the fragments' configuration to the build directory.
    fn configure(&self, setup: &BuildrootSetup, site: &BuildrootSite) -> Result<()> {
        let request = BuildrootRequest {
            plan: &self.buildroot,
            title: &defconfig_title(&self.plan),
            tree: &self.tree,
            setup,
            site,
            log: &setup.output.join("slipway-make.log"),
            yes: false,
        };
        engine::configure(&request).map(drop)
    }
}

fn resolve_one_case(target: &BuildrootTargetArgs) -> Result<Case> {
    tools::require_tools(&[ToolPurpose::Buildroot], true)?;
    resolve_case(target, &product_name(target)?, target.board.as_deref())
}

fn menuconfig(target: &BuildrootTargetArgs) -> Result<()> {
    let case = resolve_one_case(target)?;
    let setup = case.menu()?;
    let _lock = setup.lock()?;
    let found = menus::edit_menu(
        &setup,
        &case.buildroot.defconfig,
        &defconfig_title(&case.plan),
        |setup| setup.make().arg("menuconfig").run_on_terminal(),
    )?;
    say("menu", format!("{} symbols differ from the fragments", found.len()));
    print_changes(&case)
}

fn package_menuconfig(target: &BuildrootTargetArgs, package: &str) -> Result<()> {
    let case = resolve_one_case(target)?;
    let (setup, site) = (case.setup()?, BuildrootSite::of_machine(target.offline)?);
    let _lock = setup.lock()?;
    case.configure(&setup, &site)?;
    setup.fetching(&site).arg(format!("{package}-menuconfig")).run_on_terminal()?;
    let text = setup.make().args(["-s", &format!("{package}-diff-config")]).read()?;
    let found = menus::from_diffconfig(&text);
    menus::save_pending(&menus::pending_changes_path(&setup, package), &found)?;
    // A build depends on the fragments only: the next one merges them again.
    setup.make().args(["-s", &format!("{package}-clean-for-reconfigure")]).run()?;
    print_changes(&case)
}

fn diff(target: &BuildrootTargetArgs) -> Result<()> {
    print_changes(&resolve_case(target, &product_name(target)?, target.board.as_deref())?)
}

/// Prints the pending changes, each line with its file.
fn print_changes(case: &Case) -> Result<()> {
    let defconfig = &case.buildroot.defconfig;
    let changes: Vec<MenuChange> =
        menus::read_pending(&menus::pending_changes_path(&case.menu()?, "buildroot"))?;
    let root = workspace_root()?;
    let values = if changes.is_empty() {
        KconfigValues::default()
    } else {
        let (setup, _lock) = BuildrootSetup::for_check(&case.cache.root, &case.tree.path, &root)?;
        KconfigValues::parse(
            &check_defconfig(&setup, defconfig, &defconfig_title(&case.plan))?.config,
        )
    };
    let mut empty = true;
    for advice in menus::advise_changes(&changes, defconfig, &values) {
        outln!("{:<8} {}\n         {}", advice.action, advice.line, advice.place);
        empty = false;
    }
    let fragments = [
        ("linux", "BR2_LINUX_KERNEL_CONFIG_FRAGMENT_FILES"),
        ("uboot", "BR2_TARGET_UBOOT_CONFIG_FRAGMENT_FILES"),
    ];
    for (package, symbol) in fragments {
        let lines: Vec<String> =
            menus::read_pending(&menus::pending_changes_path(&case.setup()?, package))?;
        let files = match defconfig.get(symbol).map(|r| &r.value) {
            Some(SymbolValue::Text(text)) => {
                text.replace("$(BR2_EXTERNAL_SLIPWAY_PATH)", "external")
            }
            _ => String::new(),
        };
        let mut known = std::collections::HashSet::new();
        for file in files.split_whitespace() {
            let text = std::fs::read_to_string(root.join(file));
            let text = text.with_context(|| format!("reading {file}"))?;
            known.extend(text.lines().map(str::to_owned));
        }
        let last = files.split_whitespace().next_back().unwrap_or("a fragment of this board");
        for line in lines.iter().filter(|line| !known.contains(*line)) {
            outln!("{:<8} {line}\n         {last}", "add");
            empty = false;
        }
    }
    if empty {
        outln!("Nothing that a menu changed is missing from the fragments.");
    }
    Ok(())
}

/// What would be built again, in machine-readable form.
#[derive(serde::Serialize)]
struct Pending<'a> {
    /// Everything, for this reason.
    everything: Option<&'a str>,
    /// Targets of make, with their reasons.
    targets: Option<&'a BTreeMap<String, BTreeSet<String>>>,
    finished: usize,
    total: usize,
    took_seconds: Option<u64>,
}

fn why(target: &BuildrootTargetArgs, format: OutputFormat) -> Result<()> {
    let case = resolve_one_case(target)?;
    let build = case.setup()?;
    // Resolved in another directory, so that the build's is not changed.
    let (setup, _lock) = case.check_setup(&build.overrides)?;
    let verdict = check_defconfig(&setup, &case.buildroot.defconfig, &defconfig_title(&case.plan))?;
    verdict.require()?;
    let info = BuildrootInfo::read(&setup, &BuildrootSite::default())?;
    overrides::require_known(&info, &setup)?;
    let state = OutputState::describe(&build, &case.tree, &verdict.config, &info)?;
    let pending = PendingRebuild::find(&build.output, &case.tree, &state, &info)?;
    let (everything, targets) = match &pending.action {
        RebuildAction::Nothing => (None, None),
        RebuildAction::Everything(why) => (Some(why.as_str()), None),
        RebuildAction::Targets(targets) => (None, Some(targets)),
    };
    if format == OutputFormat::Json {
        let PendingRebuild { finished, total, took, .. } = pending;
        let took_seconds = took.map(|took| took.as_secs());
        let shown = Pending { everything, targets, finished, total, took_seconds };
        outln!("{}", text::to_json(&shown)?);
        return Ok(());
    }
    if let Some(why) = everything {
        outln!("everything: {why}; {}", pending.describe_loss(&build.output));
    }
    for (target, why) in targets.into_iter().flatten() {
        let why: Vec<&str> = why.iter().map(String::as_str).collect();
        outln!("{target}: {}", list_names(&why));
    }
    if pending.action == RebuildAction::Nothing {
        outln!("Nothing that is finished would be built again.");
    }
    outln!("{} of {} packages are finished in {}.", pending.finished, pending.total, build.output);
    Ok(())
}

fn make(target: &BuildrootTargetArgs, arguments: &[String]) -> Result<()> {
    let case = resolve_one_case(target)?;
    let (setup, site) = (case.setup()?, BuildrootSite::of_machine(target.offline)?);
    let _lock = setup.lock()?;
    case.configure(&setup, &site)?;
    OutputState::mark_sources(&setup)?;
    setup.fetching(&site).args(arguments).run_on_terminal()
}

/// One board's result in machine-readable form.
#[derive(serde::Serialize)]
struct Checked {
    product: String,
    board: String,
    compared: usize,
    seconds: f64,
    losses: Vec<LostRequest>,
}

fn check_boards(target: &BuildrootTargetArgs, packages: bool, format: OutputFormat) -> Result<()> {
    let product = product_name(target)?;
    let boards = board_names(target, &product)?;
    let mut results = Vec::new();
    let mut failure = None;
    for board in &boards {
        let started = Instant::now();
        let case = resolve_case(target, &product, Some(board))?;
        let (setup, _lock) = case.check_setup(&case.buildroot.overrides)?;
        let verdict =
            check_defconfig(&setup, &case.buildroot.defconfig, &defconfig_title(&case.plan))
                .with_context(|| format!("checking {product} for {board}"))?;
        let mut note = String::new();
        if packages && verdict.losses.is_empty() {
            let info = BuildrootInfo::read(&setup, &BuildrootSite::default())?;
            overrides::require_known(&info, &setup)?;
            engine::require_packages(&info, &setup.tree, &case.buildroot)?;
            note = format!(", {} packages", info.packages().count());
        }
        let seconds = started.elapsed();
        let lost = verdict.losses.len();
        let outcome =
            if lost == 0 { "all requests met".to_owned() } else { format!("{lost} requests lost") };
        let compared = verdict.compared;
        say(
            "check",
            format!("{board}: {compared} symbols, {outcome}{note}  ({})", format_duration(seconds)),
        );
        if let Err(error) = verdict.require() {
            let error =
                error.context(format!("{product} for {board}: Kconfig lost {lost} requests"));
            failure.get_or_insert_with(Vec::new).push(format!("{error:#}"));
        }
        results.push(Checked {
            product: product.clone(),
            board: board.clone(),
            compared,
            seconds: seconds.as_secs_f64(),
            losses: verdict.losses,
        });
    }
    if format == OutputFormat::Json {
        outln!("{}", text::to_json(&results)?);
    }
    match failure {
        Some(messages) => bail!("{}", messages.join("\n")),
        None => Ok(()),
    }
}
