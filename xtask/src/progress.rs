//! Progress output: bars with rates and remaining time on a terminal, plain lines in a log.
//! Everything is written to standard error; standard output is for results.

use std::io::IsTerminal;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::errln;
use crate::text::printable;

/// The minimum interval between progress lines of a long step in a log.
const LOG_INTERVAL: Duration = Duration::from_secs(10);

/// The width of the stage names in the first column.
const COLUMN: usize = 8;

fn bars() -> &'static MultiProgress {
    static BARS: OnceLock<MultiProgress> = OnceLock::new();
    BARS.get_or_init(|| {
        let target = if std::io::stderr().is_terminal() {
            ProgressDrawTarget::stderr_with_hz(8)
        } else {
            ProgressDrawTarget::hidden()
        };
        MultiProgress::with_draw_target(target)
    })
}

/// Prints one line: the stage's name, then what happened.
pub fn say(stage: &str, message: impl AsRef<str>) {
    // Much of the text comes from other programs: `errln` prints no control characters.
    let line = format!(" {stage:<COLUMN$} {}", message.as_ref());
    bars().suspend(|| errln!("{line}"));
}

/// Prints a prominent warning.
pub fn warn(message: impl AsRef<str>) {
    let line = format!("warning: {}", message.as_ref());
    bars().suspend(|| errln!("{line}"));
}

/// The unit of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProgressUnit {
    /// Bytes; shown with binary units and a rate.
    Bytes,
    /// Items (packages, files, …).
    Items,
}

/// One long step. Dropping it removes its bar.
#[derive(Debug)]
pub struct ProgressStep {
    bar: ProgressBar,
    stage: String,
    what: String,
    unit: ProgressUnit,
    last_line: std::sync::Mutex<Instant>,
}

impl ProgressStep {
    /// Starts a step of `total` bytes or items; 0 when the total is not known.
    pub fn new(stage: &str, what: impl Into<String>, total: u64, unit: ProgressUnit) -> Self {
        let what = printable(&what.into());
        let bar = bars().add(ProgressBar::new(total));
        let template = match (total, unit) {
            (0, _) => " {prefix} {spinner} {msg}  {elapsed}",
            (_, ProgressUnit::Bytes) => {
                " {prefix} {msg:40!} {percent:>3} %  {binary_bytes} of {binary_total_bytes}  {binary_bytes_per_sec}  {eta} left"
            }
            (_, ProgressUnit::Items) => {
                " {prefix} {msg:40!} {percent:>3} %  {pos} of {len}  {eta} left"
            }
        };
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.set_prefix(format!("{stage:<COLUMN$}"));
        bar.set_message(what.clone());
        if total == 0 {
            bar.enable_steady_tick(Duration::from_millis(200));
        }
        Self {
            bar,
            stage: stage.to_owned(),
            what,
            unit,
            last_line: std::sync::Mutex::new(Instant::now()),
        }
    }

    /// Adds `n` to the progress.
    pub fn advance(&self, n: u64) {
        self.bar.inc(n);
        self.log_line();
    }

    /// Sets the progress.
    pub fn set(&self, position: u64) {
        self.bar.set_position(position);
        self.log_line();
    }

    /// Shows the current item.
    pub fn note(&self, message: impl Into<String>) {
        self.bar.set_message(printable(&message.into()));
        self.log_line();
    }

    fn log_line(&self) {
        if !self.bar.is_hidden() {
            return;
        }
        let Ok(mut last) = self.last_line.try_lock() else { return };
        if last.elapsed() < LOG_INTERVAL {
            return;
        }
        *last = Instant::now();
        let what = &self.what;
        match (self.bar.length().unwrap_or(0), self.unit) {
            (0, _) => say(&self.stage, format!("{what}: {}", self.bar.message())),
            (total, ProgressUnit::Bytes) => say(
                &self.stage,
                format!("{what}: {} of {}", format_bytes(self.bar.position()), format_bytes(total)),
            ),
            (total, ProgressUnit::Items) => {
                say(&self.stage, format!("{what}: {} of {total}", self.bar.position()));
            }
        }
    }
}

impl Drop for ProgressStep {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
        bars().remove(&self.bar);
    }
}

/// A size in human-readable form: `38 MiB`, `4.0 GiB`, `912 B`.
pub fn format_bytes(n: u64) -> String {
    const UNITS: [&str; 4] = ["KiB", "MiB", "GiB", "TiB"];
    if n < 1024 {
        return format!("{n} B");
    }
    let mut value = n as f64 / 1024.0;
    let mut unit = 0;
    // 1023.5 would be shown as 1024 of the smaller unit.
    while value >= 1023.5 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    let digits = usize::from(value < 9.95);
    format!("{value:.digits$} {}", UNITS[unit])
}

/// A time in human-readable form: `0.4 s`, `41 s`, `3 min 41 s`.
pub fn format_duration(d: Duration) -> String {
    let seconds = d.as_secs();
    match seconds {
        0..10 => format!("{:.1} s", d.as_secs_f64()),
        10..120 => format!("{seconds} s"),
        _ => format!("{} min {} s", seconds / 60, seconds % 60),
    }
}

/// Names for a sentence: the first ten, and the number of others.
pub fn list_names(names: &[impl AsRef<str>]) -> String {
    const SHOWN: usize = 10;
    let shown: Vec<&str> = names.iter().take(SHOWN).map(AsRef::as_ref).collect();
    let more = names.len().saturating_sub(SHOWN);
    let end = if more == 0 { String::new() } else { format!(" and {more} more") };
    format!("{}{end}", shown.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_for_people() {
        let shown = [0, 1023, 1024, 1_048_064, 1 << 20, 10 << 20, 4 << 30].map(format_bytes);
        assert_eq!(shown, ["0 B", "1023 B", "1.0 KiB", "1.0 MiB", "1.0 MiB", "10 MiB", "4.0 GiB"]);
    }

    #[test]
    fn long_lists_end_early() {
        assert_eq!(list_names(&["a", "b"]), "a, b");
        let many: Vec<String> = (0..157).map(|n| n.to_string()).collect();
        assert_eq!(list_names(&many), "0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 147 more");
    }
}
