//! The results as pictures, in SVG. One picture answers one question.

use std::ops::Range;

use anyhow::anyhow;
use plotters::coord::Shift;
use plotters::prelude::{
    ChartBuilder, Circle, DrawingArea, IntoDrawingArea as _, IntoLogRange as _, LineSeries, PathElement,
    RGBColor, SVGBackend, Text, WHITE,
};
use plotters::style::{Color as _, RGBAColor};

use super::results::{Figure, Results, Workload};
use super::statistics::Spread;

const SIZE: (u32, u32) = (760, 420);
/// How much of the width is for the names of the lines.
const LEGEND: u32 = 200;
/// On the lower axis; of nines, one each.
const TICKS: usize = 6;
/// Where the axis of shares ends: behind 99.99 %.
const MOST_NINES: f64 = 4.2;

/// One question, answered.
#[derive(Debug)]
pub struct Plot {
    pub title: String,
    pub svg: String,
}

/// A peer's points, in order.
struct Line {
    name: String,
    points: Vec<(f64, f64)>,
}

/// How much room a value has on its axis.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Scales {
    /// Each axis by magnitude.
    Magnitudes,
    /// The upper axis in proportion, from nothing.
    FromNothing,
    /// The lower axis by the nines of a share.
    Nines,
}

struct Axes {
    title: String,
    x: &'static str,
    y: &'static str,
    scales: Scales,
}

/// All plots that have something to show.
pub fn plots(results: &Results) -> anyhow::Result<Vec<Plot>> {
    let mut plots = Vec::new();
    for (suffix, title) in [("keep-alive", "kept connections"), ("new", "a new connection each")] {
        let case = move |case: &str| case.ends_with(&format!(" {suffix}, 1 KiB"));
        let axes = Axes {
            title: format!("Requests per second, {title}, 1 KiB"),
            x: "connections",
            y: "right answers per second",
            scales: Scales::FromNothing,
        };
        plots.push((axes, lines(results, Workload::Requests, case, Figure::Rate)));
    }
    for (case, title) in
        [("64 keep-alive, 1 KiB", "64 kept connections"), ("64 new, 1 KiB", "64 connections, new each time")]
    {
        let axes = Axes {
            title: format!("Latency of {title}: how many were not slower"),
            x: "share of the requests",
            y: "microseconds",
            scales: Scales::Nines,
        };
        plots.push((axes, distributions(results, case)));
    }
    let any = |_: &str| true;
    let axes = |title: &str, x, y| Axes { title: title.to_owned(), x, y, scales: Scales::Magnitudes };
    plots.push((
        axes("Guests that boot at once: until the last has all", "guests", "milliseconds"),
        lines(results, Workload::Boot, any, Figure::LastMs),
    ));
    plots.push((
        axes("Memory at rest", "networks", "resident MiB"),
        lines(results, Workload::Density, any, Figure::ResidentMib),
    ));
    plots.push((
        axes("Interface appears to first byte, median", "networks", "milliseconds"),
        lines(results, Workload::Density, any, Figure::FirstByteMs),
    ));
    let drawn = plots.into_iter().filter(|(_, lines)| lines.iter().any(|line| line.points.len() > 1));
    drawn.map(|(axes, lines)| draw(axes, &lines)).collect()
}

fn lines(results: &Results, workload: Workload, fits: impl Fn(&str) -> bool, figure: Figure) -> Vec<Line> {
    let of = |peer: &&str| {
        let cases = results.cases(workload).into_iter().filter(|case| fits(case));
        let point = |case| {
            let scale = results.runs(workload, case, peer).next()?.scale;
            Some((scale, results.spread(workload, case, peer, figure)?.median))
        };
        let mut points: Vec<(f64, f64)> = cases.filter_map(point).collect();
        points.sort_by(|one, other| one.0.total_cmp(&other.0));
        Line { name: (*peer).to_owned(), points }
    };
    results.peers(workload).iter().map(of).collect()
}

/// Over the number of nines: what is rare gets as much room as what is common.
fn distributions(results: &Results, case: &str) -> Vec<Line> {
    let of = |peer: &&str| {
        let runs: Vec<_> = results.runs(Workload::Requests, case, peer).collect();
        let shares = runs.first().map(|run| run.distribution.iter().map(|(share, _)| *share));
        let point = |(position, share): (usize, f64)| {
            let of_runs = runs.iter().filter_map(|run| run.distribution.get(position).map(|(_, us)| *us));
            (share < 1.0).then(|| (-(1.0 - share).log10(), Spread::of(of_runs).median))
        };
        let points = shares.into_iter().flatten().enumerate().filter_map(point).collect();
        Line { name: (*peer).to_owned(), points }
    };
    results.peers(Workload::Requests).iter().map(of).collect()
}

fn share(nines: f64) -> String {
    let percent = 100.0 * (1.0 - 10_f64.powf(-nines));
    format!("{}%", format!("{percent:.3}").trim_end_matches('0').trim_end_matches('.'))
}

fn draw(axes: Axes, lines: &[Line]) -> anyhow::Result<Plot> {
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        let drawn = area.fill(&WHITE).map_err(|e| e.to_string()).and_then(|()| draw_on(&area, &axes, lines));
        drawn
            .and_then(|()| area.present().map_err(|e| e.to_string()))
            .map_err(|e| anyhow!("draw {}: {e}", axes.title))?;
    }
    Ok(Plot { title: axes.title, svg })
}

fn draw_on(area: &DrawingArea<SVGBackend<'_>, Shift>, axes: &Axes, lines: &[Line]) -> Result<(), String> {
    let points = || lines.iter().flat_map(|line| line.points.iter().copied());
    let (x, y) = (around(points().map(|(x, _)| x)), around(points().map(|(_, y)| y)));
    let (area, beside) = area.split_horizontally(SIZE.0 - LEGEND);
    draw_legend(&beside, lines)?;
    let mut builder = ChartBuilder::on(&area);
    builder.margin(12).x_label_area_size(44).y_label_area_size(70).caption(&axes.title, ("sans-serif", 18));
    macro_rules! draw_chart {
        ($x:expr, $y:expr) => {{
            let mut chart = builder.build_cartesian_2d($x, $y).map_err(|e| e.to_string())?;
            chart
                .configure_mesh()
                .light_line_style(WHITE)
                .x_labels(TICKS)
                .x_desc(axes.x)
                .y_desc(axes.y)
                .x_label_formatter(&|value| {
                    if axes.scales == Scales::Nines { share(*value) } else { format!("{value:.0}") }
                })
                .y_label_formatter(&|value| plain(*value))
                .draw()
                .map_err(|e| e.to_string())?;
            for line in lines.iter().filter(|line| !line.points.is_empty()) {
                let colour = colour(&line.name);
                let style = colour.stroke_width(2);
                chart
                    .draw_series(LineSeries::new(line.points.iter().copied(), style))
                    .map_err(|e| e.to_string())?;
                chart
                    .draw_series(line.points.iter().map(|point| Circle::new(*point, 3, colour.filled())))
                    .map_err(|e| e.to_string())?;
            }
            Ok::<(), String>(())
        }};
    }
    match axes.scales {
        Scales::Magnitudes => draw_chart!(x.log_scale(), y.log_scale()),
        Scales::FromNothing => draw_chart!(x.log_scale(), 0.0..y.end),
        // Nines are logarithms already, and begin at none.
        Scales::Nines => draw_chart!(0.0..MOST_NINES, y.log_scale()),
    }
}

/// Beside the lines, where it hides none.
fn draw_legend(area: &DrawingArea<SVGBackend<'_>, Shift>, lines: &[Line]) -> Result<(), String> {
    for (line, y) in lines.iter().filter(|line| !line.points.is_empty()).zip((50..).step_by(22)) {
        let stroke = colour(&line.name).stroke_width(3);
        area.draw(&PathElement::new([(0, y), (18, y)], stroke)).map_err(|e| e.to_string())?;
        let name = Text::new(line.name.clone(), (24, y - 6), ("sans-serif", 12));
        area.draw(&name).map_err(|e| e.to_string())?;
    }
    Ok(())
}

/// The same for a peer in every plot, and paler where it bears more.
fn colour(peer: &str) -> RGBAColor {
    const OF_KINDS: [(&str, RGBColor); 5] = [
        ("direct", RGBColor(120, 120, 120)),
        ("haproxy", RGBColor(31, 119, 180)),
        ("host-haproxy", RGBColor(148, 103, 189)),
        ("ours", RGBColor(214, 39, 40)),
        ("ovn", RGBColor(44, 160, 44)),
    ];
    let (kind, bears_more) = peer.split_once(',').map_or((peer, false), |(kind, _)| (kind, true));
    let found = OF_KINDS.iter().find(|(name, _)| *name == kind).map(|(_, colour)| *colour);
    found.unwrap_or(RGBColor(255, 127, 14)).mix(if bears_more { 0.5 } else { 1.0 })
}

/// All of these, and a little room; a logarithm has no place for nothing.
fn around(values: impl Iterator<Item = f64>) -> Range<f64> {
    let spread = Spread::of(values.filter(|value| *value > 0.0));
    if spread.lowest.is_nan() { 1.0..10.0 } else { spread.lowest * 0.8..spread.highest * 1.6 }
}

fn plain(value: f64) -> String {
    if value >= 10.0 { format!("{value:.0}") } else { format!("{value}") }
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
    fn a_plot_is_one_whole_svg_that_names_its_peers() {
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
    fn shares_are_labelled_as_people_say_them() {
        assert_eq!([1.0, 2.0, 3.0].map(share), ["90%", "99%", "99.9%"]);
    }
}
