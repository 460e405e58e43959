//! Update bundles on the workstation: payload files in, a signed bundle out; and the same bundle
//! verified again. The crate `bundle` implements the format itself.

use std::fs::File;
use std::io::{self, BufReader, Read, Write};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use bundle::component::{API, ComponentLock};
use bundle::manifest::BundleComponent;
use bundle::{
    BuildKind, BundleManifest, BundlePolicy, BundleReader, CompressionLevel, KeySet, Payload,
    PayloadReader, PayloadSource, SeekableInput, SignedBy, StreamInput, Version,
};
use camino::{Utf8Path, Utf8PathBuf};
use serde::Serialize;
use sha2::{Digest, Sha256};

use crate::artifact::{self, Artifact};
use crate::keys::{SigningKey, explain_bundle_error};
use crate::progress::{ProgressStep, ProgressUnit};
use crate::wheel::component::WheelTrees;

/// The maximum number of bytes of a manifest that is read without verification: more than any has.
const LARGEST_MANIFEST: u64 = 1 << 20;

/// One payload to pack.
#[derive(Debug, Clone)]
pub struct PayloadRequest {
    /// Its role: `root`, `boot`.
    pub role: String,
    /// The file with its content; holes are neither read nor stored.
    pub path: Utf8PathBuf,
}

/// One component to pack.
#[derive(Debug, Clone)]
pub struct ComponentRequest {
    /// Its name: `system`, `api`.
    pub name: String,
    /// Its version.
    pub version: Version,
    /// Its payloads.
    pub payloads: Vec<PayloadRequest>,
}

/// A bundle to pack.
#[derive(Debug)]
pub struct PackRequest<'a> {
    /// The product's name.
    pub product: String,
    /// The bundle's version.
    pub version: Version,
    /// Development or release.
    pub kind: BuildKind,
    /// The boards that it runs on.
    pub boards: Vec<String>,
    /// After the install, robots reject bundles below this version.
    pub minimum_version: Version,
    /// The lowest key epoch that robots accept from now on; `None`: the lowest epoch of the
    /// signers.
    pub key_epoch: Option<u32>,
    /// The sources' time, seconds since 1970.
    pub epoch: u64,
    /// The components, in order.
    pub components: Vec<ComponentRequest>,
    /// The compression level.
    pub level: CompressionLevel,
    /// The number of threads for compression; `None`: one for each core. The bundle's bytes do not
    /// depend on it.
    pub workers: Option<usize>,
    /// The keys that sign, at least one.
    pub signers: &'a [SigningKey],
}

/// How one payload was packed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct PackedPayload {
    /// The component's name.
    pub component: String,
    /// The payload's role.
    pub role: String,
    /// Its size in bytes, holes included.
    pub size: u64,
    /// Bytes of its blocks that are not zero.
    pub used: u64,
    /// Bytes of its block index.
    pub index: u64,
    /// Bytes of its compressed frames.
    pub stored: u64,
}

/// A finished bundle.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct PackReport {
    /// The file.
    pub artifact: Artifact,
    /// Its manifest.
    pub manifest: BundleManifest,
    /// The keys that signed it.
    pub signed_by: Vec<SignedBy>,
    /// Its payloads, in order.
    pub payloads: Vec<PackedPayload>,
    /// How long it took.
    #[serde(skip)]
    pub elapsed: Duration,
}

/// A payload file. Its holes are found with `SEEK_DATA` and `SEEK_HOLE`.
struct Sparse {
    file: File,
    size: u64,
}

impl Sparse {
    fn open(path: &Utf8Path) -> Result<Self> {
        let file = File::open(path).with_context(|| format!("opening {path}"))?;
        let metadata = file.metadata().with_context(|| format!("reading {path}"))?;
        ensure!(metadata.is_file(), "packing {path}: not a plain file");
        Ok(Self { file, size: metadata.len() })
    }
}

impl PayloadSource for Sparse {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(buffer, offset)
    }

    fn data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        use rustix::fs::{SeekFrom, seek};
        use rustix::io::Errno;
        if offset >= self.size {
            return Ok(None);
        }
        // Threads share the file's position, but none of them uses it.
        match seek(&self.file, SeekFrom::Data(offset)) {
            Ok(start) => Ok(Some(start..seek(&self.file, SeekFrom::Hole(start))?)),
            // After the last data there is only a hole.
            Err(Errno::NXIO) => Ok(None),
            // The filesystem does not support holes.
            Err(Errno::INVAL | Errno::OPNOTSUPP) => Ok(Some(offset..self.size)),
            Err(error) => Err(error.into()),
        }
    }
}

/// Writes to a file, while another thread hashes the same bytes in parallel.
struct Hashing<'a> {
    out: &'a mut dyn Write,
    hasher: SyncSender<Vec<u8>>,
    size: u64,
}

impl Write for Hashing<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.out.write(bytes)?;
        let written = bytes.get(..n).unwrap_or_default().to_vec();
        self.hasher.send(written).map_err(|_| io::Error::other("the hashing thread has ended"))?;
        self.size += n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// Runs `write` on a [`Hashing`] writer; returns size and SHA-256 of what it wrote.
fn write_hashed(
    out: &mut dyn Write,
    write: impl FnOnce(&mut Hashing<'_>) -> Result<()>,
) -> Result<(u64, String)> {
    std::thread::scope(|scope| {
        // At most 1 MiB in flight: frames are written 64 KiB at a time.
        let (hasher, received) = sync_channel::<Vec<u8>>(16);
        let thread = scope.spawn(move || {
            let mut hasher = Sha256::new();
            received.iter().for_each(|bytes| hasher.update(bytes));
            artifact::hex(&hasher.finalize())
        });
        let mut hashing = Hashing { out, hasher, size: 0 };
        let result = write(&mut hashing);
        let size = hashing.size;
        // Dropping the sender is what ends the thread.
        drop(hashing);
        let sha256 = thread.join().map_err(|_| anyhow::anyhow!("the hashing thread failed"))?;
        result.map(|()| (size, sha256))
    })
}

/// Packs the bundle `out`. The file gets its name only when it is complete and has been read back:
/// archive, signatures and indices are verified, frames are not decompressed again. This does not
/// sync the file: use [`artifact::flush_file`].
///
/// # Errors
/// When a payload cannot be read, a release would be signed by a development key alone, or writing
/// fails. No file has the final name then.
pub fn pack_bundle(request: &PackRequest<'_>, out: &Utf8Path) -> Result<PackReport> {
    pack_in(request, out).with_context(|| format!("making the bundle {out}"))
}

fn pack_in(request: &PackRequest<'_>, out: &Utf8Path) -> Result<PackReport> {
    let started = Instant::now();
    let key_epoch = check_signers(request)?;
    let dir = out.parent().filter(|dir| !dir.as_str().is_empty()).unwrap_or(Utf8Path::new("."));
    std::fs::create_dir_all(dir).with_context(|| format!("creating {dir}"))?;
    // An index precedes its frames but is known only after them, so frames are stored in an unnamed
    // file first.
    let mut spool =
        tempfile::tempfile_in(dir).with_context(|| format!("creating a file in {dir}"))?;
    let (manifest, packed, indices) = compress_payloads(request, key_epoch, &mut spool)?;
    let mut payloads = Vec::new();
    let mut at = 0;
    for (index, packed) in indices.iter().zip(&packed) {
        // Clones share the file's position, so each part has its own position.
        let file = spool.try_clone().context("opening the temporary file again")?;
        payloads.push((index, At { file, at }));
        at += packed.stored;
    }
    let comment = format!("slipway bundle {} {}", request.product, request.version);
    let mut result = None;
    artifact::write_large(out, |file| {
        let mut sign = |bytes: &[u8]| {
            Ok(request.signers.iter().map(|signer| signer.sign(bytes, &comment)).collect())
        };
        let mut parts: Vec<(&[u8], &mut dyn io::Read)> = payloads
            .iter_mut()
            .map(|(index, data)| (index.as_slice(), data as &mut dyn io::Read))
            .collect();
        let (size, sha256) = write_hashed(file, |file| {
            bundle::write_archive(file, &manifest, &mut sign, &mut parts)
                .map_err(explain_bundle_error)?;
            file.flush().context("writing")
        })?;
        let artifact = Artifact { path: out.to_owned(), size, sha256 };
        let signed_by = read_back(&artifact::partial_path(out), request)?;
        result = Some((artifact, signed_by));
        Ok(())
    })?;
    let Some((artifact, signed_by)) = result else { bail!("the bundle was not written") };
    Ok(PackReport { artifact, manifest, signed_by, payloads: packed, elapsed: started.elapsed() })
}

/// A part of a file, read by position.
struct At {
    file: File,
    at: u64,
}

impl io::Read for At {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.file.read_at(buffer, self.at)?;
        self.at += n as u64;
        Ok(n)
    }
}

/// Checks the rules about signing keys; returns the manifest's key epoch.
fn check_signers(request: &PackRequest<'_>) -> Result<u32> {
    let lowest = request.signers.iter().map(|signer| signer.key().epoch).min();
    let Some(lowest) = lowest else {
        bail!(
            "no signing key: the bundle would be unsigned\nhelp: `cargo xtask keys new` makes a key"
        )
    };
    for key in request.signers.iter().map(SigningKey::key) {
        ensure!(
            request.kind == BuildKind::Development || key.kind == BuildKind::Release,
            "`{}` is a release, but the key {} is a development key\n\
             help: sign it with a release key (`cargo xtask keys new`)",
            request.product,
            key.id
        );
    }
    Ok(request.key_epoch.unwrap_or(lowest))
}

/// Compresses all payloads into `spool`, one after the other.
fn compress_payloads(
    request: &PackRequest<'_>,
    key_epoch: u32,
    spool: &mut File,
) -> Result<(BundleManifest, Vec<PackedPayload>, Vec<Vec<u8>>)> {
    let workers = request.workers.unwrap_or_else(crate::parallel::cores);
    let (mut packed, mut indices, mut components) = (Vec::new(), Vec::new(), Vec::new());
    for component in &request.components {
        let mut described: Vec<Payload> = Vec::new();
        for payload in &component.payloads {
            let source = Sparse::open(&payload.path)?;
            let what = format!("compressing {}/{}", component.name, payload.role);
            let step = ProgressStep::new("bundle", &what, source.size, ProgressUnit::Bytes);
            let done =
                bundle::compress(&source, request.level, workers, spool, &mut |n| step.advance(n))
                    .map_err(explain_bundle_error)
                    .with_context(|| format!("compressing {}", payload.path))?;
            described.push(done.describe(&payload.role));
            packed.push(PackedPayload {
                component: component.name.clone(),
                role: payload.role.clone(),
                size: done.size,
                used: u64::from(done.used_blocks) * bundle::BLOCK_SIZE as u64,
                index: done.index.len() as u64,
                stored: done.data_size,
            });
            indices.push(done.index);
        }
        components.push(BundleComponent {
            name: component.name.clone(),
            version: component.version.clone(),
            payloads: described,
        });
    }
    let manifest = BundleManifest {
        format: bundle::FORMAT,
        required: Vec::new(),
        product: request.product.clone(),
        version: request.version.clone(),
        kind: request.kind,
        boards: request.boards.clone(),
        minimum_version: request.minimum_version.clone(),
        key_epoch,
        epoch: request.epoch,
        components,
    };
    Ok((manifest, packed, indices))
}

/// Reads the written bundle and verifies everything except the frames, which are skipped.
fn read_back(path: &Utf8Path, request: &PackRequest<'_>) -> Result<Vec<SignedBy>> {
    let keys =
        KeySet { serial: 0, keys: request.signers.iter().map(|s| s.key().clone()).collect() };
    let file = File::open(path).with_context(|| format!("reading {path} back"))?;
    let walk = || -> bundle::Result<Vec<SignedBy>> {
        let mut reader = BundleReader::open(SeekableInput(file), &keys)?;
        while let Some(mut payload) = reader.next_payload()? {
            while payload.next_frame().is_some() {
                payload.skip_frame()?;
            }
        }
        Ok(reader.signed_by().to_vec())
    };
    walk().map_err(explain_bundle_error).with_context(|| format!("reading {path} back"))
}

/// A bundle that was verified to its last block.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct VerifiedBundle {
    /// The manifest.
    pub manifest: BundleManifest,
    /// SHA-256 of `manifest.json`.
    pub manifest_sha256: String,
    /// The valid signatures of trusted keys.
    pub signed_by: Vec<SignedBy>,
}

/// The unverified manifest of a bundle and its SHA-256: for displaying it, or for identifying the
/// bundle.
///
/// # Errors
/// When the file is not a bundle.
pub fn read_unverified(path: &Utf8Path) -> Result<(BundleManifest, String)> {
    let read = || -> Result<(BundleManifest, String)> {
        let mut archive = tar::Archive::new(artifact::open_file(path)?);
        let entry = archive.entries()?.next().context("not an update bundle (no tar header)")?;
        // The crate's own message contains the bytes.
        let Ok(entry) = entry else { bail!("not an update bundle (no tar header)") };
        let mut json = Vec::new();
        entry.take(LARGEST_MANIFEST).read_to_end(&mut json)?;
        let manifest = serde_json::from_slice(&json)
            .context("not an update bundle (no manifest at the beginning)")?;
        Ok((manifest, artifact::hash_bytes(&json)))
    };
    read().with_context(|| format!("reading the bundle {path}"))
}

/// Verifies a bundle: signatures, policy, indices, every frame and every block; and, for a
/// component `api`, that robots accept its trees.
///
/// # Errors
/// The first error. The chain holds a [`bundle::Error`] with its stable code.
pub fn verify_bundle(
    path: &Utf8Path,
    keys: &KeySet,
    policy: &BundlePolicy<'_>,
) -> Result<VerifiedBundle> {
    let file = artifact::open_file(path)?;
    let walk = || -> bundle::Result<VerifiedBundle> {
        let mut reader =
            BundleReader::open(StreamInput(BufReader::with_capacity(1 << 18, file)), keys)?;
        reader.check(policy)?;
        let sizes = reader.manifest().components.iter().flat_map(|c| &c.payloads).map(|p| p.size);
        let step =
            ProgressStep::new("verify", "checking every block", sizes.sum(), ProgressUnit::Bytes);
        let components = reader.manifest().components.clone();
        let mut api = Api::default();
        while let Some(payload) = reader.next_payload()? {
            let component = components.iter().find(|c| c.name == payload.component());
            let mut content =
                Content { payload, ready: Vec::new(), at: 0, error: None, step: &step };
            let mut read = Ok(());
            if let Some(component) = component.filter(|component| component.name == API) {
                read = api.payload(component, &mut content);
            }
            // The unread rest is hashed, too.
            let rest = io::copy(&mut content, &mut io::sink());
            match content.error {
                Some(error) => return Err(error),
                None => read.and(rest.map(drop).map_err(bundle::Error::from))?,
            }
        }
        Ok(VerifiedBundle {
            manifest: reader.manifest().clone(),
            manifest_sha256: reader.manifest_sha256().to_owned(),
            signed_by: reader.signed_by().to_vec(),
        })
    };
    walk().map_err(explain_bundle_error).with_context(|| format!("verifying {path}"))
}

/// A component `api` on its way through [`verify_bundle`].
#[derive(Default)]
struct Api {
    lock: Option<ComponentLock>,
    trees: WheelTrees,
}

impl Api {
    fn payload(
        &mut self,
        component: &BundleComponent,
        content: &mut dyn Read,
    ) -> bundle::Result<()> {
        let Some(lock) = &self.lock else {
            let mut json = Vec::new();
            content.take(bundle::MAX_LOCK + 1).read_to_end(&mut json)?;
            let lock = ComponentLock::parse(&json)?;
            lock.matches(component)?;
            self.lock = Some(lock);
            return Ok(());
        };
        let Some(wheel) = lock.wheels.get(self.trees.count()) else { return Ok(()) };
        self.trees.read(wheel, content)
    }
}

/// A payload's verified bytes as a stream.
struct Content<'r, 's, I> {
    payload: PayloadReader<'r, I>,
    ready: Vec<u8>,
    at: usize,
    error: Option<bundle::Error>,
    step: &'s ProgressStep,
}

impl<I: bundle::BundleInput> Read for Content<'_, '_, I> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.at == self.ready.len() && self.error.is_none() {
            if self.payload.next_frame().is_none() {
                return Ok(0);
            }
            self.ready.clear();
            self.at = 0;
            let ready = &mut self.ready;
            let read = self.payload.read_frame(&mut |_, bytes| {
                self.step.advance(bytes.len() as u64);
                ready.extend_from_slice(bytes);
                Ok(())
            });
            self.error = read.err();
        }
        if self.error.is_some() {
            return Err(io::Error::other("the bundle is damaged"));
        }
        let n = (&self.ready[self.at..]).read(buffer)?;
        self.at += n;
        Ok(n)
    }
}
