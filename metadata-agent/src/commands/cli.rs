//! The command line. Flags and help of the configuration are made from the table of options, so
//! that they always agree with the reader.
//!
//! Init systems and probes rely on the exit codes: 0 done, 1 failed, 64 (`EX_USAGE` in sysexits.h)
//! the command line or the configuration is wrong, and a restart does not help.

use std::ffi::OsString;
use std::fmt::Write as _;
use std::path::PathBuf;
use std::sync::LazyLock;

use anyhow::Context as _;
use clap::builder::{PathBufValueParser, StyledStr};
use clap::{Arg, ArgAction, ArgMatches, Args, FromArgMatches, Parser, Subcommand};

use oslo_config::{Access, OptionSpec};

use super::output::{print_error, unless_reader_left};
use crate::config::{ConfigArgs, ConfigSource, NEUTRON_FILES, OPTIONS};
use crate::data_plane;
use crate::error_chain::error_chain;

/// Exit code for a wrong command line or configuration.
pub(crate) const EX_USAGE: u8 = 64;

/// Answers the metadata requests of all guests of this host.
///
/// eBPF programs on the interfaces of guests redirect requests for 169.254.169.254 into the agent's
/// own network namespace. The agent identifies each guest by its interface, signs its identity and
/// sends the request to Nova.
#[derive(Debug, Parser)]
#[command(
    name = "metadata-agent",
    version,
    after_help = "Exit codes: 0 done, 1 failed, 64 wrong command line or configuration.",
    max_term_width = 110
)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Serve the guests of this host until a signal stops it.
    ///
    /// Adopts the attachments of an agent that crashed, attaches to new guest interfaces, and
    /// answers requests. SIGTERM and SIGINT stop it: new connections take the host's own metadata
    /// path at once, requests in flight end, and then the agent removes everything that it made.
    /// SIGHUP reads the configuration again and logs which changes need a restart. SIGUSR1 logs the
    /// state. SIGUSR2 has no effect. After a crash the programs stay attached and leave guests to
    /// the host's own metadata path, until the next agent adopts them or `detach` removes them.
    ///
    /// Needs root, or CAP_SYS_ADMIN, CAP_NET_ADMIN, CAP_NET_BIND_SERVICE, CAP_SETUID and
    /// CAP_SETGID; Linux 5.10 with IPv6; a BPF file system. CAP_SYS_ADMIN includes CAP_BPF and
    /// CAP_PERFMON. The process that answers guests, which it starts, has none of them.
    #[command(after_help = RUN_EXIT, after_long_help = long_reference(RUN_EXIT))]
    Run(RunArgs),
    /// Check if this host can run the agent, and print what is missing.
    ///
    /// Checks the configuration, the kernel, capabilities, the BPF file system, the sources and
    /// Nova. Changes nothing. Needs the same capabilities as `run` for the same results.
    #[command(after_help = CHECK_EXIT, after_long_help = long_reference(CHECK_EXIT))]
    Check(CheckArgs),
    /// Show the configuration.
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Show the state of the running agent.
    ///
    /// Uses the admin socket and needs only access to it. With --live or --ready it prints one line
    /// and reports through its exit code, for exec probes. If --admin-socket or its variable is
    /// set, it reads no configuration file.
    #[command(after_help = STATUS_EXIT, after_long_help = long_reference(STATUS_EXIT))]
    Status(StatusArgs),
    /// Remove everything that an agent left on this host.
    ///
    /// Removes every program, pinned map, interface, route and namespace that the agent made, and
    /// nothing else. Guests take the host's own metadata path at once. Use it after a crash: an
    /// agent that stops does this by itself, and while an agent runs, this command refuses. Running
    /// it twice does no harm. Needs root, or CAP_SYS_ADMIN and CAP_NET_ADMIN.
    #[command(after_help = DETACH_EXIT, after_long_help = long_reference(DETACH_EXIT))]
    Detach(DetachArgs),
    /// Answer guests, as a process that `run` starts.
    #[command(name = data_plane::COMMAND, hide = true)]
    DataPlane,
}

/// Subcommands of `config`.
#[derive(Debug, Subcommand)]
pub(crate) enum ConfigCommand {
    /// Print the value of each option, and its origin.
    ///
    /// Reads the same configuration as `run` and prints the values that `run` would use, by
    /// section. Each value is shown after references are replaced. Its origin follows in brackets:
    /// the flag, the variable, the file and line, or `default`. Of a secret it prints only whether
    /// it is set. Notes name Neutron's options that have no effect here, or a different one. The
    /// command does not ask the running agent (`status --json` does) and needs only read access to
    /// the files.
    #[command(after_help = SHOW_EXIT, after_long_help = long_reference(SHOW_EXIT))]
    Show(ShowArgs),
}

const SHOW_EXIT: &str = "Exit codes: 0 the configuration is usable, 1 it cannot be printed, 64 wrong command line or configuration.";
const RUN_EXIT: &str = "Exit codes: 0 stopped by a signal, 1 failed, 64 wrong command line or configuration.";
const CHECK_EXIT: &str =
    "Exit codes: 0 nothing is missing, 1 something is, 64 wrong command line or configuration.";
const STATUS_EXIT: &str = "Exit codes: 0 the agent answers (--live: and is live; --ready: and is ready), 1 it does not, \
                           64 wrong command line or configuration.";
const DETACH_EXIT: &str =
    "Exit codes: 0 nothing is left, 1 something is, 64 wrong command line or configuration.";

/// Arguments of `run`.
#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    #[command(flatten)]
    pub config: ConfigArgs,
}

/// Arguments of `check`.
#[derive(Debug, Args)]
pub(crate) struct CheckArgs {
    #[command(flatten)]
    pub config: ConfigArgs,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `config show`.
#[derive(Debug, Args)]
pub(crate) struct ShowArgs {
    #[command(flatten)]
    pub config: ConfigArgs,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `status`.
#[derive(Debug, Args)]
pub(crate) struct StatusArgs {
    #[command(flatten)]
    pub config: ConfigArgs,
    /// Print the whole state as JSON.
    #[arg(long)]
    pub json: bool,
    /// Exit with 0 if the agent is live.
    #[arg(long, conflicts_with_all = ["ready", "json"])]
    pub live: bool,
    /// Exit with 0 if the start is complete; otherwise print the steps and sources that it still
    /// waits for.
    #[arg(long, conflicts_with = "json")]
    pub ready: bool,
}

/// Arguments of `detach`.
#[derive(Debug, Args)]
pub(crate) struct DetachArgs {
    #[command(flatten)]
    pub config: ConfigArgs,
}

impl Cli {
    /// Parses the command line of this process. Without a command to run, prints help, version or
    /// an error, and exits.
    #[must_use]
    pub(crate) fn parse_or_exit() -> Self {
        Self::read(std::env::args_os()).unwrap_or_else(|(message, code)| {
            let printed = unless_reader_left(message.print());
            let code = match printed.context("write to standard output") {
                // Help was asked for, and cannot be shown.
                Err(error) if code == 0 => {
                    print_error(&error_chain(error.as_ref()));
                    1
                }
                _ => code,
            };
            std::process::exit(i32::from(code))
        })
    }

    /// Parses a command line. The error is the message to print and the exit code.
    fn read(args: impl IntoIterator<Item = OsString>) -> Result<Self, (clap::Error, u8)> {
        Self::try_parse_from(args).map_err(|error| {
            let code = if error.use_stderr() { EX_USAGE } else { 0 };
            (error, code)
        })
    }
}

const CONFIG_FILE: &str = "config-file";
const CONFIG_DIR: &str = "config-dir";

/// Options that have flags, with their flags.
static FLAGS: LazyLock<Vec<(&OptionSpec, String)>> =
    LazyLock::new(|| OPTIONS.iter().filter_map(|option| Some((*option, option.flag()?))).collect());

impl Args for ConfigArgs {
    fn augment_args(command: clap::Command) -> clap::Command {
        let source = |id: &'static str, name: &'static str, help: String| {
            let arg = Arg::new(id).long(id).value_name(name).help(help).action(ArgAction::Append);
            arg.value_parser(PathBufValueParser::new())
        };
        let files = NEUTRON_FILES.join(", ");
        let command = command.next_help_heading("Configuration").args([
            source(CONFIG_FILE, "FILE", format!(
                "Read a file in the format of oslo.config. May be given several times; later files override earlier ones. Without \
                 --config-file and --config-dir: those of {files} that exist in /etc/neutron"
            )),
            source(CONFIG_DIR, "DIR", "Read every *.conf of a directory, in the order of their names".to_owned()),
        ]);
        let command = command.args(FLAGS.iter().map(|(option, flag)| {
            let arg = Arg::new(option.key).long(flag.as_str()).help(option.doc.trim_end_matches('.'));
            match option.access {
                Access::Toggle => {
                    arg.value_name("BOOL").num_args(0..=1).require_equals(true).default_missing_value("true")
                }
                Access::Flag | Access::File | Access::Secret => {
                    arg.value_name("VALUE").allow_hyphen_values(true)
                }
            }
        }));
        command.next_help_heading(None)
    }

    fn augment_args_for_update(command: clap::Command) -> clap::Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for ConfigArgs {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut args = Self::default();
        args.update_from_arg_matches(matches)?;
        Ok(args)
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        let mut sources = placed(matches, CONFIG_FILE, ConfigSource::File);
        sources.extend(placed(matches, CONFIG_DIR, ConfigSource::Dir));
        sources.sort_by_key(|(index, _)| *index);
        self.sources.extend(sources.into_iter().map(|(_, source)| source));
        for (option, _) in FLAGS.iter() {
            if let Some(value) = matches.get_one::<String>(option.key) {
                self.flags.insert(option.key, value.clone());
            }
        }
        Ok(())
    }
}

/// Returns each path of an argument with its position on the command line: later files and
/// directories override earlier ones.
fn placed(matches: &ArgMatches, id: &str, source: fn(PathBuf) -> ConfigSource) -> Vec<(usize, ConfigSource)> {
    let paths = matches.get_many::<PathBuf>(id).into_iter().flatten().cloned().map(source);
    matches.indices_of(id).into_iter().flatten().zip(paths).collect()
}

/// Formats every option, for `--help`.
fn long_reference(exit_codes: &str) -> StyledStr {
    let mut text = format!(
        "{exit_codes}\n\nOptions of the configuration. A flag overrides the environment, the environment overrides \
         files, and later files override earlier ones. In files, unknown options are ignored, and $name stands for \
         the value of another option. An invalid value of a known option is fatal.\n"
    );
    let mut group = "";
    for option in OPTIONS {
        if option.group != group {
            group = option.group;
            let _ = write!(text, "\n[{group}]\n");
        }
        let instead = match option.fallbacks {
            [] => String::new(),
            fallbacks => {
                let named = fallbacks.iter().map(|(group, name)| format!("{name} of [{group}]"));
                format!(" If not set: {}.", named.collect::<Vec<_>>().join(", then "))
            }
        };
        let default = if option.default.is_empty() { "nothing" } else { option.default };
        let _ = write!(
            text,
            "  {} (environment {})\n      {}\n      Accepted: {}.{instead} Default: {default}\n",
            option.name,
            option.env(),
            option.doc,
            (option.accepts)(),
        );
    }
    text.into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn read(line: &str) -> Result<Cli, (clap::Error, u8)> {
        Cli::read(line.split(' ').map(OsString::from))
    }

    fn run_config(line: &str) -> ConfigArgs {
        match read(line).unwrap().command {
            Command::Run(args) => args.config,
            other @ (Command::Check(_)
            | Command::Config(_)
            | Command::Status(_)
            | Command::Detach(_)
            | Command::DataPlane) => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn files_and_directories_keep_their_order() {
        let file = |path: &str| ConfigSource::File(path.into());
        let args = run_config("metadata-agent run --config-file a --config-dir d --config-file=b");
        assert_eq!(args.sources, [file("a"), ConfigSource::Dir("d".into()), file("b")]);
    }

    #[test]
    fn flags_are_stored_under_the_keys_of_their_options() {
        let line = "metadata-agent run --nova-metadata-host ::1 --guest-interfaces tap*,eth? --attach-mode tcx --debug";
        let flags = run_config(line).flags;
        let want = [
            ("attach_mode", "tcx"),
            ("debug", "true"),
            ("guest_interfaces", "tap*,eth?"),
            ("nova_metadata_host", "::1"),
        ];
        assert_eq!(flags.into_iter().collect::<Vec<_>>(), want.map(|(name, value)| (name, value.to_owned())));
        assert_eq!(run_config("metadata-agent run --debug=no").flags["debug"], "no");
    }

    #[test]
    fn important_options_have_flags() {
        for flag in [
            "nova-metadata-host",
            "static-inventory",
            "portal-namespace",
            "bpffs-dir",
            "admin-socket",
            "guest-interfaces",
            "guest-link-kinds",
            "attach-mode",
            "log-format",
        ] {
            let args = run_config(&format!("metadata-agent run --{flag} x"));
            assert_eq!(args.flags[flag.replace('-', "_").as_str()], "x");
        }
    }

    #[test]
    fn the_secret_cannot_be_a_flag() {
        let (error, code) = read("metadata-agent run --metadata-proxy-shared-secret x").unwrap_err();
        assert_eq!((error.kind(), code), (clap::error::ErrorKind::UnknownArgument, EX_USAGE));
    }

    #[test]
    fn errors_exit_with_64_and_help_with_0() {
        for (line, want) in [
            ("metadata-agent", EX_USAGE),
            ("metadata-agent serve", EX_USAGE),
            ("metadata-agent status --ready --json", EX_USAGE),
            ("metadata-agent status --live --ready", EX_USAGE),
            ("metadata-agent run --config-file", EX_USAGE),
            ("metadata-agent --help", 0),
            ("metadata-agent run -h", 0),
            ("metadata-agent --version", 0),
        ] {
            assert_eq!(read(line).unwrap_err().1, want, "{line}");
        }
    }

    #[test]
    fn flags_of_a_command_are_not_listed_as_configuration() {
        let help = read("metadata-agent status -h").unwrap_err().0.to_string();
        let (own, configuration) = help.split_once("\nConfiguration:\n").unwrap();
        assert!(own.contains("--ready  ") && !configuration.contains("--ready  "), "{help}");
    }

    #[test]
    fn help_names_every_option_and_variable() {
        for command in ["run", "check", "config show", "status", "detach"] {
            let (help, _) = read(&format!("metadata-agent {command} --help")).unwrap_err();
            // Independent of line breaks.
            let help = help.to_string().split_whitespace().collect::<Vec<_>>().join(" ");
            assert!(help.contains("Exit codes: 0"), "{help}");
            for option in OPTIONS {
                let line = format!(" {} (environment {}) ", option.name, option.env());
                assert!(help.contains(&line), "{command} --help lacks {line:?}");
                let flag = option.flag().map(|flag| format!("--{flag}"));
                assert!(flag.is_none_or(|flag| help.contains(&flag)), "{command}: {}", option.name);
            }
        }
    }
}
