//! The shared secrets with Nova: the one in the configuration, then those in files of one secret
//! each.
//!
//! [`SecretFiles`] reads them and keeps a [`Signer`] up to date. The signer makes the signatures of
//! every identity. No other room uses a secret, and none is ever logged.

mod files;
mod signer;

pub(crate) use files::read;
pub use files::{SecretFileError, SecretFiles};
pub use signer::Signer;
