//! The reference page docs/configuration.md, made from the table of options.

use std::fmt::Write as _;

use oslo_config::OptionSpec;

use super::OPTIONS;
use super::options::OWN;

const HEAD: &str = "\
<!-- Generated from the table of options: `BLESS=1 cargo test -p metadata-agent --lib configuration_page`\nrewrites this page. -->

# Configuration

The agent reads Neutron's own files in oslo.config's format: `neutron.conf`, `metadata_agent.ini`,
`neutron_ovn_metadata_agent.ini` and `plugins/ml2/ovn_agent.ini` in `/etc/neutron`, as far as they exist.
`--config-file` and `--config-dir` name other files. Unknown options are ignored, since the files are Neutron's. An invalid
value of an option below stops the agent, with a list of all errors.

A flag overrides the environment, the environment overrides files, and later files override earlier
ones. In files, `$name` stands for the value of another option. `metadata-agent config show` prints each
value that is used, and its origin.
";

/// Returns the text of docs/configuration.md.
#[must_use]
pub(crate) fn markdown() -> String {
    let mut page = HEAD.to_owned();
    let mut group = "";
    for option in OPTIONS {
        if option.group != group {
            group = option.group;
            let about = if group == OWN { "Options of the agent." } else { "Options of Neutron." };
            let _ = write!(page, "\n## [{group}]\n\n{about}\n");
        }
        entry(&mut page, option);
    }
    page
}

fn entry(page: &mut String, option: &OptionSpec) {
    let _ = write!(page, "\n### {}\n\n{}\n\n", option.name, escaped(option.doc));
    let default = if option.default.is_empty() { "empty".to_owned() } else { code(option.default) };
    let _ = writeln!(page, "- Default: {default}");
    let _ = writeln!(page, "- Accepted: {}", escaped(&(option.accepts)()));
    let _ = writeln!(page, "- Environment: {}", code(&option.env()));
    if let Some(flag) = option.flag() {
        let _ = writeln!(page, "- Flag: {}", code(&format!("--{flag}")));
    }
    if !option.fallbacks.is_empty() {
        let fallbacks = option.fallbacks.iter().map(|(group, name)| code(&format!("[{group}] {name}")));
        let _ = writeln!(page, "- If not set: {}", fallbacks.collect::<Vec<_>>().join(", then "));
    }
}

fn code(text: &str) -> String {
    format!("`{text}`")
}

/// Escapes characters with a meaning in Markdown, except in code.
fn escaped(text: &str) -> String {
    let mut in_code = false;
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if c == '`' {
            in_code = !in_code;
        }
        if matches!(c, '*' | '_' | '<' | '[' | ']') && !in_code {
            out.push('\\');
        }
        out.push(c);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    #[test]
    fn special_characters_are_escaped_outside_code() {
        assert_eq!(escaped("a_b `c_d` *"), "a\\_b `c_d` \\*");
    }

    /// `BLESS=1` rewrites the page.
    #[test]
    fn configuration_page_matches_the_options() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/configuration.md");
        if std::env::var_os("BLESS").is_some() {
            std::fs::write(&path, markdown()).unwrap();
        }
        let found = std::fs::read_to_string(&path).unwrap_or_default();
        let command = "BLESS=1 cargo test -p metadata-agent --lib configuration_page";
        assert!(found == markdown(), "{} does not match the options; run {command}", path.display());
    }
}
