//! The token by which we ask Neutron, and its renewal: before it expires, and when Neutron refuses it.
//!
//! One task authenticates, so there is never more than one attempt under way; whoever waited for an attempt that failed
//! shares its failure. A token that was never accepted and is refused is not replaced at once: the next is no better, and
//! Keystone is not to be asked as often as Neutron is.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use secrecy::SecretString;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;
use tracing::debug;

use super::access::HttpUrl;
use super::gate::SHORTEST_PAUSE;
use super::http::Http;
use super::keystone::{Grant, Keystone, KeystoneError};

/// Those who may wait for a token.
const QUEUE: usize = 64;
/// The longest time before its end at which a token is replaced, and the part of its life if that is shorter.
const MARGIN: Duration = Duration::from_mins(5);
const MARGIN_PART: u32 = 5;

/// Why there is no token.
#[derive(Debug, thiserror::Error)]
pub enum AuthError {
    /// Keystone gives none.
    #[error(transparent)]
    Keystone(#[from] KeystoneError),
    /// Neutron does not take the one that Keystone has just given.
    #[error("refuses the token that Keystone has just issued (401): does it belong to another Keystone?")]
    TokenRefused,
    /// The agent stops.
    #[error("is not asked any more: the agent stops")]
    Stopping,
}

/// Something to show to Neutron, or to a Neutron without Keystone nothing, and where that is.
#[derive(Debug)]
pub(super) struct Token {
    pub(super) secret: Option<SecretString>,
    pub(super) endpoint: HttpUrl,
    serial: u64,
    accepted: AtomicBool,
    times: Option<Times>,
}

/// When a token is to be replaced, and when it is of no use any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Times {
    renew: Instant,
    end: Instant,
}

impl Times {
    /// Of a token that was asked for at this moment, so that it ends rather too early.
    fn of(asked: Instant, lifetime: Duration) -> Self {
        let margin = MARGIN.min(lifetime / MARGIN_PART);
        Self { renew: asked + lifetime.saturating_sub(margin), end: asked + lifetime }
    }
}

impl Token {
    /// For a Neutron that asks for none.
    fn none(endpoint: HttpUrl) -> Self {
        Self { secret: None, endpoint, serial: 0, accepted: AtomicBool::new(false), times: None }
    }

    /// Neutron has accepted it.
    pub(super) fn accept(&self) {
        self.accepted.store(true, Ordering::Relaxed);
    }
}

type Outcome = Result<Arc<Token>, Arc<AuthError>>;

/// By which a token is had.
#[derive(Clone, Debug)]
pub(super) struct Tokens(Supply);

#[derive(Clone, Debug)]
enum Supply {
    Unneeded(Arc<Token>),
    Session(mpsc::Sender<Want>),
}

#[derive(Debug)]
struct Want {
    since: Instant,
    refused: Option<u64>,
    reply: oneshot::Sender<Outcome>,
}

impl Tokens {
    /// Those of a Neutron without Keystone.
    pub(super) fn unneeded(endpoint: HttpUrl) -> Self {
        Self(Supply::Unneeded(Arc::new(Token::none(endpoint))))
    }

    /// Those of a session that has yet to be served.
    pub(super) fn of(keystone: Keystone, http: Arc<Http>) -> (Self, Session) {
        let (sender, wants) = mpsc::channel(QUEUE);
        let session = Session { keystone, http, wants, token: None, serial: 0, failure: None };
        (Self(Supply::Session(sender)), session)
    }

    /// A token that is good now.
    pub(super) async fn get(&self) -> Outcome {
        self.want(None).await
    }

    /// Another token than this one, which Neutron refuses.
    pub(super) async fn replace(&self, refused: &Token) -> Outcome {
        self.want(Some(refused.serial)).await
    }

    async fn want(&self, refused: Option<u64>) -> Outcome {
        let wants = match &self.0 {
            Supply::Unneeded(_) if refused.is_some() => return Err(Arc::new(AuthError::TokenRefused)),
            Supply::Unneeded(token) => return Ok(Arc::clone(token)),
            Supply::Session(wants) => wants,
        };
        let (reply, outcome) = oneshot::channel();
        let want = Want { since: Instant::now(), refused, reply };
        let stopping = |()| Arc::new(AuthError::Stopping);
        wants.send(want).await.map_err(|_| stopping(()))?;
        outcome.await.map_err(|_| stopping(()))?
    }
}

/// The one who authenticates.
#[derive(Debug)]
pub(super) struct Session {
    keystone: Keystone,
    http: Arc<Http>,
    wants: mpsc::Receiver<Want>,
    token: Option<Arc<Token>>,
    serial: u64,
    failure: Option<(Instant, Arc<AuthError>)>,
}

impl Session {
    /// Gives out tokens until nobody wants one any more.
    pub(super) async fn serve(mut self) {
        while let Some(Want { since, refused, reply }) = self.wants.recv().await {
            let outcome = self.token(since, refused).await;
            // Whoever wanted it may have lost patience.
            drop(reply.send(outcome));
        }
    }

    async fn token(&mut self, since: Instant, refused: Option<u64>) -> Outcome {
        if let Some(token) = self.token.take_if(|token| Some(token.serial) == refused) {
            debug!(accepted = ?token.accepted, "Neutron refuses the token");
            if !token.accepted.load(Ordering::Relaxed) {
                return Err(self.fail(AuthError::TokenRefused));
            }
        }
        let now = Instant::now();
        let usable = |token: &&Arc<Token>, until: fn(&Times) -> Instant| {
            token.times.as_ref().is_none_or(|times| now < until(times))
        };
        if let Some(token) = self.token.as_ref().filter(|token| usable(token, |times| times.renew)) {
            return Ok(Arc::clone(token));
        }
        let old = self.token.as_ref().filter(|token| usable(token, |times| times.end)).cloned();
        if let Some((at, error)) = &self.failure
            // Whoever passed the gate before it was closed on that failure, which it is for at least as long.
            && since < *at + SHORTEST_PAUSE
        {
            return old.ok_or_else(|| Arc::clone(error));
        }
        match self.keystone.authenticate(&self.http).await {
            Ok(grant) => Ok(self.keep(grant, now)),
            Err(error) => {
                let error = self.fail(error.into());
                old.ok_or(error)
            }
        }
    }

    fn keep(&mut self, grant: Grant, asked: Instant) -> Arc<Token> {
        let Grant { token, lifetime, endpoint } = grant;
        debug!(lifetime = lifetime.as_secs(), %endpoint, "Keystone has issued a token");
        self.serial += 1;
        let token = Arc::new(Token {
            secret: Some(token),
            endpoint,
            serial: self.serial,
            accepted: AtomicBool::new(false),
            times: Some(Times::of(asked, lifetime)),
        });
        self.token = Some(Arc::clone(&token));
        self.failure = None;
        token
    }

    fn fail(&mut self, error: AuthError) -> Arc<AuthError> {
        let error = Arc::new(error);
        self.failure = Some((Instant::now(), Arc::clone(&error)));
        error
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_replaced_well_before_its_end() {
        let asked = Instant::now();
        let hour = Times::of(asked, Duration::from_hours(1));
        assert_eq!(hour.renew, asked + Duration::from_mins(55));
        assert_eq!(hour.end, asked + Duration::from_hours(1));
        let short = Times::of(asked, Duration::from_secs(10));
        assert_eq!(short.renew, asked + Duration::from_secs(8));
        assert_eq!(Times::of(asked, Duration::ZERO).renew, asked);
    }
}
