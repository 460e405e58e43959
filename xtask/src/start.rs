//! Whether each model would start from a finished card image, and how: `bootmodel::chain` over its bytes, with the
//! places on the card traced back to the files of the workspace.

use std::fs::File;
use std::rc::Rc;

use anyhow::{Context, Result, anyhow, bail};
use bootmodel::chain::{self, Card, Facts, Finding, Level, Place};
use camino::{Utf8Path, Utf8PathBuf};
use serde::{Deserialize, Serialize};

use crate::plan::{BootSourcePlan, Plan};

/// Raised when the model itself says something else of the same card; its facts count by their text.
const MODEL_VERSION: u32 = 3;

/// How one model starts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Start {
    /// The model: a string of the board's `compatible`.
    pub model: String,
    /// For people.
    pub title: String,
    /// Whether nothing is known that keeps it from starting, trying an update and coming back.
    pub starts: bool,
    /// Who does what, in order, from the boot ROM to `/init`.
    pub steps: Vec<(String, String)>,
}

/// What is known of a card.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Starts {
    /// One for each model.
    pub models: Vec<Start>,
    /// What keeps a model from starting, trying or coming back, with what to do.
    pub stops: Vec<String>,
    /// What is lost although it starts, with what to do.
    pub degrades: Vec<String>,
}

/// What the answer depends on besides the card, for a stage's key.
pub fn version() -> (u32, [&'static str; 4]) {
    (MODEL_VERSION, chain::facts::TEXTS)
}

/// What a card was made of: the workspace's root, and the plan.
pub type Origin<'a> = (&'a Utf8Path, &'a Plan);

/// Looks at a card image. With its origin the findings name the workspace's files.
///
/// # Errors
/// An image that is not one of ours, or is damaged.
pub fn look(image: &Utf8Path, origin: Option<Origin<'_>>) -> Result<Starts> {
    let facts = Facts::known().map_err(|reason| anyhow!("bootmodel/facts: {reason}"))?;
    let file = File::open(image).with_context(|| format!("opening {image}"))?;
    let card = Card::read(Rc::new(file)).map_err(|reason| anyhow!("reading {image}: {reason}"))?;
    let verdict = chain::check(&card, &facts);
    let told = |level: Level| {
        let some = verdict.findings.iter().filter(move |finding| finding.level == level);
        some.map(|finding| tell(finding, &card, origin)).collect()
    };
    Ok(Starts {
        stops: told(Level::Stops),
        degrades: told(Level::Degrades),
        models: verdict
            .chains
            .into_iter()
            .map(|chain| Start {
                model: chain.model,
                title: chain.title,
                starts: chain.starts,
                steps: chain.steps.into_iter().map(|s| (s.who.to_owned(), s.what)).collect(),
            })
            .collect(),
    })
}

/// Refuses a card from which a model would not start.
///
/// # Errors
/// All that stops any of them.
pub fn require(starts: &Starts, board: &str) -> Result<()> {
    if starts.stops.is_empty() {
        return Ok(());
    }
    let failed: Vec<&str> =
        starts.models.iter().filter(|m| !m.starts).map(|m| m.model.as_str()).collect();
    bail!(
        "the board {board} would not start, try an update or come back: {}\n  - {}",
        failed.join(", "),
        starts.stops.join("\n  - ")
    )
}

/// A finding, with the file of the workspace that its place was made of, and the line in it.
fn tell(finding: &Finding, card: &Card, origin: Option<Origin<'_>>) -> String {
    let source = origin.and_then(|(root, plan)| Some((root, source(&finding.place, plan)?)));
    let Some((root, source)) = source else { return finding.to_string() };
    let line = line(&finding.place, card, &root.join(&source));
    let line = line.map(|line| format!(":{line}")).unwrap_or_default();
    format!("{source}{line}: on the card {finding}")
}

/// The workspace's file behind a file of the card.
fn source(place: &Place, plan: &Plan) -> Option<Utf8PathBuf> {
    let (number, file) = (place.partition?, place.file.as_deref()?);
    let role = &plan.disk.partitions.iter().find(|placed| placed.number == number)?.name;
    let boot = plan.boot_files.iter().find(|boot| boot.partition == *role && boot.path == file);
    if let Some(BootSourcePlan::Template { source, .. }) = boot.map(|boot| &boot.source) {
        return Some(source.clone());
    }
    let overlay = plan.overlay.iter().find(|overlay| overlay.target == file)?;
    Some(overlay.source.clone())
}

/// The line of the workspace's file that has the words of the card's line, where just one has: a template's lines are
/// others than those of what it makes.
fn line(place: &Place, card: &Card, source: &Utf8Path) -> Option<usize> {
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
pub fn lines(starts: &Starts) -> Vec<String> {
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
