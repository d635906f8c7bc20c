//! A running domain as libvirt keeps it in `/run/libvirt/qemu`: its root, Nova's metadata, one
//! interface.

use std::net::IpAddr;

use crate::port::Port;

/// Returns the file's text for an instance with one port.
#[must_use]
pub fn domain_xml(port: &Port) -> String {
    let Port { id, instance, project, mac, .. } = port;
    let tap = port.tap();
    let address = |ip: &IpAddr| {
        let version = if ip.is_ipv4() { 4 } else { 6 };
        format!(r#"<nova:ip type="fixed" address="{ip}" ipVersion="{version}"/>"#)
    };
    let addresses = port.fixed_ips.iter().map(address).collect::<Vec<_>>().concat();
    format!(
        r#"<domstatus state="running" reason="booted" pid="1">
  <domain type="qemu">
    <uuid>{instance}</uuid>
    <metadata>
      <nova:instance xmlns:nova="http://openstack.org/xmlns/libvirt/nova/1.1">
        <nova:owner><nova:project uuid="{project}">guests</nova:project></nova:owner>
        <nova:ports><nova:port uuid="{id}">{addresses}</nova:port></nova:ports>
      </nova:instance>
    </metadata>
    <devices>
      <interface type="bridge">
        <mac address="{mac}"/>
        <target dev="{tap}"/>
      </interface>
    </devices>
  </domain>
</domstatus>
"#
    )
}
