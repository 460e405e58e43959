//! Stage 14, the kernel's command line: parameters without which a slot is not found, a panic does not restart, or a
//! trial never ends.
//!
//! Sources: Linux, Documentation/admin-guide/kernel-parameters.txt (`panic=`: 0, the default, waits for ever) and
//! Documentation/watchdog/watchdog-parameters.rst (`open_timeout`: 0 means no limit; `handle_boot_enabled`: without it
//! the kernel does not feed a running watchdog); the words of `/init` are in its head, board/common/init.

use super::system::BootSystem;
use super::{Boot, Run};

pub(super) fn check(run: &mut Run<'_>, boot: Option<&Boot<'_>>, system: &BootSystem<'_>) {
    let words: Vec<&str> = system.words.split_ascii_whitespace().collect();
    // If a parameter occurs twice, the last one applies.
    let value = |name: &str| {
        let mut all = words.iter().rev().filter_map(|word| word.split_once('='));
        all.find(|(known, _)| *known == name).map(|(_, value)| value)
    };
    let place = || system.places[3].clone();
    let mut stop = |rule, message: String, help: &str| {
        run.stop(rule, place(), message, help.to_owned());
    };
    let in_cmdline = "`kernel.cmdline` in board.toml";
    let seconds: Option<i64> = value("panic").and_then(|value| value.parse().ok());
    if seconds.unwrap_or(0) == 0 {
        stop(
            "words-panic",
            "without panic= and a number of seconds, a kernel that panics never restarts"
                .to_owned(),
            in_cmdline,
        );
    }
    let open = value("watchdog.open_timeout");
    if open.is_some_and(|value| value.parse().unwrap_or(0u64) == 0) {
        stop(
            "words-watchdog",
            format!(
                "watchdog.open_timeout={} means no limit: the kernel feeds the watchdog for ever if user space does not",
                open.unwrap_or_default()
            ),
            in_cmdline,
        );
    }
    let feeds = value("watchdog.handle_boot_enabled");
    if feeds.is_some_and(|value| ["0", "n", "N"].contains(&value)) {
        stop(
            "words-watchdog",
            "with watchdog.handle_boot_enabled=0 the kernel does not feed the watchdog that was started before it: every trial is reset".to_owned(),
            in_cmdline,
        );
    }
    if words.contains(&"slipway.no-watchdog") {
        stop(
            "words-watchdog",
            "with slipway.no-watchdog /init starts no watchdog: a trial that hangs never ends"
                .to_owned(),
            in_cmdline,
        );
    }
    let template = "the board's cmdline.txt and boot.scr as in board/common";
    match (boot, system.script) {
        (_, Some(_)) => {
            for name in ["root", "slipway.slot"] {
                if value(name).is_none_or(str::is_empty) {
                    stop(
                        "words-slot",
                        format!("without {name}= /init does not know which slot it starts"),
                        template,
                    );
                }
            }
        }
        (Some(boot), None) => {
            let number = boot.volume.number.to_string();
            let list = value("slipway.tryboot").unwrap_or_default();
            let mut own = list.split(',').map(|part| part.split(':').collect::<Vec<_>>());
            let own = own.find(|part| part.first() == Some(&number.as_str()));
            let slot = own.as_ref().and_then(|part| part.get(1)).copied().unwrap_or_default();
            let root = own.as_ref().and_then(|part| part.get(2)?.parse::<u32>().ok());
            if !["a", "b"].contains(&slot) {
                stop(
                    "words-slot",
                    format!(
                        "slipway.tryboot={list} names no slot for partition {number}, from which this system starts"
                    ),
                    template,
                );
            } else if let Some(root) = root.filter(|root| *root != system.slot.number) {
                stop(
                    "words-slot",
                    format!(
                        "slipway.tryboot={list} says that slot {slot} is partition {root}, but it is {}",
                        system.slot.number
                    ),
                    template,
                );
            }
        }
        (None, None) => {}
    }
}
