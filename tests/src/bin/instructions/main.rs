//! The number of instructions and allocations per packet and per request. These figures are
//! reproducible on a noisy machine, so an increase is caused by the code.
//!
//! The program runs itself under callgrind, which counts only inside [`meter::counted`], and
//! compares the result with the figures in the tree. Gungraun does the counting as well, but needs
//! a runner to be built first, keeps its reference figures out of the tree, and does not
//! distinguish compilers.

mod callgrind;
mod decisions;
mod meter;
mod record;
mod requests;

use metadata_tests::terminal::print;
use std::process::ExitCode;

use clap::Parser;

use record::Record;

/// Counts instructions and allocations, and fails if they have increased
#[derive(Parser)]
#[command(name = "instructions", bin_name = "cargo xtask test instructions --")]
struct Cli {
    /// Write the figures to the record instead of comparing them
    #[arg(long)]
    record: bool,
    /// Run only the counted code; used under callgrind
    #[arg(long, hide = true, conflicts_with = "record")]
    perform: bool,
}

fn main() -> anyhow::Result<ExitCode> {
    let cli = Cli::parse();
    if cli.perform {
        for subject in subjects()? {
            print(serde_json::to_string(&subject)?);
        }
        return Ok(ExitCode::SUCCESS);
    }
    let found = Record { compiler: record::compiler()?, figures: callgrind::count()?, ..Record::default() };
    if cli.record {
        found.write()?;
        print(format_args!("{found}\nWritten to {}.", record::FILE));
        return Ok(ExitCode::SUCCESS);
    }
    let comparison = Record::read()?.against(&found);
    print(&comparison);
    Ok(if comparison.fails() { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// Runs all subjects, one after the other.
fn subjects() -> anyhow::Result<Vec<meter::Subject>> {
    let mut subjects = vec![meter::nothing()];
    subjects.extend(decisions::perform()?);
    subjects.extend(requests::perform()?);
    Ok(subjects)
}
