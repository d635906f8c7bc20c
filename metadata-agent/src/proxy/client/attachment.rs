//! Finds the port behind an attachment, and waits for a port that is not known yet.
//!
//! The proxy knows guests only by their identity address. A [`ClientDirectory`] knows the port
//! behind one. An unknown port is not "not found": the request waits.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use metadata_ebpf::identity::ClientAddress;
use tokio::sync::watch;

use super::{ClientIdentity, SecretStatus};
use crate::ids::{MacAddress, NetworkOrRouter};
use crate::proxy::metrics::{HoldOutcome, Metrics};
use crate::proxy::request::Rejection;

/// Knows the port behind each attachment. Look-ups never wait, because each request makes one.
pub trait ClientDirectory: fmt::Debug + Send + Sync + 'static {
    fn lookup(&self, client: &ClientAddress) -> LookupState;

    /// Changes whenever any [`LookupState`] may have changed.
    fn changes(&self) -> watch::Receiver<u64>;

    /// Returns the source MAC address of a guest behind a shared attachment, if the kernel saw it.
    fn guest_mac(&self, client: &ClientAddress) -> Option<MacAddress>;

    /// Returns the state of the secrets that sign the identities.
    fn secrets(&self) -> Arc<SecretStatus>;
}

/// The directory's knowledge of a client.
#[derive(Debug, Clone)]
pub enum LookupState {
    /// Requests can be made on behalf of this client.
    Known(Arc<ClientIdentity>),
    /// No source reports the port, not yet or not any more.
    Pending {
        /// The attachment, or the loss of its identity.
        since: Instant,
    },
    /// Many guests share the attachment, so the client is looked up by its address there.
    Shared(NetworkOrRouter),
    /// A source reports that the port does not belong to a Nova instance.
    NotAnInstance,
    /// The attachment has vanished.
    Gone,
    /// The agent itself. No guest has its attachment.
    Agent,
}

/// The client, or clients, of an attachment.
#[derive(Debug, Clone)]
pub(super) enum AttachmentOwner {
    Port(Arc<ClientIdentity>),
    Shared(NetworkOrRouter),
}

/// How long a port may stay unknown.
#[derive(Debug, Clone, Copy)]
pub(super) struct IdentityWait {
    /// The longest wait of one request.
    pub(super) hold: Duration,
    /// The time after which an unknown port counts as not an instance.
    pub(super) grace: Duration,
}

/// Finds the owner of a client's attachment, and waits for it to become known.
///
/// # Errors
/// [`Rejection::IdentityPending`] makes the guest try again. cloud-init repeats a 503 with
/// `Retry-After` without bound, while a quick 404 over IPv6 ends its search although IPv4 would
/// have succeeded (url_helper.py, `dual_stack`).
pub(super) async fn owner(
    directory: &dyn ClientDirectory,
    client: &ClientAddress,
    wait: IdentityWait,
    metrics: &Metrics,
) -> Result<AttachmentOwner, Rejection> {
    // The common case subscribes to no changes.
    let first = directory.lookup(client);
    if !matches!(first, LookupState::Pending { .. }) {
        return decide(first, Instant::now(), wait.grace);
    }
    let held = hold(directory, client, wait).await;
    metrics.identity_hold(match &held {
        Ok(_) => HoldOutcome::Resolved,
        Err(Rejection::IdentityPending) => HoldOutcome::RetryLater,
        Err(_) => HoldOutcome::Refused,
    });
    held
}

async fn hold(
    directory: &dyn ClientDirectory,
    client: &ClientAddress,
    wait: IdentityWait,
) -> Result<AttachmentOwner, Rejection> {
    let deadline = tokio::time::Instant::now() + wait.hold;
    let mut changes = directory.changes();
    loop {
        // Marked as seen before the look-up, so that a change during the look-up ends the wait
        // below.
        changes.borrow_and_update();
        let state = directory.lookup(client);
        let now = tokio::time::Instant::now();
        if now >= deadline || !is_waiting(&state, now.into_std(), wait.grace) {
            return decide(state, now.into_std(), wait.grace);
        }
        let change = tokio::time::timeout_at(deadline, changes.changed()).await;
        if matches!(change, Ok(Err(_))) {
            // The directory is shutting down and will not change again.
            let state = directory.lookup(client);
            return decide(state, tokio::time::Instant::now().into_std(), wait.grace);
        }
    }
}

fn is_waiting(state: &LookupState, now: Instant, grace: Duration) -> bool {
    matches!(state, LookupState::Pending { since } if now.saturating_duration_since(*since) < grace)
}

fn decide(state: LookupState, now: Instant, grace: Duration) -> Result<AttachmentOwner, Rejection> {
    match state {
        LookupState::Known(identity) => Ok(AttachmentOwner::Port(identity)),
        LookupState::Shared(scope) => Ok(AttachmentOwner::Shared(scope)),
        LookupState::Pending { since } if now.saturating_duration_since(since) < grace => {
            Err(Rejection::IdentityPending)
        }
        LookupState::Pending { .. } => Err(Rejection::IdentityUnknown),
        // Connections of the agent are answered before they count as a client's.
        LookupState::NotAnInstance | LookupState::Agent => Err(Rejection::NotAnInstance),
        LookupState::Gone => Err(Rejection::AttachmentGone),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proxy::client::signatures::samples::signatures;
    use metadata_ebpf::identity::AttachmentId;
    use std::sync::Mutex;

    const WAIT: IdentityWait = IdentityWait { hold: Duration::from_secs(5), grace: Duration::from_mins(2) };

    #[derive(Debug)]
    struct FakeDirectory {
        state: Mutex<LookupState>,
        version: watch::Sender<u64>,
    }

    impl FakeDirectory {
        fn new(state: LookupState) -> Self {
            Self { state: Mutex::new(state), version: watch::Sender::new(0) }
        }

        fn set(&self, state: LookupState) {
            *self.state.lock().unwrap() = state;
            self.version.send_modify(|version| *version += 1);
        }
    }

    impl ClientDirectory for FakeDirectory {
        fn lookup(&self, _: &ClientAddress) -> LookupState {
            self.state.lock().unwrap().clone()
        }

        fn changes(&self) -> watch::Receiver<u64> {
            self.version.subscribe()
        }

        fn guest_mac(&self, _: &ClientAddress) -> Option<MacAddress> {
            None
        }

        fn secrets(&self) -> Arc<SecretStatus> {
            Arc::default()
        }
    }

    fn client() -> ClientAddress {
        ClientAddress::ipv4(AttachmentId::new(7).unwrap(), [10, 0, 0, 5])
    }

    fn identity() -> ClientIdentity {
        ClientIdentity::new(
            "3b0e5c6e-9a1f-4d0a-8f0b-1c2d3e4f5a6b".parse().unwrap(),
            &"acme".parse().unwrap(),
            Vec::new(),
            signatures(1),
        )
    }

    async fn resolve(directory: &FakeDirectory) -> Result<AttachmentOwner, Rejection> {
        owner(directory, &client(), WAIT, &Metrics::default()).await
    }

    fn now() -> Instant {
        tokio::time::Instant::now().into_std()
    }

    #[tokio::test(start_paused = true)]
    async fn a_late_identity_wakes_the_request() {
        let directory = FakeDirectory::new(LookupState::Pending { since: now() });
        let began = now();
        let (resolved, ()) = tokio::join!(resolve(&directory), async {
            tokio::time::sleep(Duration::from_secs(3)).await;
            directory.set(LookupState::Pending { since: began });
            directory.set(LookupState::Known(Arc::new(identity())));
        });
        assert!(resolved.is_ok(), "{resolved:?}");
        assert_eq!(now() - began, Duration::from_secs(3));
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_waits_no_longer_than_the_hold() {
        let directory = FakeDirectory::new(LookupState::Pending { since: now() });
        let began = now();
        assert!(matches!(resolve(&directory).await, Err(Rejection::IdentityPending)));
        assert_eq!(now() - began, WAIT.hold);
    }

    #[tokio::test(start_paused = true)]
    async fn after_the_grace_period_no_request_waits() {
        let since = now();
        tokio::time::advance(WAIT.grace).await;
        let directory = FakeDirectory::new(LookupState::Pending { since });
        let began = now();
        assert!(matches!(resolve(&directory).await, Err(Rejection::IdentityUnknown)));
        assert_eq!(now(), began);
    }

    #[tokio::test(start_paused = true)]
    async fn a_final_state_ends_the_wait() {
        for (state, not_an_instance) in [(LookupState::NotAnInstance, true), (LookupState::Gone, false)] {
            let directory = FakeDirectory::new(LookupState::Pending { since: now() });
            let (resolved, ()) = tokio::join!(resolve(&directory), async { directory.set(state) });
            match resolved {
                Err(Rejection::NotAnInstance) => assert!(not_an_instance),
                Err(Rejection::AttachmentGone) => assert!(!not_an_instance),
                other => panic!("{other:?}"),
            }
        }
    }
}
