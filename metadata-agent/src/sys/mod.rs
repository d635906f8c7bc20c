//! System calls without a safe wrapper in any dependency. The agent's only unsafe code.

mod descriptors;
mod shared_words;

pub(crate) use descriptors::{close_inherited, receive};
pub(crate) use shared_words::SharedWords;
