//! Stage 10, a restart after a panic: what resets the board when the kernel stops before any module is loaded.
//!
//! Sources: the Raspberry Pi has no PSCI; its restart handler is in drivers/watchdog/bcm2835_wdt.c. Where that is a
//! module, "Rebooting in 10 seconds.." is followed by "Reboot failed -- System halted" (seen with Debian's 6.1.192 in
//! QEMU's raspi3b and raspi4b). A watchdog that is already running resets the board.

use super::settings::reads_key;
use super::system::{BootSystem, SystemParts};
use super::{Boot, Run};

/// The upper byte of both registers must hold a password to start the watchdog (bcm2835_wdt.c: PM_PASSWORD, and
/// PM_RSTC_WRCFG_FULL_RESET).
const PASSWORD: u64 = 0x5a00_0000;
const FULL_RESET: u64 = 0x20;

pub(super) fn check(
    run: &mut Run<'_>,
    boot: Option<&Boot<'_>>,
    system: &BootSystem<'_>,
    parts: &SystemParts,
) {
    let psci = parts.tree.nodes.iter().any(|node| {
        parts.tree.enabled(node)
            && node.compatible().iter().any(|name| name.starts_with("arm,psci"))
    });
    let watchdog = run.soc.watchdog.clone();
    let built_in = parts.built_in_modules.contains(&watchdog);
    if psci || built_in {
        let who = if psci { "PSCI".to_owned() } else { format!("{watchdog}, built in") };
        run.step("kernel", format!("a panic restarts at any time: {who}"));
        return;
    }
    let [time, start] = run.soc.watchdog_start;
    let started = match (system.script, boot) {
        (Some(script), _) => {
            let writes = |at: u64, mark: u64| {
                script.writes.iter().any(|(to, value)| {
                    *to == at && value & 0xff00_0000 == PASSWORD && value & mark == mark
                })
            };
            writes(time.0, 0) && writes(start.0, FULL_RESET)
        }
        (None, Some(boot)) if boot.tryboot => {
            // On a Raspberry Pi 5 the EEPROM reads this setting, on older models the firmware on the card.
            let key = "kernel_watchdog_timeout";
            boot.is_on(key) && boot.program.is_none_or(|program| reads_key(program, key))
        }
        (None, Some(_)) => true,
        (None, None) => false,
    };
    if started {
        run.step(
            "kernel",
            format!("a panic before {watchdog} is loaded: the watchdog, started before the kernel"),
        );
        return;
    }
    let (place, help) = match system.script {
        Some(_) => (
            system.places[3].clone(),
            format!("set `watchdog-start` in [u-boot] of board.toml, which boot.scr runs on a trial: mw.l {:#x} 0x5a0fffff; mw.l {:#x} 0x5a000122", time.0, start.0),
        ),
        None => (system.places[0].clone(), "set kernel_watchdog_timeout below [tryboot] in config.txt, or use a kernel that has the driver built in".to_owned()),
    };
    run.stop(
        "panic-halts",
        place,
        format!("a panic before {watchdog} is loaded halts the board: the kernel has no other way to restart, and the watchdog is not running; a trial that fails like this is never rolled back"),
        help,
    );
}
