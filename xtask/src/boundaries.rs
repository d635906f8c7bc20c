//! Checks which rooms of the agent import which. A room is a file or folder at the top of
//! `metadata-agent/src`.
//!
//! The check reads tokens, not types. It resolves paths that start at the crate (`crate::`,
//! `metadata_agent::`) or climb there (`super::super::`), alone and in `use` trees. A re-export
//! under another name is not followed.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::command::workspace_root;
use crate::terminal::note;
use crate::tokens::{self, Token};

/// The layers from top to bottom. A room imports only rooms of lower layers, and none of its own
/// layer.
const LAYERS: &[&[&str]] = &[
    &["main"],
    &["commands"],
    &["app"],
    &["config"],
    &["admin", "teardown"],
    &["namespaces"],
    &["attach", "data_path_probe"],
    &["directory"],
    &["data_plane"],
    &["datapath", "nova_access", "secrets", "sources"],
    &["inventory", "ipc", "net", "process", "proxy"],
    &["error_chain", "ids", "sys"],
];

/// Rooms that a room must not import although they are in a lower layer, with the reason.
const FORBIDDEN: &[(&str, &str, &str)] =
    &[("sources", "proxy", "sources feed the inventory; the proxy reads it through the directory")];

/// A name that only one module may use.
struct Home {
    module: &'static str,
    names: &'static [&'static str],
    why: &'static str,
}

const HOMES: &[Home] = &[
    Home { module: "datapath", names: &["aya", "aya_log"], why: "only datapath loads and maps BPF objects" },
    Home {
        module: "net/netlink",
        names: &["rtnetlink", "netlink_packet_route"],
        why: "rtnetlink breaks its API with every release; only net/netlink uses it",
    },
    Home {
        module: "net/netns",
        names: &["setns"],
        why: "a thread in the wrong namespace is a security hole; only net/netns moves threads",
    },
    Home {
        module: "net/socket",
        names: &["setsockopt"],
        why: "raw socket options are set only in net/socket",
    },
    Home {
        module: "secrets/signer",
        names: &["hmac", "Hmac"],
        why: "only secrets/signer signs with the shared secret",
    },
    Home { module: "sys", names: &["unsafe"], why: "unsafe code is only in sys" },
];

/// Paths of names that a room must not use.
struct Ban {
    room: &'static str,
    paths: &'static [&'static str],
    why: &'static str,
}

const BANS: &[Ban] = &[
    Ban {
        room: "proxy",
        paths: &[
            "fs",
            "File::open",
            "OpenOptions",
            "ServerTrust::Ca",
            "ServerTrust::AnyNameOfCa",
            "ServerTrust::SystemCa",
            "lookup_host",
            "ToSocketAddrs",
            "spawn_blocking",
            "TcpStream::connect",
            "UnixStream::connect",
        ],
        why: "the proxy opens no file, resolves no name and connects to no path; nova_access does",
    },
    Ban {
        room: "proxy",
        paths: &["secrecy", "SecretString", "ExposeSecret", "expose_secret"],
        why: "the proxy reads what guests send, so it holds signatures and no secret",
    },
];

/// One import or name that a rule forbids.
#[derive(Debug, PartialEq, Eq)]
struct Breach {
    file: PathBuf,
    line: usize,
    name: String,
    why: String,
}

impl fmt::Display for Breach {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: names `{}`; {}", self.file.display(), self.line, self.name, self.why)
    }
}

/// Checks every source file of the agent.
///
/// # Errors
/// Lists every breach.
pub fn check() -> Result<()> {
    note("+ check the boundaries of the agent's modules");
    let root = workspace_root().join("metadata-agent/src");
    let mut files = Vec::new();
    collect(&root, &mut files)?;
    let mut breaches = Vec::new();
    for file in files {
        let text = fs::read_to_string(&file).with_context(|| format!("read {}", file.display()))?;
        breaches.extend(breaches_in(file.strip_prefix(&root)?, &text));
    }
    if !breaches.is_empty() {
        let list: Vec<_> = breaches.iter().map(|breach| format!("metadata-agent/src/{breach}")).collect();
        bail!("modules import what they must not:\n{}", list.join("\n"));
    }
    Ok(())
}

fn collect(folder: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(folder).with_context(|| format!("list {}", folder.display()))? {
        let path = entry?.path();
        if path.is_dir() {
            collect(&path, files)?;
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    files.sort();
    Ok(())
}

fn breaches_in(file: &Path, text: &str) -> Vec<Breach> {
    let tokens = tokens::read(text);
    let breach = |token: Token<'_>, why: String| Breach {
        file: file.to_owned(),
        line: token.line,
        name: token.text.to_owned(),
        why,
    };
    let module = module_of(file);
    // The root of the library only declares the rooms.
    let room = module.first().map_or("", String::as_str);
    let imports = if room == "lib" { Vec::new() } else { imports(&tokens, module.len()) };
    let imports = imports
        .into_iter()
        .filter_map(|token| forbidden_import(room, token.text).map(|why| breach(token, why)));

    let is_in = |home: &Home| file.with_extension("").starts_with(home.module);
    let names = HOMES.iter().filter(|home| !is_in(home)).flat_map(|home| {
        let uses = tokens.iter().filter(|token| home.names.contains(&token.text));
        uses.map(|token| breach(*token, home.why.to_owned()))
    });
    let banned = BANS.iter().filter(|ban| ban.room == room).flat_map(|ban| {
        let uses = ban.paths.iter().flat_map(|path| uses_of(&tokens, path));
        uses.map(|token| breach(token, ban.why.to_owned()))
    });
    imports.chain(names).chain(banned).collect()
}

/// Returns the last name of each use of a path, such as `open` of `File::open`.
fn uses_of<'a>(tokens: &[Token<'a>], path: &str) -> Vec<Token<'a>> {
    let path = tokens::read(path);
    let is_use = |found: &&[Token<'a>]| found.iter().zip(&path).all(|(token, name)| token.text == name.text);
    tokens.windows(path.len()).filter(is_use).filter_map(|found| found.last().copied()).collect()
}

/// Returns the path of the module in a file. The first part is the room.
fn module_of(file: &Path) -> Vec<String> {
    let parts = file.with_extension("");
    let mut parts: Vec<String> = parts.iter().map(|part| part.to_string_lossy().into_owned()).collect();
    if parts.last().is_some_and(|last| last == "mod") {
        parts.pop();
    }
    parts
}

/// Returns the reason why `room` must not import `other`, or `None` if it may.
fn forbidden_import(room: &str, other: &str) -> Option<String> {
    if room == other {
        return None;
    }
    let layer_of = |name: &str| LAYERS.iter().position(|layer| layer.contains(&name));
    // A word that is not a room is an item at the crate's root.
    let other_layer = layer_of(other)?;
    let Some(layer) = layer_of(room) else {
        return Some(format!("`{room}` is not in the list of layers; add it"));
    };
    if layer >= other_layer {
        return Some(format!("`{room}` imports only rooms of lower layers"));
    }
    let why = FORBIDDEN.iter().find(|(from, to, _)| (*from, *to) == (room, other));
    why.map(|(_, _, why)| (*why).to_owned())
}

/// Returns the first names of all paths that start at the root of the crate. `depth` is the number
/// of modules between the file and the root.
fn imports<'a>(tokens: &[Token<'a>], depth: usize) -> Vec<Token<'a>> {
    let mut found = Vec::new();
    let mut rest = tokens;
    while let [token, tail @ ..] = rest {
        rest = tail;
        let mut supers = 0;
        let at_root = match token.text {
            "crate" | "metadata_agent" => true,
            "super" => {
                supers += 1;
                while let [Token { text: "::", .. }, Token { text: "super", .. }, tail @ ..] = rest {
                    supers += 1;
                    rest = tail;
                }
                supers >= depth
            }
            _ => false,
        };
        if at_root && let [Token { text: "::", .. }, tail @ ..] = rest {
            found.extend(first_names(tail));
        }
    }
    found
}

/// Returns the name that follows, or the first name of each path in the tree that follows.
fn first_names<'a>(tokens: &[Token<'a>]) -> Vec<Token<'a>> {
    let [first, rest @ ..] = tokens else { return Vec::new() };
    if first.text != "{" {
        return vec![*first];
    }
    let mut names = Vec::new();
    let mut depth = 1_usize;
    let mut starts_path = true;
    for token in rest {
        match token.text {
            "{" => depth += 1,
            "}" => depth -= 1,
            "," => {}
            _ if depth == 1 && starts_path => names.push(*token),
            _ => {}
        }
        if depth == 0 {
            break;
        }
        starts_path = depth == 1 && token.text == ",";
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(file: &str, text: &str) -> Vec<(usize, String)> {
        breaches_in(Path::new(file), text).into_iter().map(|breach| (breach.line, breach.name)).collect()
    }

    #[test]
    fn an_import_of_a_higher_layer_is_found_in_every_form() {
        for text in [
            "use crate::datapath::Map;",
            "use crate::{ids::PortId, datapath};",
            "use crate::{ids::{PortId, InstanceId}, datapath::{self, Map}};",
            "use super::super::datapath::Map;",
            "fn f() { crate::datapath::load() }",
            "use metadata_agent::datapath as d;",
        ] {
            assert_eq!(names("proxy/server.rs", text), [(1, "datapath".to_owned())], "{text}");
            assert_eq!(names("proxy.rs", text).len(), 1, "{text}");
            assert_eq!(names("app/mod.rs", text), [], "{text}");
        }
        let deep = "use super::super::super::datapath::Map;";
        assert_eq!(names("proxy/upstream/tls.rs", deep), [(1, "datapath".to_owned())]);
        let own = "use super::super::datapath::Map;";
        assert_eq!(names("proxy/upstream/tls.rs", own), [], "a module of the room itself");
    }

    #[test]
    fn arrows_point_only_downwards() {
        for (file, text, allowed) in [
            ("main.rs", "use metadata_agent::commands;", true),
            ("commands/check/mod.rs", "use crate::app;", true),
            ("app/mod.rs", "use crate::commands::cli;", false),
            ("sources/mod.rs", "use crate::config::Config;", false),
            ("sources/mod.rs", "use crate::inventory::Event;", true),
            ("sources/mod.rs", "use crate::proxy::Proxy;", false),
            ("sources/mod.rs", "use crate::datapath::Datapath;", false),
            ("inventory/mod.rs", "use crate::net::netlink;", false),
            ("admin/mod.rs", "use crate::teardown;", false),
            ("ids.rs", "use crate::error_chain;", false),
            ("unlisted.rs", "use crate::ids;", false),
            ("lib.rs", "pub use crate::app;", true),
        ] {
            assert_eq!(names(file, text).is_empty(), allowed, "{file}: {text}");
        }
    }

    #[test]
    fn words_outside_paths_are_ignored() {
        let text = "//! The datapath.\nuse crate::ids::PortId; let inventory = sources(\"crate::datapath\");\n\
                    /* crate::datapath */ let x = 'a'; struct S<'crate_> { datapath: &'crate_ str }";
        assert_eq!(names("proxy/mod.rs", text), []);
    }

    #[test]
    fn a_breach_has_its_line() {
        assert_eq!(names("inventory/mod.rs", "\n\nuse crate::proxy::X;\n"), [(3, "proxy".to_owned())]);
    }

    #[test]
    fn each_restricted_name_has_one_home() {
        for (home, text) in [
            ("datapath/load.rs", "use aya::Ebpf;"),
            ("net/netlink/mod.rs", "use rtnetlink::Handle;"),
            ("net/netns.rs", "nix::sched::setns(fd, flags)?;"),
            ("net/socket.rs", "setsockopt(&fd, option, &true)?;"),
            ("secrets/signer.rs", "use hmac::KeyInit;"),
            ("sys/mod.rs", "unsafe { start.as_ref() }"),
        ] {
            assert_eq!(names(home, text), [], "{home}");
            assert_eq!(names("admin/mod.rs", text).len(), 1, "{home}");
        }
    }

    #[test]
    fn the_proxy_uses_neither_files_nor_names_nor_paths() {
        for text in [
            "use std::fs;",
            "use std::os::unix::fs::MetadataExt;",
            "let file = File::open(path)?;",
            "use tokio::net::{TcpSocket, lookup_host};",
            "tokio::task::spawn_blocking(work).await",
            "UnixStream::connect(path).await",
            "TcpStream::connect((host, port)).await",
            "TlsMaterial::read(ServerTrust::Ca(path), None)?;",
        ] {
            assert_eq!(names("proxy/upstream/tls.rs", text).len(), 1, "{text}");
            assert_eq!(names("nova_access/tls.rs", text), [], "{text}");
        }
        for text in ["UnixStream::pair()", "socket.connect(address)", "reader.read(buffer)"] {
            assert_eq!(names("proxy/upstream/connect.rs", text), [], "{text}");
        }
    }

    #[test]
    fn the_proxy_names_no_secret() {
        let text = "fn sign(secret: &SecretString) {}";
        assert_eq!(names("proxy/client/identity.rs", text), [(1, "SecretString".to_owned())]);
        assert_eq!(names("config/options.rs", text), []);
        assert_eq!(names("proxy/client/identity.rs", "use crate::secrets::Signer;").len(), 1);
    }

    #[test]
    fn a_name_prefix_is_not_the_module() {
        assert_eq!(names("netns_watch.rs", "setns(fd)").len(), 1);
        assert_eq!(names("proxy_protocol.rs", "use crate::datapath;").len(), 1, "not in the list of layers");
    }
}
