//! The data plane: a process of its own that answers guests.
//!
//! It parses what guests send, so it holds no privilege and no secret ([`sandbox`] lists what it
//! may do). The control process starts it ([`supervisor`]) and feeds it over one socket
//! ([`messages`]): the client behind each attachment, with its signatures; answers to its calls;
//! certificates.
//!
//! | part | control process | data plane |
//! |---|---|---|
//! | clients of attachments | writes [`client_table`], sends changes | keeps a copy, which requests read |
//! | look-ups, names, unix sockets | answers ([`link`]) | calls ([`calls`]) |
//! | metrics, last heartbeat | reads [`shared_state`] | writes it |
//! | listener | opens it, and keeps it open | accepts |

mod calls;
mod client_table;
mod last_beat;
mod link;
mod messages;
mod plan;
mod process;
mod removed;
mod sandbox;
mod shared_state;
mod supervisor;

pub use client_table::{ClientEntry, ClientTable, EntryChanges, EntryRecords, TableFeed};
pub(crate) use last_beat::LastBeat;
pub(crate) use messages::{LogSettings, UserId};
pub(crate) use plan::{Listeners, Plan, TlsStock};
pub(crate) use process::DataPlaneProcess;
pub(crate) use supervisor::{COMMAND, DataPlane, Restarts};
