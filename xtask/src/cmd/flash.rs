//! `flash`: writes an image to a card.

use std::io::{BufRead, IsTerminal, Write};
use std::os::unix::fs::MetadataExt;

use anyhow::{Context, Result, bail, ensure};
use camino::{Utf8Path, Utf8PathBuf};
use rustix::fs::Access;
use serde_json::json;

use crate::cli::{FlashArgs, OutputFormat};
use crate::exec::Tool;
use crate::flash::card::CardDevice;
use crate::flash::device::{self, DeviceObjection, FlashDevice};
use crate::flash::seed::{self, PASSWORD_VARIABLE, SeedFile};
use crate::flash::source::ImageSource;
use crate::flash::{self, FlashOutcome, FlashRequest};
use crate::progress::{format_bytes, format_duration, say};
use crate::tools::{self, ToolPurpose};
use crate::workspace::{BuildSelection, dist_dir, resolve_plan};
use crate::{err, errln, out, outln, program, text, variable};

/// `cargo xtask flash`.
///
/// # Errors
/// When the device may not be written, the write was not confirmed, or the card does not hold the
/// image.
pub fn flash(options: &FlashArgs) -> Result<()> {
    if !options.device.as_ref().is_some_and(|target| target.is_file()) {
        tools::require_tools(&[ToolPurpose::Flash], false)?;
    }
    if options.list {
        // Without an image, no device is too small.
        let size = match &options.image {
            Some(_) => ImageSource::open(&find_image(options)?)?.size,
            None => 0,
        };
        return list_devices(options.format, size);
    }
    let seed = build_seed(options)?;
    let source = ImageSource::open(&find_image(options)?)?;
    let terminal = std::io::stdin().is_terminal() && std::io::stderr().is_terminal();
    let device = match &options.device {
        Some(device) => device::find_device(device)?,
        None if terminal => choose_device(source.size)?,
        None => bail!(
            "no device was given\n{}help: name a device: {} flash IMAGE DEVICE --yes",
            format_devices(&device::select_candidates(device::list_all_devices()?), source.size),
            program::name()
        ),
    };
    reject_device(&device, source.size, options.non_removable.as_deref())?;
    // Two names may be hard links to one file.
    let identity = |path: &Utf8Path| -> Result<(u64, u64)> {
        let about = std::fs::metadata(path).with_context(|| format!("reading {path}"))?;
        Ok((about.dev(), about.ino()))
    };
    ensure!(
        identity(&device.path)? != identity(&source.path)?,
        "the image and the target are the same file\nhelp: name another file or a device"
    );
    if rustix::fs::access(device.path.as_std_path(), Access::WRITE_OK).is_err() {
        let again = Tool::new("sudo")
            .arg(std::env::current_exe().unwrap_or_default().display().to_string());
        let again = again.args(std::env::args().skip(1));
        // sudo drops it.
        let lost = match std::env::var_os(PASSWORD_VARIABLE) {
            Some(_) => {
                format!(" (sudo does not keep {PASSWORD_VARIABLE}: use --wifi-password-file)")
            }
            None => String::new(),
        };
        bail!(
            "no permission to write to {}\n\
             help: {}{}",
            device.path,
            again.command_line(),
            lost
        );
    }
    confirm_write(options, &source, &device, terminal)?;
    let card = CardDevice::open(&device)?;
    let request = FlashRequest {
        source: &source,
        read_back: !options.no_read_back,
        seed: (!seed.is_empty()).then_some(&seed),
    };
    let outcome = flash::flash(&request, &card)
        .with_context(|| format!("flashing {} to {}", source.path, device.path))?;
    match options.format {
        OutputFormat::Text => outln!("{}", describe_outcome(&outcome, &source, &device)),
        OutputFormat::Json => {
            let mut value = serde_json::to_value(&outcome)?;
            value["image"] = json!(source.path);
            value["device"] = json!(device.path);
            outln!("{}", text::to_json(&value)?);
        }
    }
    Ok(())
}

fn describe_outcome(outcome: &FlashOutcome, source: &ImageSource, device: &FlashDevice) -> String {
    let proof = if outcome.read_back { "written and verified" } else { "written, not verified" };
    let rate = (outcome.bytes as f64 / outcome.seconds.max(0.001)) as u64;
    let seeded = match outcome.seeded.as_slice() {
        [] => String::new(),
        names => format!("; the first boot applies {}", names.join(", ")),
    };
    format!(
        "{} to {}: {} {proof} in {}, {}/s{seeded}",
        source.path,
        device.path,
        format_bytes(outcome.bytes),
        format_duration(std::time::Duration::from_secs_f64(outcome.seconds)),
        format_bytes(rate),
    )
}

/// A path, or the image that was built for a product.
fn find_image(options: &FlashArgs) -> Result<Utf8PathBuf> {
    // No product has either in its name.
    let is_path = |name: &str| name.contains(['/', '.']);
    if let Some(name) = options.image.as_deref().filter(|name| is_path(name)) {
        ensure!(options.board.is_none(), "{name} is an image, but --board needs a product");
        return Ok(name.into());
    }
    let selection = BuildSelection { product: options.image.clone(), board: options.board.clone() };
    let (config, _, plan) = resolve_plan(&selection)?;
    let image = dist_dir(&config.root, &plan).join(format!("{}.img", plan.stem()));
    ensure!(
        image.is_file(),
        "there is no image yet: {image}\nhelp: cargo xtask build-image --product {} --board {}",
        plan.product.name,
        plan.board.name
    );
    Ok(image)
}

fn build_seed(options: &FlashArgs) -> Result<SeedFile> {
    if let Some(name) = &options.hostname {
        seed::check_hostname(name)?;
    }
    let mut ssh_keys = Vec::new();
    for path in &options.ssh_key {
        ssh_keys.extend(seed::read_keys(path)?);
    }
    let wifi = match &options.wifi {
        Some(ssid) => Some(seed::wifi_network(ssid, wifi_password(options, ssid)?)?),
        None => None,
    };
    Ok(SeedFile { hostname: options.hostname.clone(), ssh_keys, wifi })
}

/// The Wi-Fi password; `None` for an open network. Never from the command line, which every user of
/// the machine can read.
fn wifi_password(options: &FlashArgs, ssid: &str) -> Result<Option<String>> {
    let given = if let Some(path) = &options.wifi_password_file {
        let text = std::fs::read_to_string(path).with_context(|| format!("reading {path}"))?;
        // Editors on Windows put a byte order mark before the text.
        text.trim_start_matches('\u{feff}').trim_end_matches(['\r', '\n']).to_owned()
    } else if let Some(password) = variable::find_or_empty(PASSWORD_VARIABLE)? {
        password
    } else if std::io::stdin().is_terminal() {
        ask_hidden(ssid)?
    } else {
        bail!(
            "cannot ask for the password of the Wi-Fi `{ssid}` (no terminal)\n\
             help: set {PASSWORD_VARIABLE} (empty for an open network), or use --wifi-password-file"
        );
    };
    Ok((!given.is_empty()).then_some(given))
}

fn list_devices(format: OutputFormat, size: u64) -> Result<()> {
    let devices = device::select_candidates(device::list_all_devices()?);
    match format {
        OutputFormat::Text => out!("{}", format_devices(&devices, size)),
        OutputFormat::Json => {
            let rows = devices.iter().map(|device| {
                let mut row = serde_json::to_value(device)?;
                row["objections"] = serde_json::to_value(device.objections(size, None))?;
                Ok(row)
            });
            let rows: Vec<_> = rows.collect::<Result<_>>()?;
            outln!("{}", text::to_json(&rows)?);
        }
    }
    Ok(())
}

/// The devices in human-readable form: those that can be written first.
fn format_devices(devices: &[FlashDevice], size: u64) -> String {
    if devices.is_empty() {
        return "no disks found\n".to_owned();
    }
    let mut rows: Vec<(bool, String)> = Vec::new();
    for device in devices {
        let objections = device.objections(size, None);
        let or_dash = |text: &str| if text.is_empty() { "-".to_owned() } else { text.to_owned() };
        let mut row = format!(
            "{:<10} {:>9}  {:<6} {:<9}  {:<24} {}\n",
            device.name,
            format_bytes(device.size),
            device.bus,
            if device.removable { "removable" } else { "fixed" },
            or_dash(&device.model),
            or_dash(&device.content),
        );
        for (place, at) in &device.mounted {
            row.push_str(&format!("           {place} is mounted at {at}\n"));
        }
        for DeviceObjection { message, .. } in &objections {
            row.push_str(&format!("           no: {message}\n"));
        }
        rows.push((!objections.is_empty(), row));
    }
    rows.sort_by_key(|(refused, _)| *refused);
    rows.into_iter().map(|(_, row)| row).collect()
}

/// Asks on the terminal which device to write. Typing its name is also the confirmation.
fn choose_device(size: u64) -> Result<FlashDevice> {
    let devices = device::select_candidates(device::list_all_devices()?);
    err!("{}", format_devices(&devices, size));
    let name = text::ask_line("Name of the device to write (empty: cancel): ")?;
    let wanted = Utf8Path::new(&name);
    ensure!(!name.is_empty(), "nothing was written");
    let found = devices.into_iter().find(|device| device.name == name || device.path == wanted);
    found.with_context(|| format!("`{name}` is not one of these devices; nothing was written"))
}

fn reject_device(device: &FlashDevice, size: u64, allowed: Option<&str>) -> Result<()> {
    if let Some(name) = allowed {
        ensure!(
            name == device.name || name == device.path.as_str(),
            "--non-removable names {name}, but the device is {}",
            device.name
        );
    }
    let objections = device.objections(size, allowed);
    let Some(first) = objections.first() else { return Ok(()) };
    let mut message = format!("{} cannot be flashed: {}", device.path, first.message);
    for DeviceObjection { message: more, .. } in &objections[1..] {
        message.push_str(&format!("; {more}"));
    }
    bail!("{message}\nhelp: {}", first.help)
}

/// Asks for confirmation on a terminal, unless the device was just chosen there; never asks in a
/// script.
fn confirm_write(
    options: &FlashArgs,
    source: &ImageSource,
    device: &FlashDevice,
    terminal: bool,
) -> Result<()> {
    if options.yes || options.device.is_none() {
        return Ok(());
    }
    ensure!(
        terminal,
        "everything on {} would be lost, and there is no terminal to confirm it\n\
         help: if it is the right device, add --yes",
        device.path
    );
    let or =
        |text: &str, other: &str| if text.is_empty() { other.to_owned() } else { text.to_owned() };
    errln!(
        "{}: {}, {}, {}; contents: {}",
        device.path,
        format_bytes(device.size),
        device.bus,
        or(&device.model, "unknown model"),
        or(&device.content, "unknown")
    );
    say(
        "flash",
        format!(
            "{} will be written to this device, and everything on it will be lost",
            source.path
        ),
    );
    let answer = text::ask_line(&format!("Type its name ({}) to continue: ", device.name))?;
    ensure!(answer == device.name, "nothing was written");
    Ok(())
}

/// Asks without showing what is typed.
fn ask_hidden(ssid: &str) -> Result<String> {
    let stdin = std::io::stdin();
    let before = rustix::termios::tcgetattr(&stdin).context("asking for a password")?;
    let mut silent = before.clone();
    silent.local_modes.remove(rustix::termios::LocalModes::ECHO);
    let now = rustix::termios::OptionalActions::Now;
    rustix::termios::tcsetattr(&stdin, now, &silent).context("asking for a password")?;
    let answer = ask_whole(&format!("Password of the Wi-Fi `{ssid}` (nothing: an open network): "));
    rustix::termios::tcsetattr(&stdin, now, &before).context("after asking for a password")?;
    errln!("");
    answer
}

/// Like [`ask_line`], but keeps blanks at the ends, which a password may have.
fn ask_whole(question: &str) -> Result<String> {
    err!("{question}");
    std::io::stderr().flush().context("asking")?;
    let mut answer = String::new();
    std::io::stdin().lock().read_line(&mut answer).context("reading the answer")?;
    Ok(answer.trim_end_matches(['\r', '\n']).to_owned())
}
