//! The report on a terminal: one aligned line for each important fact.

use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write};

use super::{BuildReport, CacheUse, ReportOutput, count_noun, format_seconds};
use crate::progress::format_bytes;
use crate::text::printable;

/// The width of the first column; the same as that of the lines shown during a build.
const NAME_COLUMN: usize = 8;

/// The position of the second column: a blank, the name, a blank.
const INDENT: usize = NAME_COLUMN + 2;

/// The maximum width of lines when the terminal's width is unknown.
const DEFAULT_WIDTH: usize = 100;

/// The most important outputs; the others are in the report.
const MAIN_OUTPUTS: [&str; 3] = ["image", "bundle", "report"];

/// The minimum width of lines.
const MIN_WIDTH: usize = 40;

/// The style of the lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TerminalStyle {
    /// Whether to use colours (ANSI escapes).
    pub color: bool,
    /// The maximum width of a line in columns; longer lines continue on the next one, indented.
    pub width: usize,
}

impl TerminalStyle {
    /// No colour, the width for a log.
    pub fn plain() -> Self {
        Self { color: false, width: DEFAULT_WIDTH }
    }

    /// The style for a stream: colours only on a terminal and unless `NO_COLOR` is set and not
    /// empty (see no-color.org), the terminal's width from `COLUMNS`.
    pub fn for_stream(stream: &impl IsTerminal) -> Self {
        let no_color = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        let dumb = std::env::var_os("TERM").is_some_and(|value| value == "dumb");
        let width = std::env::var_os("COLUMNS")
            .and_then(|value| value.to_str().and_then(|value| value.parse().ok()));
        Self {
            color: stream.is_terminal() && !no_color && !dumb,
            width: width.unwrap_or(DEFAULT_WIDTH),
        }
    }
}

#[derive(Clone, Copy)]
enum Ink {
    Plain,
    Name,
    Warning,
    Faint,
}

struct Page<'a> {
    out: &'a mut dyn Write,
    style: TerminalStyle,
}

/// Writes the summary of a finished build.
///
/// # Errors
/// When `out` cannot be written.
pub fn render_terminal(
    report: &BuildReport,
    out: &mut dyn Write,
    style: TerminalStyle,
) -> io::Result<()> {
    let style = TerminalStyle { width: style.width.max(MIN_WIDTH), ..style };
    let mut page = Page { out, style };
    for warning in &report.warnings {
        page.warning(warning)?;
    }
    if let Some(warning) = report.root.as_ref().and_then(|root| root.warning.as_ref()) {
        // The same sentence may already be among the warnings.
        if !report.warnings.contains(warning) {
            page.warning(warning)?;
        }
    }
    page.replaced(report)?;
    page.stages(report)?;
    if let Some(root) = &report.root {
        let text = format!(
            "{} of {} ({} %, limit {} %)",
            format_bytes(root.used),
            format_bytes(root.capacity),
            root.fill_percent,
            root.limit_percent
        );
        page.row("root", &[text], "")?;
    }
    page.outputs(report)?;
    page.row("next", &report.next, " · ")
}

impl Page<'_> {
    fn paint(&self, text: &str, ink: Ink) -> String {
        let code = match ink {
            Ink::Plain => return text.to_owned(),
            _ if !self.style.color => return text.to_owned(),
            Ink::Name => "1",
            Ink::Warning => "1;33",
            Ink::Faint => "2",
        };
        format!("\x1b[{code}m{text}\x1b[0m")
    }

    fn warning(&mut self, text: &str) -> io::Result<()> {
        let label = self.paint("warning:", Ink::Warning);
        // Only control characters are dangerous on a terminal; everything else is shown unchanged.
        let mut lines = text.lines().map(printable);
        writeln!(self.out, "{label} {}", lines.next().unwrap_or_default())?;
        lines.try_for_each(|line| writeln!(self.out, "         {line}"))
    }

    /// A name and its parts; parts that do not fit continue on the next line, below the first part.
    fn row(&mut self, name: &str, parts: &[String], separator: &str) -> io::Result<()> {
        self.row_in(name, parts, separator, Ink::Plain)
    }

    fn row_in(&mut self, name: &str, parts: &[String], between: &str, ink: Ink) -> io::Result<()> {
        let mut lines: Vec<String> = Vec::new();
        for part in parts.iter().map(|part| printable(part)) {
            let room = self.style.width - INDENT;
            match lines.last_mut() {
                Some(line)
                    if text_width(line) + text_width(between) + text_width(&part) <= room =>
                {
                    line.push_str(between);
                    line.push_str(&part);
                }
                _ => lines.push(part),
            }
        }
        for (index, line) in lines.iter().enumerate() {
            let name = if index == 0 { printable(name) } else { String::new() };
            let name = self.paint(&format!("{name:<NAME_COLUMN$}"), Ink::Name);
            let line = self.paint(line, ink);
            writeln!(self.out, " {name} {line}")?;
        }
        Ok(())
    }

    fn replaced(&mut self, report: &BuildReport) -> io::Result<()> {
        let n = report.replaced_packages.len();
        if n == 0 {
            return Ok(());
        }
        let verb = if n == 1 { "is" } else { "are" };
        self.warning(&format!(
            "{} of the lock {verb} no longer available and {} replaced",
            count_noun(n, "package"),
            if n == 1 { "was" } else { "were" }
        ))?;
        for package in &report.replaced_packages {
            let line = format!("{} {} -> {}", package.name, package.old, package.new);
            self.row("", &[line], "")?;
        }
        Ok(())
    }

    fn stages(&mut self, report: &BuildReport) -> io::Result<()> {
        let worked: Vec<String> = report
            .stages
            .iter()
            .filter(|stage| !stage.cached)
            .map(|stage| format!("{} {}", stage.name, format_seconds(stage.seconds)))
            .collect();
        self.row_in("time", &worked, " · ", Ink::Faint)?;
        let cached = report.stages.len() - worked.len();
        if report.started_in == CacheUse::Cached && cached > 0 {
            let text = format!("{} unchanged, not repeated", count_noun(cached, "stage"));
            let name = if worked.is_empty() { "time" } else { "" };
            self.row_in(name, &[text], "", Ink::Faint)?;
        }
        Ok(())
    }

    /// The outputs, with their details in one column. Details that do not fit continue below.
    fn outputs(&mut self, report: &BuildReport) -> io::Result<()> {
        let main: Vec<&ReportOutput> =
            report.outputs.iter().filter(|o| MAIN_OUTPUTS.contains(&o.name.as_str())).collect();
        // A build that stopped early may have created only less important outputs; show these then.
        let shown = if main.is_empty() { report.outputs.iter().collect() } else { main };
        let details: Vec<String> =
            shown.iter().map(|output| output_detail(report, output)).collect();
        let paths: Vec<String> = shown.iter().map(|output| printable(&output.path)).collect();
        let column = paths.iter().map(|path| text_width(path)).max().unwrap_or(0);
        let widest = details.iter().map(|detail| text_width(detail)).max().unwrap_or(0);
        let fits = INDENT + column + 2 + widest <= self.style.width;
        for ((output, path), detail) in shown.iter().zip(&paths).zip(&details) {
            if fits {
                let mut line = path.clone();
                line.extend(std::iter::repeat_n(' ', column + 2 - text_width(path)));
                line.push_str(detail);
                self.row(&output.name, &[line], "")?;
            } else {
                self.row(&output.name, std::slice::from_ref(path), "")?;
                self.row("", std::slice::from_ref(detail), "")?;
            }
        }
        Ok(())
    }
}

fn output_detail(report: &BuildReport, output: &ReportOutput) -> String {
    let mut text = format_bytes(output.size);
    if output.on_disk_size < output.size / 10 * 9 {
        write!(text, ", {} on disk", format_bytes(output.on_disk_size)).ok();
    }
    match (output.name.as_str(), &report.signed_by) {
        ("bundle", Some(signer)) => {
            write!(text, ", signed with the {} key", signer.kind.title()).ok();
        }
        ("report", _) => text = format_seconds(report.seconds),
        _ => {}
    }
    text
}

/// The width of a text in columns. Names and paths are nearly always ASCII; a wide character only
/// shifts the alignment by one.
fn text_width(text: &str) -> usize {
    text.chars().count()
}
