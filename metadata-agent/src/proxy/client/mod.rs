//! Identifies the client of a request.
//!
//! A guest is identified by its connection, for as long as the connection lasts. A haproxy forwards
//! requests of many clients and names one in the headers of each request.

mod attachment;
mod forwarded;
mod guest_key;
mod haproxy;
mod identity;
mod lookup;
mod signatures;

use std::borrow::Cow;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use hyper::header::{HeaderMap, HeaderValue};
use metadata_ebpf::identity::{AttachmentId, ClientAddress};

pub use attachment::{ClientDirectory, LookupState};
pub use forwarded::ForwardedAddresses;
#[cfg(test)]
pub(crate) use guest_key::samples;
pub(crate) use guest_key::{GuestGroup, GuestKey, LimitedGuest};
pub(crate) use haproxy::HaproxyHeaderError;
pub use identity::{ClientIdentity, NetworkHeader};
pub(crate) use identity::{IdentityKind, NetworkIdentity, SignedIdentity};
pub(crate) use lookup::PortMatch;
pub use lookup::{ClientLookup, ClientQuery, LookupFuture, LookupOutcome};
pub use signatures::{SecretStatus, Signatures};

use super::ProxyConfig;
use super::metrics::Metrics;
use super::request::Rejection;
use attachment::{AttachmentOwner, IdentityWait};
use identity::AddressValue;

/// The other end of a connection.
#[derive(Debug)]
pub(crate) enum ClientSource {
    Guest(GuestConnection),
    /// A Neutron haproxy, trusted because it could open our unix socket.
    Haproxy,
}

impl ClientSource {
    /// Describes a connection of the guest at this address, which counts for `limited`.
    pub(crate) fn guest(address: ClientAddress, limited: LimitedGuest) -> Self {
        Self::Guest(GuestConnection {
            address,
            limited,
            origin: AddressValue::from_guest(&address),
            looked_up: Mutex::new(None),
        })
    }

    /// Returns the guest at the other end. A haproxy connection has none of its own.
    pub(crate) fn guest_connection(&self) -> Option<&GuestConnection> {
        match self {
            Self::Guest(guest) => Some(guest),
            Self::Haproxy => None,
        }
    }

    pub(crate) fn attachment(&self) -> Option<AttachmentId> {
        self.guest_connection().map(|guest| guest.address.attachment)
    }

    /// Returns the caller of a request with these headers. Only a haproxy's headers are read.
    pub(crate) fn caller(&self, headers: &HeaderMap) -> Result<Caller<'_>, Rejection> {
        Ok(match self {
            Self::Guest(guest) => Caller::Guest(guest),
            Self::Haproxy => Caller::Forwarded(haproxy::client_query(headers)?),
        })
    }
}

/// The sender of one request, not yet identified.
#[derive(Debug)]
pub(crate) enum Caller<'a> {
    Guest(&'a GuestConnection),
    /// A client that a haproxy names.
    Forwarded(ClientQuery),
}

impl Caller<'_> {
    pub(crate) fn limited(&self) -> LimitedGuest {
        match self {
            Self::Guest(guest) => guest.limited,
            Self::Forwarded(query) => LimitedGuest::forwarded(query),
        }
    }
}

/// A connection of one guest.
#[derive(Debug)]
pub(crate) struct GuestConnection {
    address: ClientAddress,
    /// The guest that the connection counted for when it was accepted.
    limited: LimitedGuest,
    origin: AddressValue,
    /// The result of a look-up on a shared attachment. It holds for as long as the connection
    /// lasts, or until the secrets that signed it are replaced.
    looked_up: Mutex<Option<Arc<ClientIdentity>>>,
}

impl GuestConnection {
    pub(crate) fn address(&self) -> &ClientAddress {
        &self.address
    }

    pub(crate) fn limited(&self) -> LimitedGuest {
        self.limited
    }

    fn looked_up(&self) -> MutexGuard<'_, Option<Arc<ClientIdentity>>> {
        self.looked_up.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The client of one request.
#[derive(Debug)]
pub(crate) struct Client<'a> {
    identity: Arc<ClientIdentity>,
    origin: Cow<'a, AddressValue>,
    limited: LimitedGuest,
}

impl Client<'_> {
    pub(crate) fn identity(&self) -> &ClientIdentity {
        &self.identity
    }

    /// Returns the guest that the request counts for.
    pub(crate) fn limited(&self) -> LimitedGuest {
        self.limited
    }

    /// Returns the value of `X-Forwarded-For`.
    pub(crate) fn forwarded_for(&self) -> &HeaderValue {
        self.identity.forwarded_for(&self.origin)
    }
}

/// Finds the client of a request in the directory, or by a look-up.
#[derive(Debug)]
pub(crate) struct ClientResolver {
    directory: Arc<dyn ClientDirectory>,
    lookup: Arc<dyn ClientLookup>,
    secrets: Arc<SecretStatus>,
    wait: IdentityWait,
    metrics: Arc<Metrics>,
}

impl ClientResolver {
    pub(crate) fn new(
        directory: Arc<dyn ClientDirectory>,
        lookup: Arc<dyn ClientLookup>,
        config: &ProxyConfig,
        metrics: Arc<Metrics>,
    ) -> Self {
        let wait = IdentityWait { hold: config.identity_hold, grace: config.identity_grace };
        let secrets = directory.secrets();
        Self { directory, lookup, secrets, wait, metrics }
    }

    /// Returns the state of the secrets that sign the identities.
    pub(crate) fn secrets(&self) -> &SecretStatus {
        &self.secrets
    }

    /// Returns the guest that a new connection from this address counts for; `None` if the agent
    /// itself opened it. Never waits.
    pub(crate) fn limited(&self, client: &ClientAddress) -> Option<LimitedGuest> {
        let attachment = client.attachment;
        Some(match self.directory.lookup(client) {
            LookupState::Agent => return None,
            LookupState::Known(identity) => LimitedGuest::on_own_attachment(attachment, Some(&identity)),
            LookupState::Shared(_) => {
                LimitedGuest::on_shared_attachment(client, self.directory.guest_mac(client))
            }
            LookupState::Pending { .. } | LookupState::NotAnInstance | LookupState::Gone => {
                LimitedGuest::on_own_attachment(attachment, None)
            }
        })
    }

    /// Identifies the client of a request.
    pub(crate) async fn resolve<'a>(&self, caller: &Caller<'a>) -> Result<Client<'a>, Rejection> {
        let (identity, origin) = match caller {
            Caller::Guest(guest) => (self.resolve_guest(guest).await?, Cow::Borrowed(&guest.origin)),
            Caller::Forwarded(query) => {
                let identity = identified(self.lookup.find(query).await)?;
                (identity, Cow::Owned(AddressValue::new(query.address)))
            }
        };
        let limited = caller.limited().identified(&identity);
        Ok(Client { identity, origin, limited })
    }

    async fn resolve_guest(&self, guest: &GuestConnection) -> Result<Arc<ClientIdentity>, Rejection> {
        let owner = attachment::owner(&*self.directory, &guest.address, self.wait, &self.metrics).await?;
        let scope = match owner {
            AttachmentOwner::Port(identity) => return Ok(identity),
            AttachmentOwner::Shared(scope) => scope,
        };
        let known = guest.looked_up().clone();
        if let Some(identity) = known.as_ref().filter(|known| !known.is_outdated(&self.secrets)) {
            return Ok(Arc::clone(identity));
        }
        // The kernel saw the MAC address in the SYN. Without it, no look-up can be trusted.
        let mac = self.directory.guest_mac(&guest.address).ok_or(Rejection::IdentityPending)?;
        let query = ClientQuery::from_guest(scope, &guest.address, mac);
        let identity = match (self.lookup.find(&query).await, known) {
            // Nova accepts the earlier secrets for a while, so this request need not fail.
            (LookupOutcome::Unavailable, Some(known)) => return Ok(known),
            (outcome, _) => identified(outcome)?,
        };
        *guest.looked_up() = Some(Arc::clone(&identity));
        Ok(identity)
    }
}

fn identified(outcome: LookupOutcome) -> Result<Arc<ClientIdentity>, Rejection> {
    match outcome {
        LookupOutcome::Identified(identity) => Ok(identity),
        LookupOutcome::NotFound => Err(Rejection::ClientNotFound),
        LookupOutcome::Ambiguous => Err(Rejection::ClientAmbiguous),
        LookupOutcome::NotAnInstance => Err(Rejection::NotAnInstance),
        LookupOutcome::Unavailable => Err(Rejection::IdentityPending),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{MacAddress, NetworkOrRouter};
    use tokio::sync::watch;

    const MAC: MacAddress = MacAddress([0xfa, 0x16, 0x3e, 0, 0, 1]);

    fn scope() -> NetworkOrRouter {
        NetworkOrRouter::Network("11111111-1111-4111-8111-111111111111".parse().unwrap())
    }

    fn address(attachment: u32) -> ClientAddress {
        ClientAddress::ipv4(AttachmentId::new(attachment).unwrap(), [10, 0, 0, 5])
    }

    /// All attachments are shared, and the kernel saw the MAC address of one guest.
    #[derive(Debug, Default)]
    struct SharedAttachments(Arc<SecretStatus>);

    impl ClientDirectory for SharedAttachments {
        fn lookup(&self, _: &ClientAddress) -> LookupState {
            LookupState::Shared(scope())
        }

        fn changes(&self) -> watch::Receiver<u64> {
            watch::Sender::new(0).subscribe()
        }

        fn guest_mac(&self, client: &ClientAddress) -> Option<MacAddress> {
            (*client == address(1)).then_some(MAC)
        }

        fn secrets(&self) -> Arc<SecretStatus> {
            Arc::clone(&self.0)
        }
    }

    /// Knows one client, by its address and MAC address.
    #[derive(Debug)]
    struct OneClient(ClientQuery);

    impl ClientLookup for OneClient {
        fn find<'a>(&'a self, query: &'a ClientQuery) -> LookupFuture<'a> {
            let outcome =
                if *query == self.0 { LookupOutcome::NotAnInstance } else { LookupOutcome::NotFound };
            Box::pin(std::future::ready(outcome))
        }
    }

    #[tokio::test]
    async fn a_guest_is_looked_up_with_the_mac_the_kernel_saw() {
        let client = ClientQuery { scope: scope(), address: [10, 0, 0, 5].into(), mac: Some(MAC) };
        let resolver = ClientResolver::new(
            Arc::new(SharedAttachments::default()),
            Arc::new(OneClient(client)),
            &ProxyConfig::default(),
            Arc::new(Metrics::default()),
        );
        let resolve = async |attachment| {
            let source =
                ClientSource::guest(address(attachment), resolver.limited(&address(attachment)).unwrap());
            resolver.resolve(&source.caller(&HeaderMap::new()).unwrap()).await.unwrap_err()
        };
        assert!(matches!(resolve(1).await, Rejection::NotAnInstance));
        assert!(matches!(resolve(2).await, Rejection::IdentityPending), "its MAC address is not known");
    }

    /// Answers look-ups from a list, and fails if there are more.
    #[derive(Debug)]
    struct Outcomes(Mutex<Vec<LookupOutcome>>);

    impl ClientLookup for Outcomes {
        fn find<'a>(&'a self, _: &'a ClientQuery) -> LookupFuture<'a> {
            let outcome = self.0.lock().unwrap().pop().expect("no other look-up");
            Box::pin(std::future::ready(outcome))
        }
    }

    /// No signature with a secret that was taken away may be sent for as long as a guest keeps its
    /// connection.
    #[tokio::test]
    async fn a_kept_connection_is_looked_up_again_after_a_rotation() {
        let identified = |generation| {
            let instance = "3b0e5c6e-9a1f-4d0a-8f0b-1c2d3e4f5a6b".parse().unwrap();
            let signatures = signatures::samples::signatures(generation);
            let identity = ClientIdentity::new(instance, &"acme".parse().unwrap(), Vec::new(), signatures);
            LookupOutcome::Identified(Arc::new(identity))
        };
        let outcomes =
            vec![LookupOutcome::NotFound, identified(1), LookupOutcome::Unavailable, identified(0)];
        let directory = SharedAttachments::default();
        let secrets = Arc::clone(&directory.0);
        let resolver = ClientResolver::new(
            Arc::new(directory),
            Arc::new(Outcomes(Mutex::new(outcomes))),
            &ProxyConfig::default(),
            Arc::new(Metrics::default()),
        );
        let source = ClientSource::guest(address(1), resolver.limited(&address(1)).unwrap());
        let generation = async || {
            let client = resolver.resolve(&source.caller(&HeaderMap::new()).unwrap()).await;
            client.map(|client| match client.identity().kind() {
                IdentityKind::Signed(signed) => signed.signatures().generation(),
                IdentityKind::ByNetwork(_) => unreachable!("all are signed"),
            })
        };
        assert_eq!(generation().await.unwrap(), 0);
        assert_eq!(generation().await.unwrap(), 0, "known without a look-up");
        secrets.begin(1);
        assert_eq!(generation().await.unwrap(), 0, "Neutron is not available");
        assert_eq!(generation().await.unwrap(), 1);
        assert_eq!(generation().await.unwrap(), 1, "known without a look-up");
        secrets.begin(2);
        assert!(matches!(generation().await, Err(Rejection::ClientNotFound)), "the port is gone");
    }
}
