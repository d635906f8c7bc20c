//! Neutron's own programs that clean up namespaces, as Debian packages them, confined to one
//! namespace.

use std::fs;
use std::path::Path;
use std::process::Command;

use super::script::{self, PYTHON};
use crate::netns::{Netns, output_of};
use crate::port::Port;

const SCRIPT: &str = include_str!("cleanup.py");

/// Runs `neutron-netns-cleanup` on the host, which removes the namespace if Neutron takes it for
/// unused.
pub fn remove_if_unused(host: &Netns, namespace: &str) {
    run(host, namespace, &["netns"]);
}

/// Runs `neutron-netns-cleanup --force` on the host, which removes all interfaces first.
pub fn remove_by_force(host: &Netns, namespace: &str) {
    run(host, namespace, &["netns-force"]);
}

/// Removes all interfaces of a DHCP server but the one of its port, as the DHCP agent does each
/// time that it sets up the server.
pub fn remove_stale_interfaces(host: &Netns, namespace: &str, port: &Port) {
    run(host, namespace, &["dhcp", &port.id.to_string()]);
}

fn run(host: &Netns, namespace: &str, action: &[&str]) {
    let folder = script::folder();
    let path = |name: &str| folder.path().join(name);
    let config = format!(
        "[DEFAULT]\nstate_path = {at}\ninterface_driver = linuxbridge\n\
         [oslo_concurrency]\nlock_path = {at}\n",
        at = folder.path().display()
    );
    write(&path("cleanup.py"), SCRIPT);
    write(&path("cleanup.conf"), &config);
    let mut command: Command = host.command(PYTHON);
    command.arg(path("cleanup.py")).arg(path("cleanup.conf")).arg(namespace).args(action);
    output_of(&mut command);
}

fn write(path: &Path, text: &str) {
    fs::write(path, text).unwrap_or_else(|e| panic!("write {}: {e}", path.display()));
}
