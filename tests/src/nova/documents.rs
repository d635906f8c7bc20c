//! The documents: the OpenStack and EC2 trees of nova/api/metadata/base.py.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::Ipv4Addr;

use uuid::Uuid;

use crate::nova::instance::Instance;
use crate::nova::json::Json;

const EC2_VERSIONS: [&str; 9] = [
    "1.0",
    "2007-01-19",
    "2007-03-01",
    "2007-08-29",
    "2007-10-10",
    "2007-12-15",
    "2008-02-01",
    "2008-09-01",
    "2009-04-04",
];

/// Versions are compared as text, which orders dates correctly.
const GRIZZLY: &str = "2013-04-04";
const HAVANA: &str = "2013-10-17";
const LIBERTY: &str = "2015-10-15";
const NEWTON_ONE: &str = "2016-06-30";
const NEWTON_TWO: &str = "2016-10-06";
const VICTORIA: &str = "2020-10-14";
const OPENSTACK_VERSIONS: [&str; 9] =
    ["2012-08-10", GRIZZLY, HAVANA, LIBERTY, NEWTON_ONE, NEWTON_TWO, "2017-02-22", "2018-08-27", VICTORIA];

/// Length of `random_seed` before base64.
const SEED_BYTES: usize = 512;

/// The target of a path.
pub(super) enum Document {
    Text(Vec<u8>),
    Json(String),
    /// The instance's password, which can be read and written.
    Password,
}

/// Returns the list of versions, which `/` shows to every client.
pub(super) fn versions() -> String {
    list(&EC2_VERSIONS)
}

fn list(versions: &[&str]) -> String {
    format!("{}\nlatest", versions.join("\n"))
}

/// Looks up `path`, normalised and split, for this instance.
pub(super) fn lookup(instance: &Instance, path: &[&str]) -> Option<Document> {
    match path {
        ["openstack"] => Some(text(list(&OPENSTACK_VERSIONS))),
        ["openstack", "content", number] => content(instance, number),
        ["openstack", version, rest @ ..] => openstack(instance, version, &rest.join("/")),
        // An empty first element is the rest of two leading slashes, which mean the root.
        ["ec2"] | ["", ..] => Some(text(versions())),
        ["ec2", version, rest @ ..] | [version, rest @ ..] => ec2(instance, version, rest),
        [] => None,
    }
}

fn text(text: impl Into<Vec<u8>>) -> Document {
    Document::Text(text.into())
}

fn content(instance: &Instance, number: &str) -> Option<Document> {
    let (_, (_, bytes)) =
        instance.files.iter().enumerate().find(|(index, _)| format!("{index:04}") == number)?;
    Some(text(bytes.clone()))
}

fn known<'a>(versions: &[&'a str], version: &'a str) -> Option<&'a str> {
    if version == "latest" {
        versions.last().copied()
    } else {
        Some(version).filter(|v| versions.contains(v))
    }
}

fn openstack(instance: &Instance, version: &str, name: &str) -> Option<Document> {
    let version = known(&OPENSTACK_VERSIONS, version)?;
    match name {
        "" => Some(text(listing(instance, version))),
        "meta_data.json" => Some(Document::Json(meta_data(instance, version).to_string())),
        "user_data" => instance.user_data.clone().map(text),
        "password" if version >= GRIZZLY => Some(Document::Password),
        "vendor_data.json" if version >= HAVANA => Some(Document::Json(instance.vendor_data.clone())),
        // Nova serves it for every version, and as text.
        "network_data.json" => Some(text(network_data(instance).to_string())),
        "vendor_data2.json" if version >= NEWTON_TWO => Some(Document::Json(
            Json::object([("static", Json::Raw(instance.vendor_data.clone()))]).to_string(),
        )),
        _ => None,
    }
}

fn listing(instance: &Instance, version: &str) -> String {
    let names = [
        ("meta_data.json", true),
        ("user_data", instance.user_data.is_some()),
        ("password", version >= GRIZZLY),
        ("vendor_data.json", version >= HAVANA),
        ("network_data.json", version >= LIBERTY),
        ("vendor_data2.json", version >= NEWTON_TWO),
    ];
    let names: Vec<&str> = names.into_iter().filter_map(|(name, there)| there.then_some(name)).collect();
    names.join("\n")
}

fn meta_data(instance: &Instance, version: &str) -> Json {
    let mut members = vec![("uuid", Json::text(instance.id))];
    if !instance.meta.is_empty() {
        let meta = instance.meta.iter().map(|(key, value)| (key.clone(), Json::text(value)));
        members.push(("meta", Json::Object(meta.collect())));
    }
    if !instance.files.is_empty() {
        let files = instance.files.iter().enumerate().map(|(index, (path, _))| {
            Json::object([
                ("content_path", Json::text(format_args!("/content/{index:04}"))),
                ("path", Json::text(path)),
            ])
        });
        members.push(("files", Json::List(files.collect())));
    }
    if let Some((name, key)) = &instance.key {
        members.push(("public_keys", Json::Object(vec![(name.clone(), Json::text(key))])));
        let key = Json::object([
            ("name", Json::text(name)),
            ("type", Json::text("ssh")),
            ("data", Json::text(key)),
        ]);
        members.push(("keys", Json::List(vec![key])));
    }
    members.extend([
        ("hostname", Json::Text(instance.hostname())),
        ("name", Json::text(&instance.name)),
        ("launch_index", Json::Number(0)),
        ("availability_zone", Json::text("nova")),
    ]);
    if version >= GRIZZLY {
        members.push(("random_seed", Json::Text(random_seed())));
    }
    if version >= LIBERTY {
        members.push(("project_id", Json::text(&instance.project)));
    }
    if version >= NEWTON_ONE {
        members.push(("devices", Json::List(Vec::new())));
    }
    if version >= VICTORIA {
        members.push(("dedicated_cpus", Json::List(Vec::new())));
    }
    Json::Object(members.into_iter().map(|(key, value)| (key.to_owned(), value)).collect())
}

/// Returns a new random seed in base64.
fn random_seed() -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut bytes: Vec<u8> =
        std::iter::repeat_with(|| *Uuid::new_v4().as_bytes()).flatten().take(SEED_BYTES).collect();
    // 512 bytes are 170 groups of three and two more bytes, so base64 ends with one `=`.
    bytes.push(0);
    let mut text = String::with_capacity(SEED_BYTES * 4 / 3 + 4);
    for group in bytes.chunks_exact(3) {
        let bits = group.iter().fold(0, |bits, byte| bits << 8 | usize::from(*byte));
        for shift in [18, 12, 6, 0] {
            text.push(char::from(ALPHABET[bits >> shift & 63]));
        }
    }
    text.pop();
    text.push('=');
    text
}

fn network_data(instance: &Instance) -> Json {
    let tap = format!("tap{}", instance.port.device_suffix());
    let services = || {
        let service = |address: &Ipv4Addr| {
            Json::object([("type", Json::text("dns")), ("address", Json::text(address))])
        };
        Json::List(instance.dns.iter().map(service).collect())
    };
    let link = Json::object([
        ("id", Json::text(&tap)),
        ("vif_id", Json::text(instance.port)),
        ("type", Json::text("bridge")),
        ("mtu", Json::Number(1500)),
        ("ethernet_mac_address", Json::text(instance.mac)),
    ]);
    let route = Json::object([
        ("network", Json::text("0.0.0.0")),
        ("netmask", Json::text("0.0.0.0")),
        ("gateway", Json::text(instance.gateway)),
    ]);
    let network = Json::object([
        ("id", Json::text("network0")),
        ("type", Json::text("ipv4")),
        ("link", Json::text(&tap)),
        ("ip_address", Json::text(instance.address)),
        ("netmask", Json::text("255.255.255.0")),
        ("routes", Json::List(vec![route])),
        ("network_id", Json::text(instance.network)),
        ("services", services()),
    ]);
    Json::object([
        ("links", Json::List(vec![link])),
        ("networks", Json::List(vec![network])),
        ("services", services()),
    ])
}

/// A folder or a leaf of the EC2 tree.
enum Ec2 {
    Folder {
        /// The name in the parent's listing, if it is not the folder's name and a slash.
        shown: Option<String>,
        entries: BTreeMap<&'static str, Ec2>,
    },
    Leaf(Vec<u8>),
}

impl Ec2 {
    fn leaf(text: impl Into<Vec<u8>>) -> Self {
        Self::Leaf(text.into())
    }

    fn folder<const N: usize>(entries: [(&'static str, Ec2); N]) -> Self {
        Self::Folder { shown: None, entries: entries.into() }
    }
}

fn ec2(instance: &Instance, version: &str, path: &[&str]) -> Option<Document> {
    let mut found = ec2_tree(instance, known(&EC2_VERSIONS, version)?);
    for name in path {
        let Ec2::Folder { mut entries, .. } = found else { return None };
        found = entries.remove(name)?;
    }
    Some(match found {
        Ec2::Leaf(bytes) => text(bytes),
        Ec2::Folder { entries, .. } => {
            let mut listing = String::new();
            for (name, entry) in &entries {
                let separator = if listing.is_empty() { "" } else { "\n" };
                let written = match entry {
                    Ec2::Leaf(_) => write!(listing, "{separator}{name}"),
                    Ec2::Folder { shown: Some(shown), .. } => write!(listing, "{separator}{shown}"),
                    Ec2::Folder { shown: None, .. } => write!(listing, "{separator}{name}/"),
                };
                written.unwrap_or_else(|_| unreachable!("writing to a String cannot fail"));
            }
            text(listing)
        }
    })
}

fn ec2_tree(instance: &Instance, version: &str) -> Ec2 {
    let hostname = instance.hostname();
    let mut meta_data = BTreeMap::from([
        ("ami-id", Ec2::leaf(format!("ami-{:08x}", instance.number))),
        ("ami-launch-index", Ec2::leaf("0")),
        // Nova's own text (nova/api/metadata/base.py, `get_ec2_metadata`).
        ("ami-manifest-path", Ec2::leaf("FIXME")),
        ("instance-id", Ec2::leaf(format!("i-{:08x}", instance.number))),
        ("hostname", Ec2::leaf(hostname.clone())),
        ("local-ipv4", Ec2::leaf(instance.address.to_string())),
        ("reservation-id", Ec2::leaf(instance.reservation.clone())),
        ("security-groups", Ec2::leaf("default")),
    ]);
    if let Some((name, key)) = &instance.key {
        let entries = BTreeMap::from([("openssh-key", Ec2::leaf(key.clone()))]);
        let first = Ec2::Folder { shown: Some(format!("0={name}")), entries };
        meta_data.insert("public-keys", Ec2::folder([("0", first)]));
    }
    if version >= "2007-01-19" {
        let floating = instance.floating.map(|address| address.to_string()).unwrap_or_default();
        meta_data.insert("local-hostname", Ec2::leaf(hostname.clone()));
        meta_data.insert("public-hostname", Ec2::leaf(hostname));
        meta_data.insert("public-ipv4", Ec2::leaf(floating));
    }
    if version >= "2007-08-29" {
        meta_data.insert("instance-type", Ec2::leaf(instance.flavor.clone()));
    }
    if version >= "2007-12-15" {
        let devices = [("ami", Ec2::leaf("vda")), ("root", Ec2::leaf("/dev/vda"))];
        meta_data.insert("block-device-mapping", Ec2::folder(devices));
    }
    if version >= "2008-02-01" {
        meta_data.insert("placement", Ec2::folder([("availability-zone", Ec2::leaf("nova"))]));
    }
    if version >= "2008-09-01" {
        meta_data.insert("instance-action", Ec2::leaf("none"));
    }
    let mut top = BTreeMap::from([("meta-data", Ec2::Folder { shown: None, entries: meta_data })]);
    if let Some(user_data) = &instance.user_data {
        top.insert("user-data", Ec2::leaf(user_data.clone()));
    }
    Ec2::Folder { shown: None, entries: top }
}
