//! Stage 13, erase blocks: a power cut during a write can destroy older data in the same erase block. So data that
//! must not be lost together is kept in different erase blocks.
//!
//! Sources: Tseng, Grupp, Swanson, DAC 2011; Zheng et al., FAST 2013; units of 4 MiB on common cards:
//! wiki.linaro.org, FlashCardSurvey; 8 MiB in practice: mendersoftware/mender-docs#79, rpi-image-gen (`align = 8M`).

use super::{CardLocation, Run};

/// Bytes that a card may erase at once.
const UNIT: u64 = 8 << 20;

pub(super) fn check(run: &mut Run<'_>) {
    let card = run.card;
    if card.slots.len() < 2 {
        run.stop(
            "slot-alone",
            CardLocation::card(),
            "only one partition has a system: there is no other one to roll back to".to_owned(),
            "define partitions with the roles root-a and root-b in board.toml".to_owned(),
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
    let help = "put `first-partition` and `boot-state` in board.toml at least 8 MiB apart";
    for (index, (what, offset)) in alone.iter().enumerate() {
        for (other, at) in &alone[index + 1..] {
            if offset / UNIT == at / UNIT {
                run.degrade(
                    "shared-unit",
                    CardLocation::card(),
                    format!("{what} (at {offset}) and {other} (at {at}) are in the same 8 MiB unit: a power cut while one is written can destroy both"),
                    help.to_owned(),
                );
            }
        }
    }
    let second = starts.get(1).filter(|at| *at % UNIT != 0);
    if let (Some(at), "tryboot") = (second, card.device.boot_flow.as_str()) {
        run.degrade(
            "shared-unit",
            CardLocation::card(),
            format!("the second partition (at {at}) begins in the last 8 MiB unit of the first one, and every commit writes to that one"),
            "set the size of `boot` in board.toml to a multiple of 8 MiB".to_owned(),
        );
    }
}
