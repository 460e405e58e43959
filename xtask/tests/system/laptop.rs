//! A laptop on the other end of a cable: no DHCP server, no name server, nothing but mDNS. QEMU hands each
//! Ethernet frame of the robot's link over as one datagram on the loopback address.

use std::net::{Ipv4Addr, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// RFC 6762, 3: the group and the port.
const GROUP: Ipv4Addr = Ipv4Addr::new(224, 0, 0, 251);
const PORT: u16 = 5353;

/// An address as a laptop gives itself one on such a cable (RFC 3927).
const OURS: Ipv4Addr = Ipv4Addr::new(169, 254, 9, 9);

/// Types of records (RFC 1035, RFC 2782).
pub const ADDRESS: u16 = 1;
pub const POINTER: u16 = 12;
pub const SERVICE: u16 = 33;

/// The longest frame of the link, and some more.
const FRAME: usize = 2048;

/// One end of the cable.
pub struct Laptop {
    socket: UdpSocket,
    robot: u16,
}

impl Laptop {
    /// Plugs the cable in; the robot's end comes with [`Self::arguments`].
    pub fn new() -> Result<Self> {
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).context("a laptop")?;
        socket.set_read_timeout(Some(Duration::from_millis(200))).context("a laptop")?;
        let other = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).context("the other end")?;
        let robot = other.local_addr().context("the other end")?.port();
        Ok(Self { socket, robot })
    }

    /// QEMU's arguments for a network device of this kind on the cable.
    pub fn arguments(&self, device: &str) -> Result<Vec<String>> {
        let ours = self.socket.local_addr().context("a laptop")?;
        let cable = format!("socket,id=cable,udp={ours},localaddr=127.0.0.1:{}", self.robot);
        let device = format!("{device},netdev=cable,romfile=");
        Ok(["-netdev", &cable, "-device", &device].map(str::to_owned).to_vec())
    }

    /// Asks for records of a name, as `_http._tcp.local`, once a second, until an answer has these bytes.
    pub fn hears(&self, name: &str, kind: u16, bytes: &[u8], timeout: Duration) -> Result<()> {
        let end = Instant::now() + timeout;
        let mut answers = 0;
        while Instant::now() < end {
            self.socket.send_to(&question(name, kind), (Ipv4Addr::LOCALHOST, self.robot))?;
            let next = Instant::now() + Duration::from_secs(1);
            let mut frame = [0; FRAME];
            while Instant::now() < next {
                // A timeout is not an answer yet.
                let Ok(length) = self.socket.recv(&mut frame) else { continue };
                let Some(message) = frame.get(..length).and_then(answer) else { continue };
                answers += 1;
                if message.windows(bytes.len()).any(|window| window == bytes) {
                    return Ok(());
                }
            }
        }
        let wanted = String::from_utf8_lossy(bytes).escape_debug().to_string();
        bail!("asked for {name} (type {kind}), no answer of {answers} has `{wanted}`")
    }
}

/// A label in a message: its length, then its bytes.
pub fn label(text: &str) -> Vec<u8> {
    let length = u8::try_from(text.len()).expect("at most 63 bytes");
    [&[length], text.as_bytes()].concat()
}

/// A question in a frame to everybody (RFC 894, 791, 768, 1035).
fn question(name: &str, kind: u16) -> Vec<u8> {
    let mut message = vec![0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    message.extend(name.split('.').flat_map(label));
    message.push(0);
    message.extend(kind.to_be_bytes());
    // Class IN; the answer goes to everybody.
    message.extend([0, 1]);

    let length = u16::try_from(8 + message.len()).expect("short");
    let mut datagram = [PORT, PORT, length, 0].map(u16::to_be_bytes).concat();
    // No checksum: allowed with IPv4.
    datagram.extend(message);

    let total = u16::try_from(20 + datagram.len()).expect("short").to_be_bytes();
    // TTL 255, protocol UDP.
    let mut header = vec![0x45, 0, total[0], total[1], 0, 0, 0x40, 0, 255, 17, 0, 0];
    header.extend(OURS.octets());
    header.extend(GROUP.octets());
    let sum =
        header.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1])).sum::<u32>();
    let folded = u16::try_from((sum & 0xffff) + (sum >> 16)).expect("no carry is left");
    header[10..12].copy_from_slice(&(!folded).to_be_bytes());

    // The group's own Ethernet address, ours (locally administered), IPv4.
    let mut frame = vec![0x01, 0x00, 0x5e, 0x00, 0x00, 0xfb, 2, 0, 0, 0, 0, 9, 8, 0];
    frame.extend(header);
    frame.extend(datagram);
    frame
}

/// The DNS message of a frame, if it is an mDNS answer over IPv4.
fn answer(frame: &[u8]) -> Option<&[u8]> {
    let packet = frame.get(14..).filter(|_| frame[12..14] == [8, 0])?;
    let header = usize::from(packet.first()? & 0x0f) * 4;
    let datagram = packet.get(header..).filter(|_| packet.get(9) == Some(&17))?;
    let from = u16::from_be_bytes([*datagram.first()?, *datagram.get(1)?]);
    let message = datagram.get(8..).filter(|_| from == PORT)?;
    (message.get(2)? & 0x80 != 0).then_some(message)
}
