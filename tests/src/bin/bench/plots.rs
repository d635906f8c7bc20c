//! The results as plots. One plot answers one question, which determines its lines and axes.

use super::drawing::{Chart, Line, Point, Scales, draw};
use super::results::{Figure, Results, Run, Workload};
use super::statistics::{Spread, precise};

/// A plot with the answer to one question.
#[derive(Debug)]
pub struct Plot {
    /// The name of its file.
    pub name: &'static str,
    pub title: String,
    pub svg: String,
}

/// Returns all plots with more than a single point.
pub fn plots(results: &Results) -> anyhow::Result<Vec<Plot>> {
    let charts = [requests(results), boot(results), density(results), scale(results)].concat();
    let shown = |chart: Chart| -> Option<anyhow::Result<Plot>> {
        let chart = chart.of_lines();
        (!chart.lines.is_empty())
            .then(|| draw(&chart).map(|svg| Plot { name: chart.name, title: chart.title.to_owned(), svg }))
    };
    charts.into_iter().filter_map(shown).collect()
}

/// Rates by concurrency.
fn requests(results: &Results) -> Vec<Chart> {
    let against_connections = |suffix: &'static str, figure| {
        let case = move |case: &str| case.ends_with(&format!(" {suffix}, 1 KiB"));
        lines(results, Workload::Requests, case, |spread, _| spread, figure)
    };
    let rate = |name, title, suffix| Chart {
        name,
        title,
        x: "connections",
        y: "correct responses per second",
        scales: Scales::FromNothing,
        lines: against_connections(suffix, Figure::Rate),
    };
    let latency = |name, title, case| Chart {
        name,
        title,
        x: "share of requests with at most this latency",
        y: "milliseconds",
        scales: Scales::Nines,
        lines: distributions(results, case),
    };
    vec![
        rate("requests-new", "Requests per second on new connections, 1 KiB", "new"),
        rate("requests-kept", "Requests per second on kept connections, 1 KiB", "keep-alive"),
        latency("latency-new", "Latency at 64 new connections, 1 KiB", "64 new, 1 KiB"),
        latency("latency-kept", "Latency at 64 kept connections, 1 KiB", "64 keep-alive, 1 KiB"),
        Chart {
            name: "cpu-new",
            title: "CPU of the whole machine per 1,000 requests on new connections, 1 KiB",
            x: "connections",
            y: "CPU seconds per 1,000 requests",
            scales: Scales::Magnitudes,
            lines: against_connections("new", Figure::MachineCpu),
        },
    ]
}

fn boot(results: &Results) -> Vec<Chart> {
    let chart = |name, title, workload| Chart {
        name,
        title,
        x: "guests",
        y: "milliseconds",
        scales: Scales::Magnitudes,
        lines: lines(results, workload, |_| true, |spread, _| spread, Figure::LastMs),
    };
    vec![
        chart("boot", "Guests that boot at once: time until the last has all responses", Workload::Boot),
        chart("boot-nova", "Guests that boot at once, with a real Nova", Workload::BootNova),
    ]
}

fn density(results: &Results) -> Vec<Chart> {
    let chart =
        |name, title, y, lines| Chart { name, title, x: "networks", y, scales: Scales::Magnitudes, lines };
    let of = |figure| lines(results, Workload::Density, |_| true, |spread, _| spread, figure);
    // An appearance is measured many times in a run, so the bar covers these.
    let to_p99 = |spread: Spread, run: &Run| Spread {
        highest: run.figures.get(&Figure::FirstByteP99Ms).copied().unwrap_or(spread.highest),
        ..spread
    };
    vec![
        chart("memory", "Memory at rest", "resident MiB", of(Figure::ResidentMib)),
        chart("processes", "Processes at rest", "processes", of(Figure::Processes)),
        chart(
            "start",
            "Start with all networks present: time until all are served",
            "milliseconds",
            of(Figure::StartMs),
        ),
        chart(
            "first-byte",
            "A new interface: time to its first byte (median; bar: p99)",
            "milliseconds",
            lines(results, Workload::Density, |_| true, to_p99, Figure::FirstByteMs),
        ),
    ]
}

/// The effect of a host's size on one guest's requests. Ideally the line is flat.
fn scale(results: &Results) -> Vec<Chart> {
    let chart = |name, title, case| Chart {
        name,
        title,
        x: "ports (ours) or instances (others) on the host",
        y: "correct responses per second",
        scales: Scales::FromNothing,
        lines: against_others(results, case),
    };
    vec![
        chart("scale-new", "64 new connections, by size of the host", "64 new, 1 KiB"),
        chart("scale-kept", "64 kept connections, by size of the host", "64 keep-alive, 1 KiB"),
    ]
}

/// Returns one line per peer over the cases.
fn lines(
    results: &Results,
    workload: Workload,
    fits: impl Fn(&str) -> bool,
    bar: impl Fn(Spread, &Run) -> Spread,
    figure: Figure,
) -> Vec<Line> {
    let of = |peer: &&str| {
        let cases = results.cases(workload).into_iter().filter(|case| fits(case));
        let point = |case| {
            let run = results.runs(workload, case, peer).next()?;
            Some(Point { x: run.scale, y: bar(results.spread(workload, case, peer, figure)?, run) })
        };
        Line::new(peer, cases.filter_map(point).collect())
    };
    results.peers(workload).iter().map(of).collect()
}

/// Returns distributions over the number of nines, so that rare values get as much room as common
/// ones.
fn distributions(results: &Results, case: &str) -> Vec<Line> {
    let of = |peer: &str| {
        let runs: Vec<_> = results.runs(Workload::Requests, case, peer).collect();
        let shares = runs.first().map(|run| run.distribution.iter().map(|(share, _)| *share));
        let point = |(position, share): (usize, f64)| {
            let of_runs = runs.iter().filter_map(|run| run.distribution.get(position).map(|(_, us)| *us));
            let ms = Spread::new(of_runs.map(|us| us / 1e3));
            (share < 1.0).then(|| Point { x: -(1.0 - share).log10(), y: ms })
        };
        Line::new(peer, shares.into_iter().flatten().enumerate().filter_map(point).collect())
    };
    kinds(results).into_iter().map(of).collect()
}

/// Returns one line per kind of peer over its load besides the requesting guest.
fn against_others(results: &Results, case: &str) -> Vec<Line> {
    let of = |first: &str| {
        let peers = results.peers(Workload::Requests).into_iter().filter(|peer| kind(peer) == kind(first));
        let point = |peer: &str| {
            let run = results.runs(Workload::Requests, case, peer).next()?;
            let y = results.spread(Workload::Requests, case, peer, Figure::Rate)?;
            Some(Point { x: precise(run.others + 1), y })
        };
        Line::new(kind(first), peers.filter_map(point).collect())
    };
    kinds(results).into_iter().map(of).collect()
}

/// Returns the first peer of each kind. Variants with more load come after it.
fn kinds(results: &Results) -> Vec<&str> {
    results.peers(Workload::Requests).into_iter().fold(Vec::new(), |mut firsts, peer| {
        if !firsts.iter().any(|first| kind(first) == kind(peer)) {
            firsts.push(peer);
        }
        firsts
    })
}

fn kind(peer: &str) -> &str {
    peer.split_once(',').map_or(peer, |(kind, _)| kind)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::results::tests::rates;

    fn concurrency() -> Results {
        let mut results = rates(&[("ours", &[100.0, 200.0]), ("haproxy & co", &[90.0, 150.0])]);
        for run in &mut results.runs {
            run.scale = if run.repetition == 0 { 1.0 } else { 64.0 };
            run.case = format!("{} new, 1 KiB", run.scale);
        }
        results
    }

    #[test]
    fn a_plot_is_one_svg_that_names_its_peers() {
        let plots = plots(&concurrency()).expect("plots");
        let [plot] = &plots[..] else { panic!("{} plots", plots.len()) };
        assert!(plot.svg.starts_with("<svg") && plot.svg.trim_end().ends_with("</svg>"));
        assert!(plot.svg.contains("ours") && plot.svg.contains("haproxy &amp; co"), "{}", plot.svg);
    }

    #[test]
    fn one_point_is_no_plot() {
        assert!(plots(&rates(&[("ours", &[1.0])])).expect("none").is_empty());
    }

    #[test]
    fn one_peer_at_several_loads_is_one_line() {
        let mut results = rates(&[("direct", &[3.0]), ("ours", &[2.0]), ("ours, 4000 more ports", &[1.9])]);
        results.runs[2].others = 4000;
        let lines = against_others(&results, "64 new, 1 KiB");
        let points = |line: &Line| line.points.iter().map(|point| point.x).collect::<Vec<_>>();
        assert_eq!(lines.iter().map(points).collect::<Vec<_>>(), [vec![1.0], vec![1.0, 4001.0]]);
        let [plot] = &plots(&results).expect("plots")[..] else { panic!("one plot") };
        assert!(plot.name == "scale-new" && !plot.svg.contains("direct"));
    }
}
