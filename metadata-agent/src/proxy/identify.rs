//! Who asks. The proxy knows clients only by their identity address; somebody else knows what stands behind one
//! and says so through [`Directory`]. Unknown is not "not found": a request whose port is not known yet waits.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use hyper::header::HeaderValue;
use metadata_ebpf::identity::{ClientAddress, GuestAddress};
use tokio::sync::watch;

use super::fault::Fault;
use super::sign::{Signatures, Signer};
use crate::ids::{InstanceId, ProjectId};
use crate::metrics::Metrics;

/// Knows the requester behind a client. Look-ups never wait: they run on the path of each request.
pub trait Directory: Send + Sync + 'static {
    /// What is known of a client now.
    fn lookup(&self, client: &ClientAddress) -> Standing;

    /// Ticks whenever any standing may have changed.
    fn changes(&self) -> watch::Receiver<u64>;
}

impl<T: Directory + ?Sized> Directory for Arc<T> {
    fn lookup(&self, client: &ClientAddress) -> Standing {
        (**self).lookup(client)
    }

    fn changes(&self) -> watch::Receiver<u64> {
        (**self).changes()
    }
}

/// What is known of a client.
#[derive(Debug, Clone)]
pub enum Standing {
    /// An instance of Nova.
    Known(Arc<Requester>),
    /// The sources have not told yet.
    Pending {
        /// Since when its attachment waits for them.
        since: Instant,
    },
    /// A source says that this is no instance of Nova.
    Refused,
    /// The attachment has vanished.
    Gone,
}

/// An instance as Nova is told of it. What is said in every request is computed once, here.
#[derive(Debug)]
pub struct Requester {
    instance: InstanceId,
    project: ProjectId,
    fixed_ips: Vec<IpAddr>,
    pub(super) instance_value: HeaderValue,
    pub(super) project_value: HeaderValue,
    signer: Signer,
    signatures: ArcSwap<Signatures>,
    fixed_ip_values: Vec<HeaderValue>,
}

impl Requester {
    /// Signs for an instance, once for as long as the signer's secrets stay the same.
    #[must_use]
    pub fn new(instance: InstanceId, project: ProjectId, fixed_ips: Vec<IpAddr>, signer: &Signer) -> Self {
        let Ok(project_value) = HeaderValue::from_str(project.as_str()) else {
            unreachable!("a project id is visible ASCII")
        };
        Self {
            instance_value: text_value(&instance.to_string()),
            project_value,
            signatures: ArcSwap::from_pointee(signer.sign(&instance)),
            signer: signer.clone(),
            fixed_ip_values: fixed_ips.iter().map(|ip| text_value(&ip.to_string())).collect(),
            instance,
            project,
            fixed_ips,
        }
    }

    /// The instance.
    pub fn instance(&self) -> InstanceId {
        self.instance
    }

    /// Its project.
    pub fn project(&self) -> &ProjectId {
        &self.project
    }

    /// The port's fixed addresses.
    pub fn fixed_ips(&self) -> &[IpAddr] {
        &self.fixed_ips
    }

    /// The signatures with the secrets in force. Signs only if they were replaced since.
    pub(super) fn signatures(&self) -> Arc<Signatures> {
        let made = self.signatures.load_full();
        if self.signer.made(&made) {
            return made;
        }
        let fresh = Arc::new(self.signer.sign(&self.instance));
        self.signatures.store(Arc::clone(&fresh));
        fresh
    }

    /// Tells whoever keeps the secrets that Nova took none of them.
    pub(super) fn all_refused(&self) {
        self.signer.all_refused();
    }

    /// The one address of `X-Forwarded-For`: the guest's own if the port has it, else the port's first of the
    /// same family, else the guest's own.
    pub(super) fn forwarded_for(&self, guest: &GuestOrigin) -> HeaderValue {
        let own = self.fixed_ips.iter().position(|ip| *ip == guest.address);
        let family = || self.fixed_ips.iter().position(|ip| ip.is_ipv4() == guest.address.is_ipv4());
        match own.or_else(family) {
            Some(at) => self.fixed_ip_values[at].clone(),
            None => guest.value.clone(),
        }
    }
}

/// The address a guest connected from, also as a header's value.
#[derive(Debug)]
pub(super) struct GuestOrigin {
    address: IpAddr,
    value: HeaderValue,
}

impl GuestOrigin {
    pub(super) fn of(client: &ClientAddress) -> Self {
        let address = match client.guest {
            GuestAddress::Ipv4(octets) => IpAddr::V4(Ipv4Addr::from(octets)),
            GuestAddress::Ipv6LinkLocal(interface_id) => {
                let mut octets = [0; 16];
                octets[..2].copy_from_slice(&[0xfe, 0x80]);
                octets[8..].copy_from_slice(&interface_id);
                IpAddr::V6(Ipv6Addr::from(octets))
            }
        };
        Self { address, value: text_value(&address.to_string()) }
    }
}

fn text_value(text: &str) -> HeaderValue {
    let Ok(value) = HeaderValue::from_str(text) else { unreachable!("addresses and ids are visible ASCII") };
    value
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
) -> Result<Arc<Requester>, Fault> {
    // The common case takes no receiver.
    let first = directory.lookup(client);
    if !matches!(first, Standing::Pending { .. }) {
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
) -> Result<Arc<Requester>, Fault> {
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

fn still_waits(standing: &Standing, now: Instant, grace: Duration) -> bool {
    matches!(standing, Standing::Pending { since } if now.saturating_duration_since(*since) < grace)
}

fn settle(standing: Standing, now: Instant, grace: Duration) -> Result<Arc<Requester>, Fault> {
    match standing {
        Standing::Known(requester) => Ok(requester),
        Standing::Pending { since } if now.saturating_duration_since(since) < grace => {
            Err(Fault::IdentityPending)
        }
        Standing::Pending { .. } => Err(Fault::IdentityUnknown),
        Standing::Refused => Err(Fault::NotAnInstance),
        Standing::Gone => Err(Fault::AttachmentGone),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use metadata_ebpf::identity::AttachmentId;
    use prometheus_client::registry::Registry;
    use std::sync::Mutex;

    const PATIENCE: Patience = Patience { hold: Duration::from_secs(5), grace: Duration::from_mins(2) };

    struct Desk {
        standing: Mutex<Standing>,
        tick: watch::Sender<u64>,
    }

    impl Desk {
        fn with(standing: Standing) -> Self {
            Self { standing: Mutex::new(standing), tick: watch::Sender::new(0) }
        }

        fn tell(&self, standing: Standing) {
            *self.standing.lock().unwrap() = standing;
            self.tick.send_modify(|tick| *tick += 1);
        }
    }

    impl Directory for Desk {
        fn lookup(&self, _: &ClientAddress) -> Standing {
            self.standing.lock().unwrap().clone()
        }

        fn changes(&self) -> watch::Receiver<u64> {
            self.tick.subscribe()
        }
    }

    fn client() -> ClientAddress {
        ClientAddress::ipv4(AttachmentId::new(7).unwrap(), [10, 0, 0, 5])
    }

    fn requester(fixed_ips: &[&str]) -> Requester {
        Requester::new(
            "3b0e5c6e-9a1f-4d0a-8f0b-1c2d3e4f5a6b".parse().unwrap(),
            "acme".parse().unwrap(),
            fixed_ips.iter().map(|ip| ip.parse().unwrap()).collect(),
            &Signer::new("secret".into()),
        )
    }

    async fn ask(desk: &Desk) -> Result<Arc<Requester>, Fault> {
        identify(desk, &client(), PATIENCE, &Metrics::register(&mut Registry::default())).await
    }

    fn now() -> Instant {
        tokio::time::Instant::now().into_std()
    }

    #[tokio::test(start_paused = true)]
    async fn a_late_identity_wakes_the_request() {
        let desk = Desk::with(Standing::Pending { since: now() });
        let began = now();
        let (asked, ()) = tokio::join!(ask(&desk), async {
            tokio::time::sleep(Duration::from_secs(3)).await;
            desk.tell(Standing::Pending { since: began });
            desk.tell(Standing::Known(Arc::new(requester(&[]))));
        });
        assert!(asked.is_ok(), "{asked:?}");
        assert_eq!(now() - began, Duration::from_secs(3));
    }

    #[tokio::test(start_paused = true)]
    async fn a_hold_ends_after_its_time_with_come_back() {
        let desk = Desk::with(Standing::Pending { since: now() });
        let began = now();
        assert!(matches!(ask(&desk).await, Err(Fault::IdentityPending)));
        assert_eq!(now() - began, PATIENCE.hold);
    }

    #[tokio::test(start_paused = true)]
    async fn after_the_grace_a_port_counts_as_no_instance_at_once() {
        let since = now();
        tokio::time::advance(PATIENCE.grace).await;
        let desk = Desk::with(Standing::Pending { since });
        let began = now();
        assert!(matches!(ask(&desk).await, Err(Fault::IdentityUnknown)));
        assert_eq!(now(), began);
    }

    #[tokio::test(start_paused = true)]
    async fn a_refusal_and_a_vanished_attachment_end_the_hold() {
        for (told, refused) in [(Standing::Refused, true), (Standing::Gone, false)] {
            let desk = Desk::with(Standing::Pending { since: now() });
            let (asked, ()) = tokio::join!(ask(&desk), async { desk.tell(told) });
            match asked {
                Err(Fault::NotAnInstance) => assert!(refused),
                Err(Fault::AttachmentGone) => assert!(!refused),
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn forwarded_for_is_one_address_of_the_guests_family() {
        let v6 = ClientAddress {
            attachment: AttachmentId::new(7).unwrap(),
            guest: GuestAddress::Ipv6LinkLocal([0xf8, 0x16, 0x3e, 0xff, 0xfe, 0, 0, 1]),
        };
        for (client, fixed_ips, want) in [
            (client(), &["10.0.0.9", "10.0.0.5"][..], "10.0.0.5"),
            (client(), &["2001:db8::1", "10.0.0.9"], "10.0.0.9"),
            (client(), &["2001:db8::1"], "10.0.0.5"),
            (client(), &[], "10.0.0.5"),
            (v6, &["10.0.0.9", "2001:db8::1"], "2001:db8::1"),
            (v6, &["10.0.0.9"], "fe80::f816:3eff:fe00:1"),
        ] {
            let value = requester(fixed_ips).forwarded_for(&GuestOrigin::of(&client));
            assert_eq!(value, want, "{client:?} {fixed_ips:?}");
        }
    }
}
