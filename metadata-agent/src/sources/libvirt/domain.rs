//! Parses the ports of a libvirt domain's XML.
//!
//! | field | source |
//! |---|---|
//! | instance | `domain/uuid`, which Nova sets to the instance's id |
//! | project | `domain/metadata/nova:instance/nova:owner/nova:project@uuid` |
//! | device, MAC address | `domain/devices/interface/target@dev` and `mac@address` |
//! | port id | `interface/virtualport/parameters@interfaceid`; without it (hybrid plug, taps created by os-vif), the `nova:ports/nova:port@uuid` whose tap has the device's name |
//! | fixed addresses | `nova:port/nova:ip[@type='fixed']@address` of that port |
//!
//! The root is `domain`, or libvirt's `domstatus` with a `domain`. Both of Nova's namespaces are
//! read: 1.0, which lists no ports, and 1.1. A domain started by an old Nova and changed by a new
//! one has both.
//!
//! Only exactly these paths are read, never descendants in general, so a `nova:project` in a
//! tenant's text has no effect. Document types, and with them entities, are rejected. Interfaces
//! without a target device, such as passed-through PCI functions, have no link on the host and are
//! skipped. One invalid interface invalidates the domain.

use std::net::IpAddr;

use roxmltree::{Document, ExpandedName, Node, ParsingOptions};

use super::document_limits::{self, DocumentLimitError};
use crate::ids::{IdError, PortId, ProjectId};
use crate::inventory::{DeviceName, DeviceNameError, Port, PortAddressing};

const NOVA: [&str; 2] =
    ["http://openstack.org/xmlns/libvirt/nova/1.1", "http://openstack.org/xmlns/libvirt/nova/1.0"];

/// A domain with hundreds of disks has about ten thousand nodes.
const MAX_NODES: u32 = 100_000;
/// Limit of interfaces, and of ports listed in Nova's metadata, since each of the one is compared
/// with each of the other. QEMU offers slots for about a hundred interfaces.
const MAX_PORTS: usize = 1_000;

/// Invalid or foreign domain XML.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DomainError {
    /// Not well-formed, with a document type, or too large.
    #[error("invalid XML: {0}")]
    Xml(#[source] roxmltree::Error),
    #[error(transparent)]
    Limit(#[from] DocumentLimitError),
    #[error("more than {MAX_PORTS} interfaces or ports")]
    TooManyPorts,
    /// The root is neither `domain` nor `domstatus` with a `domain`.
    #[error("no domain element")]
    NoDomain,
    /// The domain was not created by Nova.
    #[error("no Nova metadata")]
    NotNova,
    #[error("{what} is missing")]
    Missing { what: &'static str },
    #[error("{what}: {source}")]
    Id { what: &'static str, source: IdError },
    #[error("interface/target@dev: {0}")]
    BadDevice(#[source] DeviceNameError),
    #[error("nova:ip@address: {text:?} is not an IP address")]
    Address { text: String },
    /// Nova's metadata of both versions name different projects.
    #[error("metadata name two projects, {first} and {second}")]
    SeveralProjects { first: ProjectId, second: ProjectId },
}

/// Port listed in Nova's metadata.
struct ListedPort {
    id: PortId,
    fixed_ips: Vec<IpAddr>,
}

/// Parses the ports of a domain.
///
/// # Errors
/// [`DomainError`]. [`DomainError::NotNova`] is an expected one.
pub(crate) fn parse_domain(xml: &str) -> Result<Vec<Port>, DomainError> {
    document_limits::check(xml)?;
    let options = ParsingOptions { allow_dtd: false, nodes_limit: MAX_NODES, ..ParsingOptions::default() };
    let document = Document::parse_with_options(xml, options).map_err(DomainError::Xml)?;
    let root = document.root_element();
    let domain = if is(root, "domain".into()) {
        root
    } else if is(root, "domstatus".into()) {
        child(root, "domain").ok_or(DomainError::NoDomain)?
    } else {
        return Err(DomainError::NoDomain);
    };

    // Read Nova's metadata.
    let metadata = child(domain, "metadata").ok_or(DomainError::NotNova)?;
    let nova: Vec<Node> = NOVA.iter().filter_map(|space| child(metadata, (*space, "instance"))).collect();
    if nova.is_empty() {
        return Err(DomainError::NotNova);
    }
    let project = project(&nova)?;
    let listed = listed(&nova)?;
    let instance = child(domain, "uuid")
        .and_then(|uuid| uuid.text())
        .ok_or(DomainError::Missing { what: "domain/uuid" })?
        .trim()
        .parse()
        .map_err(|source| DomainError::Id { what: "domain/uuid", source })?;

    // Read the interfaces that have a link on the host.
    let mut ports = Vec::new();
    let devices = child(domain, "devices");
    if children(devices, "interface").count() > MAX_PORTS {
        return Err(DomainError::TooManyPorts);
    }
    for interface in children(devices, "interface") {
        let Some(device) = child(interface, "target").and_then(|target| target.attribute("dev")) else {
            continue;
        };
        let device: DeviceName = device.parse().map_err(DomainError::BadDevice)?;
        let mac = child(interface, "mac").and_then(|mac| mac.attribute("address"));
        let mac = mac.map(str::parse).transpose();
        let mac = mac.map_err(|source| DomainError::Id { what: "interface/mac@address", source })?;
        let id = port_id(interface, &device, &listed)?;
        let entry = listed.iter().find(|port| Some(port.id) == id);
        ports.push(Port {
            id,
            device: Some(device),
            instance,
            project: project.clone(),
            addressing: PortAddressing {
                mac,
                fixed_ips: entry.map(|port| port.fixed_ips.clone()).unwrap_or_default(),
                ..PortAddressing::default()
            },
        });
    }
    Ok(ports)
}

fn project(nova: &[Node]) -> Result<ProjectId, DomainError> {
    const WHAT: &str = "nova:instance/nova:owner/nova:project@uuid";
    let mut found: Option<ProjectId> = None;
    for instance in nova {
        let space = instance.tag_name().namespace().unwrap_or_default();
        let project: ProjectId = child(*instance, (space, "owner"))
            .and_then(|owner| child(owner, (space, "project")))
            .and_then(|project| project.attribute("uuid"))
            .ok_or(DomainError::Missing { what: WHAT })?
            .parse()
            .map_err(|source| DomainError::Id { what: WHAT, source })?;
        match &found {
            Some(first) if *first != project => {
                return Err(DomainError::SeveralProjects { first: first.clone(), second: project });
            }
            Some(_) => {}
            None => found = Some(project),
        }
    }
    found.ok_or(DomainError::NotNova)
}

/// Returns the listed ports, of the newest metadata version that lists any.
fn listed(nova: &[Node]) -> Result<Vec<ListedPort>, DomainError> {
    let mut listed = Vec::new();
    let ports = nova.iter().find_map(|instance| {
        let space = instance.tag_name().namespace()?;
        child(*instance, (space, "ports")).map(|ports| (space, ports))
    });
    let Some((space, ports)) = ports else { return Ok(listed) };
    if children(Some(ports), (space, "port")).count() > MAX_PORTS {
        return Err(DomainError::TooManyPorts);
    }
    for port in children(Some(ports), (space, "port")) {
        let what = "nova:port@uuid";
        let id = port.attribute("uuid").ok_or(DomainError::Missing { what })?;
        let id = id.parse().map_err(|source| DomainError::Id { what, source })?;
        let mut fixed_ips = Vec::new();
        for ip in children(Some(port), (space, "ip")).filter(|ip| ip.attribute("type") == Some("fixed")) {
            let text = ip.attribute("address").ok_or(DomainError::Missing { what: "nova:ip@address" })?;
            fixed_ips.push(text.parse().map_err(|_| DomainError::Address { text: text.to_owned() })?);
        }
        listed.push(ListedPort { id, fixed_ips });
    }
    Ok(listed)
}

fn port_id(
    interface: Node,
    device: &DeviceName,
    listed: &[ListedPort],
) -> Result<Option<PortId>, DomainError> {
    let explicit = child(interface, "virtualport")
        .and_then(|virtualport| child(virtualport, "parameters"))
        .and_then(|parameters| parameters.attribute("interfaceid"));
    if let Some(id) = explicit {
        let what = "interface/virtualport/parameters@interfaceid";
        return id.parse().map(Some).map_err(|source| DomainError::Id { what, source });
    }
    let mut matching = listed.iter().filter(|port| DeviceName::from_port_id(&port.id) == *device);
    // If the eleven characters match two ports of one instance, neither is chosen.
    Ok(matching.next().filter(|_| matching.next().is_none()).map(|port| port.id))
}

fn child<'a, 'input: 'a, 'n>(
    node: Node<'a, 'input>,
    name: impl Into<ExpandedName<'n, 'n>>,
) -> Option<Node<'a, 'input>> {
    children(Some(node), name).next()
}

fn children<'a, 'input: 'a, 'n>(
    node: Option<Node<'a, 'input>>,
    name: impl Into<ExpandedName<'n, 'n>>,
) -> impl Iterator<Item = Node<'a, 'input>> {
    let name = name.into();
    // Not `has_tag_name`: there, a name without a namespace matches every namespace.
    node.into_iter().flat_map(|node| node.children()).filter(move |child| is(*child, name))
}

fn is(node: Node, name: ExpandedName) -> bool {
    node.is_element()
        && node.tag_name().name() == name.name()
        && node.tag_name().namespace() == name.namespace()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const OVS: &str = include_str!("../testdata/ovs_nova_1_1.xml");
    const OVS_1_0: &str = include_str!("../testdata/ovs_nova_1_0.xml");
    const HYBRID: &str = include_str!("../testdata/hybrid_nova_1_1.xml");
    const ETHERNET: &str = include_str!("../testdata/ethernet_two_versions.xml");
    const FOREIGN: &str = include_str!("../testdata/foreign.xml");
    const PROJECT: &str = "9c1b7f0e6a3d4f4bb0f6a3c7d2e5a890";

    #[test]
    fn interfaces_on_ovs_are_read_and_names_with_xml_are_text() {
        let ports = parse_domain(OVS).unwrap();
        let of = |id: &str, device: &str, mac: &str, fixed_ips: &[&str]| Port {
            id: Some(id.parse().unwrap()),
            device: Some(device.parse().unwrap()),
            instance: "7d3c6e2e-5e0b-4f0e-8a44-0d4e6c7b1f10".parse().unwrap(),
            project: PROJECT.parse().unwrap(),
            addressing: PortAddressing {
                mac: Some(mac.parse().unwrap()),
                fixed_ips: fixed_ips.iter().map(|ip| ip.parse().unwrap()).collect(),
                ..PortAddressing::default()
            },
        };
        let (one, two) = ("3f2a9d10-77c1-4e55-9d0c-2b6f4f1f0a01", "c0ffee00-12ab-4d6e-9f01-23456789abcd");
        let wanted = [
            of(one, "tap3f2a9d10-77", "fa:16:3e:11:22:33", &["10.0.0.5", "2001:db8:1::5"]),
            of(two, "tapc0ffee00-12", "fa:16:3e:44:55:66", &["192.168.7.20"]),
        ];
        assert_eq!(ports, wanted, "the passed-through function has no device");
    }

    #[test]
    fn an_old_nova_lists_no_ports_but_names_the_owner() {
        let [port] = &parse_domain(OVS_1_0).unwrap()[..] else { panic!("one port") };
        assert_eq!(port.id, Some("0a1b2c3d-4e5f-4a6b-8c7d-8e9fa0b1c2d3".parse().unwrap()));
        assert_eq!(port.project.as_str(), "1f2e3d4c5b6a47988796a5b4c3d2e1f0");
        assert_eq!(port.addressing.fixed_ips, [] as [IpAddr; 0]);
    }

    #[test]
    fn without_virtualport_the_tap_name_identifies_the_port() {
        let [port] = &parse_domain(HYBRID).unwrap()[..] else { panic!("one port") };
        assert_eq!(port.id, Some("deadbeef-0123-4abc-9def-001122334455".parse().unwrap()));
        assert_eq!(
            port.addressing.fixed_ips,
            ["10.9.0.7".parse::<IpAddr>().unwrap()],
            "floating addresses are not included"
        );
    }

    #[test]
    fn both_metadata_versions_are_read_from_a_bare_domain() {
        let [first, second] = &parse_domain(ETHERNET).unwrap()[..] else { panic!("two ports") };
        assert_eq!(first.id, Some("abcdef01-2345-4678-9abc-def012345678".parse().unwrap()));
        assert_eq!(first.addressing.fixed_ips, ["172.16.0.9".parse::<IpAddr>().unwrap()]);
        assert_eq!((second.id, &second.addressing.fixed_ips), (None, &Vec::new()));
        assert_eq!(second.device.as_ref().unwrap().as_str(), "tapfeedface-0a");

        let two = ETHERNET.replacen(PROJECT, "other", 1);
        assert!(matches!(parse_domain(&two), Err(DomainError::SeveralProjects { .. })));
    }

    #[test]
    fn a_domain_without_nova_metadata_is_foreign() {
        assert!(matches!(parse_domain(FOREIGN), Err(DomainError::NotNova)));
        let foreign = OVS.replace("xmlns/libvirt/nova/1.1", "xmlns/libvirt/nova/9");
        assert!(matches!(parse_domain(&foreign), Err(DomainError::NotNova)));
    }

    #[test]
    fn an_error_names_the_missing_or_invalid_item() {
        for (from, to, wanted) in [
            ("<uuid>7d3c6e2e-5e0b-4f0e-8a44-0d4e6c7b1f10</uuid>", "", "domain/uuid is missing"),
            ("<uuid>7d3c6e2e", "<uuid>x", "domain/uuid: `x-5e0b-4f0e-8a44-0d4e6c7b1f10` is not a UUID"),
            (
                "nova:project uuid=\"9",
                "nova:project id=\"9",
                "nova:instance/nova:owner/nova:project@uuid is missing",
            ),
            ("uuid=\"9c1b", "uuid=\"9 c1b", "is not a project id"),
            ("fa:16:3e:44:55:66", "fa:16:3e", "interface/mac@address: `fa:16:3e` is not a MAC"),
            (
                "interfaceid='c0ffee00-",
                "interfaceid='",
                "@interfaceid: `12ab-4d6e-9f01-23456789abcd` is not a UUID",
            ),
            ("dev='tapc0ffee00-12'", "dev='a/b'", "interface/target@dev: \"a/b\" is not an interface name"),
            ("address=\"10.0.0.5\"", "address=\"10.0.0\"", "nova:ip@address: \"10.0.0\" is not an IP"),
            ("<domain type='kvm' id='7'", "<domain xmlns='urn:x' id='7'", "no domain element"),
            (
                "<domstatus state='running' reason='booted' pid='48213'>",
                "<!DOCTYPE domstatus [<!ENTITY e 'x'>]><domstatus>",
                "invalid XML",
            ),
        ] {
            assert!(OVS.contains(from), "{from}");
            let error = parse_domain(&OVS.replacen(from, to, 1)).expect_err(to).to_string();
            assert!(error.contains(wanted), "{to}: {error}");
        }
        assert!(matches!(parse_domain("<network/>"), Err(DomainError::NoDomain)));
    }

    #[test]
    fn a_document_that_is_expensive_to_parse_is_rejected() {
        let declare = |at| format!("<e{at} xmlns:n{at}='urn:n'>");
        let nested = format!("<domain>{}", (0..8_000).map(declare).collect::<String>());
        assert!(nested.len() > 200_000, "{}", nested.len());
        let error = parse_domain(&nested).unwrap_err();
        assert!(matches!(error, DomainError::Limit(DocumentLimitError::Namespaces { line: 1 })), "{error}");

        let deep = format!("<domain>{}", "<a>".repeat(100_000));
        let error = parse_domain(&deep).unwrap_err();
        assert!(matches!(error, DomainError::Limit(DocumentLimitError::Depth { .. })), "{error}");

        let flat = format!("<domain>{}</domain>", "<a/>x".repeat(MAX_NODES as usize / 2));
        let error = parse_domain(&flat).unwrap_err();
        assert!(matches!(error, DomainError::Xml(roxmltree::Error::NodesLimitReached)), "{error}");
    }

    #[test]
    fn the_number_of_ports_is_limited() {
        let interface = "<interface><target dev='tap0'/></interface>";
        let port = "<nova:port uuid=\"c0ffee00-12ab-4d6e-9f01-23456789abcd\"/>";
        for (end, more) in [("</devices>", interface), ("</nova:ports>", port)] {
            // libvirt's own status has an element `devices` too, before the domain.
            let (before, after) = OVS.rsplit_once(end).unwrap();
            let with = |count| format!("{before}{}{end}{after}", more.repeat(count));
            assert!(parse_domain(&with(900)).is_ok(), "{more}");
            let error = parse_domain(&with(1_000)).unwrap_err();
            assert!(matches!(error, DomainError::TooManyPorts), "{more}: {error}");
        }
    }

    #[test]
    fn a_truncated_file_is_never_a_domain() {
        let end = OVS.rfind('>').unwrap();
        for cut in (0..=end).filter(|cut| OVS.is_char_boundary(*cut)) {
            assert!(matches!(parse_domain(&OVS[..cut]), Err(DomainError::Xml(_))), "cut at {cut}");
        }
    }

    proptest! {
        #[test]
        fn no_input_causes_a_panic(at in 0..OVS.len(), length in 0..64usize, text in "\\PC{0,16}") {
            let end = (at + length).min(OVS.len());
            if OVS.is_char_boundary(at) && OVS.is_char_boundary(end) {
                let mutated = format!("{}{text}{}", &OVS[..at], &OVS[end..]);
                for port in parse_domain(&mutated).into_iter().flatten() {
                    prop_assert!(port.device.is_some());
                }
            }
        }
    }
}
