//! Addresses of an endpoint's name, kept between connections.
//!
//! A [`NameLookup`] takes seconds if a DNS server is down. So it is not asked for each connection.
//! The last good answer is used while a single look-up refreshes it in the background, and for as
//! long as look-ups fail. If no address accepts a connection, the name is looked up at once: the
//! service may have moved.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use super::access::NameLookup;

/// The age from which an answer is refreshed. The resolver does not report how long it is valid.
const REFRESH: Duration = Duration::from_secs(10);
/// The least time between two look-ups of one name.
const PAUSE: Duration = Duration::from_secs(1);

#[derive(Debug)]
pub(super) struct Name {
    host: String,
    port: u16,
    names: Arc<dyn NameLookup>,
    is_looking: AtomicBool,
    answer: watch::Sender<Answer>,
}

#[derive(Debug, Default)]
struct Answer {
    addresses: Option<Arc<[SocketAddr]>>,
    /// The end of the last look-up.
    at: Option<Instant>,
    error: Option<Arc<io::Error>>,
}

impl Name {
    pub(super) fn new(host: &str, port: u16, names: Arc<dyn NameLookup>) -> Arc<Self> {
        let (host, is_looking) = (host.to_owned(), AtomicBool::new(false));
        Arc::new(Self { host, port, names, is_looking, answer: watch::Sender::default() })
    }

    /// Returns the addresses of the last good answer. Waits only if there has never been one.
    pub(super) async fn addresses(self: &Arc<Self>) -> Result<Arc<[SocketAddr]>, Arc<io::Error>> {
        let at = {
            let answer = self.answer.borrow();
            let age = answer.at.map(|at| at.elapsed());
            if let Some(addresses) = answer.addresses.clone() {
                drop(answer);
                if age.is_none_or(|age| age >= REFRESH) {
                    self.look_up();
                }
                return Ok(addresses);
            }
            // A look-up that has just failed counts for all who ask now.
            if let (Some(age), Some(error)) = (age, &answer.error)
                && age < PAUSE
            {
                return Err(Arc::clone(error));
            }
            answer.at
        };
        self.next_answer(at).await
    }

    /// Looks the name up because no address of the last answer can be reached. Returns `None` if
    /// the addresses are the same, or were looked up a moment ago.
    pub(super) async fn addresses_instead_of(
        self: &Arc<Self>,
        unreachable: &Arc<[SocketAddr]>,
    ) -> Option<Arc<[SocketAddr]>> {
        let at = self.answer.borrow().at;
        if at.is_none_or(|at| at.elapsed() >= PAUSE) {
            self.next_answer(at).await.ok()?;
        }
        let addresses = self.answer.borrow().addresses.clone();
        addresses.filter(|addresses| addresses != unreachable)
    }

    /// Waits for the end of a look-up that is later than `before`.
    async fn next_answer(
        self: &Arc<Self>,
        before: Option<Instant>,
    ) -> Result<Arc<[SocketAddr]>, Arc<io::Error>> {
        let mut answers = self.answer.subscribe();
        self.look_up();
        let Ok(answer) = answers.wait_for(|answer| answer.at > before).await else {
            unreachable!("the sender is in self")
        };
        match (&answer.error, &answer.addresses) {
            (None, Some(addresses)) => Ok(Arc::clone(addresses)),
            (Some(error), _) => Err(Arc::clone(error)),
            (None, None) => unreachable!("a look-up ends with addresses or an error"),
        }
    }

    /// Starts a look-up, unless one is running. It goes on if the request that needs it has left.
    fn look_up(self: &Arc<Self>) {
        if self.is_looking.swap(true, Ordering::AcqRel) {
            return;
        }
        let name = Arc::clone(self);
        tokio::spawn(async move {
            let found = name.names.look_up(&name.host, name.port).await.and_then(|addresses| {
                let none = || io::Error::new(io::ErrorKind::NotFound, "the name has no address");
                if addresses.is_empty() { Err(none()) } else { Ok(addresses) }
            });
            name.is_looking.store(false, Ordering::Release);
            name.publish(found);
        });
    }

    fn publish(&self, found: io::Result<Vec<SocketAddr>>) {
        self.answer.send_modify(|answer| {
            answer.at = Some(Instant::now());
            match found {
                Ok(addresses) => {
                    answer.error = None;
                    if answer.addresses.as_deref() != Some(&addresses[..]) {
                        answer.addresses = Some(addresses.into());
                    }
                }
                Err(error) => answer.error = Some(Arc::new(error)),
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proxy::upstream::access::NameLookupFuture;

    /// Finds the same addresses for every name.
    #[derive(Debug)]
    struct Zone(Vec<SocketAddr>);

    impl NameLookup for Zone {
        fn look_up<'a>(&'a self, _: &'a str, _: u16) -> NameLookupFuture<'a> {
            Box::pin(async { Ok(self.0.clone()) })
        }
    }

    fn addresses(texts: &[&str]) -> Vec<SocketAddr> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    fn name(found: &[&str]) -> Arc<Name> {
        Name::new("nova.example", 8775, Arc::new(Zone(addresses(found))))
    }

    #[tokio::test]
    async fn the_last_good_answer_outlives_failures() {
        let name = name(&[]);
        let error = name.addresses().await.unwrap_err();
        assert_eq!(error.to_string(), "the name has no address");
        let first = addresses(&["192.0.2.1:8775"]);
        name.publish(Ok(first.clone()));
        name.publish(Err(io::ErrorKind::NotFound.into()));
        let kept = name.addresses().await.unwrap();
        assert_eq!(kept[..], first[..]);
        assert_eq!(name.addresses_instead_of(&kept).await, None, "looked up a moment ago");
        let second = addresses(&["192.0.2.2:8775"]);
        name.publish(Ok(second.clone()));
        assert_eq!(name.addresses_instead_of(&kept).await.unwrap()[..], second[..]);
        assert_eq!(name.addresses().await.unwrap()[..], second[..], "changes are followed");
    }

    #[tokio::test(start_paused = true)]
    async fn an_old_answer_is_refreshed_in_the_background() {
        let name = name(&["192.0.2.2:8775"]);
        let stale = addresses(&["192.0.2.1:8775"]);
        name.publish(Ok(stale.clone()));
        tokio::time::advance(REFRESH).await;
        let mut answers = name.answer.subscribe();
        assert_eq!(name.addresses().await.unwrap()[..], stale[..], "nothing waits");
        answers.changed().await.unwrap();
        assert_eq!(name.addresses().await.unwrap()[..], addresses(&["192.0.2.2:8775"])[..]);
    }

    #[tokio::test]
    async fn requests_share_one_look_up() {
        let name = name(&["192.0.2.1:8775"]);
        let mut answers = name.answer.subscribe();
        let mut asked = tokio::task::JoinSet::new();
        for _ in 0..100 {
            let name = Arc::clone(&name);
            asked.spawn(async move { name.addresses().await.is_ok() });
        }
        assert!(asked.join_all().await.into_iter().all(|found| found));
        answers.changed().await.unwrap();
        assert!(!answers.has_changed().unwrap(), "there was one look-up");
    }
}
