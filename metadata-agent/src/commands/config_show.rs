//! `metadata-agent config show`: prints every option as the agent would use it, and its origin. Of
//! a secret it prints only whether it is set.

use std::io::{self, Write};
use std::process::ExitCode;

use anyhow::Result;
use oslo_config::DEFAULT;
use serde_json::json;

use super::cli::ShowArgs;
use super::output::print;
use super::with_config;
use crate::config::{Config, Setting};

pub(super) fn run(args: &ShowArgs) -> ExitCode {
    with_config(&args.config, |config| show(config, args.json).map(|()| ExitCode::SUCCESS))
}

fn show(config: &Config, json: bool) -> Result<()> {
    print(|out| if json { as_json(config, out) } else { as_text(config, out) })
}

/// Sorts by section, with `DEFAULT` first as in Neutron's files, and by name.
fn sorted(config: &Config) -> Vec<&Setting> {
    let mut settings: Vec<_> = config.settings().iter().collect();
    settings.sort_by_key(|setting| (setting.group != DEFAULT, setting.group, setting.name));
    settings
}

fn as_json(config: &Config, out: &mut dyn Write) -> io::Result<()> {
    let warnings: Vec<_> = config.warnings().iter().map(ToString::to_string).collect();
    let shown = json!({ "settings": sorted(config), "notices": config.notices(), "warnings": warnings });
    writeln!(out, "{shown:#}")
}

fn as_text(config: &Config, out: &mut dyn Write) -> io::Result<()> {
    for section in sorted(config).chunk_by(|one, next| one.group == next.group) {
        let width = section.iter().map(|setting| setting.name.len()).max().unwrap_or_default();
        for (number, setting) in section.iter().enumerate() {
            if number == 0 {
                writeln!(out, "[{}]", setting.group)?;
            }
            let Setting { name, value, origin, .. } = setting;
            writeln!(out, "{name:width$} = {}  ({})", printable(value), printable(&origin.to_string()))?;
        }
        writeln!(out)?;
    }
    for warning in config.warnings() {
        writeln!(out, "warning: {warning}")?;
    }
    for notice in config.notices() {
        writeln!(out, "note: {}", printable(&notice.to_string()))?;
    }
    Ok(())
}

/// Escapes control characters, so that the text is one line and does not control the terminal.
fn printable(text: &str) -> String {
    let mut line = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control() { line.extend(c.escape_default()) } else { line.push(c) }
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{ConfigArgs, ConfigSource};

    fn shown(ini: &str) -> [String; 2] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.ini");
        std::fs::write(&path, ini).unwrap();
        let args = ConfigArgs { sources: vec![ConfigSource::File(path)], ..ConfigArgs::default() };
        let config = Config::load(&args).unwrap();
        let (mut text, mut json) = (Vec::new(), Vec::new());
        as_text(&config, &mut text).unwrap();
        as_json(&config, &mut json).unwrap();
        let place = folder.path().display().to_string();
        [text, json].map(|bytes| String::from_utf8(bytes).unwrap().replace(&place, ""))
    }

    #[test]
    fn values_are_sorted_and_have_their_origins() {
        let [text, json] =
            shown("[DEFAULT]\nnova_metadata_port = 80\n[METADATA]\nnova_metadata_host = nova\n");
        let line = |start: &str| {
            text.lines().find(|line| line.starts_with(start)).unwrap_or_else(|| panic!("{start} in {text}"))
        };
        assert!(line("nova_metadata_port ").ends_with(" = 80  (/a.ini:2)"), "{text}");
        assert!(
            line("nova_metadata_host ").ends_with(" = nova  (/a.ini:4, [metadata] nova_metadata_host)"),
            "{text}"
        );
        assert!(line("portal_mtu ").ends_with(" = 1500  (default)"), "{text}");
        assert!(line("warning: ").contains("metadata_proxy_shared_secret is empty"), "{text}");
        let sections: Vec<_> = text.lines().filter(|line| line.starts_with('[')).collect();
        assert_eq!(sections[0], "[DEFAULT]");
        assert!(sections[1..].is_sorted() && sections[1..].contains(&"[metadata_agent]"), "{sections:?}");

        let json: serde_json::Value = serde_json::from_str(&json).unwrap();
        let settings = json["settings"].as_array().unwrap();
        assert_eq!(settings.len(), crate::config::OPTIONS.len());
        let port = settings.iter().find(|setting| setting["name"] == "nova_metadata_port").unwrap();
        assert_eq!(
            *port,
            json!({ "group": "DEFAULT", "name": "nova_metadata_port", "value": "80", "origin": "/a.ini:2" })
        );
    }

    #[test]
    fn no_secret_is_shown() {
        for group in ["DEFAULT", "METADATA"] {
            let ini = format!(
                "[{group}]\nmetadata_proxy_shared_secret = hunter2\n[DEFAULT]\ntransport_url = rabbit://a:hunter2@mq\n"
            );
            for shown in shown(&ini) {
                assert!(!shown.contains("hunter2"), "{shown}");
                assert!(shown.contains("(set)") && shown.contains("transport_url"), "{shown}");
            }
        }
    }

    #[test]
    fn a_value_cannot_control_the_terminal() {
        let [text, _] = shown("[metadata_agent]\nguest_interfaces = tap*\n  ,eth0\n");
        assert!(text.contains("= tap*\\n,eth0  (/a.ini:2)"), "{text}");
    }
}
