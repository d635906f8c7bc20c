//! The host end of the portal's veth pair, between the guard, which creates it again, and the owner
//! of the datapath, which attaches the program to it.

use std::time::Duration;

use tokio::sync::watch;
use tokio::time::timeout;

use super::PortalError;
use crate::ids::IfIndex;

/// Time for the owner of the datapath. It may be attaching to other interfaces.
const CONNECT: Duration = Duration::from_secs(2);

/// The guard's side.
#[derive(Debug)]
pub(crate) struct HostEnd {
    index: watch::Sender<IfIndex>,
    connected: watch::Receiver<IfIndex>,
}

/// The side of the datapath.
#[derive(Debug)]
pub(crate) struct HostEndUser {
    index: watch::Receiver<IfIndex>,
    connected: watch::Sender<IfIndex>,
}

/// Returns both sides, with a datapath that is connected through this interface.
pub(crate) fn host_end(index: IfIndex) -> (HostEnd, HostEndUser) {
    let (sender, receiver) = watch::channel(index);
    let (connected, now) = watch::channel(index);
    (HostEnd { index: sender, connected: now }, HostEndUser { index: receiver, connected })
}

impl HostEnd {
    pub(super) fn connected(&self) -> IfIndex {
        *self.connected.borrow()
    }

    /// Waits until the datapath is connected through an interface.
    pub(super) async fn connect(&mut self, index: IfIndex) -> Result<(), PortalError> {
        self.index.send_replace(index);
        match timeout(CONNECT, self.connected.wait_for(|connected| *connected == index)).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_)) | Err(_) => Err(PortalError::NotConnected),
        }
    }
}

impl HostEndUser {
    /// Waits for an interface that the datapath must use.
    pub(crate) async fn next(&mut self) -> IfIndex {
        if self.index.changed().await.is_err() {
            // The agent is stopping.
            std::future::pending::<()>().await;
        }
        *self.index.borrow_and_update()
    }

    /// Reports the interface that the datapath uses.
    pub(crate) fn connected(&self, index: IfIndex) {
        self.connected.send_replace(index);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_guard_waits_until_the_datapath_uses_the_interface() {
        let (mut guard, mut user) = host_end(IfIndex(4));
        assert!(guard.connect(IfIndex(5)).await.is_err(), "the datapath is busy");
        assert_eq!(guard.connected(), IfIndex(4));
        let datapath = tokio::spawn(async move {
            let index = user.next().await;
            user.connected(index);
            user
        });
        guard.connect(IfIndex(6)).await.unwrap();
        assert_eq!(guard.connected(), IfIndex(6));
        drop(datapath.await);
    }
}
