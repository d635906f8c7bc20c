//! Who is at the other end of a connection, and so who asks by it: one guest for as long as the connection lasts, or a
//! haproxy that asks for another one with each request.

use std::borrow::Cow;
use std::fmt;
use std::sync::{Arc, OnceLock};

use hyper::header::HeaderMap;
use metadata_ebpf::identity::{AttachmentId, ClientAddress};

use super::caller::{ClientLookup, ClientQuery, LookupOutcome};
use super::fault::Fault;
use super::identify::{Directory, Identity, Patience, identify};
use super::requester::{ClientIdentity, GuestOrigin};
use super::shared::Proxy;
use crate::ids::NetworkOrRouter;

/// The other end of a connection.
pub(super) trait Peer<D>: fmt::Debug + Send + Sync + 'static {
    /// Who asks by a request with these headers.
    fn identify(
        &self,
        proxy: &Proxy<D>,
        headers: &HeaderMap,
    ) -> impl Future<Output = Result<Asker<'_>, Fault>> + Send;

    /// The client, if it is one and the same for as long as the connection lasts.
    fn client(&self) -> Option<ClientAddress>;

    /// The attachment that it came by, if it came by one.
    fn attachment(&self) -> Option<AttachmentId> {
        self.client().map(|client| client.attachment)
    }
}

/// Who asks, and from where.
#[derive(Debug)]
pub(super) struct Asker<'a> {
    pub(super) requester: Arc<ClientIdentity>,
    pub(super) origin: Cow<'a, GuestOrigin>,
}

/// A guest: the client is bound to the connection, whatever its requests say.
#[derive(Debug)]
pub(super) struct Guest {
    client: ClientAddress,
    origin: GuestOrigin,
    /// Whoever it turned out to be by its address. Neither changes while the connection lasts.
    found: OnceLock<Arc<ClientIdentity>>,
}

impl Guest {
    pub(super) fn new(client: ClientAddress) -> Self {
        Self { client, origin: GuestOrigin::of(&client), found: OnceLock::new() }
    }

    async fn look_up<D: Directory>(
        &self,
        directory: &D,
        scope: NetworkOrRouter,
    ) -> Result<Arc<ClientIdentity>, Fault> {
        if let Some(requester) = self.found.get() {
            return Ok(Arc::clone(requester));
        }
        let requester = known(directory.find(scope, &self.client).await)?;
        Ok(Arc::clone(self.found.get_or_init(|| requester)))
    }
}

impl<D: Directory> Peer<D> for Guest {
    async fn identify(&self, proxy: &Proxy<D>, _: &HeaderMap) -> Result<Asker<'_>, Fault> {
        let patience = Patience { hold: proxy.config.identity_hold, grace: proxy.config.identity_grace };
        let requester = match identify(&proxy.directory, &self.client, patience, &proxy.metrics).await? {
            Identity::Own(requester) => requester,
            Identity::Shared(scope) => self.look_up(&proxy.directory, scope).await?,
        };
        Ok(Asker { requester, origin: Cow::Borrowed(&self.origin) })
    }

    fn client(&self) -> Option<ClientAddress> {
        Some(self.client)
    }
}

/// A haproxy of Neutron's, believed because it could open our socket.
#[derive(Debug)]
pub(super) struct Haproxy;

impl<C: ClientLookup> Peer<C> for Haproxy {
    async fn identify(&self, proxy: &Proxy<C>, headers: &HeaderMap) -> Result<Asker<'_>, Fault> {
        let caller = ClientQuery::read(headers)?;
        let requester = known(proxy.directory.find(&caller).await)?;
        Ok(Asker { requester, origin: Cow::Owned(GuestOrigin::at(caller.address)) })
    }

    fn client(&self) -> Option<ClientAddress> {
        None
    }
}

fn known(found: LookupOutcome) -> Result<Arc<ClientIdentity>, Fault> {
    match found {
        LookupOutcome::Identified(requester) => Ok(requester),
        LookupOutcome::NotFound => Err(Fault::CallerUnknown),
        LookupOutcome::Ambiguous => Err(Fault::CallerAmbiguous),
        LookupOutcome::NotAnInstance => Err(Fault::NotAnInstance),
        LookupOutcome::Unavailable => Err(Fault::IdentityPending),
    }
}
