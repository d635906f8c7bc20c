//! Who asks. The proxy knows clients only by their identity address; somebody else knows what stands behind one
//! and says so through [`Directory`]. Unknown is not "not found": a request whose port is not known yet waits.

use std::sync::Arc;
use std::time::{Duration, Instant};

use metadata_ebpf::identity::ClientAddress;
use tokio::sync::watch;

use super::caller::LookupOutcome;
use super::fault::Fault;
use super::requester::ClientIdentity;
use crate::ids::NetworkOrRouter;
use crate::proxy::metrics::Metrics;

/// Knows the requester behind a client. Look-ups never wait: they run on the path of each request.
pub trait Directory: Send + Sync + 'static {
    /// What is known of a client now.
    fn lookup(&self, client: &ClientAddress) -> LookupState;

    /// Ticks whenever any standing may have changed.
    fn changes(&self) -> watch::Receiver<u64>;

    /// Who a client at a place of [`LookupState::Shared`] is. Nobody, where there are no such places.
    fn find(
        &self,
        _place: NetworkOrRouter,
        _client: &ClientAddress,
    ) -> impl Future<Output = LookupOutcome> + Send {
        std::future::ready(LookupOutcome::NotFound)
    }
}

impl<T: Directory + ?Sized> Directory for Arc<T> {
    fn lookup(&self, client: &ClientAddress) -> LookupState {
        (**self).lookup(client)
    }

    fn changes(&self) -> watch::Receiver<u64> {
        (**self).changes()
    }

    fn find(
        &self,
        scope: NetworkOrRouter,
        client: &ClientAddress,
    ) -> impl Future<Output = LookupOutcome> + Send {
        (**self).find(scope, client)
    }
}

/// What a client is identified by.
#[derive(Debug, Clone)]
pub(super) enum Identity {
    /// Its attachment: nobody else is there.
    Own(Arc<ClientIdentity>),
    /// Its address there, which [`Directory::find`] knows.
    Shared(NetworkOrRouter),
}

/// What is known of a client.
#[derive(Debug, Clone)]
pub enum LookupState {
    /// Whose requests can be made: an instance of Nova, or a port whose network is known where that is enough.
    Known(Arc<ClientIdentity>),
    /// The sources have not told yet.
    Pending {
        /// Since when its attachment waits for them.
        since: Instant,
    },
    /// Many guests share its attachment: [`Directory::find`] is asked who has its address there.
    Shared(NetworkOrRouter),
    /// A source says that this is no instance of Nova.
    NotAnInstance,
    /// The attachment has vanished.
    Gone,
}

/// For how long a port may stay unknown.
#[derive(Debug, Clone, Copy)]
pub(super) struct Patience {
    /// A request's own wait.
    pub(super) hold: Duration,
    /// After this the port counts as no instance.
    pub(super) grace: Duration,
}

/// Tells who asks, and waits for it to become known.
///
/// # Errors
/// [`Fault::IdentityPending`] asks the guest to come back: cloud-init repeats a 503 with `Retry-After` without bound,
/// while a quick 404 over IPv6 ends its search although IPv4 would have succeeded (url_helper.py, `dual_stack`).
pub(super) async fn identify<D: Directory>(
    directory: &D,
    client: &ClientAddress,
    patience: Patience,
    metrics: &Metrics,
) -> Result<Identity, Fault> {
    // The common case takes no receiver.
    let first = directory.lookup(client);
    if !matches!(first, LookupState::Pending { .. }) {
        return settle(first, Instant::now(), patience.grace);
    }
    let held = hold(directory, client, patience).await;
    metrics.identity_hold(match &held {
        Ok(_) => "resolved",
        Err(Fault::IdentityPending) => "retry_later",
        Err(_) => "refused",
    });
    held
}

async fn hold<D: Directory>(
    directory: &D,
    client: &ClientAddress,
    patience: Patience,
) -> Result<Identity, Fault> {
    let deadline = tokio::time::Instant::now() + patience.hold;
    let mut changes = directory.changes();
    loop {
        // Marked as seen before the look-up: a change during it wakes the wait below.
        changes.borrow_and_update();
        let standing = directory.lookup(client);
        let now = tokio::time::Instant::now();
        if now >= deadline || !still_waits(&standing, now.into_std(), patience.grace) {
            return settle(standing, now.into_std(), patience.grace);
        }
        let tick = tokio::time::timeout_at(deadline, changes.changed()).await;
        if matches!(tick, Ok(Err(_))) {
            // No more changes will come: shutdown. Whatever is known now is the answer.
            let standing = directory.lookup(client);
            return settle(standing, tokio::time::Instant::now().into_std(), patience.grace);
        }
    }
}

fn still_waits(standing: &LookupState, now: Instant, grace: Duration) -> bool {
    matches!(standing, LookupState::Pending { since } if now.saturating_duration_since(*since) < grace)
}

fn settle(standing: LookupState, now: Instant, grace: Duration) -> Result<Identity, Fault> {
    match standing {
        LookupState::Known(requester) => Ok(Identity::Own(requester)),
        LookupState::Shared(scope) => Ok(Identity::Shared(scope)),
        LookupState::Pending { since } if now.saturating_duration_since(since) < grace => {
            Err(Fault::IdentityPending)
        }
        LookupState::Pending { .. } => Err(Fault::IdentityUnknown),
        LookupState::NotAnInstance => Err(Fault::NotAnInstance),
        LookupState::Gone => Err(Fault::AttachmentGone),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proxy::Signer;
    use metadata_ebpf::identity::AttachmentId;
    use prometheus_client::registry::Registry;
    use std::sync::Mutex;

    const PATIENCE: Patience = Patience { hold: Duration::from_secs(5), grace: Duration::from_mins(2) };

    struct Desk {
        standing: Mutex<LookupState>,
        tick: watch::Sender<u64>,
    }

    impl Desk {
        fn with(standing: LookupState) -> Self {
            Self { standing: Mutex::new(standing), tick: watch::Sender::new(0) }
        }

        fn tell(&self, standing: LookupState) {
            *self.standing.lock().unwrap() = standing;
            self.tick.send_modify(|tick| *tick += 1);
        }
    }

    impl Directory for Desk {
        fn lookup(&self, _: &ClientAddress) -> LookupState {
            self.standing.lock().unwrap().clone()
        }

        fn changes(&self) -> watch::Receiver<u64> {
            self.tick.subscribe()
        }
    }

    fn client() -> ClientAddress {
        ClientAddress::ipv4(AttachmentId::new(7).unwrap(), [10, 0, 0, 5])
    }

    fn requester() -> ClientIdentity {
        ClientIdentity::new(
            "3b0e5c6e-9a1f-4d0a-8f0b-1c2d3e4f5a6b".parse().unwrap(),
            &"acme".parse().unwrap(),
            Vec::new(),
            &Signer::new("secret".into()),
        )
    }

    async fn ask(desk: &Desk) -> Result<Identity, Fault> {
        identify(desk, &client(), PATIENCE, &Metrics::register(&mut Registry::default())).await
    }

    fn now() -> Instant {
        tokio::time::Instant::now().into_std()
    }

    #[tokio::test(start_paused = true)]
    async fn a_late_identity_wakes_the_request() {
        let desk = Desk::with(LookupState::Pending { since: now() });
        let began = now();
        let (asked, ()) = tokio::join!(ask(&desk), async {
            tokio::time::sleep(Duration::from_secs(3)).await;
            desk.tell(LookupState::Pending { since: began });
            desk.tell(LookupState::Known(Arc::new(requester())));
        });
        assert!(asked.is_ok(), "{asked:?}");
        assert_eq!(now() - began, Duration::from_secs(3));
    }

    #[tokio::test(start_paused = true)]
    async fn a_hold_ends_after_its_time_with_come_back() {
        let desk = Desk::with(LookupState::Pending { since: now() });
        let began = now();
        assert!(matches!(ask(&desk).await, Err(Fault::IdentityPending)));
        assert_eq!(now() - began, PATIENCE.hold);
    }

    #[tokio::test(start_paused = true)]
    async fn after_the_grace_a_port_counts_as_no_instance_at_once() {
        let since = now();
        tokio::time::advance(PATIENCE.grace).await;
        let desk = Desk::with(LookupState::Pending { since });
        let began = now();
        assert!(matches!(ask(&desk).await, Err(Fault::IdentityUnknown)));
        assert_eq!(now(), began);
    }

    #[tokio::test(start_paused = true)]
    async fn a_refusal_and_a_vanished_attachment_end_the_hold() {
        for (told, refused) in [(LookupState::NotAnInstance, true), (LookupState::Gone, false)] {
            let desk = Desk::with(LookupState::Pending { since: now() });
            let (asked, ()) = tokio::join!(ask(&desk), async { desk.tell(told) });
            match asked {
                Err(Fault::NotAnInstance) => assert!(refused),
                Err(Fault::AttachmentGone) => assert!(!refused),
                other => panic!("{other:?}"),
            }
        }
    }
}
