//! Every earlier form is read for ever, and what is written today is what the other side's earlier reader takes.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test may fail by panicking"
)]

mod previous;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use bundle::bootstate::Slot;
use contract::Refusal;
use contract::answer::{
    ApiRollback, CheckOutcome, DataCondition, InstallOutcome, InstallStep, Progress, RestartKind,
    RobotEvent, RobotStatus, ServingApi, SlotChange, TrialPhase,
};
use contract::api_file::ApiFile;
use contract::device_file::{BootFlow, DeviceFile, RawSectors};
use contract::health_file::{CheckTarget, HealthFile};
use contract::seed_file::{SeedFile, WifiNetwork};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

fn fixtures(folder: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(folder)
}

fn file(name: &str) -> String {
    fs::read_to_string(fixtures("files").join(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
}

fn text(name: &str) -> String {
    fs::read_to_string(fixtures("answers").join(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
}

fn answer<T: DeserializeOwned>(name: &str) -> T {
    serde_json::from_str(&text(&format!("{name}.json"))).unwrap_or_else(|e| panic!("{name}: {e}"))
}

/// Reads an answer and writes it again: not a word of it is lost.
fn whole<T: DeserializeOwned + serde::Serialize>(name: &str) -> T {
    let read: T = answer(name);
    let again = serde_json::to_value(&read).unwrap();
    assert_eq!(again, answer::<Value>(name), "{name}");
    read
}

#[test]
fn every_answer_of_before_is_read_whole() {
    let flashed: RobotStatus = whole("status-flashed");
    assert_eq!((flashed.running, flashed.pending, flashed.api), (Slot::A, false, None));
    let armed: RobotStatus = whole("status-armed");
    assert_eq!(armed.boot.pending(armed.running).unwrap().slot, Slot::B);
    let on_trial: RobotStatus = whole("status-on-trial");
    let health = on_trial.health.unwrap();
    assert!(health.why.starts_with("not healthy yet, 90 s left: startup"), "{}", health.why);
    assert_eq!(health.state.unwrap().phase, TrialPhase::Checking);
    assert_eq!(on_trial.data.unwrap().condition, DataCondition::Repaired);
    let interrupted: RobotStatus = whole("status-interrupted");
    assert_eq!(interrupted.interrupted.unwrap().frames, 7);
    assert!(interrupted.alarm.unwrap().contains("slot-a.json is damaged"));
    let api = whole::<RobotStatus>("status-api").api.unwrap();
    assert_eq!(
        (api.serves, api.version.as_str(), api.good.len()),
        (ServingApi::Installed, "10.1.0", 2)
    );

    let InstallOutcome::System(system) = whole("install") else { panic!("not a system") };
    assert_eq!((system.slot, system.resumed), (Slot::B, false));
    let InstallOutcome::Api(api) = whole("install-api") else { panic!("not an API") };
    assert_eq!((api.before.as_deref(), api.reused), (Some("10.0.0"), 1));
    assert_eq!(whole::<SlotChange>("roll-back").restart, None);
    assert_eq!(whole::<SlotChange>("boot-other").restart, Some(RestartKind::Trial));
    assert_eq!(whole::<SlotChange>("commit").slot, Slot::B);
    assert_eq!(whole::<ApiRollback>("roll-back-api").version.as_deref(), Some("10.0.0"));
    for name in ["log", "log-api"] {
        assert!(whole::<Vec<RobotEvent>>(name).iter().all(|event| event.number > 0), "{name}");
    }
    for name in
        ["refused-trial-pending", "refused-nothing-on-trial", "refused-below-floor", "health"]
    {
        let answer: Value = answer(name);
        let refusal: Refusal = serde_json::from_value(answer["refused"].clone()).unwrap();
        assert_eq!(json!({ "refused": refusal }), answer, "{name}");
        assert!(name == "health" || name == format!("refused-{}", refusal.code), "{name}");
    }
    let lines = text("install.progress");
    assert!(lines.lines().count() > 1);
    for line in lines.lines() {
        let value: Value = serde_json::from_str(line).unwrap();
        let progress: Progress = serde_json::from_value(value["progress"].clone()).unwrap();
        assert_eq!(json!({ "progress": progress }), value);
    }
}

#[test]
fn every_fixture_is_looked_at() {
    let source =
        fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/forms.rs")).unwrap();
    // Their formats belong to other crates, or consist of two words.
    let elsewhere = [
        "backup",
        "health-watch",
        "keys",
        "reset",
        "restore",
        "verify",
        "verify-api",
        "verify-slot",
    ];
    let mut missing = BTreeSet::new();
    for entry in
        fs::read_dir(fixtures("answers")).unwrap().chain(fs::read_dir(fixtures("files")).unwrap())
    {
        let name = entry.unwrap().file_name().into_string().unwrap();
        let stem = name.split('.').next().unwrap();
        if !source.contains(&format!("\"{stem}")) && !elsewhere.contains(&stem) {
            missing.insert(name);
        }
    }
    assert!(missing.is_empty(), "no test reads {missing:?}");
}

#[test]
fn an_answer_of_a_later_agent_is_understood() {
    let mut status: Value = answer("status-api");
    status["later"] = json!({ "x": 1 });
    status["boot"]["later"] = json!(1);
    status["api"]["serves"] = json!("elsewhere");
    status["data"]["condition"] = json!("rebuilding");
    status["health"] = json!({ "why": "on its way", "state": { "phase": "dreaming" } });
    let status: RobotStatus = serde_json::from_value(status).unwrap();
    assert_eq!((status.running, status.api, status.data), (Slot::A, None, None));
    let health = status.health.unwrap();
    assert_eq!((health.why.as_str(), health.state), ("on its way", None));
    let progress: Progress =
        serde_json::from_value(json!({ "step": "polish", "done": 1, "total": 2, "eta": 3 }))
            .unwrap();
    assert_eq!((progress.step, progress.step.describe()), (InstallStep::Unknown, "working"));
    let refusal: Refusal = serde_json::from_value(
        json!({ "code": "held", "message": "m", "help": "h", "holder": "api" }),
    )
    .unwrap();
    assert_eq!((refusal.code.as_ref(), refusal.kind() as u8), ("held", 1));
}

#[test]
fn what_is_written_today_is_what_the_reader_before_takes() {
    for name in
        ["status-flashed", "status-armed", "status-on-trial", "status-interrupted", "status-api"]
    {
        let status: RobotStatus = answer(name);
        let text = serde_json::to_string(&status).unwrap();
        let before: previous::push::Status = serde_json::from_str(&text).unwrap();
        assert_eq!((before.running, before.pending), (status.running, status.pending), "{name}");
        assert_eq!(Some(before.boot_id), status.boot_id, "{name}");
        assert_eq!(before.health.map(|h| h.why), status.health.map(|h| h.why), "{name}");
        assert_eq!(before.other.map(|o| o.manifest), status.other.map(|o| o.manifest), "{name}");
    }
    let text = serde_json::to_string(&answer::<InstallOutcome>("install")).unwrap();
    assert!(serde_json::from_str::<previous::push::Installed>(&text).unwrap().written > 0);
    let text = serde_json::to_string(&answer::<InstallOutcome>("install-api")).unwrap();
    assert_eq!(serde_json::from_str::<previous::push::InstalledApi>(&text).unwrap().reused, 1);
    let text = serde_json::to_string(&Refusal::new("busy", "m", "h")).unwrap();
    assert_eq!(serde_json::from_str::<previous::push::Refused>(&text).unwrap().code, "busy");
    let at = Progress { step: InstallStep::ReadBack, done: 1, total: 2 };
    let text = serde_json::to_string(&at).unwrap();
    assert_eq!(serde_json::from_str::<previous::push::Progress>(&text).unwrap().step, "read-back");
}

#[test]
fn api_toml_is_the_same_bytes_for_both_sides() {
    let before = file("api.toml");
    let read = ApiFile::parse(&before).unwrap();
    assert_eq!((read.package.as_str(), read.wheels.len()), ("opentrons", 23));
    assert_eq!(read.to_text().unwrap(), before);
    // With everything that it may have, by the writer before.
    let wheels = read.wheels.iter().map(|w| previous::compose::Wheel {
        name: &w.name,
        version: &w.version,
        sha256: &w.sha256,
    });
    let text = previous::compose::text(&previous::compose::Api {
        package: &read.package,
        module: &read.module,
        version: &read.version,
        site_packages: read.site_packages.to_str().unwrap(),
        python: &read.python,
        libc: Some("glibc 2.36"),
        minimum_version: Some("9.0.0"),
        wheels: wheels.collect(),
    });
    let full = ApiFile { minimum_version: Some("9.0.0".to_owned()), ..read };
    assert_eq!(ApiFile::parse(&text).unwrap(), full);
    assert_eq!(full.to_text().unwrap(), text);
    let before: previous::builtin::BuiltIn = toml::from_str(&full.to_text().unwrap()).unwrap();
    assert_eq!(before.minimum_version, full.minimum_version);
    // A later image may say more; an earlier one said less.
    let early = "package = 'a'\nmodule = 'a'\nversion = '1'\nsite-packages = '/x'\npython = '3.11'\nlater = 1\n";
    assert_eq!(ApiFile::parse(early).unwrap().libc, None);
}

#[test]
fn the_seed_is_the_same_bytes_for_both_sides() {
    let cases = [
        SeedFile::default(),
        SeedFile { hostname: Some("bench-7".to_owned()), ..SeedFile::default() },
        SeedFile {
            hostname: None,
            ssh_keys: vec!["ssh-ed25519 AAAA me".to_owned(), "sk-ssh BBBB you".to_owned()],
            wifi: Some(WifiNetwork { ssid: "é \"x\"".to_owned(), password: None }),
        },
        SeedFile {
            hostname: Some("a".to_owned()),
            ssh_keys: Vec::new(),
            wifi: Some(WifiNetwork {
                ssid: "lab".to_owned(),
                password: Some("pass \"word\" \\".to_owned()),
            }),
        },
    ];
    for seed in cases {
        let text = seed.to_text().unwrap();
        assert_eq!(text, previous::flash::text(&seed), "{seed:?}");
        assert!(SeedFile::parse(text.as_bytes()).unwrap() == seed, "{seed:?}");
        let before: previous::seed::Seed = toml::from_str(&text).unwrap();
        assert_eq!(before.hostname, seed.hostname);
        assert_eq!(seed.is_empty(), text.is_empty());
    }
    for (text, why) in [
        ("later = 1\n", "in the form"),
        ("hostname = \"Bench_7\"\n", "`hostname`"),
        ("ssh-keys = [\"command=x ssh-ed25519 A\"]\n", "`ssh-keys`"),
        ("[wifi]\nssid = \"\"\n", "`wifi.ssid`"),
        ("[wifi]\nssid = \"a\"\npassword = \"secret\"\n", "`wifi.password`"),
    ] {
        let refused = SeedFile::parse(text.as_bytes()).unwrap_err();
        assert!(refused.contains(why) && !refused.contains("secret"), "{text}: {refused}");
    }
    let secret = SeedFile {
        wifi: Some(WifiNetwork { ssid: "a".into(), password: Some("sesame12".into()) }),
        ..SeedFile::default()
    };
    assert!(!format!("{secret:?}").contains("sesame12"));
}

#[test]
fn every_device_toml_of_before_is_read() {
    for (name, cards) in [("device-earlier-cards.toml", 1), ("device-first.toml", 0)] {
        let text = file(name);
        let about = DeviceFile::parse(&text).unwrap();
        assert_eq!(about.earlier_cards.len(), cards, "{name}");
        assert_eq!(about.boot_flow, BootFlow::Uboot, "{name}");
        assert!(
            about.partitions.contains_key("root-a") && about.partitions.contains_key("data"),
            "{name}"
        );
        let raw = RawSectors::parse(&text).unwrap();
        assert_eq!((raw.boot_state, raw.trust), (about.boot_state, about.trust), "{name}");
    }
    // `inspect` looks at images that are nothing else of ours; the agent runs on none.
    assert_eq!(RawSectors::parse("[boot-state]\nsectors = [1]\n").unwrap().boot_state.sectors, [1]);
    assert!(DeviceFile::parse("[boot-state]\nsectors = [1]\n").is_err());
    assert_eq!(RawSectors::parse("product = 7\n").unwrap(), RawSectors::default());
}

#[test]
fn checks_are_strict_for_the_robot_and_lenient_for_the_local_target() {
    let http = "[http]\nurl = \"http://127.0.0.1:80/x\"\n";
    let CheckTarget::Http(found) = HealthFile::parse(http).unwrap().target else {
        panic!("another")
    };
    assert_eq!(HealthFile::parse_address(http).unwrap(), Some(found.clone()));
    assert_eq!(found.status, 200);
    let later = format!("later = 1\n{http}");
    assert!(HealthFile::parse(&later).unwrap_err().contains("unknown field"));
    assert_eq!(HealthFile::parse_address(&later).unwrap(), Some(found));
    assert_eq!(HealthFile::parse_address("[unit]\nname = \"a\"\n").unwrap(), None);
    let outcome = CheckOutcome { name: "a".into(), healthy: true, found: "b".into() };
    assert_eq!(
        serde_json::to_string(&outcome).unwrap(),
        r#"{"name":"a","healthy":true,"found":"b"}"#
    );
    for path in ["overlays/base", "overlays/dev"] {
        let folder =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path).join("etc/slotd/health.d");
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            HealthFile::parse(&fs::read_to_string(&path).unwrap())
                .unwrap_or_else(|e| panic!("{path:?}: {e}"));
        }
    }
}
