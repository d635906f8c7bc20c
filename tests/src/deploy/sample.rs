//! The sample configuration, generated from the agent's own table of options.

use std::fmt::Write as _;

use metadata_agent::config::OPTIONS;
use metadata_agent::config::options::OWN;

const WIDTH: usize = 110;

const HEAD: &str = "\
# Sample configuration of the metadata agent: every option with its default.
#
# The format is Neutron's (oslo.config). The agent reads neutron.conf, metadata_agent.ini,
# neutron_ovn_metadata_agent.ini and plugins/ml2/ovn_agent.ini of /etc/neutron, those that exist, and needs nothing
# more where Neutron's own agent was configured.
# The lines below can stand in any of them, or in a file that is named with --config-file. Each option can also be
# set by the environment, as METADATA_AGENT_<NAME IN CAPITALS>, and most by a flag. `metadata-agent status --json`
# prints what is in force, and where each value comes from.
";

/// Returns the expected text of the file.
#[must_use]
pub fn sample_configuration() -> String {
    let mut text = HEAD.to_owned();
    let mut group = "";
    for option in OPTIONS {
        if option.group != group {
            group = option.group;
            text.extend(["\n[", group, "]\n"]);
            if group != OWN {
                text.push_str("# Neutron's options, with Neutron's meaning.\n");
            }
        }
        let line = format!("\n{}#{} = {}", comment(option.doc), option.name, option.default);
        writeln!(text, "{}", line.trim_end()).unwrap_or_else(|_| unreachable!("a String takes all"));
    }
    text
}

/// Formats a sentence or two as comment lines.
fn comment(doc: &str) -> String {
    let mut text = String::new();
    let mut column = 0;
    for word in doc.split_whitespace() {
        if column == 0 || column + 1 + word.len() > WIDTH {
            let end = if column == 0 { "" } else { "\n" };
            text.extend([end, "# ", word]);
            column = 2 + word.len();
        } else {
            text.extend([" ", word]);
            column += 1 + word.len();
        }
    }
    text.push('\n');
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_wrap_between_words() {
        assert_eq!(comment("One  word\nmore."), "# One word more.\n");
        let long = comment(&"word ".repeat(60));
        assert!(long.lines().all(|line| line.starts_with("# ") && line.len() <= WIDTH), "{long}");
        assert_eq!(long.lines().count(), 3);
    }
}
