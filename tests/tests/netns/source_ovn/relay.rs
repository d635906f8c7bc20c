//! A recorder of the traffic between an agent and a database server.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use metadata_tests::ovsdb::server::Server;
use tempfile::TempDir;

/// A socket in front of a server's socket, which records the server's data.
pub(super) struct Relay {
    folder: TempDir,
    recorded: Arc<Mutex<Vec<u8>>>,
}

impl Relay {
    pub(super) fn before(server: &Server) -> Self {
        let folder = tempfile::Builder::new().prefix("relay-").tempdir().expect("a folder");
        let listener = UnixListener::bind(folder.path().join("sock")).expect("a socket");
        let (server, recorded) = (server.socket(), Arc::<Mutex<Vec<u8>>>::default());
        let kept = Arc::clone(&recorded);
        // Runs until the test process exits. It leaves only the socket, which is removed with the
        // folder.
        thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                // Without the server, the client sees the end of its connection.
                let Ok(server) = UnixStream::connect(&server) else { continue };
                let (client2, server2) =
                    (client.try_clone().expect("a second handle"), server.try_clone().expect("another"));
                thread::spawn(move || pass(&client, &server, |_| ()));
                let kept = Arc::clone(&kept);
                thread::spawn(move || {
                    pass(&server2, &client2, |bytes| lock(&kept).extend_from_slice(bytes));
                });
            }
        });
        Self { folder, recorded }
    }

    pub(super) fn remote(&self) -> String {
        format!("unix:{}", self.folder.path().join("sock").display())
    }

    pub(super) fn recorded(&self) -> String {
        String::from_utf8(lock(&self.recorded).clone()).expect("JSON")
    }
}

fn lock(bytes: &Mutex<Vec<u8>>) -> std::sync::MutexGuard<'_, Vec<u8>> {
    bytes.lock().unwrap_or_else(PoisonError::into_inner)
}

fn pass(mut from: &UnixStream, mut to: &UnixStream, mut seen: impl FnMut(&[u8])) {
    let mut buffer = [0; 4096];
    while let Ok(length @ 1..) = from.read(&mut buffer) {
        seen(&buffer[..length]);
        if to.write_all(&buffer[..length]).is_err() {
            break;
        }
    }
    for stream in [from, to] {
        // The other direction may have been first.
        let _already_down = stream.shutdown(Shutdown::Both);
    }
}
