//! The agent's boundaries: which module may know what. One table, checked against the text of the sources.
//!
//! It reads tokens, not types: comments and literals are left out, and a name counts wherever it stands in a
//! path. That is coarser than the compiler and cannot be circumvented by a re-export under the same name.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::command::workspace_root;
use crate::tokens::{self, Token};

/// Whom a rule binds, by module path under `metadata-agent/src`.
enum Subject {
    /// The files of this module.
    Inside(&'static str),
    /// All files but those of this module.
    Outside(&'static str),
}

/// What they must not name.
enum Forbidden {
    /// Modules of the agent itself.
    Modules(&'static [&'static str]),
    /// Names of any kind: crates, system calls.
    Names(&'static [&'static str]),
}

struct Rule {
    subject: Subject,
    forbidden: Forbidden,
    why: &'static str,
}

const RULES: &[Rule] = &[
    Rule {
        subject: Subject::Inside("proxy"),
        forbidden: Forbidden::Modules(&["datapath", "sources", "inventory", "app"]),
        why: "the proxy answers requests; where ports and packets come from is wired up in app.rs",
    },
    Rule {
        subject: Subject::Inside("inventory"),
        forbidden: Forbidden::Modules(&["datapath", "sources", "proxy", "app"]),
        why: "the inventory is told what there is; who tells and who asks is wired up in app.rs",
    },
    Rule {
        subject: Subject::Inside("sources"),
        forbidden: Forbidden::Modules(&["datapath", "proxy", "app"]),
        why: "sources feed the inventory alone; what they share with the proxy stands beside both",
    },
    Rule {
        subject: Subject::Outside("datapath"),
        forbidden: Forbidden::Names(&["aya", "aya_log"]),
        why: "the datapath alone loads and maps BPF objects",
    },
    Rule {
        subject: Subject::Outside("net/netlink"),
        forbidden: Forbidden::Names(&["rtnetlink", "netlink_packet_route"]),
        why: "rtnetlink breaks its API with every release; netlink alone speaks it",
    },
    Rule {
        subject: Subject::Outside("net/netns"),
        forbidden: Forbidden::Names(&["setns"]),
        why: "a thread in the wrong namespace is a security hole; netns alone moves threads",
    },
    Rule {
        subject: Subject::Outside("net/socket"),
        forbidden: Forbidden::Names(&["setsockopt"]),
        why: "raw socket options are set in socket alone",
    },
];

/// One place where a rule is broken.
#[derive(Debug, PartialEq, Eq)]
struct Breach {
    file: PathBuf,
    line: usize,
    name: String,
    why: &'static str,
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
    eprintln!("+ check the boundaries of the agent's modules");
    let root = workspace_root().join("metadata-agent/src");
    let mut files = Vec::new();
    sources(&root, &mut files)?;
    let mut breaches = Vec::new();
    for file in files {
        let text = fs::read_to_string(&file).with_context(|| format!("read {}", file.display()))?;
        breaches.extend(breaches_in(file.strip_prefix(&root)?, &text));
    }
    if !breaches.is_empty() {
        let list: Vec<_> = breaches.iter().map(|breach| format!("metadata-agent/src/{breach}")).collect();
        bail!("modules know what they must not:\n{}", list.join("\n"));
    }
    Ok(())
}

fn sources(folder: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(folder).with_context(|| format!("list {}", folder.display()))? {
        let path = entry?.path();
        if path.is_dir() {
            sources(&path, files)?;
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    files.sort();
    Ok(())
}

fn breaches_in(file: &Path, text: &str) -> Vec<Breach> {
    let tokens = tokens::read(text);
    let rules = RULES.iter().filter(|rule| rule.binds(file));
    rules
        .flat_map(|rule| {
            rule.forbidden.uses(&tokens).into_iter().map(|token| Breach {
                file: file.to_owned(),
                line: token.line,
                name: token.text.to_owned(),
                why: rule.why,
            })
        })
        .collect()
}

impl Rule {
    fn binds(&self, file: &Path) -> bool {
        // `proxy.rs`, `proxy/mod.rs` and `proxy/server.rs` are all of the module `proxy`.
        let is_of = |module: &str| file.with_extension("").starts_with(module);
        match self.subject {
            Subject::Inside(module) => is_of(module),
            Subject::Outside(module) => !is_of(module),
        }
    }
}

impl Forbidden {
    fn uses<'a>(&self, tokens: &[Token<'a>]) -> Vec<Token<'a>> {
        match self {
            Self::Names(names) => {
                tokens.iter().filter(|token| names.contains(&token.text)).copied().collect()
            }
            Self::Modules(names) => module_uses(names, tokens),
        }
    }
}

/// The tokens that name one of `modules` in a path, or a tree of paths, that starts at the crate or above the
/// module it stands in.
fn module_uses<'a>(modules: &[&str], tokens: &[Token<'a>]) -> Vec<Token<'a>> {
    let mut found = Vec::new();
    let mut rest = tokens;
    while let [token, tail @ ..] = rest {
        rest = tail;
        if !["crate", "super", "metadata_agent"].contains(&token.text) {
            continue;
        }
        let mut depth = 0usize;
        while let [token, tail @ ..] = rest {
            match token.text {
                "{" => depth += 1,
                "}" if depth > 0 => depth -= 1,
                "," if depth > 0 => {}
                "::" | "*" => {}
                word if tokens::is_word(word) => {}
                _ => break,
            }
            if modules.contains(&token.text) {
                found.push(*token);
            }
            rest = tail;
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(file: &str, text: &str) -> Vec<(usize, String)> {
        breaches_in(Path::new(file), text).into_iter().map(|breach| (breach.line, breach.name)).collect()
    }

    #[test]
    fn the_proxy_knows_no_datapath_however_it_is_imported() {
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
            assert_eq!(names("app.rs", text), [], "{text}");
        }
    }

    #[test]
    fn words_that_are_no_paths_are_free() {
        let text = "//! The datapath.\nuse crate::ids::PortId; let inventory = sources(\"crate::datapath\");\n\
                    /* crate::datapath */ let x = 'a'; struct S<'crate_> { datapath: &'crate_ str }";
        assert_eq!(names("proxy/mod.rs", text), []);
    }

    #[test]
    fn a_breach_bears_its_line() {
        assert_eq!(names("inventory/mod.rs", "\n\nuse crate::proxy::X;\n"), [(3, "proxy".to_owned())]);
    }

    #[test]
    fn each_dangerous_name_has_one_home() {
        for (home, text) in [
            ("datapath/load.rs", "use aya::Ebpf;"),
            ("net/netlink/mod.rs", "use rtnetlink::Handle;"),
            ("net/netns.rs", "nix::sched::setns(fd, flags)?;"),
            ("net/socket.rs", "setsockopt(&fd, option, &true)?;"),
        ] {
            assert_eq!(names(home, text), [], "{home}");
            assert_eq!(names("admin/mod.rs", text).len(), 1, "{home}");
        }
    }

    #[test]
    fn a_module_is_not_known_by_the_beginning_of_its_name() {
        assert_eq!(names("netns_watch.rs", "setns(fd)").len(), 1);
        assert_eq!(names("proxy_protocol.rs", "use crate::datapath;"), []);
    }
}
