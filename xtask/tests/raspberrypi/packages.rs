//! Packages with the recorded names, in two signed archives: one for Raspberry Pi's and one for Debian's. The contents
//! are substitutes that the engine, depmod and the model of the firmware can read.

use std::collections::BTreeSet;
use std::fs;
use std::sync::Mutex;

use anyhow::{Context, Result};
use camino::{Utf8Path, Utf8PathBuf};
use serde::Deserialize;
use xtask::build::package_spec;
use xtask::config;
use xtask::exec::Tool;
use xtask::fetch::Downloader;
use xtask::rootfs::debian::{
    AptMirrors, AptSourceMirror, DebianSpec, DownloadedPackages, LockPolicy, PackagesLock,
    fetch_lock, lock_packages,
};

use super::stand_in;
use crate::common::archive::{Server, index, new_key, sign};
use crate::common::root;

/// What the examples call the archive.
pub const VENDOR: &str = "raspberrypi";

/// The recorded names, `fixtures/raspberrypi/packages.toml`. A record without its source does not read.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Recorded {
    pub package: Vec<Package>,
    debian: Vec<Package>,
    firmware: Firmware,
    pub modules: Modules,
    built_in: Vec<BuiltIn>,
    device_tree: Vec<DeviceTree>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Package {
    pub name: String,
    pub version: String,
    #[serde(default = "all")]
    arch: String,
    depends: Option<String>,
    #[serde(default)]
    files: Vec<String>,
    day: Option<String>,
    #[serde(rename = "source")]
    _source: String,
    #[serde(rename = "unconfirmed")]
    _unconfirmed: Option<String>,
}

fn all() -> String {
    "all".to_owned()
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Firmware {
    day: String,
    keys: Vec<String>,
    #[serde(rename = "source")]
    _source: String,
    #[serde(rename = "unconfirmed")]
    _unconfirmed: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Modules {
    folder: String,
    pub ending: String,
    pub paths: Vec<String>,
    #[serde(rename = "source")]
    _source: String,
    #[serde(rename = "unconfirmed")]
    _unconfirmed: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct BuiltIn {
    #[serde(default)]
    modules: Vec<String>,
    #[serde(default)]
    drivers: Vec<Driver>,
    #[serde(rename = "source")]
    _source: String,
    #[serde(rename = "unconfirmed")]
    _unconfirmed: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Driver {
    module: String,
    compatible: Vec<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct DeviceTree {
    names: Vec<String>,
    tree: String,
    #[serde(rename = "source")]
    _source: String,
    #[serde(rename = "unconfirmed")]
    _unconfirmed: Option<String>,
}

impl Recorded {
    pub fn read() -> Result<Self> {
        let path = root().join("xtask/tests/fixtures/raspberrypi/packages.toml");
        toml::from_str(&fs::read_to_string(&path)?).with_context(|| format!("reading {path}"))
    }

    /// The kernel package that the metapackage means: the one with files in /boot.
    pub fn kernel(&self) -> Result<&Package> {
        let kernel = |p: &&Package| p.files.iter().any(|file| file.starts_with("boot/vmlinuz-"));
        self.package.iter().find(kernel).context("no recorded package has a kernel")
    }

    fn drivers(&self) -> impl Iterator<Item = &Driver> {
        self.built_in.iter().flat_map(|group| &group.drivers)
    }

    fn built_in_modules(&self) -> Vec<&str> {
        let drivers = self.drivers().map(|driver| driver.module.as_str());
        let plain = self.built_in.iter().flat_map(|group| &group.modules).map(String::as_str);
        plain.chain(drivers).filter(|module| !module.is_empty()).collect()
    }

    /// What stands for a recorded file.
    fn content(&self, package: &Package, path: &str) -> Vec<u8> {
        let file = path.rsplit('/').next().unwrap_or_default();
        let lines = |ending: &str, modules: &[&str]| {
            let lines = modules.iter().map(|module| format!("kernel/{module}.ko{ending}\n"));
            lines.collect::<String>().into_bytes()
        };
        match file {
            _ if file.starts_with("vmlinuz-") => {
                let release = file.trim_start_matches("vmlinuz-");
                let names = self.drivers().flat_map(|d| &d.compatible).map(String::as_str);
                stand_in::gzip(&stand_in::kernel(release, &Vec::from_iter(names)))
            }
            _ if file.starts_with("config-") => b"CONFIG_MODULE_COMPRESS_XZ=y\n".to_vec(),
            "modules.builtin" => lines("", &self.built_in_modules()),
            "modules.order" => {
                lines("", &Vec::from_iter(self.modules.paths.iter().map(String::as_str)))
            }
            "modules.builtin.modinfo" => {
                let mut text = String::new();
                for module in self.built_in_modules() {
                    let name = module.rsplit('/').next().unwrap_or_default().replace('-', "_");
                    text += &format!("{name}.license=GPL\0{name}.file={module}\0");
                }
                text.into_bytes()
            }
            "start4.elf" => {
                let keys = Vec::from_iter(self.firmware.keys.iter().map(String::as_str));
                stand_in::firmware(package.day.as_ref().unwrap_or(&self.firmware.day), &keys)
            }
            "fixup4.dat" => stand_in::FIXUP.to_vec(),
            _ => b"stand-in".to_vec(),
        }
    }
}

/// Signed archives, and the machine's side of them.
pub struct World {
    dir: tempfile::TempDir,
    server: Server,
    pub recorded: Recorded,
    /// One apt at a time uses the cache.
    apt: Mutex<()>,
}

/// Debian 12's suites on its two archives.
const SUITES: [(&str, &str); 4] = [
    ("debian", "bookworm"),
    ("debian", "bookworm-updates"),
    ("debian", "bookworm-backports"),
    ("security", "bookworm-security"),
];

/// What a lock holds for the machine that builds: a newer e2fsprogs, and what it loads.
const HOST: [&str; 4] = ["libarchive13", "libicu72", "libnettle8", "libxml2"];
const BACKPORTS: [&str; 4] = ["e2fsprogs", "libcom-err2", "libext2fs2", "libss2"];

impl World {
    pub fn new() -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let root = Utf8Path::from_path(dir.path()).context("UTF-8")?.to_owned();
        let server = Server::start(&root)?;
        new_key(&root, "debian", "debian.gpg")?;
        new_key(&root, VENDOR, "vendor.gpg")?;
        let world = Self { dir, server, recorded: Recorded::read()?, apt: Mutex::new(()) };
        world.vendor()?;
        world.debian()?;
        Ok(world)
    }

    fn root(&self) -> Utf8PathBuf {
        Utf8PathBuf::from_path_buf(self.dir.path().to_owned()).expect("UTF-8")
    }

    /// The public half of the vendor's key.
    pub fn key(&self) -> Utf8PathBuf {
        self.root().join("vendor.gpg")
    }

    fn vendor(&self) -> Result<()> {
        let recorded = &self.recorded;
        let kernel = recorded.kernel()?;
        for package in &recorded.package {
            let tree = self.tree(VENDOR, &package.name)?;
            self.fill(&tree, package)?;
            if package.name == kernel.name {
                self.fill_kernel(&tree)?;
            }
            self.pack(VENDOR, "main", &tree, package, "")?;
        }
        let text = index(&self.root().join(VENDOR), "main")?;
        sign(&self.root(), VENDOR, "bookworm", VENDOR, &[("main", "arm64", &text)])
    }

    /// Modules, as ELF files packed by xz, and device trees.
    fn fill_kernel(&self, tree: &Utf8Path) -> Result<()> {
        let Modules { folder, ending, paths, .. } = &self.recorded.modules;
        let (unpacked, packed) = ending.rsplit_once('.').context("a packed module's ending")?;
        let mut files = Vec::new();
        for path in paths {
            let path = tree.join(folder).join(format!("{path}{unpacked}"));
            write(&path, &module(path.file_stem().unwrap_or_default()))?;
            files.push(path);
        }
        assert_eq!(packed, "xz", "packed by another program than recorded");
        Tool::new("xz").args(["-0", "--"]).args(files).run()?;
        let kernel = &self.recorded.kernel()?.name;
        for device_tree in &self.recorded.device_tree {
            let blob = stand_in::tree(&device_tree.tree);
            for name in &device_tree.names {
                write(&tree.join("usr/lib").join(kernel).join(name), &blob)?;
            }
        }
        Ok(())
    }

    /// What stands for Debian's archive: a package for each that the examples ask for.
    fn debian(&self) -> Result<()> {
        let mut names: BTreeSet<String> = ["busybox-static", "libc6", "python3.11"]
            .into_iter()
            .chain(HOST)
            .map(str::to_owned)
            .collect();
        for product in config::list_examples(&root())? {
            let config = config::load(&root(), Some(&product), None)?;
            names.extend(config.product.rootfs.packages.iter().map(|p| p.value.clone()));
        }
        for package in &self.recorded.debian {
            names.remove(&package.name);
            let tree = self.tree("debian", &package.name)?;
            self.fill(&tree, package)?;
            self.pack("debian", "main", &tree, package, "")?;
        }
        let plain = |component: &str, name: &str, version: &str| {
            let more = match name {
                "base-files" => "Essential: yes\n",
                "python3" => "Depends: python3.11\n",
                "python3.11" => "Depends: libc6\n",
                _ => "",
            };
            let files: &[&str] = match name {
                "busybox-static" => &["bin/busybox"],
                "python3.11" => &["usr/bin/python3.11"],
                "systemd-sysv" => &["sbin/init"],
                _ => &[],
            };
            let package = Package {
                name: name.to_owned(),
                version: version.to_owned(),
                arch: all(),
                depends: None,
                files: files.iter().map(|file| (*file).to_owned()).collect(),
                day: None,
                _source: String::new(),
                _unconfirmed: None,
            };
            let tree = self.tree(component, name)?;
            self.fill(&tree, &package)?;
            self.pack("debian", component, &tree, &package, more)
        };
        for name in names.iter().map(String::as_str).chain(["base-files"]) {
            plain("main", name, if name == "libc6" { "2.36-9" } else { "3.11.2-6" })?;
        }
        for name in BACKPORTS {
            plain("backports", name, "9")?;
        }
        let archive = self.root().join("debian");
        let (main, backports) = (index(&archive, "main")?, index(&archive, "backports")?);
        for (folder, suite) in SUITES {
            let text = match suite {
                "bookworm" => main.as_str(),
                "bookworm-backports" => backports.as_str(),
                _ => "",
            };
            let mut indexes = Vec::new();
            for arch in ["arm64", "amd64"] {
                indexes.extend([("main", arch, text), ("non-free-firmware", arch, "")]);
            }
            sign(&self.root(), folder, suite, "debian", &indexes)?;
        }
        Ok(())
    }

    fn tree(&self, folder: &str, name: &str) -> Result<Utf8PathBuf> {
        let tree = self.root().join("trees").join(folder).join(name);
        fs::create_dir_all(tree.join("DEBIAN"))?;
        Ok(tree)
    }

    fn fill(&self, tree: &Utf8Path, package: &Package) -> Result<()> {
        let put = |path: &String| write(&tree.join(path), &self.recorded.content(package, path));
        package.files.iter().try_for_each(put)
    }

    fn pack(
        &self,
        folder: &str,
        component: &str,
        tree: &Utf8Path,
        package: &Package,
        more: &str,
    ) -> Result<()> {
        let Package { name, version, arch, depends, .. } = package;
        let depends = depends.as_ref().map(|d| format!("Depends: {d}\n")).unwrap_or_default();
        let control = format!(
            "Package: {name}\nVersion: {version}\nArchitecture: {arch}\nMaintainer: T <t@t>\n\
             {depends}{more}Description: stand-in\n"
        );
        fs::write(tree.join("DEBIAN/control"), control)?;
        let pool = self.root().join(folder).join("pool").join(component).join(name);
        fs::create_dir_all(&pool)?;
        // As an archive names the file: without the epoch.
        let version = version.rsplit(':').next().unwrap_or_default();
        let deb = pool.join(format!("{name}_{version}_{arch}.deb"));
        let pack = Tool::new("dpkg-deb").args(["--root-owner-group", "-Zgzip", "-z1", "-b"]);
        pack.arg(tree).arg(&deb).run()
    }

    /// What `cargo xtask lock --only packages` does, and what a build fetches by it.
    pub fn lock(&self, config: &config::Config) -> Result<DownloadedPackages> {
        let _alone = self.apt.lock().unwrap_or_else(|error| error.into_inner());
        let spec: DebianSpec = package_spec(config);
        let address = &self.server.address;
        let sources = spec.sources.iter().map(|source| AptSourceMirror {
            name: source.name.clone(),
            address: format!("{address}/{}", source.name),
            key: self.key(),
        });
        let mirrors = AptMirrors {
            archive: format!("{address}/debian"),
            security: format!("{address}/security"),
            keyring: self.root().join("debian.gpg"),
            sources: sources.collect(),
        };
        let cache = self.root().join("cache");
        let path = config.product.rootfs.lock.as_ref().context("a lock")?.value.clone();
        let lock = match PackagesLock::load(&self.root().join(&path)) {
            Ok(lock) if lock.check_request(&spec, "an example").is_ok() => lock,
            _ => lock_packages(&spec, &mirrors, &cache)?,
        };
        fs::create_dir_all(self.root().join(path.parent().context("a directory")?))?;
        lock.save(&self.root().join(&path))?;
        lock.save(&config.root.join(&path))?;
        let downloader = Downloader::new(&cache, false)?;
        fetch_lock(&lock, &downloader, Some(&mirrors), LockPolicy::Locked, &cache)
    }
}

fn write(path: &Utf8Path, bytes: &[u8]) -> Result<()> {
    fs::create_dir_all(path.parent().context("a directory")?)?;
    fs::write(path, bytes).with_context(|| format!("writing {path}"))
}

/// A kernel module as far as depmod reads one: an ELF object of that machine with a `.modinfo` (elf(5)).
fn module(name: &str) -> Vec<u8> {
    let names = b"\0.modinfo\0.shstrtab\0.symtab\0.strtab\0";
    let about = format!("license=GPL\0name={}\0", name.replace('-', "_"));
    // Name's offset, type, link, bytes: nothing, .modinfo, .shstrtab, .symtab with the empty symbol, .strtab.
    let sections: [(u32, u32, u32, &[u8]); 5] = [
        (0, 0, 0, b""),
        (1, 1, 0, about.as_bytes()),
        (10, 3, 0, names),
        (20, 2, 4, &[0; 24]),
        (28, 3, 0, b"\0"),
    ];
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(64, 0);
    let mut headers = Vec::new();
    for (name, kind, link, bytes) in sections {
        file.resize(file.len().next_multiple_of(8), 0);
        headers.extend([name.to_le_bytes(), kind.to_le_bytes()].concat());
        // Flags, address, offset, size.
        for number in [0, 0, file.len() as u64, bytes.len() as u64] {
            headers.extend(number.to_le_bytes());
        }
        headers.extend([link.to_le_bytes(), 1u32.to_le_bytes()].concat());
        for number in [8u64, if kind == 2 { 24 } else { 0 }] {
            headers.extend(number.to_le_bytes());
        }
        file.extend(bytes);
    }
    file.resize(file.len().next_multiple_of(8), 0);
    let at = file.len() as u64;
    // A relocatable object (1) of AArch64 (183).
    file[16..20].copy_from_slice(&[1, 0, 183, 0]);
    file[20] = 1;
    file[40..48].copy_from_slice(&at.to_le_bytes());
    // Sizes of the header and of a section's, how many sections, which one has their names.
    file[52] = 64;
    file[58] = 64;
    file[60] = 5;
    file[62] = 2;
    file.extend(headers);
    file
}
