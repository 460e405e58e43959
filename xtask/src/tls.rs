//! Which certificate authorities servers are believed by.

use std::fs;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use camino::Utf8Path;
use ureq::tls::{Certificate, PemItem, RootCerts, parse_pem};

/// The system's files of certificate authorities.
const AUTHORITIES: [&str; 3] =
    ["/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem"];

/// The machine's certificate authorities (a company's own included), else Mozilla's.
pub(crate) fn load_authorities() -> Result<RootCerts> {
    let named = std::env::var("SSL_CERT_FILE").ok().filter(|v| !v.is_empty());
    let candidates = named.iter().map(String::as_str).chain(AUTHORITIES);
    let Some(path) = candidates.into_iter().find(|path| Utf8Path::new(path).is_file()) else {
        return Ok(RootCerts::WebPki);
    };
    let pem = fs::read(path).with_context(|| format!("reading {path}"))?;
    let certificates: Vec<Certificate<'static>> = parse_pem(&pem)
        .filter_map(|item| match item {
            Ok(PemItem::Certificate(certificate)) => Some(certificate),
            _ => None,
        })
        .collect();
    if certificates.is_empty() {
        bail!("{path} contains no certificate\nhelp: correct SSL_CERT_FILE");
    }
    Ok(RootCerts::Specific(Arc::new(certificates)))
}
