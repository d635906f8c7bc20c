//! What the agent and its datapath cost, measured against the same Nova without them.
//!
//! Everything runs on this machine, in namespaces that are gone afterwards: figures compare with each other, not with those of
//! another machine.

#![expect(clippy::print_stdout, reason = "it talks to a person at a terminal")]

mod arena;
mod hook;
mod http;
mod inventory;
mod machine;
mod report;
mod statistics;
mod tax;

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use clap::{Args, Parser, Subcommand};

use arena::Arena;
use machine::Machine;
use report::Report;

/// Measures the release build of the metadata agent
#[derive(Parser)]
#[command(name = "bench")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// The few figures that the README shows, in less than two minutes
    Quick(Quick),
    /// What TC and XDP cost a packet that is none of ours, on tap and veth
    Hook {
        /// How often each measurement is repeated
        #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
        repetitions: u32,
    },
    /// What 10,000 ports cost the inventory, in some seconds
    Inventory(Inventory),
}

#[derive(Args)]
struct Quick {
    /// How often each measurement is repeated
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    repetitions: u32,
    /// How long each load lasts, in milliseconds
    #[arg(long, default_value_t = 1200, value_parser = clap::value_parser!(u64).range(1..))]
    millis: u64,
    /// Write every single run to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

#[derive(Args)]
struct Inventory {
    /// Write every single figure to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

fn main() -> anyhow::Result<()> {
    let command = Cli::parse().command;
    ensure!(
        nix::unistd::geteuid().is_root(),
        "the bench makes network namespaces and loads BPF programs: run it as root"
    );
    match command {
        Command::Quick(options) => quick(&options),
        Command::Inventory(options) => count_ports(&options),
        Command::Hook { repetitions } => {
            let Machine { processor, kernel, .. } = Machine::describe()?;
            println!("{processor}, Linux {kernel}. {}", hook::measure(repetitions)?);
            Ok(())
        }
    }
}

fn count_ports(options: &Inventory) -> anyhow::Result<()> {
    let figures = inventory::measure()?;
    if let Some(path) = &options.json {
        let text = serde_json::to_string_pretty(&figures).context("write the figures as JSON")?;
        fs::write(path, text).with_context(|| format!("write {}", path.display()))?;
    }
    println!("{figures}");
    Ok(())
}

fn quick(options: &Quick) -> anyhow::Result<()> {
    let duration = Duration::from_millis(options.millis);
    let machine = Machine::describe()?;
    let arena = Arena::set_up()?;
    let report = Report {
        machine,
        repetitions: options.repetitions,
        duration,
        http: http::measure(&arena, duration, options.repetitions)?,
        agent: arena.agent_process()?,
        tax: tax::measure(&arena, options.repetitions)?,
    };
    if let Some(path) = &options.json {
        let text = serde_json::to_string_pretty(&report).context("write the runs as JSON")?;
        fs::write(path, text).with_context(|| format!("write {}", path.display()))?;
    }
    println!("{report}");
    Ok(())
}
