//! The watchdog: a model of the driver against the rule of `/init`, as computed by the real shell function.

use std::process::Command;

use bootmodel::chain::facts::WatchdogDriver;
use bootmodel::chain::watchdog::{DeadlineRule, LATEST_START, can_count, reset_after};

use super::facts;
use super::stand_in::{INIT, INIT_GOOD, INIT_OLD};

/// `/init` accepts only these deadlines: 0 and a leading zero mean the default, larger ones mean 1800.
const DEADLINES: std::ops::RangeInclusive<i64> = 1..=1800;
/// The agent gives a trial up this many seconds before its deadline.
const MARGIN: i64 = 15;
/// How late a busy kernel may feed, in milliseconds.
const LATE: u64 = 4000;

fn driver() -> WatchdogDriver {
    facts().watchdog("bcm2835_wdt").expect("its facts").clone()
}

/// What is wrong with a rule: the first deadline and start second of each kind.
fn wrong(rule: &DeadlineRule) -> Vec<String> {
    let driver = driver();
    let mut found = Vec::new();
    let mut say = |kind: &str, text: String| {
        if !found.iter().any(|known: &String| known.starts_with(kind)) {
            found.push(format!("{kind}: {text}"));
        }
    };
    for deadline in DEADLINES {
        for start in 0..=LATEST_START {
            let seconds = rule.seconds(deadline, start).expect("the rule");
            let armed = u64::try_from(seconds).expect("a time ahead");
            let at = format!("deadline {deadline}, start {start}, armed with {seconds}");
            if !can_count(&driver, armed) {
                say("uncountable", at.clone());
            }
            // The fastest reset of a healthy board, and the slowest of one that hangs.
            for late in [0, LATE] {
                let reset = reset_after(&driver, armed, late) as i64;
                if reset < (seconds - MARGIN) * 1000 {
                    say("reset while healthy", format!("{at}, reset after {reset} ms"));
                }
                // A trial that begins at its deadline or after it has 10 s.
                let bound = deadline.max(start + 10) + 16;
                if start * 1000 + reset > bound * 1000 {
                    say("outlives the deadline", format!("{at}, reset after {reset} ms"));
                }
            }
        }
    }
    found
}

#[test]
fn no_healthy_trial_is_reset_and_no_hang_outlives_its_deadline() {
    let good = DeadlineRule::read(INIT_GOOD).expect("the rule");
    assert_eq!(wrong(&good), [""; 0]);
    let old = DeadlineRule::read(INIT_OLD).expect("the rule");
    let found = wrong(&old);
    assert!(found.iter().any(|text| text.starts_with("reset while healthy")), "{found:?}");
}

#[test]
fn the_driver_resets_as_measured() {
    // 288 to 296 s: reset after 0 to 8 s, before the kernel's first feed at 8 s.
    let driver = driver();
    for (seconds, after) in [(288, 0), (291, 3), (295, 7), (10, 10), (15, 15)] {
        assert_eq!(reset_after(&driver, seconds, 0), after * 1000, "{seconds}");
    }
    // 287 has a remainder of 15: fed until 16 s before its end, and reset within the last second.
    let reset = reset_after(&driver, 287, 0);
    assert!((286_000..=287_000).contains(&reset), "{reset}");
    // A watchdog whose hardware supports every timeout.
    let other = WatchdogDriver { modulo: 0, ..driver };
    assert_eq!(reset_after(&other, 12, 0), 12_000);
}

/// The lines of `begin_trial` that compute `left`, run by a shell for every deadline and start second.
fn by_shell(shell: &[&str], init: &str) -> String {
    let body: Vec<&str> = init
        .lines()
        .skip_while(|line| !line.starts_with("begin_trial()"))
        .skip(1)
        .take_while(|line| !line.contains("watched=") && *line != "}")
        .collect();
    let body = body.join("\n").replace("$(seconds)", "start");
    let script = format!(
        "rule() {{\n{body}\n}}\ndeadline=1\nwhile [ $deadline -le 1800 ]; do\nstart=0\nwhile [ $start -le {LATEST_START} ]; do\n\
         rule; echo \"$deadline $start $left\"\nstart=$((start + 1))\ndone\ndeadline=$((deadline + 7))\ndone\n"
    );
    let (program, arguments) = shell.split_first().expect("a shell");
    let output = Command::new(program)
        .args(arguments)
        .arg("-c")
        .arg(script)
        .output()
        .expect("the shell runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("UTF-8")
}

#[test]
fn the_rule_is_understood_as_the_shell_runs_it() {
    for init in [INIT, INIT_GOOD, INIT_OLD] {
        let rule = DeadlineRule::read(init).expect("the rule");
        let text = by_shell(&["sh"], init);
        let mut lines = 0;
        for line in text.lines() {
            let numbers: Vec<i64> = line.split(' ').map(|n| n.parse().expect("a number")).collect();
            let seconds = rule.seconds(numbers[0], numbers[1]).expect("the rule");
            assert_eq!(seconds, numbers[2], "deadline {}, start {}", numbers[0], numbers[1]);
            lines += 1;
        }
        assert_eq!(lines, 258 * (LATEST_START + 1));
    }
}

#[test]
fn a_rule_in_another_form_is_not_guessed_at() {
    let odd = INIT_GOOD.replace("left=$(((left + 1) / 16 * 16 - 1))", "left=$(rounded \"$left\")");
    let error =
        DeadlineRule::read(&odd).and_then(|rule| rule.seconds(300, 5)).expect_err("not understood");
    assert!(error.contains("cannot "), "{error}");
}
