//! Keystone tokens and their renewal: before they expire, and if Neutron rejects one.
//!
//! One task authenticates, so at most one attempt is in progress, and all waiting requests share
//! its failure. A token that Neutron rejects without having accepted it before is not replaced at
//! once: the next one would be rejected as well, and Keystone would get as many requests as
//! Neutron.
//!
//! A token comes with Neutron's endpoint from the catalog. If requests there fail, the endpoint may
//! have moved, so another token is requested after [`CATALOG_AGE`].

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use secrecy::SecretString;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;
use tracing::debug;

use super::access::HttpUrl;
use super::http::Http;
use super::keystone::{IssuedToken, Keystone, KeystoneError};
use super::pacer::SHORTEST_PAUSE;

/// Capacity of the channel for token requests.
const QUEUE: usize = 64;
/// Time before expiry at which a token is renewed, and the fraction of its lifetime if that is
/// shorter.
const MARGIN: Duration = Duration::from_mins(5);
const MARGIN_PART: u32 = 5;
/// Age of a catalog from which on it is not trusted about an endpoint that fails. So while Neutron
/// is down, a host authenticates no more often than this.
const CATALOG_AGE: Duration = Duration::from_mins(5);

/// No valid token is available.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AuthError {
    #[error(transparent)]
    Keystone(#[from] KeystoneError),
    #[error("a new token was rejected (401): does Neutron use another Keystone?")]
    TokenRejected,
    #[error("the agent is stopping")]
    Stopping,
}

/// Token, if Neutron requires one, and Neutron's endpoint.
#[derive(Debug)]
pub(super) struct Token {
    pub(super) secret: Option<SecretString>,
    pub(super) endpoint: HttpUrl,
    serial: u64,
    accepted: AtomicBool,
    /// The last request to the endpoint failed.
    endpoint_failed: AtomicBool,
    times: Option<TokenLifetime>,
}

/// Times of renewal and of expiry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct TokenLifetime {
    /// End of the trust in an endpoint that fails.
    catalog: Instant,
    renew: Instant,
    end: Instant,
}

impl TokenLifetime {
    /// Computes the times of a token requested at `asked`, slightly too early rather than too late.
    fn new(asked: Instant, lifetime: Duration) -> Self {
        let margin = MARGIN.min(lifetime / MARGIN_PART);
        let renew = asked + lifetime.saturating_sub(margin);
        Self { catalog: asked + CATALOG_AGE, renew, end: asked + lifetime }
    }
}

impl Token {
    /// Creates the placeholder for a Neutron without Keystone.
    fn none(endpoint: HttpUrl) -> Self {
        let [accepted, endpoint_failed] = [const { AtomicBool::new(false) }; 2];
        Self { secret: None, endpoint, serial: 0, accepted, endpoint_failed, times: None }
    }

    /// Records that Neutron accepted the token.
    pub(super) fn accept(&self) {
        self.accepted.store(true, Ordering::Relaxed);
        self.endpoint_failed.store(false, Ordering::Relaxed);
    }

    /// Records that a request to the endpoint failed.
    pub(super) fn doubt_endpoint(&self) {
        self.endpoint_failed.store(true, Ordering::Relaxed);
    }

    /// Returns true if the endpoint may have moved since the catalog was read.
    fn is_doubtful(&self, now: Instant) -> bool {
        let is_old = self.times.as_ref().is_some_and(|times| now >= times.catalog);
        is_old && self.endpoint_failed.load(Ordering::Relaxed)
    }
}

type TokenOutcome = Result<Arc<Token>, Arc<AuthError>>;

/// Handle for requesting tokens.
#[derive(Clone, Debug)]
pub(super) struct Tokens(TokenSupply);

#[derive(Clone, Debug)]
enum TokenSupply {
    Unneeded(Arc<Token>),
    Issuer(mpsc::Sender<TokenRequest>),
}

#[derive(Debug)]
struct TokenRequest {
    since: Instant,
    rejected: Option<u64>,
    reply: oneshot::Sender<TokenOutcome>,
}

impl Tokens {
    /// Creates a handle for a Neutron without Keystone.
    pub(super) fn unneeded(endpoint: HttpUrl) -> Self {
        Self(TokenSupply::Unneeded(Arc::new(Token::none(endpoint))))
    }

    /// Creates a handle, and the issuer that must be run.
    pub(super) fn new(keystone: Keystone, http: Arc<Http>) -> (Self, TokenIssuer) {
        let (sender, requests) = mpsc::channel(QUEUE);
        let session = TokenIssuer { keystone, http, requests, token: None, serial: 0, failure: None };
        (Self(TokenSupply::Issuer(sender)), session)
    }

    /// Returns a valid token.
    pub(super) async fn get(&self) -> TokenOutcome {
        self.request(None).await
    }

    /// Returns another token than this one, which Neutron rejected.
    pub(super) async fn replace(&self, rejected: &Token) -> TokenOutcome {
        self.request(Some(rejected.serial)).await
    }

    async fn request(&self, rejected: Option<u64>) -> TokenOutcome {
        let requests = match &self.0 {
            TokenSupply::Unneeded(_) if rejected.is_some() => return Err(Arc::new(AuthError::TokenRejected)),
            TokenSupply::Unneeded(token) => return Ok(Arc::clone(token)),
            TokenSupply::Issuer(requests) => requests,
        };
        let (reply, outcome) = oneshot::channel();
        let request = TokenRequest { since: Instant::now(), rejected, reply };
        let stopping = |()| Arc::new(AuthError::Stopping);
        requests.send(request).await.map_err(|_| stopping(()))?;
        outcome.await.map_err(|_| stopping(()))?
    }
}

/// Task that authenticates.
#[derive(Debug)]
pub(super) struct TokenIssuer {
    keystone: Keystone,
    http: Arc<Http>,
    requests: mpsc::Receiver<TokenRequest>,
    token: Option<Arc<Token>>,
    serial: u64,
    failure: Option<(Instant, Arc<AuthError>)>,
}

impl TokenIssuer {
    /// Serves requests until all handles are dropped.
    pub(super) async fn serve(mut self) {
        while let Some(TokenRequest { since, rejected, reply }) = self.requests.recv().await {
            let outcome = self.token(since, rejected).await;
            // The requester may have timed out.
            drop(reply.send(outcome));
        }
    }

    async fn token(&mut self, since: Instant, rejected: Option<u64>) -> TokenOutcome {
        if let Some(token) = self.token.take_if(|token| Some(token.serial) == rejected) {
            debug!(accepted = ?token.accepted, "Neutron rejected the token");
            if !token.accepted.load(Ordering::Relaxed) {
                return Err(self.fail(AuthError::TokenRejected));
            }
        }
        let now = Instant::now();
        let usable = |token: &&Arc<Token>, until: fn(&TokenLifetime) -> Instant| {
            token.times.as_ref().is_none_or(|times| now < until(times))
        };
        let is_fresh = |token: &&Arc<Token>| usable(token, |times| times.renew) && !token.is_doubtful(now);
        if let Some(token) = self.token.as_ref().filter(is_fresh) {
            return Ok(Arc::clone(token));
        }
        let old = self.token.as_ref().filter(|token| usable(token, |times| times.end)).cloned();
        if let Some((at, error)) = &self.failure
            // The request passed the pacer before it blocked requests because of this failure. The
            // backoff is at least this long.
            && since < *at + SHORTEST_PAUSE
        {
            return old.ok_or_else(|| Arc::clone(error));
        }
        match self.keystone.authenticate(&self.http).await {
            Ok(issued) => Ok(self.keep(issued, now)),
            Err(error) => {
                let error = self.fail(error.into());
                old.ok_or(error)
            }
        }
    }

    fn keep(&mut self, issued: IssuedToken, asked: Instant) -> Arc<Token> {
        let IssuedToken { token, lifetime, endpoint } = issued;
        debug!(lifetime = lifetime.as_secs(), %endpoint, "Keystone issued a token");
        self.serial += 1;
        let token = Arc::new(Token {
            secret: Some(token),
            endpoint,
            serial: self.serial,
            accepted: AtomicBool::new(false),
            endpoint_failed: AtomicBool::new(false),
            times: Some(TokenLifetime::new(asked, lifetime)),
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
    fn a_token_is_renewed_well_before_it_expires() {
        let asked = Instant::now();
        let hour = TokenLifetime::new(asked, Duration::from_hours(1));
        assert_eq!(hour.renew, asked + Duration::from_mins(55));
        assert_eq!(hour.end, asked + Duration::from_hours(1));
        let short = TokenLifetime::new(asked, Duration::from_secs(10));
        assert_eq!(short.renew, asked + Duration::from_secs(8));
        assert_eq!(TokenLifetime::new(asked, Duration::ZERO).renew, asked);
    }
}
