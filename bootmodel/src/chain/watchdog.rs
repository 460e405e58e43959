//! Stage 11, the watchdog: which timeouts its driver supports, and when it resets a board that hangs.
//!
//! Sources: drivers/watchdog/bcm2835_wdt.c (`bcm2835_wdt_start` writes `SECS_TO_WDOG_TICKS(timeout) & 0xfffff`, which are
//! the seconds modulo 16); drivers/watchdog/watchdog_dev.c (`watchdog_next_keepalive`: the kernel feeds after half of the
//! hardware's maximum, and for the last time that long before the deadline). The release's own rule for the seconds
//! that `/init` asks for is parsed from the initrd's script.

use std::collections::BTreeMap;

use super::card::{CardSlot, MANAGER};
use super::config::ConfigSetting;
use super::facts::WatchdogDriver;
use super::system::{BootSystem, SystemParts};
use super::{Boot, CardLocation, Run};

/// The `compatible` strings of the watchdog (`bcm2835_pm_of_match` in Linux, drivers/mfd/bcm2835-pm.c). Some trees
/// of a Pi 5 have the last and the first, others only the last.
const WATCHDOG: [&str; 4] =
    ["brcm,bcm2835-pm-wdt", "brcm,bcm2835-pm", "brcm,bcm2711-pm", "brcm,bcm2712-pm"];

/// The latest second after the kernel's start at which a trial may reach `/init`.
pub const LATEST_START: i64 = 120;

/// The longest timeout that is evaluated, in seconds; longer ones are treated as this.
const LONGEST: u64 = 1 << 20;
/// The largest `/init` that is parsed; Slipway's has 16 KiB.
const LARGEST_INIT: usize = 256 << 10;
/// Maximum depth of parentheses in its arithmetic.
const DEEPEST: u32 = 16;

/// Milliseconds from the start of a watchdog with this timeout until it resets a board whose kernel runs but whose
/// user space never feeds it. A kernel never feeds early, so `late` milliseconds are added to each feed.
pub fn reset_after(driver: &WatchdogDriver, seconds: u64, late: u64) -> u64 {
    // The same remainder, so the hardware gets the same value.
    let seconds = match seconds.checked_sub(LONGEST) {
        Some(more) if driver.modulo > 0 => LONGEST + more % driver.modulo,
        _ => seconds.min(LONGEST),
    };
    let timeout = seconds * 1000;
    let counted = if driver.modulo == 0 { timeout } else { seconds % driver.modulo * 1000 };
    // watchdog_need_worker: the kernel feeds only if the timeout exceeds the hardware's maximum.
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

/// Whether a watchdog with this timeout does not expire between the kernel's feeds.
pub fn can_count(driver: &WatchdogDriver, seconds: u64) -> bool {
    driver.modulo == 0
        || (1..driver.modulo).contains(&seconds)
        || seconds % driver.modulo >= driver.smallest_rest
}

/// How `/init` computes the watchdog's timeout from the deadline and its own start second.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeadlineRule {
    /// The deadline without `slipway.deadline=`.
    pub deadline: i64,
    /// The maximum deadline; longer ones are reduced to it.
    pub longest: i64,
    steps: Vec<Assignment>,
    /// The first line of the rule in the script.
    pub line: usize,
}

/// An assignment to `left`, and its condition.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Assignment {
    /// Comparison, bound, and whether it must hold.
    condition: Option<(String, i64, bool)>,
    expression: String,
}

impl DeadlineRule {
    /// Parses the rule from the script: the lines of `begin_trial` up to the watchdog's start.
    ///
    /// # Errors
    /// When a line changes `left` in a form that this parser does not support.
    pub fn read(init: &str) -> Result<Self, String> {
        if init.len() > LARGEST_INIT {
            return Err(format!("/init has {} bytes", init.len()));
        }
        let (mut deadline, mut longest) = (None, i64::MAX);
        let (mut inside, mut steps, mut first) = (false, Vec::new(), 0);
        for (line, text) in (1..).zip(init.lines().map(str::trim)) {
            if let Some(value) = text.strip_prefix("deadline=").and_then(|v| v.parse().ok()) {
                deadline = deadline.or(Some(value));
            }
            let bound =
                text.strip_prefix("[ \"$deadline\" -le ").and_then(|rest| rest.split_once(' '));
            if let Some((bound, "] || deadline=")) = bound
                .map(|(bound, rest)| (bound, rest.trim_end_matches(|c: char| c.is_ascii_digit())))
            {
                longest = bound.parse().unwrap_or(longest);
            }
            if text.starts_with("begin_trial()") {
                (inside, first) = (true, line + 1);
            } else if inside
                && (text == "}" || text.starts_with("watched=") || text.contains("start_watchdog"))
            {
                inside = false;
            } else if inside && text.contains("left") && !text.starts_with('#') {
                let step = parse_assignment(text);
                steps.push(step.ok_or_else(|| format!("/init:{line}: cannot parse `{text}`"))?);
            }
        }
        if steps.is_empty() {
            return Err("/init has no begin_trial() that computes `left`".to_owned());
        }
        let deadline = deadline.ok_or("/init has no deadline")?;
        Ok(Self { deadline, longest, steps, line: first })
    }

    /// The deadline that results from `slipway.deadline=`. Values that are not a number, or may be octal, are ignored.
    pub fn deadline_for(&self, value: &str) -> i64 {
        let plain = !value.starts_with('0') && value.bytes().all(|byte| byte.is_ascii_digit());
        let number = Some(value).filter(|value| plain && !value.is_empty());
        let number = number.map(|value| value.parse().unwrap_or(i64::MAX));
        number.map_or(self.deadline, |number| number.min(self.longest))
    }

    /// What `/init` asks the watchdog for, when it runs this many seconds after the kernel's start.
    ///
    /// # Errors
    /// When the arithmetic has a form that this parser does not support.
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
                left = Arithmetic { rest: expression.as_bytes(), deadline, start, left, depth: 0 }
                    .whole()
                    .ok_or_else(|| format!("cannot evaluate `{expression}`"))?;
            }
        }
        Ok(left)
    }
}

/// `left=EXPRESSION`, or `[ "$left" -lt 16 ] || left=EXPRESSION`.
fn parse_assignment(text: &str) -> Option<Assignment> {
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

/// The subset of shell arithmetic that such a rule needs.
struct Arithmetic<'a> {
    rest: &'a [u8],
    deadline: i64,
    start: i64,
    left: i64,
    depth: u32,
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
            self.depth += 1;
            let value = (self.depth <= DEEPEST).then(|| self.sum())??;
            self.take(b")")?;
            self.depth -= 1;
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
/// Parts of a second are rounded up, as the manager does for a watchdog (usec_to_watchdog, DIV_ROUND_UP).
fn parse_timespan(text: &str) -> Option<u64> {
    let mut micros = 0u64;
    let mut rest = text.trim();
    while !rest.is_empty() {
        let end = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
        let number: u64 = rest[..end].parse().ok()?;
        rest = rest[end..].trim_start();
        let end = rest.find(|c: char| !c.is_alphabetic()).unwrap_or(rest.len());
        let unit: u64 = match &rest[..end] {
            "us" | "usec" | "\u{b5}s" | "\u{3bc}s" => 1,
            "ms" | "msec" => 1000,
            "" | "s" | "sec" | "second" | "seconds" => 1_000_000,
            "m" | "min" | "minute" | "minutes" => 60_000_000,
            "h" | "hr" | "hour" | "hours" => 3_600_000_000,
            "d" | "day" | "days" => 86_400_000_000,
            "w" | "week" | "weeks" => 604_800_000_000,
            _ => return None,
        };
        micros = micros.saturating_add(number.saturating_mul(unit));
        rest = rest[end..].trim_start();
    }
    Some(micros.div_ceil(1_000_000)).filter(|total| *total > 0)
}

/// The effective settings of the manager, each with its file and line. Drop-in files override the main file. They are
/// sorted by name across all directories, and a file in `/etc` replaces one with the same name
/// (systemd-system.conf(5)).
fn manager_settings(slot: &CardSlot) -> BTreeMap<String, (String, String, usize)> {
    let file = |path: &str| slot.files.contains_key(path).then(|| path.to_owned());
    let mut files: Vec<String> = MANAGER.iter().find_map(|path| file(path)).into_iter().collect();
    let mut extra: BTreeMap<&str, &str> = BTreeMap::new();
    for folder in MANAGER.iter().rev() {
        let inside = slot.files.keys().filter_map(|path| {
            let name = path.strip_prefix(folder)?.strip_prefix(".d/")?;
            (name.ends_with(".conf") && !name.contains('/')).then_some((name, path.as_str()))
        });
        extra.extend(inside);
    }
    files.extend(extra.into_values().map(str::to_owned));
    let mut found = BTreeMap::new();
    for path in files {
        let text = slot.files.get(&path).map(|bytes| String::from_utf8_lossy(bytes).into_owned());
        let mut is_manager = false;
        for (line, text) in (1..).zip(text.unwrap_or_default().lines().map(str::trim)) {
            if text.starts_with('[') {
                is_manager = text == "[Manager]";
            }
            let comment = text.starts_with(['#', ';']);
            let setting = text.split_once('=').filter(|_| is_manager && !comment);
            if let Some((key, value)) = setting {
                let value = value.trim().to_owned();
                found.insert(key.trim().to_owned(), (value, path.clone(), line));
            }
        }
    }
    found
}

pub(super) fn check(
    run: &mut Run<'_>,
    boot: Option<&Boot<'_>>,
    system: &BootSystem<'_>,
    parts: &SystemParts,
) {
    let Some(driver) = run.facts.watchdog(&run.soc.watchdog).cloned() else { return };
    let has =
        parts.built_in_modules.contains(&driver.name) || parts.loaded.contains_key(&driver.name);
    if !has {
        run.stop(
            "watchdog-missing",
            system.places[1].clone(),
            format!(
                "neither the kernel nor the initrd has {}: a trial that hangs never ends",
                driver.name
            ),
            format!("add \"{}\" to `kernel.initrd-modules` in board.toml", driver.name),
        );
    }
    let help = || {
        format!(
            "use a number below {}, or one with a remainder of {} or more when divided by it: 63, 127",
            driver.modulo, driver.smallest_rest
        )
    };
    // Kernels often feed a second late.
    let reset = |seconds: u64| reset_after(&driver, seconds, 1000);
    let explain = |seconds: u64| {
        let after = reset(seconds) / 1000;
        format!(
            "{} uses {seconds} s modulo {}: it resets a healthy board after {after} s",
            driver.name, driver.modulo
        )
    };
    if !parts.tree.nodes.iter().any(|node| {
        node.compatible().iter().any(|name| WATCHDOG.contains(&&**name)) && parts.tree.enabled(node)
    }) {
        run.stop(
            "watchdog-node",
            system.places[2].clone(),
            format!(
                "the device tree has no enabled {}: no watchdog, and no way to restart",
                WATCHDOG[0]
            ),
            "use the device tree of this model".to_owned(),
        );
    }
    for (key, (value, path, line)) in manager_settings(system.slot) {
        let watches = ["RuntimeWatchdogSec", "RebootWatchdogSec", "KExecWatchdogSec"];
        let seconds = parse_timespan(&value).filter(|_| watches.contains(&key.as_str()));
        if let Some(seconds) = seconds.filter(|seconds| !can_count(&driver, *seconds)) {
            let place = CardLocation::line(system.slot.number, &path, line);
            let message = format!("{key}={value}: {}", explain(seconds));
            run.stop("watchdog-seconds", place, message, help());
        }
    }
    if let Some(boot) = boot {
        check_firmware(run, boot, &driver, &explain, &help);
    }
    if !system.words.split(' ').any(|word| word.starts_with("watchdog.open_timeout=")) {
        run.stop(
            "watchdog-open",
            system.places[3].clone(),
            "the kernel's command line has no watchdog.open_timeout: the kernel feeds for ever if user space never starts".to_owned(),
            "add watchdog.open_timeout=120 to `kernel.cmdline` in board.toml".to_owned(),
        );
    }
    let init = parts.initrd.get("init").map(|init| String::from_utf8_lossy(init).into_owned());
    let mut words = system.words.split_ascii_whitespace().rev();
    let told = words.find_map(|word| word.strip_prefix("slipway.deadline="));
    let place = || system.places[1].clone();
    let rule = DeadlineRule::read(&init.unwrap_or_default());
    let wrong = rule.and_then(|rule| {
        let deadline = told.map_or(rule.deadline, |value| rule.deadline_for(value));
        let mut worst = None;
        for start in 0..=LATEST_START {
            let seconds = rule.seconds(deadline, start)?;
            let seconds =
                u64::try_from(seconds).map_err(|_| format!("/init asks for {seconds} s"))?;
            let found = (reset(seconds), rule.line, deadline, start, seconds);
            if !can_count(&driver, seconds) && worst.is_none_or(|known| found < known) {
                worst = Some(found);
            }
        }
        Ok(worst)
    });
    match wrong {
        Ok(None) => run.step("/init", format!("a trial arms {}: every start second up to {LATEST_START} gives a valid timeout", driver.name)),
        Ok(Some((_, line, deadline, start, seconds))) => run.stop(
            "watchdog-deadline",
            place(),
            format!("/init:{line}: with a deadline of {deadline} s, started {start} s after the kernel, it asks for {seconds} s; {}", explain(seconds)),
            "in board/common/init, round the remaining time to a number that the driver supports".to_owned(),
        ),
        Err(reason) => run.stop(
            "watchdog-deadline",
            place(),
            format!("cannot determine the watchdog timeout of a trial: {reason}"),
            "keep the rule as lines of `left=…` in begin_trial, or add the new form to bootmodel::chain::watchdog".to_owned(),
        ),
    }
}

/// Checks the firmware's settings for the watchdog that it starts before the kernel.
fn check_firmware(
    run: &mut Run<'_>,
    boot: &Boot<'_>,
    driver: &WatchdogDriver,
    explain: &dyn Fn(u64) -> String,
    help: &dyn Fn() -> String,
) {
    if let Some(value) = boot.value("kernel_watchdog_timeout") {
        let place = boot.place("kernel_watchdog_timeout");
        match value.parse() {
            Ok(seconds) if can_count(driver, seconds) => {}
            Ok(0) => run.stop(
                "watchdog-seconds",
                place,
                "0 s: the watchdog is not started".to_owned(),
                help(),
            ),
            Ok(seconds) => run.stop("watchdog-seconds", place, explain(seconds), help()),
            Err(_) => {
                let message = format!("invalid number of seconds {value:?}");
                run.stop("watchdog-seconds", place, message, help());
            }
        }
    }
    let rule = run.facts.releases.early_watchdog.clone();
    let told = |set: &ConfigSetting| {
        set.key == "dtparam" && set.value.split(',').any(|part| part.trim() == rule.parameter)
    };
    if boot.is_on("kernel_watchdog_timeout") && !boot.settings.iter().any(told) {
        run.stop(
            "watchdog-early",
            boot.place("kernel_watchdog_timeout"),
            format!(
                "with this line alone, firmware of {} or later starts no watchdog before the kernel: a trial whose kernel hangs never ends",
                rule.since
            ),
            format!("add dtparam={} below this line", rule.parameter),
        );
    }
    // According to the documentation (boot.adoc). One board was measured to read autoboot.txt anyway after a hang in Linux
    // (usr-ein/TriMixxx, pi-qemu, T9). What other releases do is unknown.
    if let Some(value) = boot.value("kernel_watchdog_partition").filter(|value| *value != "0") {
        run.stop(
            "watchdog-partition",
            boot.place("kernel_watchdog_partition"),
            format!("a reset by the watchdog starts partition {value} and ignores autoboot.txt, and with it the committed slot"),
            "delete the line".to_owned(),
        );
    }
    let off = |value: &str| value.split(',').any(|part| part.trim() == "watchdog=off");
    let setting = boot.settings.iter().rfind(|set| set.key == "dtparam" && off(&set.value));
    if let Some(setting) = setting {
        run.stop(
            "watchdog-node",
            boot.at(setting),
            "this line disables the watchdog: a trial that hangs never ends, and the board cannot restart"
                .to_owned(),
            "delete the line".to_owned(),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_as_systemd_reads_them() {
        for (text, expected) in [
            ("63s", Some(63)),
            ("2min", Some(120)),
            ("1min 3s", Some(63)),
            ("120000ms", Some(120)),
            ("62500ms", Some(63)),
            ("1d", Some(86_400)),
            ("off", None),
            ("0", None),
            ("infinity", None),
            ("99999999999999999999s", None),
        ] {
            assert_eq!(parse_timespan(text), expected, "{text}");
        }
        assert!(parse_timespan("99999999999999999w").is_some(), "more than can be counted");
    }

    #[test]
    fn the_file_that_counts_is_the_last_by_its_own_name() {
        let mut slot = CardSlot { number: 1, files: BTreeMap::new() };
        let mut put = |path: &str, text: &str| {
            slot.files.insert(path.to_owned(), text.as_bytes().to_vec());
        };
        put("etc/systemd/system.conf", "[Manager]\n#RebootWatchdogSec=60s\nRebootWatchdogSec=1s\n");
        put("usr/lib/systemd/system.conf.d/50-a.conf", "[Manager]\nRuntimeWatchdogSec=60s\n");
        put("etc/systemd/system.conf.d/10-b.conf", "[Manager]\nRuntimeWatchdogSec=2s\n");
        put("usr/lib/systemd/system.conf.d/90-c.conf", "[Manager]\nKExecWatchdogSec=9s\n");
        put("etc/systemd/system.conf.d/90-c.conf", "[Other]\nRebootWatchdogSec=8s\n");
        let found = manager_settings(&slot);
        let display: Vec<_> =
            found.iter().map(|(key, (value, ..))| format!("{key}={value}")).collect();
        assert_eq!(display, ["RebootWatchdogSec=1s", "RuntimeWatchdogSec=60s"]);
    }

    #[test]
    fn numbers_that_nobody_waits_for_are_answered_at_once() {
        let driver = WatchdogDriver {
            name: "a".to_owned(),
            modulo: 16,
            limit_ms: 15_999,
            smallest_rest: 12,
            source: String::new(),
        };
        for seconds in [u64::MAX, 1 << 40, (1 << 40) + 9] {
            assert!(reset_after(&driver, seconds, 1000) <= 2 * LONGEST * 1000, "{seconds}");
        }
        let deep = format!(
            "begin_trial() {{\nleft=$(({}1{}))\n}}\ndeadline=300\n",
            "(".repeat(100_000),
            ")".repeat(100_000)
        );
        assert!(DeadlineRule::read(&deep).is_ok_and(|rule| rule.seconds(300, 0).is_err()));
        let init = "begin_trial() {\nleft=$((deadline - $(seconds)))\n}\ndeadline=300\n[ \"$deadline\" -le 1800 ] || deadline=1800\n";
        let rule = DeadlineRule::read(init).expect("a rule");
        let told: Vec<i64> = ["600", "9999999999999999999999", "010", "x", ""]
            .map(|value| rule.deadline_for(value))
            .to_vec();
        assert_eq!(told, [600, 1800, 300, 300, 300]);
    }
}
