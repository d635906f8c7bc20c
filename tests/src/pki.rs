//! A test's certificate authority and its certificates, as files.

use std::fs;
use std::path::{Path, PathBuf};

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, KeyUsagePurpose,
    date_time_ymd,
};

#[derive(Debug)]
pub struct Pki {
    folder: PathBuf,
    authority: CertifiedIssuer<'static, KeyPair>,
}

/// A certificate and its key.
#[derive(Clone, Debug)]
pub struct Pair {
    pub certificate: PathBuf,
    pub key: PathBuf,
}

impl Pki {
    /// Creates an authority and the folder for its files.
    #[must_use]
    pub fn new(folder: &Path) -> Self {
        fs::create_dir_all(folder).unwrap_or_else(|e| panic!("make {}: {e}", folder.display()));
        let mut params = params(&format!("the authority of {}", folder.display()));
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let authority = CertifiedIssuer::self_signed(params, key());
        let authority = authority.unwrap_or_else(|e| panic!("create an authority: {e}"));
        let pki = Self { folder: folder.to_owned(), authority };
        write(&pki.authority(), &pki.authority.pem());
        pki
    }

    /// Returns the path of the authority's certificate.
    #[must_use]
    pub fn authority(&self) -> PathBuf {
        self.folder.join("authority.pem")
    }

    /// Issues a certificate for this name and replaces an earlier one with the same name.
    pub fn sign(&self, name: &str) -> Pair {
        self.write(name, &params(name))
    }

    /// Issues an expired certificate for this name.
    pub fn sign_expired(&self, name: &str) -> Pair {
        let mut params = params(name);
        params.not_after = date_time_ymd(2001, 1, 1);
        self.write(name, &params)
    }

    fn write(&self, name: &str, params: &CertificateParams) -> Pair {
        let key = key();
        let certificate = params.signed_by(&key, &self.authority);
        let certificate = certificate.unwrap_or_else(|e| panic!("sign a certificate for {name}: {e}"));
        let file = |kind: &str| self.folder.join(format!("{name}-{kind}.pem"));
        let pair = Pair { certificate: file("certificate"), key: file("key") };
        write(&pair.certificate, &certificate.pem());
        write(&pair.key, &key.serialize_pem());
        pair
    }
}

/// The certificate does not name a host, because the name is not verified.
fn params(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, name);
    params.not_before = date_time_ymd(2000, 1, 1);
    params
}

fn key() -> KeyPair {
    KeyPair::generate().unwrap_or_else(|e| panic!("create a key: {e}"))
}

fn write(path: &Path, text: &str) {
    fs::write(path, text).unwrap_or_else(|e| panic!("write {}: {e}", path.display()));
}
