//! The certificate authorities that are trusted for servers.

use std::io::Read;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use camino::Utf8Path;
use ureq::tls::{Certificate, PemItem, RootCerts, parse_pem};

use crate::artifact::open_regular;
use crate::variable;

/// The system's files of certificate authorities.
const AUTHORITIES: [&str; 3] =
    ["/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem"];

/// The machine's certificate authorities (a company's own included), else Mozilla's.
pub(crate) fn load_authorities() -> Result<RootCerts> {
    let named = variable::find("SSL_CERT_FILE")?;
    let known = || AUTHORITIES.into_iter().find(|path| Utf8Path::new(path).is_file());
    let Some(path) = named.as_deref().or_else(known) else { return Ok(RootCerts::WebPki) };
    let help = match named {
        Some(_) => {
            "set SSL_CERT_FILE to a file of certificates (PEM), or unset it to use those of the system"
        }
        None => "set SSL_CERT_FILE to a file of certificates (PEM)",
    };
    let context = || format!("reading the certificate authorities in {path}\nhelp: {help}");
    let mut pem = Vec::new();
    let mut file = open_regular(Utf8Path::new(path)).with_context(context)?;
    file.read_to_end(&mut pem).with_context(context)?;
    let certificates: Vec<Certificate<'static>> = parse_pem(&pem)
        .filter_map(|item| match item {
            Ok(PemItem::Certificate(certificate)) => Some(certificate),
            _ => None,
        })
        .collect();
    if certificates.is_empty() {
        bail!("{path} contains no certificate\nhelp: {help}");
    }
    Ok(RootCerts::Specific(Arc::new(certificates)))
}
