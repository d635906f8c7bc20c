//! The source against a changing directory.

use std::os::unix::fs::symlink;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time;

use super::super::SourceState;
use super::*;
use crate::inventory::{Entry, Inventory};

const OVS: &str = include_str!("../testdata/ovs_nova_1_1.xml");
const OLD: &str = include_str!("../testdata/ovs_nova_1_0.xml");
const FOREIGN: &str = include_str!("../testdata/foreign.xml");
const TAP: &str = "tap3f2a9d10-77";
const OLD_TAP: &str = "tap0a1b2c3d-4e";

#[tokio::test]
async fn domains_start_change_and_end() {
    let folder = tempfile::tempdir().unwrap();
    let directory = folder.path().join("libvirt/qemu");
    let mut source = LibvirtHarness::start(directory.clone());

    let state = source.state(|state| !state.faults.is_empty()).await;
    assert!(!state.ready, "the source is not ready without the directory: {state:?}");
    fs::create_dir_all(&directory).unwrap();
    let state = source.state(|state| state.ready).await;
    assert_eq!((state.ports, state.fault()), (0, None));

    source.rename_into("instance-0000002a.xml", OVS);
    source.instance(TAP, Some("7d3c6e2e-5e0b-4f0e-8a44-0d4e6c7b1f10")).await;
    source.rename_into("instance-00000011.xml", OLD);
    source.rename_into("jumphost.xml", FOREIGN);
    source.instance(OLD_TAP, Some("5b0f5a4e-1d3a-4c55-8f0e-6a2f8d7c9b01")).await;
    let state = source.state(|state| state.ignored == 1).await;
    assert_eq!((state.ports, state.fault()), (3, None));

    fs::remove_file(directory.join("instance-00000011.xml")).unwrap();
    source.instance(OLD_TAP, None).await;
    fs::rename(directory.join("instance-0000002a.xml"), folder.path().join("away")).unwrap();
    source.instance(TAP, None).await;
    fs::rename(folder.path().join("away"), directory.join("again.xml")).unwrap();
    source.instance(TAP, Some("7d3c6e2e-5e0b-4f0e-8a44-0d4e6c7b1f10")).await;

    fs::remove_dir_all(&directory).unwrap();
    source.instance(TAP, None).await;
    fs::create_dir(&directory).unwrap();
    source.rename_into("instance-0000002a.xml", OVS);
    source.instance(TAP, Some("7d3c6e2e-5e0b-4f0e-8a44-0d4e6c7b1f10")).await;
    source.stop().await;
}

#[tokio::test]
async fn a_default_directory_may_be_missing_and_appear_later() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("libvirt/qemu");
    let directory = DomainDirectory { path: path.clone(), is_configured: false };
    let mut source = LibvirtHarness::start_with(directory);
    let state = source.state(|state| state.ready).await;
    assert_eq!((state.ports, state.fault()), (0, None));

    fs::create_dir_all(&path).unwrap();
    source.rename_into("instance-0000002a.xml", OVS);
    source.instance(TAP, Some("7d3c6e2e-5e0b-4f0e-8a44-0d4e6c7b1f10")).await;
    // Once it was there, it is missed.
    fs::remove_dir_all(&path).unwrap();
    source.instance(TAP, None).await;
    let state = source.state(|state| !state.faults.is_empty()).await;
    assert!(state.ready, "{state:?}");
    source.stop().await;
}

#[tokio::test]
async fn an_invalid_file_is_withdrawn() {
    let folder = tempfile::tempdir().unwrap();
    let mut source = LibvirtHarness::start(folder.path().into());
    source.rename_into("other.xml", OLD);
    source.rename_into("a.xml", OVS);
    source.instance(TAP, Some("7d3c6e2e-5e0b-4f0e-8a44-0d4e6c7b1f10")).await;

    fs::write(folder.path().join("a.xml"), &OVS[..OVS.len() / 2]).unwrap();
    source.instance(TAP, None).await;
    let state = source.state(|state| !state.faults.is_empty()).await;
    assert_eq!(state.fault().unwrap().0, "a.xml");

    let next = OVS.replace("<uuid>7d3c6e2e", "<uuid>00000000");
    fs::write(folder.path().join("a.xml"), next).unwrap();
    source.instance(TAP, Some("00000000-5e0b-4f0e-8a44-0d4e6c7b1f10")).await;
    let state = source.state(|state| state.faults.is_empty()).await;
    assert_eq!(state.ports, 3);
    source.instance(OLD_TAP, Some("5b0f5a4e-1d3a-4c55-8f0e-6a2f8d7c9b01")).await;
    source.stop().await;
}

#[tokio::test]
async fn an_unreadable_file_is_reported_and_affects_no_other() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    fs::File::create(path("huge.xml")).unwrap().set_len(MAX_DOMAIN_BYTES + 1).unwrap();
    fs::create_dir(path("folder.xml")).unwrap();
    nix::unistd::mkfifo(&path("pipe.xml"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    fs::write(path("latin.xml"), b"<domain>\xfc</domain>").unwrap();
    fs::write(path("instance-0000002a.xml.new"), OVS).unwrap();
    symlink("instance-0000002a.xml.new", path("link.xml")).unwrap();
    fs::write(path("good.xml"), OLD).unwrap();

    let mut source = LibvirtHarness::start(folder.path().into());
    source.instance(OLD_TAP, Some("5b0f5a4e-1d3a-4c55-8f0e-6a2f8d7c9b01")).await;
    source.instance(TAP, None).await;
    let state = source.state(|state| state.ready).await;
    let invalid: Vec<&str> = state.faults.keys().map(String::as_str).collect();
    assert_eq!(invalid, ["folder.xml", "huge.xml", "latin.xml", "link.xml", "pipe.xml"]);
    assert_eq!(state.ports, 1);
    source.stop().await;
}

/// The source under test, its inventory and their states.
struct LibvirtHarness {
    directory: PathBuf,
    inventory: Arc<Inventory>,
    version: watch::Receiver<u64>,
    state: watch::Receiver<SourceState>,
    cancel: CancellationToken,
    tasks: [JoinHandle<()>; 2],
}

impl LibvirtHarness {
    fn start(directory: PathBuf) -> Self {
        Self::start_with(DomainDirectory { path: directory, is_configured: true })
    }

    fn start_with(directory: DomainDirectory) -> Self {
        let (inventory, publisher) = Inventory::new();
        let (sender, events) = mpsc::channel(4);
        let (reporter, state) = Reporter::new(SourceKind::Libvirt);
        let cancel = CancellationToken::new();
        let tasks = [
            tokio::spawn(publisher.run(events, cancel.clone())),
            tokio::spawn(run(directory.clone(), sender, reporter, cancel.clone())),
        ];
        let version = inventory.subscribe();
        Self { directory: directory.path, inventory, version, state, cancel, tasks }
    }

    /// Writes a file as libvirt does.
    fn rename_into(&self, name: &str, content: &str) {
        let new = self.directory.join(format!("{name}.new"));
        fs::write(&new, content).unwrap();
        fs::rename(new, self.directory.join(name)).unwrap();
    }

    async fn instance(&mut self, device: &str, wanted: Option<&str>) {
        let inventory = Arc::clone(&self.inventory);
        let instance = || match inventory.load().find(device, None) {
            Ok(Some(Entry::Agreed(port))) => Some(port.instance.to_string()),
            Ok(Some(Entry::Incomplete(_) | Entry::NoInstance(_)) | None) => None,
            Ok(Some(Entry::Disputed(_))) | Err(_) => panic!("{device} is disputed"),
        };
        let wait = self.version.wait_for(|_| instance().as_deref() == wanted);
        let found = time::timeout(Duration::from_secs(10), wait).await;
        assert!(found.is_ok(), "{device}: {:?} instead of {wanted:?}", instance());
    }

    async fn state(&mut self, fits: impl Fn(&SourceState) -> bool) -> SourceState {
        let wait = self.state.wait_for(fits);
        let state = time::timeout(Duration::from_secs(10), wait).await.map(|state| state.unwrap().clone());
        state.unwrap_or_else(|_| panic!("the state was not reached: {:?}", self.state.borrow()))
    }

    async fn stop(self) {
        self.cancel.cancel();
        for task in self.tasks {
            time::timeout(Duration::from_secs(10), task).await.expect("the source did not stop").unwrap();
        }
    }
}
