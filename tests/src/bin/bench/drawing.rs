//! A line chart as SVG. A peer has the same colour in every chart, and each point shows its spread.

use std::ops::Range;

use anyhow::anyhow;
use plotters::coord::Shift;
use plotters::coord::ranged1d::{DefaultFormatting, KeyPointHint};
use plotters::coord::types::RangedCoordf64;
use plotters::prelude::{
    ChartBuilder, Circle, DrawingArea, ErrorBar, IntoDrawingArea as _, LineSeries, PathElement, RGBColor,
    Ranged, SVGBackend, Text, WHITE,
};
use plotters::style::{Color as _, RGBAColor};

use super::statistics::Spread;

const SIZE: (u32, u32) = (760, 420);
/// The part of the width for the legend.
const LEGEND: u32 = 215;
const TITLE: u32 = 34;
const BAR: u32 = 8;
/// 50 % as a number of nines.
const NINES_OF_HALF: f64 = std::f64::consts::LOG10_2;
/// The end of the axis of shares, beyond 99.99 %.
const MOST_NINES: f64 = 4.2;
/// An axis with more powers of ten than this has ticks at these alone.
const MANY_MAGNITUDES: f64 = 2.5;
/// The number of ticks on a linear axis.
const MARKS: f64 = 6.0;
/// The minimum distance of two ticks in powers of ten, so that their numbers fit.
const APART: f64 = 0.12;

#[derive(Clone, Debug)]
pub struct Chart {
    pub name: &'static str,
    pub title: &'static str,
    pub x: &'static str,
    pub y: &'static str,
    pub scales: Scales,
    pub lines: Vec<Line>,
}

/// The scales of both axes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scales {
    /// Both axes are logarithmic.
    Magnitudes,
    /// The vertical axis is linear and starts at zero.
    FromNothing,
    /// The horizontal axis shows a share as a number of nines.
    Nines,
}

/// A peer's points, in order.
#[derive(Clone, Debug)]
pub struct Line {
    name: String,
    pub points: Vec<Point>,
}

#[derive(Clone, Copy, Debug)]
pub struct Point {
    pub x: f64,
    pub y: Spread,
}

impl Line {
    pub fn new(name: &str, mut points: Vec<Point>) -> Self {
        points.retain(|point| point.x.is_finite() && point.y.median.is_finite());
        points.sort_by(|one, other| one.x.total_cmp(&other.x));
        // Variants with equal load are not a line; the first stands for them.
        points.dedup_by(|later, first| later.x.total_cmp(&first.x).is_eq());
        Self { name: name.to_owned(), points }
    }
}

impl Chart {
    /// Removes peers with a single point.
    pub fn of_lines(mut self) -> Self {
        self.lines.retain(|line| line.points.len() > 1);
        self
    }
}

/// Draws the chart as SVG.
pub fn draw(chart: &Chart) -> anyhow::Result<String> {
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        let drawn = area.fill(&WHITE).map_err(|e| e.to_string()).and_then(|()| draw_on(&area, chart));
        drawn
            .and_then(|()| area.present().map_err(|e| e.to_string()))
            .map_err(|e| anyhow!("draw {}: {e}", chart.title))?;
    }
    Ok(svg)
}

fn draw_on(area: &DrawingArea<SVGBackend<'_>, Shift>, chart: &Chart) -> Result<(), String> {
    let Chart { scales, lines, .. } = chart;
    let points = || lines.iter().flat_map(|line| &line.points);
    let x = around(points().map(|point| point.x));
    let y = around(points().flat_map(|point| [point.y.lowest, point.y.highest]));
    let title = Text::new(chart.title, (16, 12), ("sans-serif", 18));
    area.draw(&title).map_err(|e| e.to_string())?;
    let (_, area) = area.split_vertically(TITLE);
    let (area, beside) = area.split_horizontally(SIZE.0 - LEGEND);
    draw_legend(&beside, lines)?;
    let mut builder = ChartBuilder::on(&area);
    builder.margin(12).x_label_area_size(44).y_label_area_size(80);
    let measured = measured(points().map(|point| point.x));
    let (x, y) = match scales {
        Scales::Magnitudes => (Axis::of_magnitudes(x, measured), Axis::of_magnitudes_marked(y)),
        Scales::FromNothing => (Axis::of_magnitudes(x, measured), Axis::from_nothing(y.end * 0.85)),
        Scales::Nines => (Axis::of_nines(), Axis::of_magnitudes_marked(y)),
    };
    let mut on_axes = builder.build_cartesian_2d(x, y).map_err(|e| e.to_string())?;
    on_axes
        .configure_mesh()
        .light_line_style(WHITE)
        .x_desc(chart.x)
        .y_desc(chart.y)
        .axis_desc_style(("sans-serif", 15))
        .label_style(("sans-serif", 14))
        .x_label_formatter(&|value| if *scales == Scales::Nines { share(*value) } else { plain(*value) })
        .y_label_formatter(&|value| plain(*value))
        .draw()
        .map_err(|e| e.to_string())?;
    for line in lines {
        let colour = colour(&line.name);
        let middle = line.points.iter().map(|point| (point.x, point.y.median));
        let drawn = on_axes.draw_series(LineSeries::new(middle.clone(), colour.stroke_width(2)));
        drawn.map_err(|e| e.to_string())?;
        let spread = line.points.iter().filter(|point| point.y.lowest < point.y.highest);
        let bar = |Point { x, y }: &Point| {
            ErrorBar::new_vertical(*x, y.lowest, y.median, y.highest, colour.stroke_width(1), BAR)
        };
        on_axes.draw_series(spread.map(bar)).map_err(|e| e.to_string())?;
        let dots = middle.map(|point| Circle::new(point, 3, colour.filled()));
        on_axes.draw_series(dots).map_err(|e| e.to_string())?;
    }
    Ok(())
}

/// An axis with chosen ticks.
struct Axis {
    range: Range<f64>,
    /// The linear coordinate: the values or their logarithms.
    proportional: RangedCoordf64,
    by_magnitude: bool,
    marks: Vec<f64>,
}

impl Axis {
    fn in_proportion(range: Range<f64>, marks: Vec<f64>) -> Self {
        Self { proportional: range.clone().into(), range, by_magnitude: false, marks }
    }

    fn from_nothing(end: f64) -> Self {
        Self::in_proportion(0.0..end, proportions(end))
    }

    /// Nines are logarithms already and start at zero.
    fn of_nines() -> Self {
        Self::in_proportion(0.0..MOST_NINES, vec![0.0, NINES_OF_HALF, 1.0, 2.0, 3.0, 4.0])
    }

    fn of_magnitudes(range: Range<f64>, marks: Vec<f64>) -> Self {
        Self { proportional: (range.start.ln()..range.end.ln()).into(), range, by_magnitude: true, marks }
    }

    fn of_magnitudes_marked(range: Range<f64>) -> Self {
        let marks = magnitudes(&range);
        Self::of_magnitudes(range, marks)
    }
}

impl Ranged for Axis {
    type FormatOption = DefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, limit: (i32, i32)) -> i32 {
        self.proportional.map(&if self.by_magnitude { value.ln() } else { *value }, limit)
    }

    fn key_points<Hint: KeyPointHint>(&self, _hint: Hint) -> Vec<f64> {
        self.marks.clone()
    }

    fn range(&self) -> Range<f64> {
        self.range.clone()
    }
}

/// Draws the legend beside the lines, where it hides none.
fn draw_legend(area: &DrawingArea<SVGBackend<'_>, Shift>, lines: &[Line]) -> Result<(), String> {
    for (line, y) in lines.iter().zip((24..).step_by(22)) {
        let stroke = colour(&line.name).stroke_width(3);
        area.draw(&PathElement::new([(0, y), (18, y)], stroke)).map_err(|e| e.to_string())?;
        let name = Text::new(line.name.clone(), (24, y - 6), ("sans-serif", 14));
        area.draw(&name).map_err(|e| e.to_string())?;
    }
    Ok(())
}

/// Returns the colour of a peer, the same in every plot and paler under more load.
fn colour(peer: &str) -> RGBAColor {
    const OF_KINDS: [(&str, RGBColor); 7] = [
        ("direct", RGBColor(120, 120, 120)),
        ("haproxy", RGBColor(31, 119, 180)),
        ("host-haproxy", RGBColor(148, 103, 189)),
        ("ours", RGBColor(214, 39, 40)),
        ("ovn", RGBColor(44, 160, 44)),
        ("neutron-agent", RGBColor(255, 127, 14)),
        ("legacy", RGBColor(140, 86, 75)),
    ];
    let kind = peer.split([',', ' ']).next().unwrap_or(peer);
    let found = OF_KINDS.iter().find(|(name, _)| *name == kind).map(|(_, colour)| *colour);
    found.unwrap_or(RGBColor(23, 190, 207)).mix(if peer.contains(',') { 0.5 } else { 1.0 })
}

/// Returns the range of all values and a margin. A logarithmic axis excludes zero.
fn around(values: impl Iterator<Item = f64>) -> Range<f64> {
    let spread = Spread::new(values.filter(|value| *value > 0.0));
    if spread.lowest.is_nan() { 1.0..10.0 } else { spread.lowest * 0.8..spread.highest * 1.25 }
}

/// Returns ticks at the measured values. If two are too close, only the second is kept.
fn measured(values: impl Iterator<Item = f64>) -> Vec<f64> {
    let mut marks: Vec<f64> = values.filter(|value| *value > 0.0).collect();
    marks.sort_by(f64::total_cmp);
    let mut apart: Vec<f64> = Vec::new();
    for mark in marks {
        if apart.last().is_some_and(|last| (mark / last).log10() < APART) {
            apart.pop();
        }
        apart.push(mark);
    }
    apart
}

/// Returns ticks at powers of ten and, if there is room, at two and five times these.
fn magnitudes(range: &Range<f64>) -> Vec<f64> {
    let many = (range.end / range.start).log10() > MANY_MAGNITUDES;
    let steps: &[f64] = if many { &[1.0] } else { &[1.0, 2.0, 5.0] };
    let mut marks = Vec::new();
    let mut power = 10_f64.powf(range.start.log10().floor());
    while power <= range.end {
        marks.extend(steps.iter().map(|step| step * power).filter(|mark| range.contains(mark)));
        power *= 10.0;
    }
    marks
}

/// Returns ticks at equal distances from zero: ones, twos or fives.
fn proportions(end: f64) -> Vec<f64> {
    let rough = end / MARKS;
    let power = 10_f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].iter().map(|step| step * power).find(|step| *step >= rough);
    let step = step.unwrap_or(rough);
    std::iter::successors(Some(0.0), |mark| Some(mark + step)).take_while(|mark| *mark <= end).collect()
}

fn share(nines: f64) -> String {
    let percent = 100.0 * (1.0 - 10_f64.powf(-nines));
    format!("{}%", format!("{percent:.3}").trim_end_matches('0').trim_end_matches('.'))
}

/// Formats a number with separated thousands and only significant digits.
fn plain(value: f64) -> String {
    if value < 1000.0 {
        let text = format!("{value:.3}");
        return if text.contains('.') {
            text.trim_end_matches('0').trim_end_matches('.').to_owned()
        } else {
            text
        };
    }
    let digits = format!("{value:.0}");
    let mut grouped = String::new();
    for (position, digit) in digits.chars().enumerate() {
        if position > 0 && (digits.len() - position).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_and_numbers_have_readable_labels() {
        assert_eq!([0.0, 1.0, 2.0, 3.0].map(share), ["0%", "90%", "99%", "99.9%"]);
        assert_eq!(share(NINES_OF_HALF), "50%");
        assert_eq!([0.05, 2.0, 999.0, 4001.0, 1e6].map(plain), ["0.05", "2", "999", "4,001", "1,000,000"]);
    }

    #[test]
    fn axis_ticks_leave_room() {
        assert_eq!(magnitudes(&(0.8..1e4)), [1.0, 10.0, 100.0, 1000.0]);
        assert_eq!(magnitudes(&(30.0..300.0)), [50.0, 100.0, 200.0]);
        assert_eq!(proportions(29_000.0), [0.0, 5000.0, 10_000.0, 15_000.0, 20_000.0, 25_000.0]);
        assert_eq!(measured([1.0, 1000.0, 1001.0, 64.0].into_iter()), [1.0, 64.0, 1001.0]);
    }

    #[test]
    fn the_same_peer_under_more_load_is_drawn_paler() {
        assert_eq!(colour("ours").rgb(), colour("ours, 4000 more ports").rgb());
        assert!(colour("ours").alpha() > colour("ours, 4000 more ports").alpha());
        assert_eq!(colour("neutron-agent (RPC replaced)").rgb(), (255, 127, 14));
        assert_ne!(colour("legacy").rgb(), colour("another").rgb());
    }
}
