//! How many instructions a packet and a request take, and how many allocations: figures that repeat on a noisy machine, so
//! that a rise is a rise of the code.
//!
//! The program runs itself under callgrind, which counts within [`meter::counted`] alone, and holds what it finds against
//! the figures in the tree. Gungraun does the first half as well, with a runner to be built first; but it keeps what it
//! compares with out of the tree, and knows no compiler.

#![expect(clippy::print_stdout, reason = "it talks to a person at a terminal")]

mod callgrind;
mod decisions;
mod meter;
mod record;
mod requests;

use std::process::ExitCode;

use clap::Parser;

use record::Record;

/// Counts instructions and allocations, and fails where they have risen
#[derive(Parser)]
#[command(name = "instructions", bin_name = "cargo xtask test instructions --")]
struct Cli {
    /// Write the figures down, instead of comparing them
    #[arg(long)]
    record: bool,
    /// Do what is counted, and nothing else: what runs under callgrind
    #[arg(long, hide = true, conflicts_with = "record")]
    perform: bool,
}

fn main() -> anyhow::Result<ExitCode> {
    let cli = Cli::parse();
    if cli.perform {
        for subject in subjects()? {
            println!("{}", serde_json::to_string(&subject)?);
        }
        return Ok(ExitCode::SUCCESS);
    }
    let found = Record { compiler: record::compiler()?, figures: callgrind::count()?, ..Record::default() };
    if cli.record {
        found.write()?;
        println!("{found}\nWritten to {}.", record::FILE);
        return Ok(ExitCode::SUCCESS);
    }
    let comparison = Record::read()?.against(&found);
    println!("{comparison}");
    Ok(if comparison.fails() { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// Everything that is counted, one after the other.
fn subjects() -> anyhow::Result<Vec<meter::Subject>> {
    let mut subjects = vec![meter::nothing()];
    subjects.extend(decisions::perform()?);
    subjects.extend(requests::perform()?);
    Ok(subjects)
}
