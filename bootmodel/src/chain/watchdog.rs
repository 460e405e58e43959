//! Stage 11, the watchdog: which seconds its driver can count, and when it resets a board that hangs.
//!
//! Sources: drivers/watchdog/bcm2835_wdt.c (`bcm2835_wdt_start` writes `SECS_TO_WDOG_TICKS(timeout) & 0xfffff`, which are
//! the seconds modulo 16); drivers/watchdog/watchdog_dev.c (`watchdog_next_keepalive`: the kernel feeds at half of what
//! the hardware can count, for the last time that much before the deadline). The release's own rule, which seconds
//! `/init` asks for, is read out of the initrd's script.

use super::facts::Driver;
use super::system::{Parts, System};
use super::{Boot, Place, Run};

/// Until which second after the kernel's start a trial may reach `/init`.
pub const LATEST_START: i64 = 120;

/// Milliseconds from the start of a watchdog with this timeout until it resets a board whose user space never feeds it
/// and whose kernel runs. A kernel feeds no earlier than it plans to, so `late` milliseconds are added to each feed.
pub fn reset_after(driver: &Driver, seconds: u64, late: u64) -> u64 {
    let timeout = seconds * 1000;
    let counted = if driver.modulo == 0 { timeout } else { seconds % driver.modulo * 1000 };
    // watchdog_need_worker: only a timeout that the hardware cannot count is fed.
    if timeout <= driver.limit_ms {
        return counted;
    }
    let last = timeout - driver.limit_ms;
    let mut now = 0;
    loop {
        let reset = now + counted;
        let left = last.saturating_sub(now);
        if left == 0 {
            return reset;
        }
        let next = now + left.min(driver.limit_ms / 2) + late;
        if next >= reset {
            return reset;
        }
        now = next;
    }
}

/// Whether a watchdog with this timeout outlives the kernel's feeds.
pub fn counts(driver: &Driver, seconds: u64) -> bool {
    driver.modulo == 0
        || (1..driver.modulo).contains(&seconds)
        || seconds % driver.modulo >= driver.smallest_rest
}

/// How `/init` makes the watchdog's seconds of the deadline and its own start second.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    /// The deadline without `slipway.deadline=`.
    pub deadline: i64,
    steps: Vec<Assignment>,
    /// The first line of the rule in the script.
    pub line: usize,
}

/// What `left` becomes, and when.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Assignment {
    /// Comparison, bound, and whether it must hold.
    condition: Option<(String, i64, bool)>,
    expression: String,
}

impl Rule {
    /// Reads the rule out of the script: the lines of `begin_trial` up to the watchdog's start.
    ///
    /// # Errors
    /// A line that changes `left` in a way that is not understood here.
    pub fn read(init: &str) -> Result<Self, String> {
        let mut deadline = None;
        let (mut inside, mut steps, mut first) = (false, Vec::new(), 0);
        for (line, text) in (1..).zip(init.lines().map(str::trim)) {
            if let Some(value) = text.strip_prefix("deadline=").and_then(|v| v.parse().ok()) {
                deadline = deadline.or(Some(value));
            }
            if text.starts_with("begin_trial()") {
                (inside, first) = (true, line + 1);
            } else if inside
                && (text == "}" || text.starts_with("watched=") || text.contains("start_watchdog"))
            {
                inside = false;
            } else if inside && text.contains("left") && !text.starts_with('#') {
                let step = step(text);
                steps
                    .push(step.ok_or_else(|| format!("/init:{line}: `{text}` is not understood"))?);
            }
        }
        if steps.is_empty() {
            return Err("/init has no begin_trial() that computes `left`".to_owned());
        }
        Ok(Self { deadline: deadline.ok_or("/init has no deadline")?, steps, line: first })
    }

    /// What `/init` asks the watchdog for, when it runs this many seconds after the kernel's start.
    ///
    /// # Errors
    /// Arithmetic that is not understood here.
    pub fn seconds(&self, deadline: i64, start: i64) -> Result<i64, String> {
        let mut left = 0;
        for Assignment { condition, expression } in &self.steps {
            let holds = match condition {
                None => true,
                Some((comparison, bound, wanted)) => {
                    let holds = match comparison.as_str() {
                        "-gt" => left > *bound,
                        "-ge" => left >= *bound,
                        "-lt" => left < *bound,
                        "-le" => left <= *bound,
                        "-eq" => left == *bound,
                        _ => left != *bound,
                    };
                    holds == *wanted
                }
            };
            if holds {
                left = Arithmetic { rest: expression.as_bytes(), deadline, start, left }
                    .whole()
                    .ok_or_else(|| format!("`{expression}` is not understood"))?;
            }
        }
        Ok(left)
    }
}

/// `left=EXPRESSION`, or `[ "$left" -lt 16 ] || left=EXPRESSION`.
fn step(text: &str) -> Option<Assignment> {
    let (condition, assignment) = match text.strip_prefix("[ \"$left\" ") {
        None => (None, text),
        Some(rest) => {
            let (test, assignment) = rest.split_once(" ] ")?;
            let (comparison, bound) = test.split_once(' ')?;
            let known = ["-gt", "-ge", "-lt", "-le", "-eq", "-ne"].contains(&comparison);
            let (wanted, assignment) = match assignment.split_once(' ')? {
                ("||", assignment) => (false, assignment),
                ("&&", assignment) => (true, assignment),
                _ => return None,
            };
            (
                Some((comparison.to_owned(), bound.parse().ok()?, wanted)).filter(|_| known),
                assignment,
            )
        }
    };
    if text.starts_with('[') && condition.is_none() {
        return None;
    }
    let value = assignment.strip_prefix("left=")?;
    let inner = value.strip_prefix("$((").and_then(|rest| rest.strip_suffix("))")).unwrap_or(value);
    let expression = inner.replace("$(seconds)", "start").replace(['$', '"'], "");
    Some(Assignment { condition, expression })
}

/// The shell's arithmetic, as far as such a rule needs it.
struct Arithmetic<'a> {
    rest: &'a [u8],
    deadline: i64,
    start: i64,
    left: i64,
}

impl Arithmetic<'_> {
    fn whole(mut self) -> Option<i64> {
        let value = self.sum()?;
        self.blank();
        self.rest.is_empty().then_some(value)
    }

    fn blank(&mut self) {
        self.rest = self.rest.trim_ascii_start();
    }

    fn take(&mut self, among: &[u8]) -> Option<u8> {
        self.blank();
        let (first, rest) = self.rest.split_first()?;
        among.contains(first).then(|| {
            self.rest = rest;
            *first
        })
    }

    fn sum(&mut self) -> Option<i64> {
        let mut value = self.product()?;
        while let Some(sign) = self.take(b"+-") {
            let other = self.product()?;
            value =
                if sign == b'+' { value.checked_add(other)? } else { value.checked_sub(other)? };
        }
        Some(value)
    }

    fn product(&mut self) -> Option<i64> {
        let mut value = self.atom()?;
        while let Some(sign) = self.take(b"*/%") {
            let other = self.atom()?;
            value = match sign {
                b'*' => value.checked_mul(other)?,
                b'/' => value.checked_div(other)?,
                _ => value.checked_rem(other)?,
            };
        }
        Some(value)
    }

    fn atom(&mut self) -> Option<i64> {
        if self.take(b"(").is_some() {
            let value = self.sum()?;
            self.take(b")")?;
            return Some(value);
        }
        self.blank();
        let end = self.rest.iter().position(|b| !b.is_ascii_alphanumeric() && *b != b'_');
        let (word, rest) = self.rest.split_at(end.unwrap_or(self.rest.len()));
        self.rest = rest;
        match std::str::from_utf8(word).ok()? {
            "deadline" => Some(self.deadline),
            "start" => Some(self.start),
            "left" => Some(self.left),
            number => number.parse().ok(),
        }
    }
}

/// Seconds of systemd's `63s`, `2min` or `1min 3s` (systemd.time(7)); none for `off`, `0`, `infinity` or `default`.
fn timespan(text: &str) -> Option<u64> {
    let mut total = 0;
    let mut rest = text.trim();
    while !rest.is_empty() {
        let end = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
        let number: u64 = rest[..end].parse().ok()?;
        rest = rest[end..].trim_start();
        let end = rest.find(|c: char| !c.is_ascii_alphabetic()).unwrap_or(rest.len());
        total += number
            * match &rest[..end] {
                "" | "s" | "sec" | "second" | "seconds" => 1,
                "m" | "min" | "minute" | "minutes" => 60,
                "h" | "hr" | "hour" | "hours" => 3600,
                _ => return None,
            };
        rest = rest[end..].trim_start();
    }
    Some(total).filter(|total| *total > 0)
}

pub(super) fn check(
    run: &mut Run<'_>,
    boot: Option<&Boot<'_>>,
    system: &System<'_>,
    parts: &Parts,
) {
    let Some(driver) = run.facts.watchdog(&run.soc.watchdog).cloned() else { return };
    let has =
        parts.built_in_modules.contains(&driver.name) || parts.loaded.contains_key(&driver.name);
    if !has {
        run.stop(
            "watchdog-missing",
            system.places[1].clone(),
            format!(
                "neither the kernel nor the initrd has {}: nothing ends a trial that hangs",
                driver.name
            ),
            format!("add \"{}\" to `kernel.initrd-modules` in board.toml", driver.name),
        );
    }
    let help = || {
        format!(
            "a number below {}, or one that leaves {} or more when divided by it: 63, 127",
            driver.modulo, driver.smallest_rest
        )
    };
    // A kernel that feeds a second late is a common one.
    let reset = |seconds: u64| reset_after(&driver, seconds, 1000);
    let explain = |seconds: u64| {
        let after = reset(seconds) / 1000;
        format!(
            "{} counts {seconds} s modulo {}: it resets a sound board after {after} s",
            driver.name, driver.modulo
        )
    };
    for (path, bytes) in &system.slot.files {
        if !path.starts_with("etc/systemd/system.conf") {
            continue;
        }
        let text = String::from_utf8_lossy(bytes).into_owned();
        for (line, text) in (1..).zip(text.lines()) {
            let Some((key, value)) = text.split_once('=') else { continue };
            let watches = ["RuntimeWatchdogSec", "RebootWatchdogSec", "KExecWatchdogSec"];
            let seconds = timespan(value).filter(|_| watches.contains(&key.trim()));
            if let Some(seconds) = seconds.filter(|seconds| !counts(&driver, *seconds)) {
                let place = Place::line(system.slot.number, path, line);
                run.stop(
                    "watchdog-seconds",
                    place,
                    format!("{key}={value}: {}", explain(seconds)),
                    help(),
                );
            }
        }
    }
    if let Some(boot) = boot
        && let Some(seconds) = boot.value("kernel_watchdog_timeout").and_then(|v| v.parse().ok())
        && !counts(&driver, seconds)
    {
        let place = boot.place("kernel_watchdog_timeout");
        run.stop("watchdog-seconds", place, explain(seconds), help());
    }
    if !system.words.split(' ').any(|word| word.starts_with("watchdog.open_timeout=")) {
        run.stop(
            "watchdog-open",
            system.places[3].clone(),
            "the kernel's command line has no watchdog.open_timeout: the kernel feeds for ever when user space never comes".to_owned(),
            "watchdog.open_timeout=120 in `kernel.cmdline` of board.toml".to_owned(),
        );
    }
    let init = parts.initrd.get("init").map(|init| String::from_utf8_lossy(init).into_owned());
    let told = system
        .words
        .split(' ')
        .find_map(|word| word.strip_prefix("slipway.deadline=")?.parse().ok());
    let place = || system.places[1].clone();
    let rule = Rule::read(&init.unwrap_or_default());
    let wrong = rule.and_then(|rule| {
        let deadline = told.unwrap_or(rule.deadline);
        let mut worst = None;
        for start in 0..=LATEST_START {
            let seconds = rule.seconds(deadline, start)?;
            let seconds =
                u64::try_from(seconds).map_err(|_| format!("/init asks for {seconds} s"))?;
            let found = (reset(seconds), rule.line, deadline, start, seconds);
            if !counts(&driver, seconds) && worst.is_none_or(|known| found < known) {
                worst = Some(found);
            }
        }
        Ok(worst)
    });
    match wrong {
        Ok(None) => run.step("/init", format!("a trial arms {}: any start second up to {LATEST_START} can be counted", driver.name)),
        Ok(Some((_, line, deadline, start, seconds))) => run.stop(
            "watchdog-deadline",
            place(),
            format!("/init:{line}: with a deadline of {deadline} s, started {start} s after the kernel, it asks for {seconds} s; {}", explain(seconds)),
            "in board/common/init, round what is left to a number that the driver can count".to_owned(),
        ),
        Err(reason) => run.stop(
            "watchdog-deadline",
            place(),
            format!("which seconds a trial asks for cannot be told: {reason}"),
            "keep the rule as lines of `left=…` in begin_trial, or teach bootmodel::chain::watchdog the new form".to_owned(),
        ),
    }
}
