//! Which web servers are trusted over https. This prevents others from reading the transfer, and from blocking
//! updates with an old bundle. A bundle itself is trusted because of its signature, whichever server sends it.

use std::fmt;
use std::io;

use rustls::CertificateError;
use ureq::tls::{PemItem, RootCerts, TlsConfig, parse_pem};

use crate::durable;
use crate::refusal::{Refusal, Result};
use crate::root::RootDir;

/// Directories with certificates of authorities, as PEM in files `*.pem` and `*.crt`: the image's and the robot's.
const AUTHORITIES: [&str; 2] = ["etc/slotd/ca.d", "data/identity/ca.d"];

/// The trusted authorities: those in the robot's files, or if there are none, Mozilla's list as of the agent's
/// build.
///
/// # Errors
/// `bad-certificate`: a file is invalid. `io`.
pub(super) fn tls_config(root: &RootDir) -> Result<TlsConfig> {
    let mut known = Vec::new();
    for folder in AUTHORITIES {
        let folder = root.path(folder);
        let failed =
            |error: io::Error| Refusal::io(format!("reading {}", folder.display()), &error);
        for path in durable::list(&folder).map_err(failed)? {
            if !path.extension().is_some_and(|ending| ending == "pem" || ending == "crt") {
                continue;
            }
            let bad = |why: String| {
                Refusal::new(
                    "bad-certificate",
                    format!("{}: {why}", path.display()),
                    "put the certificates of authorities into this file, as PEM, or remove the file",
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
                return Err(bad("the file has no certificate".to_owned()));
            }
        }
    }
    let roots = if known.is_empty() { RootCerts::WebPki } else { RootCerts::from(known) };
    Ok(TlsConfig::builder().root_certs(roots).build())
}

/// Why a server's certificate is not trusted, and what to do about it.
#[derive(Debug)]
struct Distrust {
    why: String,
    help: &'static str,
}

impl fmt::Display for Distrust {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the server's certificate is not trusted: {}", self.why)
    }
}

impl std::error::Error for Distrust {}

/// The error of a request, if the server's certificate is not trusted.
pub(super) fn distrust_error(error: &ureq::Error) -> Option<io::Error> {
    let error = match error {
        ureq::Error::Rustls(error) => error,
        ureq::Error::Io(error) => error.get_ref()?.downcast_ref::<rustls::Error>()?,
        _ => return None,
    };
    let rustls::Error::InvalidCertificate(why) = error else { return None };
    let (why, help) = match why {
        // The second: an authority with the name of a known one, but a new key.
        CertificateError::UnknownIssuer | CertificateError::BadSignature => (
            "it was not issued by an authority that this robot trusts".to_owned(),
            "put the authority's certificate, as PEM, into /data/identity/ca.d, or use an http:// address: \
             the bundle is verified by its own signature",
        ),
        CertificateError::Expired
        | CertificateError::ExpiredContext { .. }
        | CertificateError::NotValidYet
        | CertificateError::NotValidYetContext { .. } => (
            why.to_string(),
            "set this robot's clock (`date` shows it), or renew the certificate, or use an http:// address: \
             the bundle is verified by its own signature",
        ),
        CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => (
            why.to_string(),
            "use the server name of its certificate, or use an http:// address: the bundle is verified by \
             its own signature",
        ),
        _ => (
            why.to_string(),
            "give the server a valid certificate, or use an http:// address: the bundle is verified by its own \
             signature",
        ),
    };
    Some(io::Error::other(Distrust { why, help }))
}

/// The refusal, if the error is that a server's certificate is not trusted.
pub(crate) fn refusal(action: &str, error: &io::Error) -> Option<Refusal> {
    let distrust = error.get_ref()?.downcast_ref::<Distrust>()?;
    Some(Refusal::new("bad-certificate", format!("{action}: {distrust}"), distrust.help))
}
