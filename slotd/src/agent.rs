//! The verbs. [`crate::lobby`] decides who may use them, and when.

use std::path::Path;
use std::process::Command;

use bundle::bootstate::Slot;
use bundle::{BundleInput, BundlePolicy, BundleReader, KeySet};
pub use contract::answer::{RestartKind, RobotStatus, SlotChange, TrialHealth, VerifyOutcome};
use contract::request::AgentVerb;
use serde_json::json;

use crate::admission::{self, ChangePermit};
use crate::boot::{self, BootControl};
use crate::components;
use crate::condition::DataState;
use crate::damage;
use crate::device::{RobotDevice, slot_role};
use crate::events::EventLog;
use crate::files::DirectFileChanges;
use crate::health::{self, TrialVerdict, TrialWatch, watchdog};
use crate::install::{self, InstallOptions, Progress};
use crate::machine::{RobotContext, SlotStorage};
use crate::record;
use crate::refusal::{Refusal, Result};
use crate::reserve;
use crate::root::RootDir;
use crate::trust::{self, TrustStore};
use crate::update;

/// The first bytes of a file system, which identify it; zero while a slot is written.
const FIRST: usize = bundle::BLOCK_SIZE;

/// The robot, opened.
pub struct Agent {
    device: RobotDevice,
    flow: Box<dyn BootControl>,
    events: EventLog,
}

/// The result for a verified bundle, or for a slot that was compared with it.
fn verify_outcome<I: BundleInput>(
    reader: &BundleReader<I>,
    slot: Option<Slot>,
    size: u64,
) -> VerifyOutcome {
    VerifyOutcome {
        slot,
        version: reader.manifest().version.clone(),
        manifest: reader.manifest_sha256().to_owned(),
        signed_by: reader.signed_by().to_vec(),
        size,
    }
}

impl Agent {
    /// Opens this robot.
    ///
    /// # Errors
    /// `bad-device`, `unknown-slot`, `wrong-layout` or `io`.
    pub fn open(root: &RootDir) -> Result<Self> {
        let device = RobotDevice::read(root)?;
        let flow = boot::open(&device)?;
        Ok(Self { device, flow, events: EventLog::new(root) })
    }

    /// Its log.
    pub fn events(&self) -> &EventLog {
        &self.events
    }

    /// What the robot is.
    pub fn device(&self) -> &RobotDevice {
        &self.device
    }

    /// How its slot is chosen.
    pub fn flow(&self) -> &dyn BootControl {
        self.flow.as_ref()
    }

    /// Requests the permission for a verb ([`admission::request_permit`]).
    ///
    /// # Errors
    /// The refusal, which is also logged unless it is `busy`.
    pub fn request_permit(&self, verb: AgentVerb) -> Result<ChangePermit> {
        let robot = self.robot();
        let permit =
            admission::request_permit(robot.root, verb, || install::admission_state(&robot));
        permit.map_err(|refusal| match refusal.code.as_ref() {
            "busy" => refusal,
            _ => self.refused(refusal),
        })
    }

    fn robot(&self) -> RobotContext<'_> {
        RobotContext {
            root: self.device.root(),
            about: &self.device.about,
            running: self.device.running,
            flow: self.flow.as_ref(),
            slots: &self.device,
            files: &DirectFileChanges,
            events: &self.events,
        }
    }

    /// The robot's status. Nothing is changed, and no lock is waited for.
    ///
    /// # Errors
    /// `boot-state`, `io`.
    pub fn status(&self) -> Result<RobotStatus> {
        let (about, root) = (&self.device.about, self.device.root());
        let boot = self.flow.status()?;
        let trust = TrustStore::read(&self.robot());
        // The status must also work without a key.
        let keys = trust.keys().unwrap_or_default();
        let mut alarms: Vec<String> = Vec::new();
        let health = health::read_state(root).unwrap_or_default();
        let data = DataState::read(root).ok();
        alarms.extend(data.as_ref().and_then(DataState::alarm));
        alarms.extend(trust.alarms);
        alarms.extend(damage::find_damaged(root).into_iter().map(|damage| damage.what));
        let pending = boot.pending(self.device.running);
        let runs = pending.is_some_and(|trial| trial.slot == self.device.running);
        Ok(RobotStatus {
            product: about.product.clone(),
            board: about.board.clone(),
            version: about.version.clone(),
            running: self.device.running,
            boot_id: root.boot_id().ok(),
            pending: pending.is_some(),
            boot,
            health: health
                .filter(|_| runs)
                .map(|state| TrialHealth { why: state.why(), state: Some(state) }),
            other: record::read_slot(root, self.device.idle()),
            // The lobby adds it.
            job: None,
            interrupted: record::read_journal(root),
            floor: trust.floor,
            keys: keys.keys.iter().filter(|key| !key.revoked).count(),
            api: components::status(root),
            alarm: Some(alarms.join("\n")).filter(|_| !alarms.is_empty()),
            data: data.map(Into::into),
        })
    }

    /// Verifies a whole bundle as an install would, and writes nothing.
    ///
    /// # Errors
    /// The refusals of a bundle, as in an install.
    pub fn verify<I: BundleInput>(
        &self,
        input: I,
        progress: &(dyn Fn(u64) + Sync),
    ) -> Result<VerifyOutcome> {
        let robot = self.robot();
        let trust = TrustStore::read(&robot);
        let mut reader = BundleReader::open(input, &trust.keys()?).map_err(install::from_source)?;
        install::check_manifest(&robot, &trust.floor, &reader, &InstallOptions::default())?;
        let mut size = 0;
        reader
            .verify(|bytes| {
                size += bytes;
                progress(size);
            })
            .map_err(install::from_source)?;
        Ok(verify_outcome(&reader, None, size))
    }

    /// Compares a slot, which may be the running one, with a bundle, block by block. Of the bundle's payloads only
    /// the indexes are read, and nothing is written.
    ///
    /// # Errors
    /// `slot-differs`, with the places. The refusals of a bundle, except those of floor and key epoch: the slot may
    /// have an old system. `io`: a partition cannot be read.
    pub fn verify_slot<I: BundleInput>(
        &self,
        input: I,
        slot: Slot,
        progress: &(dyn Fn(Progress) + Sync),
    ) -> Result<VerifyOutcome> {
        let robot = RobotContext { slots: &install::ReadOnlySlots(&self.device), ..self.robot() };
        let keys = TrustStore::read(&robot).keys()?;
        let mut reader = BundleReader::open(input, &keys).map_err(install::from_source)?;
        let about = robot.about;
        let (product, board) = (Some(about.product.as_str()), Some(about.board.as_str()));
        reader.check(&BundlePolicy { product, board, ..BundlePolicy::default() })?;
        let size = install::compare(&robot, &mut reader, slot, progress)?;
        Ok(verify_outcome(&reader, Some(slot), size))
    }

    /// Compares all files of the APIs on `data`, the one that serves and those that are kept, with their stored hashes.
    /// Nothing is written, and nothing is installed meanwhile.
    ///
    /// # Errors
    /// `api-differs`, with the files. `io`.
    pub fn verify_api(&self, _: &ChangePermit) -> Result<components::ApiVerifyOutcome> {
        components::verify(self.device.root())
    }

    /// Installs a bundle: a system into the idle slot, whose trial [`Agent::restart`] then begins, or an API,
    /// which serves at once.
    ///
    /// # Errors
    /// As [`update::install`].
    pub fn install<I: BundleInput>(
        &self,
        input: I,
        options: &InstallOptions,
        progress: &(dyn Fn(Progress) + Sync),
    ) -> Result<update::InstallOutcome> {
        update::install(&self.robot(), input, options, progress)
    }

    /// Makes the running slot the committed one, and raises the floor to that of its bundle.
    ///
    /// # Errors
    /// `boot-state`, `io`. `watchdog`: systemd does not take the watchdog over; everything else is done.
    pub fn commit(&self, permit: ChangePermit) -> Result<SlotChange> {
        let running = self.device.running;
        let status = self.flow.status()?;
        if status.active != running || status.trial.is_some() {
            self.flow.commit()?;
            self.events
                .add("committed", json!({ "slot": running, "version": self.device.about.version }));
        }
        // After the commit: a floor that was raised by a system which is then rolled back would exclude its predecessor.
        // If the power fails in between, the running system itself still has these requirements, and `install` and
        // `boot-other` store them before another system can start.
        let robot = self.robot();
        reserve::with_reserve_released(robot.root, || {
            update::store_requirements(&robot);
            update::remove_damaged(&robot);
        });
        // Slots and boot state are final: the next install need not wait for systemd.
        drop(permit);
        // Last: until then the deadline applies; when it passes, the slot starts that is now committed.
        watchdog::hand_over(self.device.root())?;
        Ok(SlotChange { slot: running, restart: None })
    }

    /// Ends a trial: the committed slot runs from the next restart on.
    ///
    /// # Errors
    /// `boot-state`, `io`.
    pub fn roll_back(&self, _: &ChangePermit) -> Result<SlotChange> {
        let status = self.flow.status()?;
        self.flow.roll_back()?;
        let tried = status.trial.map(|trial| trial.slot);
        let restart = (tried == Some(self.device.running)).then_some(RestartKind::Committed);
        self.events.add("rolled-back", json!({ "slot": status.active, "tried": tried }));
        Ok(SlotChange { slot: status.active, restart })
    }

    /// Goes back to the previous good API, or to the built-in one. Only the API's services restart.
    ///
    /// # Errors
    /// As [`components::roll_back`].
    pub fn api_back(&self, _: &ChangePermit) -> Result<components::ApiRollback> {
        components::roll_back(self.device.root(), &self.events, &DirectFileChanges)
            .map_err(|refusal| self.refused(refusal))
    }

    /// Tries the other slot, which must be complete; or goes back to the committed one, if the other one
    /// is running instead.
    ///
    /// # Errors
    /// `below-floor`, `incomplete-slot`, `boot-state`, `io`.
    pub fn boot_other(
        &self,
        _: &ChangePermit,
        allow_downgrade: Option<&str>,
    ) -> Result<SlotChange> {
        let slot = self.device.idle();
        // All other undecided states of the slots were refused before (`crate::policy`).
        if self.flow.status()?.active != self.device.running {
            return Ok(SlotChange { slot, restart: Some(RestartKind::Committed) });
        }
        let robot = self.robot();
        update::store_requirements(&robot);
        let version = record::read_slot(robot.root, slot).map(|installed| installed.version);
        let floor = TrustStore::read(&robot).floor.version;
        // An unknown system may have any version.
        let below = floor.filter(|floor| version.as_ref().is_none_or(|version| version < floor));
        if let (Some(floor), None) = (&below, allow_downgrade) {
            let known = version.as_ref().map_or("is not known".to_owned(), |v| format!("is {v}"));
            return Err(self.refused(Refusal::new(
                "below-floor",
                format!(
                    "the version in slot {slot} {known}, but this robot requires {floor} or later"
                ),
                "install a newer bundle, or override with `--allow-downgrade REASON`",
            )));
        }
        let suffix = slot_role("", slot);
        for role in self.device.about.partitions.keys() {
            let Some(role) = role.strip_suffix(&suffix) else { continue };
            let mut first = crate::buffer::AlignedBuffer::new(FIRST);
            let device = self.device.open(slot, role)?;
            device.read_back(0, &mut first).map_err(|error| {
                Refusal::io(format!("reading {}", slot_role(role, slot)), &error)
            })?;
            if bundle::index::is_zero(&first) {
                return Err(self.refused(Refusal::new(
                    "incomplete-slot",
                    format!("slot {slot} has no complete system: an install into it was interrupted, or nothing was installed"),
                    "install a bundle into it",
                )));
            }
        }
        if let (Some(floor), Some(reason)) = (&below, allow_downgrade) {
            self.events.add(
                "downgrade-allowed",
                json!({ "slot": slot, "version": version, "floor": floor, "reason": reason }),
            );
        }
        self.flow.arm_trial(slot)?;
        self.events.add("trial-armed", json!({ "slot": slot }));
        Ok(SlotChange { slot, restart: Some(RestartKind::Trial) })
    }

    /// The accepted keys.
    ///
    /// # Errors
    /// `key-set`, `no-keys`.
    pub fn keys(&self) -> Result<KeySet> {
        TrustStore::read(&self.robot()).keys()
    }

    /// Installs a newer key set that a trusted key has signed.
    ///
    /// # Errors
    /// As [`trust::install_key_set`].
    pub fn take_keys(&self, _: &ChangePermit, file: &Path) -> Result<KeySet> {
        update::store_requirements(&self.robot());
        // A full `data` must not prevent the revocation of a key.
        let robot = self.robot();
        let taken =
            reserve::with_reserve_released(robot.root, || trust::install_key_set(&robot, file));
        let set = taken.map_err(|refusal| self.refused(refusal))?;
        self.events.add("key-set-taken", json!({ "serial": set.serial, "keys": set.keys }));
        Ok(set)
    }

    /// Runs every health check once.
    ///
    /// # Errors
    /// `unhealthy`, with the checks that fail.
    pub fn health(&self) -> Result<Vec<health::CheckOutcome>> {
        let root = self.device.root();
        let outcomes: Vec<health::CheckOutcome> =
            health::load_checks(root).iter().map(|check| check.run(root)).collect();
        let failing: Vec<String> = outcomes
            .iter()
            .filter(|outcome| !outcome.healthy)
            .map(|outcome| format!("FAILS {}: {}", outcome.name, outcome.found))
            .collect();
        if failing.is_empty() {
            return Ok(outcomes);
        }
        Err(Refusal::new(
            "unhealthy",
            failing.join("\n"),
            "for a unit, see `journalctl -u UNIT`; for a program, run it by hand to see all of its output",
        ))
    }

    /// Watches the running trial, if there is one: commits it when all checks pass, otherwise restarts in an
    /// orderly way shortly before the watchdog would.
    ///
    /// # Errors
    /// `io`, `restart`.
    pub fn watch(&self) -> Result<Option<TrialVerdict>> {
        let root = self.device.root();
        let Some(trial) = health::TrialRecord::read(root)? else { return Ok(None) };
        let checks = health::load_checks(root);
        let verdict = TrialWatch::new(root, &checks, trial).run(
            || {
                self.request_permit(AgentVerb::Commit)
                    .and_then(|permit| self.commit(permit))
                    .map(drop)
            },
            |state| {
                self.events.add("health", json!({ "why": state.why(), "checks": state.checks }))
            },
        )?;
        if let TrialVerdict::OutOfTime(state) = &verdict {
            self.events.add("trial-failed", json!({ "why": state.why() }));
            self.restart(RestartKind::Committed)?;
        }
        Ok(Some(verdict))
    }

    /// Restarts the robot in an orderly way. With a test's root nothing is restarted.
    ///
    /// # Errors
    /// `restart`: the init system does not accept the request.
    pub fn restart(&self, into: RestartKind) -> Result<bool> {
        if !self.device.root().is_system() {
            return Ok(false);
        }
        let mut command = Command::new("systemctl");
        command.arg("reboot");
        let argument = self.flow.restart_argument().filter(|_| into == RestartKind::Trial);
        if let Some(argument) = argument {
            command.arg(format!("--reboot-argument={argument}"));
        }
        let failed = |why: String| {
            Refusal::new("restart", format!("restarting: {why}"), "restart the robot by hand")
        };
        let status = command.status().map_err(|error| failed(error.to_string()))?;
        if status.success() { Ok(true) } else { Err(failed(format!("systemctl: {status}"))) }
    }

    fn refused(&self, refusal: Refusal) -> Refusal {
        self.events.add("refused", json!(refusal));
        refusal
    }
}
