//! What runs on a started robot: the API through the proxy, names, addresses, the user's own things.

use std::net::Ipv4Addr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use xtask::plan::Plan;
use xtask::qemu::QemuSession;
use xtask::wheel::WheelLock;

use crate::boot::{COMMAND, output};
use crate::laptop::{ADDRESS, Laptop, POINTER, SERVICE, label};
use crate::support::root;

/// What a robot without a DHCP server needs for an address: networkd gives up on one after three attempts.
const ADDRESS_TIME: Duration = Duration::from_secs(180);

/// What a busy machine may need until the API server has imported its package.
const API_TIME: Duration = Duration::from_secs(900);

/// How soon a question over mDNS must be answered.
const ANSWER: Duration = Duration::from_secs(60);

/// Asks the robot's web server from the robot itself; status and text.
pub fn get(session: &mut QemuSession, host: &str, path: &str) -> Result<(u16, String)> {
    let program = "import http.client,sys; c=http.client.HTTPConnection(sys.argv[1],80,timeout=60); \
        c.request(\"GET\",sys.argv[2]); r=c.getresponse(); print(r.status,r.read().decode()[:400])";
    let printed = output(session, &format!("python3 -c '{program}' {host} {path}"), COMMAND)?;
    let (status, text) = printed.split_once(' ').unwrap_or((&printed, ""));
    Ok((status.parse().with_context(|| format!("reading {printed}"))?, text.trim().to_owned()))
}

/// Waits for the API server, which imports its package for a while.
pub fn api_is_up(session: &mut QemuSession) -> Result<()> {
    let wait = "for i in $(seq 300); do systemctl is-active -q slipway-api && break; sleep 1; done; \
                systemctl is-active slipway-api";
    output(session, wait, API_TIME).map(drop)
}

/// The API that the product has locked is the one that answers, from the image's own copy.
pub fn api(session: &mut QemuSession, plan: &Plan) -> Result<()> {
    let api = plan.api.as_ref().context("the product has an API")?;
    let name = api.package.split("==").next().unwrap_or_default();
    let lock = WheelLock::load(&root().join(&api.lock))?;
    let wheel = lock.wheels.iter().find(|w| w.name == name);
    let version = &wheel.with_context(|| format!("the lock has no {name}"))?.version;
    let (status, text) = get(session, "127.0.0.1", "/health")?;
    ensure!(status == 200, "/health answers {status}: {text}");
    let health: Value = serde_json::from_str(&text).with_context(|| format!("reading {text}"))?;
    ensure!(health["api_version"] == **version, "expected {version}: {text}");
    let path = health["path"].as_str().unwrap_or_default();
    let module = name.replace('-', "_");
    ensure!(path.starts_with("/usr/") && path.ends_with(&module), "the image's own copy: {text}");
    ensure!(health["name"] == *plan.network.hostname, "the host's name: {text}");
    ensure!(health["labware"]["wells"] == 96, "the package's data: {text}");
    Ok(())
}

/// The proxy hands on what is named, nothing else; a broken snippet is left out and reported.
pub fn proxy(session: &mut QemuSession) -> Result<()> {
    let (status, text) = get(session, "127.0.0.1", "/labware/opentrons_96_tiprack_300ul")?;
    ensure!(status == 200 && text.contains("\"ordering\""), "/labware/… answers {status}");
    for path in ["/", "/index.html", "/healthy", "/labware/../health/x", "/etc/passwd"] {
        let (status, text) = get(session, "127.0.0.1", path)?;
        ensure!((status, text.as_str()) == (404, "not found"), "{path} answers {status}: {text}");
    }
    let folder = "/data/system/proxy.d";
    let good = "location = /snippet { return 200 resources; }";
    let write = format!(
        "mkdir -p {folder} && echo '{good}' >{folder}/10-good.conf && \
         echo 'location = /broken {{' >{folder}/20-bad.conf && \
         echo '{good}' >{folder}/30-twice.conf && systemctl reload slipway-proxy"
    );
    output(session, &write, COMMAND)?;
    // The workers of before answer for a moment.
    output(session, "sleep 2", COMMAND)?;
    let (status, text) = get(session, "127.0.0.1", "/snippet")?;
    ensure!((status, text.as_str()) == (200, "resources"), "a snippet answers {status}: {text}");
    let (status, _) = get(session, "127.0.0.1", "/broken")?;
    ensure!(status == 404, "what a broken snippet names answers {status}");
    let printed = output(session, "journalctl -b -u slipway-proxy -o cat --no-pager", COMMAND)?;
    for name in ["20-bad.conf", "30-twice.conf"] {
        let reported = |line: &str| {
            line.contains(name) && line.contains("is left out: ") && line.contains("[emerg]")
        };
        ensure!(printed.lines().any(reported), "{name} is not reported: {printed}");
    }
    // With a broken snippet there, it also starts.
    output(session, "systemctl restart slipway-proxy && rm -r /data/system/proxy.d", COMMAND)?;
    // A server that dies is started again; meanwhile the proxy says why there is no answer.
    output(session, "systemctl kill --signal KILL slipway-api", COMMAND)?;
    let (status, text) = get(session, "127.0.0.1", "/health")?;
    ensure!(status == 503 && text.contains("does not answer"), "it answers {status}: {text}");
    let wait = "for i in $(seq 30); do systemctl show -P NRestarts slipway-api | grep -qx 1 && break; \
                sleep 1; done; systemctl show -P NRestarts slipway-api";
    let restarts = output(session, wait, COMMAND)?;
    ensure!(restarts == "1", "the API server was started again {restarts} times");
    // Until then its main process may be one of systemd's, which still sees everything.
    api_is_up(session)
}

/// What faces the network has empty places where the agent's, the identity's and the network's
/// directories are.
pub fn hidden(session: &mut QemuSession) -> Result<()> {
    for (unit, folders) in [
        ("slipway-api", "slotd identity network home"),
        ("slipway-proxy", "slotd identity network home"),
        ("systemd-resolved", "slotd identity network"),
        ("systemd-networkd", "slotd identity"),
    ] {
        // Root reads what is there: of an inaccessible directory systemd shows an empty one in its
        // place.
        let look = format!(
            "cd /proc/$(systemctl show -P MainPID {unit})/root/data && ls -A system >/dev/null && \
             for folder in {folders}; do ls -A /data/$folder | head -n 1 | grep -q . || echo $folder is empty; \
             ls -A $folder | sed \"s|^|$folder/|\"; done"
        );
        let printed = output(session, &look, COMMAND)?;
        let seen: Vec<&str> = printed.lines().filter(|line| line.contains('/')).collect();
        ensure!(seen.is_empty(), "{unit} sees {seen:?}");
        ensure!(!printed.contains("identity is empty"), "there is nothing to hide: {printed}");
    }
    // The proxy's place for bodies is its own.
    let size = "stat -f -c '%S %b' /proc/$(systemctl show -P MainPID slipway-proxy)/root/run/slipway-proxy/body";
    let printed = output(session, size, COMMAND)?;
    let numbers: Vec<u64> = printed.split(' ').filter_map(|n| n.trim().parse().ok()).collect();
    ensure!(numbers.iter().product::<u64>() == 32 << 20, "the place for bodies: {printed}");
    Ok(())
}

/// The robot's address on a cable without any server, and that it is found there by its names.
pub fn link_local(session: &mut QemuSession, plan: &Plan, laptop: &Laptop) -> Result<()> {
    let wait = "for i in $(seq 120); do ip -4 -o addr show scope link | grep -q 169.254 && break; \
                sleep 1; done; ip -o addr show scope link";
    let printed = output(session, wait, ADDRESS_TIME)?;
    ensure!(printed.contains("inet6 fe80:"), "no link-local address of IPv6: {printed}");
    let address = printed.split_whitespace().find(|word| word.starts_with("169.254."));
    let address = address.with_context(|| format!("no link-local address: {printed}"))?;
    let address = address.split('/').next().unwrap_or_default();
    let (status, _) = get(session, address, "/health")?;
    ensure!([200, 503].contains(&status), "port 80 of {address} answers {status}");
    let here: Ipv4Addr = address.parse().with_context(|| format!("reading {address}"))?;

    let hostname = format!("{}.local", plan.network.hostname);
    laptop.hears(&hostname, ADDRESS, &here.octets(), ANSWER)?;
    let display = label(&plan.product.title);
    laptop.hears("_http._tcp.local", POINTER, &display, ANSWER)?;
    let service = format!("{}._http._tcp.local", plan.product.title);
    // Port 80, and where.
    let at = [&80u16.to_be_bytes()[..], &label(&plan.network.hostname)].concat();
    laptop.hears(&service, SERVICE, &at, ANSWER)
}

/// What makes this machine this machine.
pub fn identity(session: &mut QemuSession) -> Result<String> {
    let files = "machine-id ssh/ssh_host_ed25519_key ssh/ssh_host_ed25519_key.pub";
    let printed = output(session, &format!("cd /data/identity && sha256sum {files}"), COMMAND)?;
    ensure!(printed.lines().count() == 3, "something of the identity is missing: {printed}");
    let same =
        "cmp /etc/machine-id /data/identity/machine-id && cmp /run/slipway/hostname /etc/hostname";
    output(session, same, COMMAND)?;
    Ok(printed)
}

/// Puts the user's own things on `data`: names, a connection, boot scripts.
pub fn leave_things(session: &mut QemuSession) -> Result<()> {
    for command in [
        "echo bench-2 >/data/identity/hostname; echo 'Bench 2' >/data/identity/display-name",
        "printf '[Match]\\nType=ether\\n[Network]\\nAddress=192.0.2.7/24\\n' >/data/network/10-lab.network",
        "echo nonsense >/data/network/20-broken.network",
        "umask 077; cd /data/network && for i in 0 1; do m=$((i*2)); \
         printf \"ctrl_interface=/run/wpa_supplicant\\nnetwork={\\n ssid=\\\"bench\\\"\\n \
         psk=\\\"not a secret\\\"\\n key_mgmt=WPA-PSK\\n mode=$m\\n frequency=2412\\n}\\n\" \
         >wpa_supplicant-wlan$i.conf; done",
        "cd /data/boot.d && printf '#!/bin/sh\\necho ran >/run/ran\\n' >10-runs && \
         printf '#!/bin/sh\\nexec sleep 900\\n' >20-hangs && chmod 0755 10-runs 20-hangs",
    ] {
        output(session, command, COMMAND)?;
    }
    // Names apply at once on request.
    let renamed =
        "systemctl restart slipway-identity systemd-resolved && hostnamectl --static && hostname";
    let printed = output(session, renamed, COMMAND)?;
    ensure!(printed.lines().all(|line| line.trim() == NAME), "the host's name is {printed}");
    Ok(())
}

/// The name that [`leave_things`] gives.
pub const NAME: &str = "bench-2";

/// Looks for these things after a restart.
pub fn find_things(session: &mut QemuSession, long: Duration) -> Result<()> {
    // The script that hangs holds up nothing.
    let (_, state) = session.run("systemctl is-system-running --wait", long)?;
    ensure!(state == "running", "the system is {state}");
    for (command, expected) in [
        ("hostnamectl --static", NAME),
        ("hostnamectl --pretty", "Bench 2"),
        ("cat /run/ran", "ran"),
        ("systemctl is-active slipway-boot-scripts", "active"),
    ] {
        let printed = output(session, command, COMMAND)?;
        ensure!(printed == expected, "`{command}` says {printed}, expected {expected}");
    }
    let printed = output(session, "ip -4 -o addr show scope global", COMMAND)?;
    ensure!(printed.contains("192.0.2.7/24"), "the user's connection is not used: {printed}");
    let printed = output(session, "journalctl -b -u slipway-network -o cat --no-pager", COMMAND)?;
    ensure!(printed.contains("20-broken.network is not used"), "nothing is reported: {printed}");
    wireless(session)
}

/// Wi-Fi on radios without hardware: one is an access point and one its station, as their files say; the
/// third has no file and is left alone.
fn wireless(session: &mut QemuSession) -> Result<()> {
    output(session, "modprobe mac80211_hwsim radios=3", COMMAND)?;
    // "up" comes after the four-way handshake, so the passphrase was the right one.
    let wait = "for i in $(seq 90); do grep -sqx up /sys/class/net/wlan0/operstate && break; sleep 1; done; \
                cat /sys/class/net/wlan0/operstate";
    let state = output(session, wait, ADDRESS_TIME)?;
    let journal = "journalctl -b -u 'slipway-wifi@*' -o cat --no-pager | tail -n 20";
    let printed = output(session, journal, COMMAND)?;
    ensure!(state == "up", "the station is {state}: {printed}");
    let (_, units) = session.run("systemctl is-active slipway-wifi@wlan{0,1,2}", COMMAND)?;
    let units: Vec<&str> = units.split_whitespace().collect();
    ensure!(units == ["active", "active", "inactive"], "the supplicants are {units:?}: {printed}");
    Ok(())
}
