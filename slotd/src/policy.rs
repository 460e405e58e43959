//! Which caller may use which verb, and in which state of the robot. Both are pure tables with a line for each verb; no
//! other code of the agent decides either.

use contract::job::CallerRights;
use contract::refusal::Refusal;
use contract::request::{AgentRequest, AgentVerb};

/// Maximum number of log events for the user `update`.
pub const MOST_EVENTS: usize = 10_000;

/// The account whose sessions may update the robot and do nothing else. The product defines it (`[[users]]`); its keys are
/// on `data`.
pub const USER: &str = "update";

/// The refusal of a command that [`USER`] may not run.
pub fn not_offered(what: &str) -> Refusal {
    let escaped: String =
        what.chars().take(80).map(|c| if c.is_control() { '?' } else { c }).collect();
    Refusal::new(
        "not-offered",
        format!("the user {USER} may not run `{escaped}`"),
        "allowed: status, health, log [-n NUMBER], verify -, install - [--no-restart]; a bundle is read from standard input",
    )
}

/// Whether a caller with these rights may make this request. The user `update` may not start older software, replace data
/// or keys, or name a file on the robot.
pub fn is_allowed(rights: CallerRights, request: &AgentRequest) -> bool {
    match (rights, request) {
        (CallerRights::All, _) => true,
        (CallerRights::Update, AgentRequest::Status | AgentRequest::Health) => true,
        (CallerRights::Update, AgentRequest::Log { last }) => {
            last.is_none_or(|last| last <= MOST_EVENTS)
        }
        (CallerRights::Update, AgentRequest::Verify { source, slot }) => {
            source == "-" && slot.is_none()
        }
        (CallerRights::Update, AgentRequest::Install { source, allow_downgrade, .. }) => {
            source == "-" && allow_downgrade.is_none()
        }
        (CallerRights::Update, _) => false,
    }
}

/// The states that exclude a verb.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VerbRules {
    /// Another operation is running; the verb takes the lock itself.
    pub busy: bool,
    /// A trial has not started yet.
    pub trial_waits: bool,
    /// A trial is running.
    pub trial_runs: bool,
    /// The running slot is not the committed one, and there is no trial.
    pub not_committed: bool,
    /// The boot state cannot be read.
    pub unknown: bool,
    /// There is no trial.
    pub no_trial: bool,
    /// The image is for another board.
    pub wrong_board: bool,
    /// `data` is read-only.
    pub no_data: bool,
}

/// For verbs that only read, and for the steps of a start, during which there are no other requests: they never wait.
const NOTHING: VerbRules = VerbRules {
    busy: false,
    trial_waits: false,
    trial_runs: false,
    not_committed: false,
    unknown: false,
    no_trial: false,
    wrong_board: false,
    no_data: false,
};

/// For verbs that need only the lock.
const TURN: VerbRules = VerbRules { busy: true, ..NOTHING };

/// For verbs that write or start a slot: while a trial is undecided, that slot may be the only good one.
const DECIDED: VerbRules =
    VerbRules { trial_waits: true, trial_runs: true, not_committed: true, unknown: true, ..TURN };

/// The rules of each verb.
pub fn rules_for(verb: AgentVerb) -> VerbRules {
    match verb {
        AgentVerb::Status
        | AgentVerb::Report
        | AgentVerb::Log
        | AgentVerb::Health
        | AgentVerb::Keys
        | AgentVerb::Verify
        | AgentVerb::Backup
        | AgentVerb::CheckProvisioned
        | AgentVerb::Job
        | AgentVerb::CancelJob => NOTHING,
        // The watch commits by a request of its own.
        AgentVerb::Watch => NOTHING,
        AgentVerb::ProvisionAtStart
        | AgentVerb::GrowData
        | AgentVerb::PrepareData
        | AgentVerb::TakeSeed => NOTHING,
        // The compared files must not change meanwhile.
        AgentVerb::VerifyApi => TURN,
        // A full `data`, or one in memory, must not prevent the update that fixes it. Whether an API fits on `data` is
        // checked once the bundle is known to have one.
        AgentVerb::Install => VerbRules { wrong_board: true, ..DECIDED },
        AgentVerb::Commit => VerbRules { trial_waits: true, unknown: true, ..TURN },
        AgentVerb::RollBack => VerbRules { no_trial: true, unknown: true, ..TURN },
        AgentVerb::RollBackApi => VerbRules { no_data: true, ..DECIDED },
        // If the committed slot did not start, this verb goes back to it.
        AgentVerb::BootOther => VerbRules { not_committed: false, ..DECIDED },
        // It must always be possible to revoke a key.
        AgentVerb::TakeKeys => VerbRules { no_data: true, ..TURN },
        // Both restart the robot, which would begin or end a trial. They write no slot, and must also work with a damaged
        // boot state.
        AgentVerb::Reset | AgentVerb::Restore => {
            VerbRules { trial_waits: true, trial_runs: true, no_data: true, ..TURN }
        }
        // An install of an API includes provisioning.
        AgentVerb::Provision => TURN,
    }
}

/// The state of the robot, as far as the rules need it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdmissionState {
    /// The state of the slots.
    pub slots: SlotsState,
    /// The refusal because there is no trial; `None`: there is a trial, which may have failed.
    pub no_trial: Option<Refusal>,
    /// The refusal because the image is for another machine; `None`: it is for this one.
    pub wrong_board: Option<Refusal>,
    /// The refusal because `data` is read-only; `None`: it is writable.
    pub no_data: Option<Refusal>,
}

/// The state of the slots.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SlotsState {
    /// The running slot is committed. A trial may have failed.
    Decided,
    /// A trial begins with the next restart.
    TrialWaits(Refusal),
    /// A trial is running.
    TrialRuns(Refusal),
    /// The running slot is not the committed one, and there is no trial.
    NotCommitted(Refusal),
    /// The boot state cannot be read.
    Unknown(Refusal),
}

/// Checks a verb against the state of the robot.
///
/// # Errors
/// The refusal of the first rule that excludes the verb: `trial-pending`, `not-committed`, `nothing-on-trial`,
/// `wrong-board`, `no-data`, or the error of reading the boot state.
pub fn check_state(verb: AgentVerb, standing: &AdmissionState) -> Result<(), Refusal> {
    let rules = rules_for(verb);
    match &standing.slots {
        SlotsState::TrialWaits(why) if rules.trial_waits => return Err(why.clone()),
        SlotsState::TrialRuns(why) if rules.trial_runs => return Err(why.clone()),
        SlotsState::NotCommitted(why) if rules.not_committed => return Err(why.clone()),
        SlotsState::Unknown(why) if rules.unknown => return Err(why.clone()),
        _ => {}
    }
    let others = [
        (rules.no_trial, &standing.no_trial),
        (rules.wrong_board, &standing.wrong_board),
        (rules.no_data, &standing.no_data),
    ];
    match others.into_iter().find_map(|(asked, why)| why.as_ref().filter(|_| asked)) {
        Some(why) => Err(why.clone()),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn why(code: &'static str) -> Refusal {
        Refusal::new(code, "message", "help")
    }

    /// Every standing: six of the slots, the board and `data` each good and bad.
    fn standings() -> Vec<(&'static str, AdmissionState)> {
        let slots = [
            ("decided", SlotsState::Decided),
            ("failed", SlotsState::Decided),
            ("waits", SlotsState::TrialWaits(why("trial-pending"))),
            ("runs", SlotsState::TrialRuns(why("trial-pending"))),
            ("not-committed", SlotsState::NotCommitted(why("not-committed"))),
            ("unknown", SlotsState::Unknown(why("boot-state"))),
        ];
        let mut all = Vec::new();
        for (name, slots) in slots {
            for wrong_board in [None, Some(why("wrong-board"))] {
                for no_data in [None, Some(why("no-data"))] {
                    let wrong_board = wrong_board.clone();
                    let none = matches!(name, "decided" | "not-committed");
                    let no_trial = none.then(|| why("nothing-on-trial"));
                    let slots = slots.clone();
                    all.push((name, AdmissionState { slots, no_trial, wrong_board, no_data }));
                }
            }
        }
        all
    }

    /// What a verb is refused with in each state of the slots, where board and `data` are good: written down a second time,
    /// so that a change of the table is a change of this one.
    fn expected(verb: AgentVerb, slots: &str) -> Option<&'static str> {
        let trial = matches!(slots, "waits" | "runs");
        match verb {
            AgentVerb::Install | AgentVerb::RollBackApi => match slots {
                "waits" | "runs" => Some("trial-pending"),
                "not-committed" => Some("not-committed"),
                "unknown" => Some("boot-state"),
                _ => None,
            },
            AgentVerb::BootOther => match slots {
                "waits" | "runs" => Some("trial-pending"),
                "unknown" => Some("boot-state"),
                _ => None,
            },
            AgentVerb::Commit => match slots {
                "waits" => Some("trial-pending"),
                "unknown" => Some("boot-state"),
                _ => None,
            },
            AgentVerb::RollBack => match slots {
                "decided" | "not-committed" => Some("nothing-on-trial"),
                "unknown" => Some("boot-state"),
                _ => None,
            },
            AgentVerb::Reset | AgentVerb::Restore => trial.then_some("trial-pending"),
            _ => None,
        }
    }

    #[test]
    fn every_verb_is_admitted_or_refused_as_it_is_written_down() {
        let mut refused = 0;
        for verb in AgentVerb::ALL {
            for (slots, standing) in standings() {
                let board = standing.wrong_board.is_some() && verb == AgentVerb::Install;
                let data = standing.no_data.is_some()
                    && matches!(
                        verb,
                        AgentVerb::RollBackApi
                            | AgentVerb::TakeKeys
                            | AgentVerb::Reset
                            | AgentVerb::Restore
                    );
                let expected = expected(verb, slots)
                    .or(board.then_some("wrong-board"))
                    .or(data.then_some("no-data"));
                let found =
                    check_state(verb, &standing).err().map(|refusal| refusal.code.into_owned());
                assert_eq!(found.as_deref(), expected, "{verb:?}, {slots}");
                refused += usize::from(found.is_some());
            }
        }
        assert_eq!(standings().len() * AgentVerb::ALL.len(), 24 * 25);
        assert!(refused > 100, "only {refused}");
    }

    #[test]
    fn what_changes_something_has_a_turn_of_its_own_and_what_looks_has_none() {
        for verb in AgentVerb::ALL {
            let looks = matches!(
                verb,
                AgentVerb::Status
                    | AgentVerb::Report
                    | AgentVerb::Log
                    | AgentVerb::Health
                    | AgentVerb::Watch
                    | AgentVerb::Keys
                    | AgentVerb::Verify
                    | AgentVerb::Backup
                    | AgentVerb::CheckProvisioned
                    | AgentVerb::Job
                    | AgentVerb::CancelJob
            );
            let of_a_start = matches!(
                verb,
                AgentVerb::ProvisionAtStart
                    | AgentVerb::GrowData
                    | AgentVerb::PrepareData
                    | AgentVerb::TakeSeed
            );
            assert_eq!(rules_for(verb).busy, !looks && !of_a_start, "{verb:?}");
            if looks || of_a_start {
                assert_eq!(rules_for(verb), NOTHING, "{verb:?}");
            }
        }
    }

    #[test]
    fn the_user_update_may_ask_for_news_and_newer_software_alone() {
        let install = |source: &str, why: Option<&str>| AgentRequest::Install {
            source: source.to_owned(),
            no_restart: true,
            allow_downgrade: why.map(str::to_owned),
        };
        let verify = |source: &str, slot| AgentRequest::Verify { source: source.to_owned(), slot };
        for good in [
            AgentRequest::Status,
            AgentRequest::Health,
            AgentRequest::Log { last: None },
            AgentRequest::Log { last: Some(MOST_EVENTS) },
            verify("-", None),
            install("-", None),
        ] {
            assert!(is_allowed(CallerRights::Update, &good), "{good:?}");
        }
        let file = || "/data/x".to_owned();
        for bad in [
            AgentRequest::Report,
            AgentRequest::Log { last: Some(MOST_EVENTS + 1) },
            AgentRequest::Watch,
            verify("/data/x", None),
            verify("-", Some(bundle::bootstate::Slot::A)),
            AgentRequest::VerifyApi,
            install("http://robot/x", None),
            install("-", Some("why")),
            AgentRequest::Commit,
            AgentRequest::RollBack { no_restart: false },
            AgentRequest::RollBackApi,
            AgentRequest::BootOther { no_restart: true, allow_downgrade: None },
            AgentRequest::Keys,
            AgentRequest::TakeKeys { file: file().into() },
            AgentRequest::Reset { backup: true, no_restart: true },
            AgentRequest::Backup { file: file() },
            AgentRequest::Restore { file: file(), no_restart: true },
            AgentRequest::Provision,
            AgentRequest::ProvisionAtStart,
            AgentRequest::CheckProvisioned,
            AgentRequest::GrowData,
            AgentRequest::PrepareData,
            AgentRequest::TakeSeed,
            AgentRequest::Job,
            AgentRequest::CancelJob,
        ] {
            assert!(!is_allowed(CallerRights::Update, &bad), "{bad:?}");
            assert!(is_allowed(CallerRights::All, &bad), "{bad:?}");
        }
    }
}
