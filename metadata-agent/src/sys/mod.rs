//! System calls without a safe wrapper in any dependency. The agent's only unsafe code.

mod shared_words;

pub(crate) use shared_words::SharedWords;
