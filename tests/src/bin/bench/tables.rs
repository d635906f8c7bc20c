//! The results as tables: medians with the lowest and the highest repetition, and failures beside
//! them.

use std::fmt::Write as _;

use super::results::{Figure, Results, Workload};
use super::statistics::precise;
use super::targets::{Bound, targets};

/// A table, to be rendered as Markdown or HTML.
#[derive(Debug)]
pub struct Table {
    pub title: &'static str,
    pub note: &'static str,
    pub header: Vec<String>,
    pub rows: Vec<Vec<String>>,
}

/// Returns all tables that have rows.
pub fn tables(results: &Results) -> Vec<Table> {
    let mut all = vec![target_table(results)];
    all.extend(SECTIONS.iter().map(|section| section.table(results)));
    all.push(profile_table(results));
    all.push(absent_table(results));
    all.retain(|table| !table.rows.is_empty());
    all
}

impl Table {
    pub fn to_markdown(&self) -> String {
        let line = |cells: &[String]| format!("| {} |\n", cells.join(" | "));
        let mut text = format!("## {}\n\n{}\n\n{}|", self.title, self.note, line(&self.header));
        text.push_str(&"---|".repeat(self.header.len()));
        text.push('\n');
        text.extend(self.rows.iter().map(|row| line(row)));
        text
    }
}

/// Returns the machine, the versions and the noise.
pub fn preamble(results: &Results) -> Vec<String> {
    let machine = &results.machine;
    let mut lines = vec![
        format!(
            "{}, {} cores, {} MiB; Linux {}, BPF JIT {}.",
            machine.processor,
            machine.cores,
            machine.memory_mib,
            machine.kernel,
            if machine.bpf_jit { "on" } else { "off" }
        ),
        machine.versions.join("; "),
        format!("Plan: {}. Medians (lowest..highest) of the repetitions.", results.plan),
    ];
    let mut noise =
        format!("While the bench was idle, {:.1} % of the machine was busy", 100.0 * results.noise);
    noise.push_str(if results.noise > 0.05 { ": other programs disturbed these measurements." } else { "." });
    lines.push(noise);
    lines
}

struct Section {
    workload: Workload,
    title: &'static str,
    note: &'static str,
    case: &'static str,
    figures: &'static [Figure],
    counts_failures: bool,
}

const SECTIONS: [Section; 6] = [
    Section {
        workload: Workload::Requests,
        title: "Requests",
        note: "One guest; nginx with two workers is the upstream of all peers. Only correct responses count. CPU is in \
               seconds of one core per 1,000 correct responses: `machine` is everything that was not idle (guest, path, \
               upstream, interrupts), `peer` the peer's own processes with their system calls. `others` is the share of \
               the machine that is accounted to no participant: interrupts and other programs. Our limits per port are off.",
        case: "connections",
        figures: &[
            Figure::Rate,
            Figure::P50Us,
            Figure::P99Us,
            Figure::P999Us,
            Figure::MachineCpu,
            Figure::PeerCpu,
            Figure::Others,
        ],
        counts_failures: true,
    },
    Section {
        workload: Workload::Boot,
        title: "Boot",
        note: "The 28 requests of cloud-init in sequence, by guests that start at the same moment; each failure is retried \
               after a second, up to five times.",
        case: "guests",
        figures: &[Figure::LastMs, Figure::MedianMs],
        counts_failures: true,
    },
    Section {
        workload: Workload::BootNova,
        title: "Boot, real Nova",
        note: "The same with nova-api-metadata as upstream, whose cached data of these guests have expired. `direct` is \
               the time of Nova itself: guests sign their requests.",
        case: "guests",
        figures: &[Figure::LastMs, Figure::MedianMs],
        counts_failures: true,
    },
    Section {
        workload: Workload::Density,
        title: "Density",
        note: "Networks with one idle port each. `start` is the time until all are served. `first byte` starts when one \
               more interface appears; for haproxy, when one more process starts on an existing network and namespace. \
               With fewer than 100 measurements, p99 is the slowest.",
        case: "networks",
        figures: &[
            Figure::ResidentMib,
            Figure::ProportionalMib,
            Figure::Processes,
            Figure::StartMs,
            Figure::FirstByteMs,
            Figure::FirstByteP99Ms,
        ],
        counts_failures: false,
    },
    Section {
        workload: Workload::Tax,
        title: "Cost per packet",
        note: "md_from_guest by BPF_PROG_TEST_RUN: by itself, and what it adds to an empty program. Metadata packets are \
               timed one by one.",
        case: "packet",
        figures: &[Figure::ProgramNs, Figure::AddedNs],
        counts_failures: false,
    },
    Section {
        workload: Workload::Bystander,
        title: "Ordinary traffic",
        note: "One stream from a guest to its gateway, over a tap with our programs and over one without.",
        case: "traffic",
        figures: &[Figure::TcpMbit, Figure::UdpMbit],
        counts_failures: false,
    },
];

impl Section {
    fn table(&self, results: &Results) -> Table {
        let mut header = vec![self.case.to_owned(), "peer".to_owned()];
        if self.counts_failures {
            header.push("failed".to_owned());
        }
        header.extend(self.figures.iter().map(|figure| figure.label().to_owned()));
        let mut rows = Vec::new();
        for case in results.cases(self.workload) {
            for peer in results.peers(self.workload) {
                if results.runs(self.workload, case, peer).next().is_some() {
                    rows.push(self.row(results, case, peer));
                }
            }
        }
        Table { title: self.title, note: self.note, header, rows }
    }

    fn row(&self, results: &Results, case: &str, peer: &str) -> Vec<String> {
        let mut row = vec![case.to_owned(), peer.to_owned()];
        if self.counts_failures {
            row.push(failures(results, self.workload, case, peer));
        }
        for figure in self.figures {
            let spread = results.spread(self.workload, case, peer, *figure);
            row.push(
                spread.map_or_else(|| "-".to_owned(), |spread| format!("{spread:.0$}", figure.digits())),
            );
        }
        row
    }
}

fn failures(results: &Results, workload: Workload, case: &str, peer: &str) -> String {
    let (failed, answers) = results
        .runs(workload, case, peer)
        .fold((0, 0), |(failed, answers), run| (failed + run.failed, answers + run.answers));
    if failed == 0 {
        return "0".to_owned();
    }
    let mut text = format!("{failed} ({:.2} %)", 100.0 * precise(failed) / precise(failed + answers));
    let mut kinds: Vec<&str> =
        results.runs(workload, case, peer).flat_map(|run| run.failures.keys().map(String::as_str)).collect();
    kinds.sort_unstable();
    kinds.dedup();
    write!(text, ": {}", kinds.join(", "))
        .unwrap_or_else(|_| unreachable!("writing to a String cannot fail"));
    text
}

fn target_table(results: &Results) -> Table {
    let row = |target: &super::targets::Target| {
        let bound = match target.bound {
            Bound::AtLeast(least) => format!(">= {least}"),
            Bound::AtMost(most) => format!("<= {most}"),
        };
        let found = target.found.map_or_else(|| "-".to_owned(), |found| found.to_string());
        let verdict = match target.is_reached() {
            Some(true) => "reached",
            Some(false) => "MISSED",
            None => "not measured",
        };
        vec![target.what.to_owned(), bound, found, verdict.to_owned()]
    };
    Table {
        title: "Targets",
        note: "Ratios compare runs of the same repetition.",
        header: ["figure", "target", "found", ""].map(str::to_owned).to_vec(),
        rows: targets(results).iter().map(row).collect(),
    }
}

fn profile_table(results: &Results) -> Table {
    let percent = |share: f64| format!("{:.1} %", 100.0 * share);
    let rows = results
        .profile
        .iter()
        .map(|hot| vec![hot.load.clone(), hot.function.clone(), percent(hot.own), percent(hot.with_callees)]);
    Table {
        title: "Profile of the agent",
        note: "Samples of its threads, in user space and in the kernel: those that found the function running, and \
               those that found it running or waiting for what it called. The flame graphs flame-new.svg and \
               flame-kept.svg beside this report show all of them.",
        header: ["load", "function", "own", "with callees"].map(str::to_owned).to_vec(),
        rows: rows.collect(),
    }
}

fn absent_table(results: &Results) -> Table {
    Table {
        title: "Absent",
        note: "Not available on this machine.",
        header: ["peer", "why"].map(str::to_owned).to_vec(),
        rows: results.absent.iter().map(|absent| vec![absent.what.clone(), absent.why.clone()]).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::results::Absent;
    use crate::results::tests::rates;

    fn requests(results: &Results) -> Table {
        tables(results).into_iter().find(|table| table.title == "Requests").expect("a table")
    }

    #[test]
    fn failures_are_shown_beside_the_figures() {
        let mut results = rates(&[("ours", &[10.0, 30.0, 20.0])]);
        assert_eq!(requests(&results).rows[0][2..4], ["0", "20 (10..30)"]);
        results.runs[1].answers = 3;
        results.runs[1].failed = 1;
        results.runs[1].failures.insert("no answer".to_owned(), 1);
        assert_eq!(requests(&results).rows[0][2], "1 (25.00 %): no answer");
    }

    #[test]
    fn unmeasured_is_a_dash_and_an_absent_peer_is_named() {
        let mut results = rates(&[("ours", &[1.0])]);
        assert_eq!(requests(&results).rows[0][3..5], ["1", "-"]);
        assert!(tables(&results).iter().all(|table| table.title != "Absent"));
        results.absent.push(Absent { what: "haproxy".to_owned(), why: "not installed".to_owned() });
        let absent = tables(&results).pop().expect("a table").to_markdown();
        assert!(absent.contains("| haproxy | not installed |"), "{absent}");
    }

    #[test]
    fn markdown_has_a_rule_as_wide_as_the_header() {
        let text = requests(&rates(&[("ours", &[1.0])])).to_markdown();
        let lines: Vec<_> = text.lines().skip(4).take(2).collect();
        assert_eq!(lines[0].matches('|').count(), lines[1].matches('|').count());
    }
}
