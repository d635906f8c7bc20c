//! TLS towards Nova. Certificates and keys come from outside and apply to the next connection.
//!
//! [`UpstreamTls`] is the upstream's end, and [`TlsFeed`] the end of the one who reads the files.
//! A file may have been replaced just before a certificate is refused. So the upstream then has the
//! files checked, and tries again if what is in force has changed.

use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use rustls::{AlertDescription, ClientConfig};
use tls_files::{TlsMaterial, TlsSetupError};
use tokio::sync::watch;
use tokio::time::timeout;

/// The longest wait for a check of the files, which may be on a dead file server.
const CHECK: Duration = Duration::from_secs(2);

/// The TLS configuration for new connections.
#[derive(Debug)]
pub struct UpstreamTls {
    current: Arc<ArcSwap<ClientConfig>>,
    /// The number of checks that were asked for.
    wanted: watch::Sender<u64>,
    /// The number of those that were made.
    made: watch::Receiver<u64>,
}

/// Puts other certificates and keys in force.
#[derive(Debug)]
pub struct TlsFeed {
    current: Arc<ArcSwap<ClientConfig>>,
    wanted: watch::Receiver<u64>,
    made: watch::Sender<u64>,
}

impl UpstreamTls {
    /// # Errors
    /// The material cannot be used.
    pub fn new(material: TlsMaterial) -> Result<(Self, TlsFeed), TlsSetupError> {
        let current = Arc::new(ArcSwap::from_pointee(material.client_config()?));
        let (wanted, wanted_now) = watch::channel(0);
        let (made, made_now) = watch::channel(0);
        let feed = TlsFeed { current: Arc::clone(&current), wanted: wanted_now, made };
        Ok((Self { current, wanted, made: made_now }, feed))
    }

    /// Returns the configuration in force.
    pub(super) fn current(&self) -> Arc<ClientConfig> {
        self.current.load_full()
    }

    /// Has the files checked because a certificate was refused. Returns the configuration that is
    /// then in force, unless it is the `refused` one.
    pub(super) async fn replacement_of(&self, refused: &Arc<ClientConfig>) -> Option<Arc<ClientConfig>> {
        let replacement = || Some(self.current()).filter(|current| !Arc::ptr_eq(current, refused));
        if let Some(replacement) = replacement() {
            return Some(replacement);
        }
        let mut number = 0;
        self.wanted.send_modify(|wanted| {
            *wanted += 1;
            number = *wanted;
        });
        let mut made = self.made.clone();
        // Ends early if no one reads the files any more.
        let _ = timeout(CHECK, made.wait_for(|made| *made >= number)).await;
        replacement()
    }
}

impl TlsFeed {
    /// Waits until a certificate was refused. The caller then checks the files, and passes the
    /// number of the refusal to [`Self::checked`]. Cancelling the wait loses nothing.
    pub async fn refused(&mut self) -> u64 {
        if self.wanted.changed().await.is_err() {
            // The upstream has ended.
            std::future::pending::<()>().await;
        }
        *self.wanted.borrow_and_update()
    }

    /// Puts other material in force for connections that begin from now on.
    ///
    /// # Errors
    /// The material cannot be used. The former one stays in force.
    pub fn replace(&self, material: TlsMaterial) -> Result<(), TlsSetupError> {
        self.current.store(Arc::new(material.client_config()?));
        Ok(())
    }

    /// Reports the end of a check that began after this refusal and those before it.
    pub fn checked(&self, refusal: u64) {
        self.made.send_replace(refusal);
    }
}

/// Returns whether a server sends this alert because it requires a client certificate or refuses
/// ours. It does so before it handles a request.
pub(super) fn refuses_client_certificate(alert: AlertDescription) -> bool {
    matches!(
        alert,
        AlertDescription::CertificateRequired
            | AlertDescription::BadCertificate
            | AlertDescription::UnsupportedCertificate
            | AlertDescription::CertificateRevoked
            | AlertDescription::CertificateExpired
            | AlertDescription::CertificateUnknown
            | AlertDescription::UnknownCA
            | AlertDescription::DecryptError
            | AlertDescription::HandshakeFailure
    )
}

/// Returns whether other certificates or another key could have prevented this error.
pub(super) fn is_about_certificates(error: &rustls::Error) -> bool {
    matches!(error, rustls::Error::InvalidCertificate(_))
        || matches!(error, rustls::Error::AlertReceived(alert) if refuses_client_certificate(*alert))
}

#[cfg(test)]
mod tests {
    use super::*;
    use tls_files::ServerTrust;
    use tokio::time::Instant;

    fn material() -> TlsMaterial {
        TlsMaterial::read(ServerTrust::Unverified, None).unwrap()
    }

    #[tokio::test]
    async fn a_refusal_waits_for_a_check_that_began_later() {
        let (tls, mut feed) = UpstreamTls::new(material()).unwrap();
        let refused = tls.current();
        let checks = async {
            // Ends a check that began before the refusal.
            feed.checked(0);
            let refusal = feed.refused().await;
            feed.replace(material()).unwrap();
            feed.checked(refusal);
        };
        let (replacement, ()) = tokio::join!(tls.replacement_of(&refused), checks);
        let replacement = replacement.unwrap();
        assert!(Arc::ptr_eq(&replacement, &tls.current()));
        let checks = async {
            let refusal = feed.refused().await;
            feed.checked(refusal);
        };
        let (unchanged, ()) = tokio::join!(tls.replacement_of(&replacement), checks);
        assert!(unchanged.is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn a_check_that_never_ends_is_not_awaited_for_long() {
        let (tls, feed) = UpstreamTls::new(material()).unwrap();
        let (refused, start) = (tls.current(), Instant::now());
        assert!(tls.replacement_of(&refused).await.is_none());
        assert_eq!(start.elapsed(), CHECK);
        drop(feed);
        assert!(tls.replacement_of(&refused).await.is_none());
        assert_eq!(start.elapsed(), CHECK, "no one checks any more");
    }
}
