//! Whether each model would boot from a finished card image, and how: `bootmodel::chain` over its
//! bytes, with places on the card mapped to files of the workspace.

use std::fs::File;
use std::rc::Rc;

use anyhow::{Context, Result, anyhow, bail};
use bootmodel::chain::{self, BootFacts, BootFinding, CardContent, CardLocation, Severity};
use camino::{Utf8Path, Utf8PathBuf};
use serde::{Deserialize, Serialize};

use crate::plan::{BootSourcePlan, Plan};

/// Raised when a change of the model's code changes its result for the same card; its facts are
/// part of the key.
const MODEL_VERSION: u32 = 3;

/// How one model boots.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ModelBoot {
    /// The model: a string of the board's `compatible`.
    pub model: String,
    /// Human-readable name.
    pub title: String,
    /// Whether no problem is known that prevents it from booting, trying an update and rolling
    /// back.
    pub starts: bool,
    /// The steps with their actors, in order, from the boot ROM to `/init`.
    pub steps: Vec<(String, String)>,
}

/// The facts about a card.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct BootCheck {
    /// The boot chain of each model.
    pub models: Vec<ModelBoot>,
    /// Problems that prevent a model from booting, trying an update or rolling back, with help.
    pub stops: Vec<String>,
    /// Problems of a model that boots nevertheless, with help.
    pub degrades: Vec<String>,
}

/// What the result depends on besides the card, for a stage's key.
pub fn model_version() -> (u32, [&'static str; 4]) {
    (MODEL_VERSION, chain::facts::TEXTS)
}

/// The sources of a card: the workspace's root, and the plan.
pub type CardOrigin<'a> = (&'a Utf8Path, &'a Plan);

/// Checks a card image. With its origin the findings name the workspace's files.
///
/// # Errors
/// An image that was not built by Slipway, or is damaged.
pub fn check_card(image: &Utf8Path, origin: Option<CardOrigin<'_>>) -> Result<BootCheck> {
    let facts = BootFacts::known().map_err(|reason| anyhow!("bootmodel/facts: {reason}"))?;
    let file = File::open(image).with_context(|| format!("opening {image}"))?;
    let card =
        CardContent::read(Rc::new(file)).map_err(|reason| anyhow!("reading {image}: {reason}"))?;
    let verdict = chain::check(&card, &facts);
    let told = |level: Severity| {
        let some = verdict.findings.iter().filter(move |finding| finding.level == level);
        some.map(|finding| describe_finding(finding, &card, origin)).collect()
    };
    Ok(BootCheck {
        stops: told(Severity::Stops),
        degrades: told(Severity::Degrades),
        models: verdict
            .chains
            .into_iter()
            .map(|chain| ModelBoot {
                model: chain.model,
                title: chain.title,
                starts: chain.starts,
                steps: chain.steps.into_iter().map(|s| (s.who.to_owned(), s.what)).collect(),
            })
            .collect(),
    })
}

/// Rejects a card from which a model would not boot.
///
/// # Errors
/// All problems that prevent any of them from booting.
pub fn require_bootable(starts: &BootCheck, board: &str) -> Result<()> {
    if starts.stops.is_empty() {
        return Ok(());
    }
    let failed: Vec<&str> =
        starts.models.iter().filter(|m| !m.starts).map(|m| m.model.as_str()).collect();
    bail!(
        "the board {board} would not boot, try an update or roll back: {}\n  - {}",
        failed.join(", "),
        starts.stops.join("\n  - ")
    )
}

/// A finding, with the source file in the workspace, and the line in it.
fn describe_finding(
    finding: &BootFinding,
    card: &CardContent,
    origin: Option<CardOrigin<'_>>,
) -> String {
    let source =
        origin.and_then(|(root, plan)| Some((root, source_of_file(&finding.place, plan)?)));
    let Some((root, source)) = source else { return finding.to_string() };
    let line = line_in_source(&finding.place, card, &root.join(&source));
    let line = line.map(|line| format!(":{line}")).unwrap_or_default();
    format!("{source}{line}: on the card {finding}")
}

/// The source file in the workspace of a file on the card.
fn source_of_file(place: &CardLocation, plan: &Plan) -> Option<Utf8PathBuf> {
    let (number, file) = (place.partition?, place.file.as_deref()?);
    let role = &plan.disk.partitions.iter().find(|placed| placed.number == number)?.name;
    let boot = plan.boot_files.iter().find(|boot| boot.partition == *role && boot.path == file);
    if let Some(BootSourcePlan::Template { source, .. }) = boot.map(|boot| &boot.source) {
        return Some(source.clone());
    }
    let overlay = plan.overlay.iter().find(|overlay| overlay.target == file)?;
    Some(overlay.source.clone())
}

/// The only line of the workspace's file with the text of the card's line, if any: the line numbers
/// of a template and of its result differ.
fn line_in_source(place: &CardLocation, card: &CardContent, source: &Utf8Path) -> Option<usize> {
    let (number, file, at) = (place.partition?, place.file.as_deref()?, place.line?);
    let volume = card.volumes.iter().find(|volume| volume.number == number);
    let slot = card.slots.iter().find(|slot| slot.number == number);
    let bytes = volume
        .and_then(|volume| volume.file(file))
        .or_else(|| slot.and_then(|slot| slot.files.get(file).map(Vec::as_slice)))?;
    let text = String::from_utf8_lossy(bytes);
    let words = text.lines().nth(at.checked_sub(1)?)?;
    let source = std::fs::read_to_string(source).ok()?;
    let mut same = source.lines().zip(1..).filter(|(line, _)| line.trim_end() == words.trim_end());
    let (_, line) = same.next()?;
    same.next().is_none().then_some(line)
}

/// The chains as text, one step a line.
pub fn describe_chains(starts: &BootCheck) -> Vec<String> {
    let mut lines = Vec::new();
    for model in &starts.models {
        let verdict = if model.starts { "starts" } else { "DOES NOT START" };
        lines.push(format!("{} ({}): {verdict}", model.title, model.model));
        for (who, what) in &model.steps {
            lines.push(format!("  {who:<9} {what}"));
        }
    }
    lines
}
