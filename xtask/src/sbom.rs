//! The software bill of materials: CycloneDX 1.6 JSON of the image's components. Equal contents
//! give equal bytes: the serial number is derived from the contents, the time from the build's
//! epoch.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result, bail};
use camino::Utf8Path;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::artifact::write_atomically;
use crate::plan::AptSourcePlan;
use crate::rootfs::BasePackage;
use crate::time::format_timestamp;
use crate::wheel::lock::WheelLock;
use crate::wheel::metadata::License;
use crate::wheel::{InstalledWheels, target::normalise_name};

/// The origin of a component; determines its package URL.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SbomOrigin {
    /// A Debian package: its architecture (`arm64`, `all`) and the release (`bookworm`).
    Debian {
        /// `arm64` or `all`
        arch: String,
        /// `bookworm`
        release: String,
    },
    /// A package of a product's additional archive. It belongs to its vendor, even if Debian has a
    /// package with the same name: Debian's lists of vulnerabilities would be about another
    /// package.
    Vendor {
        /// `arm64` or `all`
        arch: String,
        /// The archive's name in the product.
        vendor: String,
        /// The archive's suite.
        suite: String,
        /// The archive's address in the product.
        address: String,
    },
    /// A Python wheel.
    Wheel {
        /// The wheel's file name.
        file: String,
    },
    /// A Rust crate that is compiled into the agent.
    Crate,
    /// Anything else, such as a Buildroot package or our own agent.
    Generic,
}

/// One component of the system.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct SbomComponent {
    /// The package's or distribution's name.
    pub name: String,
    /// Its version.
    pub version: String,
    /// Its origin.
    pub origin: SbomOrigin,
    /// SHA-256 of the file that was installed (the .deb, the wheel), lower-case hexadecimal.
    pub sha256: Option<String>,
    /// Its licence.
    pub license: Option<License>,
    /// One sentence about it.
    pub summary: Option<String>,
    /// Its name in the CVE dictionary (CPE 2.3), if known.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub cpe: Option<String>,
    /// The package URLs of the components that it needs, if known.
    pub depends_on: Vec<String>,
}

/// The subject of the bill.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct SbomSubject {
    /// The product's name.
    pub product: String,
    /// Its version.
    pub version: String,
    /// The board's name.
    pub board: String,
    /// The build's time, seconds since 1970.
    pub epoch: u64,
}

impl SbomComponent {
    /// The package URL, which is also the component's reference in the bill.
    pub fn purl(&self) -> String {
        let version = percent_encode(&self.version);
        match &self.origin {
            SbomOrigin::Debian { arch, release } => format!(
                "pkg:deb/debian/{}@{version}?arch={}&distro={}",
                percent_encode(&self.name.to_ascii_lowercase()),
                percent_encode(arch),
                percent_encode(release)
            ),
            // The type `deb` of the package URL specification: the namespace is the vendor, and
            // `repository_url` the base address of an archive that is not implied by the vendor's
            // name. Qualifiers are sorted, slashes in them encoded.
            SbomOrigin::Vendor { arch, vendor, suite, address } => format!(
                "pkg:deb/{}/{}@{version}?arch={}&distro={}&repository_url={}",
                percent_encode(&vendor.to_ascii_lowercase()),
                percent_encode(&self.name.to_ascii_lowercase()),
                percent_encode(arch),
                percent_encode(suite),
                percent_encode(address)
            ),
            SbomOrigin::Wheel { file } => {
                format!(
                    "{}?file_name={}",
                    wheel_purl(&self.name, &self.version),
                    percent_encode(file)
                )
            }
            SbomOrigin::Crate => format!("pkg:cargo/{}@{version}", percent_encode(&self.name)),
            SbomOrigin::Generic => format!("pkg:generic/{}@{version}", percent_encode(&self.name)),
        }
    }
}

/// The origin of a package of the engine `debian`: Debian's release, or an additional archive of
/// the product.
///
/// # Errors
/// When it is from an archive that the product does not define.
pub fn debian_origin(
    package: &BasePackage,
    release: &str,
    sources: &[AptSourcePlan],
) -> Result<SbomOrigin> {
    let arch = package.arch.clone();
    let Some(name) = &package.archive else {
        return Ok(SbomOrigin::Debian { arch, release: release.to_owned() });
    };
    let source = sources.iter().find(|source| source.name == *name).with_context(|| {
        format!(
            "{} {} is from the archive {name}, but the product does not define it",
            package.name, package.version
        )
    })?;
    let AptSourcePlan { suite, address, .. } = source.clone();
    Ok(SbomOrigin::Vendor { arch, vendor: name.clone(), suite, address })
}

/// The package URL type `pypi` requires lower case and `-` for `_`; dots are kept.
fn wheel_purl(name: &str, version: &str) -> String {
    let name = name.to_ascii_lowercase().replace('_', "-");
    format!("pkg:pypi/{}@{}", percent_encode(&name), percent_encode(version))
}

/// Percent-encodes for package URLs: letters, digits, `.-_~` and `:` are kept.
fn percent_encode(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b".-_~:".contains(&byte) {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}

/// The installed wheels as components, with the dependencies from the lock.
pub fn wheel_components(installed: &InstalledWheels, lock: &WheelLock) -> Vec<SbomComponent> {
    let mut components: Vec<SbomComponent> = installed
        .distributions
        .iter()
        .map(|d| SbomComponent {
            name: d.name.clone(),
            version: d.version.clone(),
            origin: SbomOrigin::Wheel { file: d.wheel.clone() },
            sha256: Some(d.sha256.clone()),
            license: d.license.clone(),
            summary: d.summary.clone(),
            cpe: None,
            depends_on: Vec::new(),
        })
        .collect();
    let by_name: BTreeMap<String, (usize, String)> = components
        .iter()
        .enumerate()
        .map(|(index, component)| (normalise_name(&component.name), (index, component.purl())))
        .collect();
    for wheel in &lock.wheels {
        let Some((_, purl)) = by_name.get(&wheel.name) else { continue };
        for by in &wheel.needed_by {
            if let Some((index, _)) = by_name.get(by) {
                components[*index].depends_on.push(purl.clone());
            }
        }
    }
    components
}

/// The bill as a CycloneDX 1.6 document. The order of `components` does not matter.
///
/// # Errors
/// When two components have one package URL, or one needs a component that is not in the list.
pub fn to_cyclonedx(components: &[SbomComponent], meta: &SbomSubject) -> Result<Value> {
    let mut sorted = BTreeMap::new();
    for component in components {
        let purl = component.purl();
        if sorted.insert(purl.clone(), component).is_some() {
            bail!("{purl} is in the list of components twice");
        }
    }
    let mut needed = BTreeSet::new();
    let mut edges = BTreeMap::new();
    for (purl, component) in &sorted {
        let on: BTreeSet<&String> = component.depends_on.iter().collect();
        if let Some(missing) = on.iter().find(|on| !sorted.contains_key(on.as_str())) {
            bail!("{purl} needs {missing}, which is not among the components");
        }
        needed.extend(on.iter().copied());
        edges.insert(purl.clone(), on);
    }
    let root =
        format!("pkg:generic/{}@{}", percent_encode(&meta.product), percent_encode(&meta.version));
    if sorted.contains_key(&root) {
        bail!("the component {root} has the name and version of the product itself");
    }
    // Components that no other component needs are dependencies of the product itself.
    edges.insert(root.clone(), sorted.keys().filter(|purl| !needed.contains(purl)).collect());
    let dependencies: Vec<Value> =
        edges.iter().map(|(purl, on)| json!({ "ref": purl, "dependsOn": on })).collect();
    let listed: Vec<Value> = sorted.iter().map(|(purl, c)| describe_component(purl, c)).collect();
    let mut document = json!({
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "timestamp": format_timestamp(meta.epoch),
            "tools": { "components": [{
                "type": "application",
                "name": "slipway",
                "version": env!("CARGO_PKG_VERSION"),
            }] },
            "component": {
                "type": "operating-system",
                "bom-ref": root,
                "name": meta.product,
                "version": meta.version,
                "purl": root,
                "properties": [{ "name": "slipway:board", "value": meta.board }],
            },
        },
        "components": listed,
        "dependencies": dependencies,
    });
    let text = serde_json::to_vec(&document).context("writing the bill of materials")?;
    let digest = Sha256::digest(&text);
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&digest[..16]);
    // Version 8 (RFC 9562): the content's own hash.
    let serial = uuid::Builder::from_custom_bytes(bytes).into_uuid();
    document["serialNumber"] = json!(format!("urn:uuid:{serial}"));
    Ok(document)
}

/// Writes the bill, indented, with a newline at its end.
///
/// # Errors
/// As `cyclonedx`, or when the file cannot be written.
pub fn write_sbom(path: &Utf8Path, components: &[SbomComponent], meta: &SbomSubject) -> Result<()> {
    let document = to_cyclonedx(components, meta)?;
    write_atomically(path, |out| {
        serde_json::to_writer_pretty(&mut *out, &document)
            .with_context(|| format!("writing {path}"))?;
        out.write_all(b"\n").with_context(|| format!("writing {path}"))
    })
}

fn describe_component(purl: &str, component: &SbomComponent) -> Value {
    let kind = match component.origin {
        SbomOrigin::Wheel { .. } | SbomOrigin::Crate => "library",
        SbomOrigin::Debian { .. } | SbomOrigin::Vendor { .. } | SbomOrigin::Generic => {
            "application"
        }
    };
    let mut value = json!({
        "type": kind,
        "bom-ref": purl,
        "name": component.name,
        "version": component.version,
        "purl": purl,
    });
    if let Some(summary) = &component.summary {
        value["description"] = json!(summary);
    }
    if let Some(cpe) = &component.cpe {
        value["cpe"] = json!(cpe);
    }
    if let Some(sha256) = &component.sha256 {
        value["hashes"] = json!([{ "alg": "SHA-256", "content": sha256 }]);
    }
    match &component.license {
        Some(License::Expression(expression)) => {
            value["licenses"] = json!([{ "expression": expression }]);
        }
        Some(License::Text(text)) => {
            value["licenses"] = json!([{ "license": { "name": text } }]);
        }
        None => {}
    }
    value
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The examples and the rules of the type `deb`: package-url/purl-spec,
    /// types/deb-definition.json.
    #[test]
    fn a_package_of_a_further_archive_is_not_debians() {
        let mut package = BasePackage {
            name: "linux-image-rpi-v8".into(),
            version: "1:6.12-1+rpt1~bookworm".into(),
            arch: "arm64".into(),
            role: crate::rootfs::PackageRole::Extra,
            source: "linux".into(),
            source_version: "1".into(),
            archive: None,
            section: String::new(),
            installed_bytes: 0,
            download_bytes: 0,
            sha256: String::new(),
            homepage: None,
            licences: vec![],
            essential: false,
            cpe: None,
            needs: vec![],
        };
        let source = AptSourcePlan {
            name: "acme-one".into(),
            address: "https://archive.acme.example/debian".into(),
            suite: "stable".into(),
            components: vec!["main".into()],
            key: "acme.asc".into(),
            packages: vec!["linux-*".into()],
        };
        let purl = |package: &BasePackage| {
            let origin = debian_origin(package, "bookworm", std::slice::from_ref(&source))?;
            let component = SbomComponent {
                name: package.name.clone(),
                version: package.version.clone(),
                origin,
                sha256: None,
                license: None,
                summary: None,
                cpe: None,
                depends_on: vec![],
            };
            anyhow::Ok(component.purl())
        };
        let same = "linux-image-rpi-v8@1:6.12-1%2Brpt1~bookworm?arch=arm64&distro=";
        let own = format!("pkg:deb/debian/{same}bookworm");
        assert_eq!(purl(&package).expect("Debian's"), own);
        package.archive = Some("acme-one".into());
        let address = "https:%2F%2Farchive.acme.example%2Fdebian";
        let vendors = format!("pkg:deb/acme-one/{same}stable&repository_url={address}");
        assert_eq!(purl(&package).expect("the vendor's"), vendors);
        package.archive = Some("other".into());
        let error = purl(&package).expect_err("unknown").to_string();
        assert!(error.contains("is from the archive other, but the product does not"), "{error}");
    }

    #[test]
    fn package_urls_encode_what_they_must() {
        let component = SbomComponent {
            name: "libstdc++6".into(),
            version: "2:12.2.0-14+deb12u1~x".into(),
            origin: SbomOrigin::Debian { arch: "arm64".into(), release: "bookworm".into() },
            sha256: None,
            license: None,
            summary: None,
            cpe: None,
            depends_on: vec![],
        };
        assert_eq!(
            component.purl(),
            "pkg:deb/debian/libstdc%2B%2B6@2:12.2.0-14%2Bdeb12u1~x?arch=arm64&distro=bookworm"
        );
        let meta =
            SbomSubject { product: "p".into(), version: "1".into(), board: "b".into(), epoch: 0 };
        let twice = to_cyclonedx(&[component.clone(), component.clone()], &meta).unwrap_err();
        assert!(twice.to_string().ends_with("is in the list of components twice"), "{twice}");
        let mut lonely = component;
        lonely.depends_on = vec!["pkg:pypi/x@1".into()];
        let missing = to_cyclonedx(&[lonely], &meta).unwrap_err().to_string();
        assert!(missing.contains("needs pkg:pypi/x@1, which is not among"), "{missing}");
    }
}
