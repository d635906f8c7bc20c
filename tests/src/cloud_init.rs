//! cloud-init's own code, from Debian's package, which is unpacked but not installed.

use std::path::PathBuf;
use std::process::Stdio;
use std::thread::{self, JoinHandle};

use crate::cache;
use crate::guest::Guest;
use crate::vm::debian;

/// Probes as DataSourceOpenStack does: both families at once, IPv4 150 ms after IPv6
/// (url_helper.py, `dual_stack`).
const PROBE: &str = "\
import sys
from cloudinit.url_helper import wait_for_url
urls = ['http://[fe80::a9fe:a9fe%25eth0]/openstack', 'http://169.254.169.254/openstack']
found, answer = wait_for_url(urls=urls, max_wait=int(sys.argv[1]), timeout=10, connect_synchronously=False)
print(found, answer.decode() if found else '')
";

/// The unpacked code.
#[derive(Clone, Debug)]
pub struct CloudInit {
    packages: PathBuf,
}

impl CloudInit {
    /// Unpacks the code unless it is already there.
    #[must_use]
    pub fn prepare() -> Self {
        let entry = debian::candidate("cloud-init").and_then(|version| {
            cache::entry("cloud-init", cache::Key::new().with(&version), |dir| {
                debian::unpack("cloud-init", dir).map(drop)
            })
        });
        let entry = entry.unwrap_or_else(|e| panic!("unpack cloud-init: {e:#}"));
        Self { packages: entry.join("cloud-init/usr/lib/python3/dist-packages") }
    }

    /// Looks for the metadata service from inside a guest. With a `max_wait` of -1 every address is
    /// tried once; otherwise probing repeats for that many seconds. Returns the URL that answered
    /// and its answer, or nothing if none did.
    #[must_use]
    pub fn probe(&self, guest: &Guest, max_wait: i32) -> JoinHandle<(String, String)> {
        let mut command = guest.netns().command("/usr/bin/python3");
        command.args(["-c", PROBE, &max_wait.to_string()]).env("PYTHONPATH", &self.packages);
        let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
        let child = child.unwrap_or_else(|e| panic!("start cloud-init's probe: {e}"));
        thread::spawn(move || {
            let output = child.wait_with_output().unwrap_or_else(|e| panic!("wait for the probe: {e}"));
            let errors = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "cloud-init's probe: {errors}");
            let text = String::from_utf8_lossy(&output.stdout);
            let (url, answer) = text.split_once(' ').unwrap_or_else(|| panic!("the probe printed {text:?}"));
            (if url == "False" { String::new() } else { url.to_owned() }, answer.trim_end().to_owned())
        })
    }
}
