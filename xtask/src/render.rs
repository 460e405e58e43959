//! Render: every generated text of a build, from templates whose only input is the plan. An
//! undefined variable is an error, never an empty string.

use std::collections::BTreeMap;

use anyhow::{Context, Result, anyhow};
use camino::{Utf8Path, Utf8PathBuf};
use contract::device_file;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{AutoEscape, Environment, UndefinedBehavior, Value, context};

use crate::config::content::{self, FileDestination};
use crate::config::overlay::{FileAttributes, OverlayFileKind};
use crate::disk::layout::{DiskLayout, StateSector};
use crate::plan::{BootSourcePlan, EarlierCardPlan, Plan};
use crate::ssh_keys;

/// The robot's first program, in the initrd of every system.
pub const INIT: &str = "board/common/init";

/// A file of the overlay, ready to be added to the root.
#[derive(Debug, Clone)]
pub struct OverlayEntry {
    /// Path in the workspace, for messages.
    pub source: Utf8PathBuf,
    /// Path on the robot, without the leading slash.
    pub target: String,
    /// Mode and owner.
    pub attributes: FileAttributes,
    /// What it is.
    pub content: OverlayContent,
}

/// The kind of an overlay entry.
#[derive(Debug, Clone)]
pub enum OverlayContent {
    /// A file with this content.
    File(Vec<u8>),
    /// A symbolic link to this target.
    Symlink(String),
}

/// Every generated or copied text of a build.
#[derive(Debug)]
pub struct RenderedFiles {
    /// The root filesystem overlay, sorted by target.
    pub overlay: Vec<OverlayEntry>,
    /// Rendered boot files, by partition role and path.
    pub boot: BTreeMap<(String, String), Vec<u8>>,
    /// The defconfig, for the engine `buildroot`.
    pub defconfig: Option<String>,
    /// SSH public keys of each account.
    pub authorized_keys: BTreeMap<String, String>,
}

impl RenderedFiles {
    /// Writes every text below `dir`, for inspection; replaces the previous content.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn write(&self, dir: &Utf8Path) -> Result<()> {
        if dir.exists() {
            std::fs::remove_dir_all(dir).with_context(|| format!("clearing {dir}"))?;
        }
        let put = |path: Utf8PathBuf, bytes: &[u8]| -> Result<()> {
            let parent = path.parent().context("a rendered file has a directory")?;
            std::fs::create_dir_all(parent).with_context(|| format!("creating {parent}"))?;
            std::fs::write(&path, bytes).with_context(|| format!("writing {path}"))
        };
        for entry in &self.overlay {
            if let OverlayContent::File(bytes) = &entry.content {
                put(dir.join("overlay").join(&entry.target), bytes)?;
            }
        }
        for ((role, path), bytes) in &self.boot {
            put(dir.join(role).join(path), bytes)?;
        }
        if let Some(defconfig) = &self.defconfig {
            put(dir.join("defconfig"), defconfig.as_bytes())?;
        }
        Ok(())
    }
}

/// Renders everything in the plan.
///
/// # Errors
/// A template with a mistake: file, line and the error.
pub fn render(root: &Utf8Path, plan: &Plan) -> Result<RenderedFiles> {
    let context = template_context(plan);
    let text = |path: &Utf8Path| {
        let bytes = std::fs::read(root.join(path)).with_context(|| format!("reading {path}"))?;
        String::from_utf8(bytes).map_err(|_| {
            anyhow!(
                "{path} is not UTF-8\nhelp: a template (.j2) must be a text; rename other files"
            )
        })
    };
    let template = |path: &Utf8Path| expand_template(path, &text(path)?, &context);
    let mut overlay = Vec::new();
    for file in &plan.overlay {
        let content = match file.kind {
            OverlayFileKind::Literal => OverlayContent::File(
                std::fs::read(root.join(&file.source))
                    .with_context(|| format!("reading {}", file.source))?,
            ),
            OverlayFileKind::Template => {
                let text = template(&file.source)?.into_bytes();
                // Other files were checked when they were found.
                check_content(&file.source, FileDestination::Root(&file.target), &text)?;
                if file.target == device_file::PATH {
                    check_device_file(&file.source, &text)?;
                }
                OverlayContent::File(text)
            }
            OverlayFileKind::Symlink => OverlayContent::Symlink(
                root.join(&file.source)
                    .read_link_utf8()
                    .with_context(|| format!("reading {}", file.source))?
                    .into_string(),
            ),
        };
        overlay.push(OverlayEntry {
            source: file.source.clone(),
            target: file.target.to_string(),
            attributes: file.attributes,
            content,
        });
    }
    let mut boot = BTreeMap::new();
    for file in &plan.boot_files {
        if let BootSourcePlan::Template { source, .. } = &file.source {
            let name = (file.partition.clone(), file.path.clone());
            let bytes = if source.extension() == Some("j2") {
                template(source)?.into_bytes()
            } else {
                text(source)?.into_bytes()
            };
            check_content(source, FileDestination::Boot, &bytes)?;
            boot.insert(name, bytes);
        }
    }
    let init = root.join(INIT);
    if init.is_file() {
        let bytes = std::fs::read(&init).with_context(|| format!("reading {INIT}"))?;
        check_content(Utf8Path::new(INIT), FileDestination::Boot, &bytes)?;
    }
    let defconfig =
        plan.rootfs.buildroot.as_ref().map(|b| b.defconfig.render(&defconfig_title(plan)));
    let mut authorized_keys = BTreeMap::new();
    for user in &plan.users {
        let mut keys = String::new();
        for path in &user.authorized_keys {
            let file = std::fs::read(root.join(path)).with_context(|| format!("reading {path}"))?;
            keys.push_str(&ssh_keys::keys_as_lines(&file).map_err(|bad| bad.into_error(path))?);
        }
        authorized_keys.insert(user.name.clone(), keys);
    }
    Ok(RenderedFiles { overlay, boot, defconfig, authorized_keys })
}

/// The first line of the defconfig.
pub fn defconfig_title(plan: &Plan) -> String {
    format!("{} for {}", plan.product.name, plan.board.name)
}

/// A value between double quotes, for a shell and os-release(5).
fn quote_for_shell(value: String) -> String {
    let mut quoted = String::from("\"");
    for c in value.chars() {
        if matches!(c, '"' | '$' | '`' | '\\') {
            quoted.push('\\');
        }
        quoted.push(c);
    }
    quoted.push('"');
    quoted
}

fn check_content(source: &Utf8Path, place: FileDestination<'_>, bytes: &[u8]) -> Result<()> {
    content::find_problem(place, bytes).map_or(Ok(()), |problem| Err(problem.into_error(source)))
}

/// Refuses a `device.toml` that the robot's agent would not understand: it could neither update nor come back.
fn check_device_file(source: &Utf8Path, text: &[u8]) -> Result<()> {
    let read = |text: &str| device_file::DeviceFile::parse(text).map(drop);
    read(&String::from_utf8_lossy(text)).with_context(|| {
        format!(
            "{source} makes a device.toml that the robot's agent does not understand\n\
             help: write it as `contract/src/device_file.rs` has it"
        )
    })
}

fn expand_template(path: &Utf8Path, source: &str, context: &Value) -> Result<String> {
    let mut environment = Environment::new();
    environment.set_undefined_behavior(UndefinedBehavior::Strict);
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    let syntax = SyntaxConfig::builder()
        .keep_trailing_newline(true)
        .trim_blocks(true)
        .lstrip_blocks(true)
        .build()
        .context("configuring the template syntax")?;
    environment.set_syntax(syntax);
    environment.add_filter("shell", quote_for_shell);
    environment.add_filter("toml", |value: String| toml::Value::String(value).to_string());
    let explain = |error: minijinja::Error| {
        let line = error.line().unwrap_or(0);
        let excerpt = source.lines().nth(line.saturating_sub(1)).unwrap_or_default().trim();
        let detail = error.detail().map_or(String::new(), |d| format!(": {d}"));
        let help = match error.kind() {
            // A shell's `${#list[@]}` opens a template comment.
            minijinja::ErrorKind::SyntaxError => {
                "`{{`, `{%` and `{#`, here or above, begin a template expression; \
                 put text that contains them between {% raw %} and {% endraw %}"
            }
            _ => "docs/reference/templates.md lists the variables that a template may use",
        };
        anyhow!("rendering {path}:{line}: {}{detail}\n  | {excerpt}\nhelp: {help}", error.kind())
    };
    environment.add_template(path.as_str(), source).map_err(explain)?;
    let template = environment.get_template(path.as_str()).map_err(explain)?;
    template.render(context).map_err(explain)
}

/// The variables of templates; `docs/reference/templates.md` describes them.
fn template_context(plan: &Plan) -> Value {
    context! {
        product => plan_part(&plan.product),
        board => context! {
            name => plan.board.name.clone(),
            title => plan.board.title.clone(),
            arch => plan.board.arch.clone(),
            boot_flow => Value::from(Serde(plan.board.boot_flow)),
            compatible => plan.board.compatible.clone(),
            eeprom_since => plan.board.eeprom_since.clone(),
            left_out_revisions => plan.board.left_out_revisions.clone(),
            console => plan.board.console.as_ref().map(plan_part),
            console_on_board => plan.board.console_on_board,
            kernel => context! { cmdline => plan.board.cmdline.clone() },
            u_boot => with_snake_case_keys(&plan.board.uboot),
        },
        disk => context! {
            table => plan.disk.table.name(),
            size => plan.disk.size,
            signature => plan.identifiers.disk_signature,
            boot_state => sector_numbers(&plan.disk.states),
            trust => sector_numbers(&plan.disk.trust),
        },
        earlier_cards => plan.board.earlier_cards.iter().map(earlier_card).collect::<Vec<_>>(),
        partitions => partition_values(&plan.disk),
        rootfs => plan_part(&plan.rootfs),
        users => plan.users.iter().map(plan_part).collect::<Vec<_>>(),
        ssh => plan_part(&plan.ssh),
        network => plan_part(&plan.network),
        update => plan_part(&plan.update),
        api => plan.api.as_ref().map(plan_part),
        epoch => plan.epoch,
        commit => plan.commit.clone(),
    }
}

/// A part of the plan with its keys as template variables: `boot-flow` becomes `boot_flow`.
fn plan_part(part: &impl serde::Serialize) -> Value {
    let json = serde_json::to_value(part).unwrap_or_default();
    let serde_json::Value::Object(map) = json else { return Value::from(Serde(json)) };
    Value::from_pairs(map.into_iter().map(|(k, v)| (k.replace('-', "_"), Value::from(Serde(v)))))
}

fn with_snake_case_keys(map: &BTreeMap<String, String>) -> Value {
    Value::from_pairs(map.iter().map(|(k, v)| (k.replace('-', "_"), v.as_str())))
}

fn sector_numbers(copies: &[StateSector]) -> Vec<u64> {
    copies.iter().map(|copy| copy.sector).collect()
}

fn earlier_card(card: &EarlierCardPlan) -> Value {
    context! {
        until => card.until.clone(),
        boot_state => sector_numbers(&card.disk.states),
        trust => sector_numbers(&card.disk.trust),
        partitions => partition_values(&card.disk),
    }
}

fn partition_values(layout: &DiskLayout) -> Value {
    Value::from_pairs(layout.partitions.iter().map(|p| {
        let facts = context! {
            number => p.number,
            start_sector => p.first_sector,
            sectors => p.sectors,
            offset => p.offset,
            size => p.size,
        };
        (p.name.replace('-', "_"), facts)
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_undefined_variable_is_an_error_with_its_place() {
        let error = expand_template(
            Utf8Path::new("a.j2"),
            "one\n{{ product.nmae }}\n",
            &context! {
                product => context! { name => "x" },
            },
        )
        .expect_err("undefined")
        .to_string();
        assert!(error.starts_with("rendering a.j2:2: undefined value"), "{error}");
        assert!(error.contains("| {{ product.nmae }}"), "{error}");
    }
}
