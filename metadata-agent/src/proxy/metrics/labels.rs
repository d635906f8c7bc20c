//! Closed sets of label values. Each value has an index, so counting one is an atomic addition.

use crate::proxy::upstream::RequestBound;

/// A closed set of values of one label.
pub(super) trait Label: Copy {
    /// The label's name.
    const KEY: &'static str;
    /// All values, in the order of their indexes.
    const VALUES: &'static [&'static str];

    fn index(self) -> usize;
}

macro_rules! labels {
    ($($(#[$attribute:meta])* $name:ident as $key:literal { $($variant:ident = $value:literal,)+ })+) => {
        $(
            $(#[$attribute])*
            #[derive(Debug, Clone, Copy, PartialEq, Eq)]
            pub(crate) enum $name {
                $($variant,)+
            }

            impl Label for $name {
                const KEY: &'static str = $key;
                const VALUES: &'static [&'static str] = &[$($value),+];

                fn index(self) -> usize {
                    self as usize
                }
            }
        )+
    };
}

labels! {
    /// The label of an `UpstreamError`, or of an error in the body of a response.
    UpstreamErrorLabel as "error" {
        Resolve = "resolve",
        Connect = "connect",
        ConnectTimeout = "connect_timeout",
        Busy = "busy",
        Tls = "tls",
        Handshake = "handshake",
        Broken = "broken",
        Garbled = "garbled",
        Upgraded = "upgraded",
        AnswerTimeout = "answer_timeout",
        BodyStalled = "body_stalled",
        BodyBroken = "body_broken",
    }

    /// The label of a `Rejection`, or of a connection that was closed without a response.
    RejectionLabel as "reason" {
        Target = "target",
        Malformed = "malformed",
        HeadTooLarge = "head_too_large",
        HeadTimeout = "head_timeout",
        BodyTooLarge = "body_too_large",
        BodyTimeout = "body_timeout",
        BodyBroken = "body_broken",
        WriteTimeout = "write_timeout",
        DrainTimeout = "drain_timeout",
        RateLimited = "rate_limited",
        GuestConnections = "guest_connections",
        GroupConnections = "group_connections",
        TotalConnections = "total_connections",
        IdentityPending = "identity_pending",
        IdentityUnknown = "identity_unknown",
        NotAnInstance = "not_an_instance",
        NotAnIdentity = "not_an_identity",
        AttachmentGone = "attachment_gone",
        CallerUnreadable = "caller_unreadable",
        CallerUnknown = "caller_unknown",
        CallerAmbiguous = "caller_ambiguous",
        HaproxyUser = "haproxy_user",
    }

    /// The end of a wait for an identity.
    HoldOutcome as "outcome" {
        Resolved = "resolved",
        RetryLater = "retry_later",
        Refused = "refused",
    }
}

impl Label for RequestBound {
    const KEY: &'static str = "bound";
    const VALUES: &'static [&'static str] = &["guest", "all"];

    fn index(self) -> usize {
        match self {
            Self::Guest => 0,
            Self::All => 1,
        }
    }
}
