//! Addresses of names, as the host's resolver finds them.

use tokio::net::lookup_host;

use crate::proxy::{NameLookup, NameLookupFuture};

/// The resolver of the C library, with the host's `nsswitch.conf` and `resolv.conf`. It runs on a
/// thread for blocking work.
#[derive(Debug)]
pub(crate) struct SystemResolver;

impl NameLookup for SystemResolver {
    fn look_up<'a>(&'a self, host: &'a str, port: u16) -> NameLookupFuture<'a> {
        Box::pin(async move { Ok(lookup_host((host, port)).await?.collect()) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn names_are_looked_up_by_the_host() {
        let found = SystemResolver.look_up("localhost", 8775).await.unwrap();
        assert!(!found.is_empty());
        assert!(
            found.iter().all(|address| address.ip().is_loopback() && address.port() == 8775),
            "{found:?}"
        );
        assert!(SystemResolver.look_up("nova.invalid", 8775).await.is_err());
    }
}
