//! A running domain as libvirt keeps it in its run-time directory, with the metadata that Nova
//! writes.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use crate::port::Port;

/// Writes a domain with this one port into `directory`, or replaces it. Like libvirt, it writes
/// under another name and renames the file.
pub fn write(directory: &Path, port: &Port) {
    let file = directory.join(format!("{}.xml", name(port)));
    let new = file.with_extension("xml.new");
    fs::write(&new, live_xml(port)).unwrap_or_else(|e| panic!("write {}: {e}", new.display()));
    fs::rename(&new, &file).unwrap_or_else(|e| panic!("rename to {}: {e}", file.display()));
}

/// Removes the file of [`write`], as libvirt does when the domain ends.
pub fn remove(directory: &Path, port: &Port) {
    let file = directory.join(format!("{}.xml", name(port)));
    fs::remove_file(&file).unwrap_or_else(|e| panic!("remove {}: {e}", file.display()));
}

/// Returns libvirt's name of the domain.
fn name(port: &Port) -> String {
    format!("instance-{}", &port.instance.to_string()[..8])
}

fn live_xml(port: &Port) -> String {
    let Port { id, instance, project, mac, .. } = port;
    let (name, tap) = (name(port), port.tap());
    let addresses = port.fixed_ips.iter().fold(String::new(), |mut addresses, address| {
        let version = if address.is_ipv4() { 4 } else { 6 };
        let line = format_args!("<nova:ip type=\"fixed\" address=\"{address}\" ipVersion=\"{version}\"/>");
        write!(addresses, "{line}").unwrap_or_else(|_| unreachable!("writing to a String cannot fail"));
        addresses
    });
    format!(
        r#"<!--
WARNING: THIS IS AN AUTO-GENERATED FILE. CHANGES TO IT ARE LIKELY TO BE
OVERWRITTEN AND LOST. Changes to this xml configuration should be made using:
  virsh edit {name}
or other application using the libvirt API.
-->

<domstatus state='running' reason='booted' pid='48213'>
  <taint flag='host-cpu'/>
  <monitor path='/var/lib/libvirt/qemu/domain-7-{name}/monitor.sock' type='unix'/>
  <domain type='kvm' id='7'>
    <name>{name}</name>
    <uuid>{instance}</uuid>
    <metadata>
      <nova:instance xmlns:nova="http://openstack.org/xmlns/libvirt/nova/1.1">
        <nova:package version="29.2.0"/>
        <nova:name>web-1</nova:name>
        <nova:creationTime>2025-03-04 08:15:42</nova:creationTime>
        <nova:flavor name="m1.tiny">
          <nova:memory>512</nova:memory>
          <nova:vcpus>1</nova:vcpus>
        </nova:flavor>
        <nova:owner>
          <nova:user uuid="3b1f0c9d8e7a46f5b4c3d2e1f0a9b8c7">alice</nova:user>
          <nova:project uuid="{project}">acme</nova:project>
        </nova:owner>
        <nova:root type="image" uuid="d2d6d8a4-1f4b-4a1e-8a5b-8c8b3f8f1e77"/>
        <nova:ports>
          <nova:port uuid="{id}">{addresses}</nova:port>
        </nova:ports>
      </nova:instance>
    </metadata>
    <memory unit='KiB'>524288</memory>
    <os>
      <type arch='x86_64' machine='pc-q35-8.2'>hvm</type>
    </os>
    <devices>
      <emulator>/usr/bin/qemu-system-x86_64</emulator>
      <interface type='bridge'>
        <mac address='{mac}'/>
        <source bridge='br-int'/>
        <virtualport type='openvswitch'>
          <parameters interfaceid='{id}'/>
        </virtualport>
        <target dev='{tap}'/>
        <model type='virtio'/>
        <mtu size='1442'/>
        <alias name='net0'/>
      </interface>
    </devices>
  </domain>
</domstatus>
"#
    )
}
