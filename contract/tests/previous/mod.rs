//! The definitions of November 2026, when each side had its own: what robots and workstations in the field still run.
//! They never change.
#![allow(dead_code, missing_docs)]

/// `xtask push`.
pub mod push {
    use bundle::Version;
    use bundle::bootstate::Slot;
    use serde::Deserialize;

    #[derive(Deserialize)]
    #[serde(rename_all = "kebab-case")]
    pub struct Status {
        pub version: Version,
        pub running: Slot,
        pub boot_id: String,
        pub boot: Boot,
        pub pending: bool,
        pub health: Option<Health>,
        pub other: Option<OtherSlot>,
    }

    #[derive(Deserialize)]
    pub struct Boot {
        pub active: Slot,
        pub trial: Option<Trial>,
    }

    #[derive(Deserialize)]
    pub struct Trial {}

    #[derive(Deserialize)]
    pub struct Health {
        pub why: String,
    }

    #[derive(Deserialize)]
    pub struct OtherSlot {
        pub manifest: String,
    }

    #[derive(Deserialize)]
    #[serde(rename_all = "kebab-case")]
    pub struct Installed {
        pub resumed: bool,
        pub size: u64,
        pub held: u64,
        pub written: u64,
    }

    #[derive(Deserialize)]
    #[serde(rename_all = "kebab-case")]
    pub struct InstalledApi {
        pub version: String,
        pub before: Option<String>,
        pub wheels: u64,
        pub reused: u64,
        pub written: u64,
        pub down_ms: u64,
    }

    #[derive(Deserialize)]
    pub struct Refused {
        pub code: String,
        pub message: String,
        pub help: String,
    }

    #[derive(Deserialize)]
    pub struct Progress {
        pub step: String,
        pub done: u64,
        pub total: u64,
    }
}

/// The writer of `api.toml`.
pub mod compose {
    use serde::Serialize;

    #[derive(Serialize)]
    #[serde(rename_all = "kebab-case")]
    pub struct Api<'a> {
        pub package: &'a str,
        pub module: &'a str,
        pub version: &'a str,
        pub site_packages: &'a str,
        pub python: &'a str,
        #[serde(skip_serializing_if = "Option::is_none")]
        pub libc: Option<&'a str>,
        #[serde(skip_serializing_if = "Option::is_none")]
        pub minimum_version: Option<&'a str>,
        pub wheels: Vec<Wheel<'a>>,
    }

    #[derive(Serialize)]
    pub struct Wheel<'a> {
        pub name: &'a str,
        pub version: &'a str,
        pub sha256: &'a str,
    }

    pub fn text(api: &Api<'_>) -> String {
        let text = toml::to_string(api).unwrap();
        format!("# The API that this image has. Written from what was installed.\n{text}")
    }
}

/// The reader of `api.toml`.
pub mod builtin {
    use std::path::PathBuf;

    use serde::Deserialize;

    #[derive(Deserialize)]
    #[serde(rename_all = "kebab-case")]
    pub struct BuiltIn {
        pub package: String,
        pub module: String,
        pub version: String,
        pub site_packages: PathBuf,
        pub python: String,
        #[serde(default)]
        pub libc: Option<String>,
        #[serde(default)]
        pub minimum_version: Option<String>,
        #[serde(default)]
        pub wheels: Vec<Wheel>,
    }

    #[derive(Deserialize)]
    #[serde(rename_all = "kebab-case")]
    pub struct Wheel {
        pub name: String,
        pub version: String,
        pub sha256: String,
    }
}

/// The writer of the seed.
pub mod flash {
    use serde::Serialize;

    #[derive(Serialize)]
    pub struct Wifi {
        ssid: String,
        #[serde(skip_serializing_if = "Option::is_none")]
        password: Option<String>,
    }

    #[derive(Serialize)]
    #[serde(rename_all = "kebab-case")]
    pub struct Seed {
        #[serde(skip_serializing_if = "Option::is_none")]
        pub hostname: Option<String>,
        #[serde(skip_serializing_if = "Vec::is_empty")]
        pub ssh_keys: Vec<String>,
        #[serde(skip_serializing_if = "Option::is_none")]
        pub wifi: Option<Wifi>,
    }

    pub fn text(seed: &contract::seed_file::SeedFile) -> String {
        let wifi = seed.wifi.as_ref();
        toml::to_string(&Seed {
            hostname: seed.hostname.clone(),
            ssh_keys: seed.ssh_keys.clone(),
            wifi: wifi.map(|w| Wifi { ssid: w.ssid.clone(), password: w.password.clone() }),
        })
        .unwrap()
    }
}

/// The reader of the seed.
pub mod seed {
    use serde::Deserialize;

    #[derive(Deserialize)]
    #[serde(rename_all = "kebab-case", deny_unknown_fields)]
    pub struct Seed {
        pub hostname: Option<String>,
        #[serde(default)]
        pub ssh_keys: Vec<String>,
        pub wifi: Option<Wifi>,
    }

    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    pub struct Wifi {
        pub ssid: String,
        pub password: Option<String>,
    }
}
