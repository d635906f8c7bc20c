//! Access to Nova, or to Neutron's agent in its place, for the proxy: addresses of names, open unix
//! sockets, and the content of TLS files. The proxy itself uses neither the file system nor the
//! resolver.

mod names;
mod sockets;
mod tls;

use std::sync::Arc;

pub(crate) use names::SystemResolver;
pub(crate) use sockets::HostSockets;
pub use tls::{NovaTls, TlsFileWatch, TlsUser};
pub use tls_files::{ClientCertificate, TlsSetupError};

use crate::proxy::{TlsFeed, UpstreamAccess, UpstreamConfig, UpstreamTls};

/// Opens the access of a proxy in this process: reads the TLS files if an endpoint uses https. The
/// caller then runs the watch, so that a replaced file applies to new connections.
///
/// # Errors
/// A file cannot be used.
pub fn open(
    upstream: &UpstreamConfig,
    tls: NovaTls,
) -> Result<(UpstreamAccess, Option<TlsFileWatch<TlsFeed>>), TlsSetupError> {
    let (tls, watch) = if upstream.uses_tls() {
        // A file that is replaced meanwhile is read once more.
        let versions = tls.versions();
        let (upstream, feed) = UpstreamTls::new(tls.read()?)?;
        (Some(upstream), Some(TlsFileWatch::new(tls, versions, feed)))
    } else {
        (None, None)
    };
    let access = UpstreamAccess { names: Arc::new(SystemResolver), sockets: Arc::new(HostSockets), tls };
    Ok((access, watch))
}
