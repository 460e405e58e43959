//! Which web servers are believed over https. This keeps others from reading along, and from holding a robot up
//! with an old bundle; what makes a bundle trusted is the signature in it, whoever has sent it.

use std::fmt;
use std::fs;
use std::io;

use rustls::CertificateError;
use ureq::tls::{PemItem, RootCerts, TlsConfig, parse_pem};

use crate::durable;
use crate::refusal::{Refusal, Result};
use crate::root::Root;

/// Folders with the certificates of authorities, as PEM in files `*.pem` and `*.crt`: the image's and the robot's.
const AUTHORITIES: [&str; 2] = ["etc/slotd/ca.d", "data/identity/ca.d"];

/// Whose certificates count: those of the authorities that the robot has files of, and if it has none, Mozilla's
/// list as of the agent's build.
///
/// # Errors
/// `bad-certificate`: a file makes no sense. `io`.
pub(super) fn config(root: &Root) -> Result<TlsConfig> {
    let mut known = Vec::new();
    for folder in AUTHORITIES {
        let folder = root.path(folder);
        let failed =
            |error: io::Error| Refusal::io(format!("reading {}", folder.display()), &error);
        let entries = match fs::read_dir(&folder) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(failed(error)),
        };
        for entry in entries {
            let path = entry.map_err(failed)?.path();
            if !path.extension().is_some_and(|ending| ending == "pem" || ending == "crt") {
                continue;
            }
            let bad = |why: String| {
                Refusal::new(
                    "bad-certificate",
                    format!("{}: {why}", path.display()),
                    "put the certificates of authorities there, as PEM, or remove the file",
                )
            };
            let pem = durable::read(&path).map_err(|error| bad(error.to_string()))?;
            let before = known.len();
            for item in parse_pem(&pem.unwrap_or_default()) {
                if let PemItem::Certificate(one) = item.map_err(|error| bad(error.to_string()))? {
                    known.push(one);
                }
            }
            if known.len() == before {
                return Err(bad("it has no certificate".to_owned()));
            }
        }
    }
    let roots = if known.is_empty() { RootCerts::WebPki } else { RootCerts::from(known) };
    Ok(TlsConfig::builder().root_certs(roots).build())
}

/// Why a server is not believed, and what to do about it.
#[derive(Debug)]
struct Distrust {
    why: String,
    help: &'static str,
}

impl fmt::Display for Distrust {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the server's certificate is not accepted: {}", self.why)
    }
}

impl std::error::Error for Distrust {}

/// The failure of a request, if it is that the server is not believed.
pub(super) fn distrust(error: &ureq::Error) -> Option<io::Error> {
    let error = match error {
        ureq::Error::Rustls(error) => error,
        ureq::Error::Io(error) => error.get_ref()?.downcast_ref::<rustls::Error>()?,
        _ => return None,
    };
    let rustls::Error::InvalidCertificate(why) = error else { return None };
    let (why, help) = match why {
        // The second: an authority that has the name of one that the robot knows, made anew.
        CertificateError::UnknownIssuer | CertificateError::BadSignature => (
            "no authority that this robot knows has issued it".to_owned(),
            "put the authority's certificate, as PEM, into /data/identity/ca.d, or take an address with http: \
             what is trusted is the bundle's own signature",
        ),
        CertificateError::Expired
        | CertificateError::ExpiredContext { .. }
        | CertificateError::NotValidYet
        | CertificateError::NotValidYetContext { .. } => (
            why.to_string(),
            "set this robot's clock (`date` shows it), or renew the certificate, or take an address with http: \
             what is trusted is the bundle's own signature",
        ),
        CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => (
            why.to_string(),
            "name the server as its certificate does, or take an address with http: what is trusted is the \
             bundle's own signature",
        ),
        _ => (
            why.to_string(),
            "give the server a sound certificate, or take an address with http: what is trusted is the bundle's \
             own signature",
        ),
    };
    Some(io::Error::other(Distrust { why, help }))
}

/// The refusal, if a failure is that a server is not believed.
pub(crate) fn refusal(doing: &str, error: &io::Error) -> Option<Refusal> {
    let distrust = error.get_ref()?.downcast_ref::<Distrust>()?;
    Some(Refusal::new("bad-certificate", format!("{doing}: {distrust}"), distrust.help))
}
