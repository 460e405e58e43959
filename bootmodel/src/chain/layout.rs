//! Stage 13, what shares an erase block: a power cut in a write can destroy what was written before in its
//! neighbourhood, so what must not be lost together lies apart.
//!
//! Sources: Tseng, Grupp, Swanson, DAC 2011; Zheng et al., FAST 2013; units of 4 MiB on common cards:
//! wiki.linaro.org, FlashCardSurvey; 8 MiB in practice: mendersoftware/mender-docs#79, rpi-image-gen (`align = 8M`).

use super::{Place, Run};

/// What a card may erase at once.
const UNIT: u64 = 8 << 20;

pub(super) fn check(run: &mut Run<'_>) {
    let card = run.card;
    if card.slots.len() < 2 {
        run.stop(
            "slot-alone",
            Place::card(),
            "only one partition has a system in it: there is none to come back to".to_owned(),
            "partitions of the roles root-a and root-b in board.toml".to_owned(),
        );
    }
    let mut alone = vec![("the partition table".to_owned(), 0)];
    for (number, sector) in (1..).zip(&card.device.boot_state.sectors) {
        alone.push((format!("copy {number} of the boot state"), sector.saturating_mul(512)));
    }
    let mut starts: Vec<u64> = card.partitions.values().copied().collect();
    starts.sort_unstable();
    if let Some(first) = starts.first() {
        alone.push(("the first partition".to_owned(), *first));
    }
    let help = "`first-partition` and `boot-state` in board.toml: 8 MiB and more apart";
    for (index, (what, offset)) in alone.iter().enumerate() {
        for (other, at) in &alone[index + 1..] {
            if offset / UNIT == at / UNIT {
                run.degrade(
                    "shared-unit",
                    Place::card(),
                    format!("{what} (at {offset}) and {other} (at {at}) lie in one unit of 8 MiB: a cut while one is written can destroy both"),
                    help.to_owned(),
                );
            }
        }
    }
    let second = starts.get(1).filter(|at| *at % UNIT != 0);
    if let (Some(at), "tryboot") = (second, card.device.boot_flow.as_str()) {
        run.degrade(
            "shared-unit",
            Place::card(),
            format!("the second partition (at {at}) begins in the last unit of 8 MiB of the first, which every commit writes"),
            "a size of `boot` in board.toml that is a multiple of 8 MiB".to_owned(),
        );
    }
}
