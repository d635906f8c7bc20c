//! Median and range of a few repetitions.

use std::fmt;

/// The median of some figures, with the lowest and the highest.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spread {
    pub lowest: f64,
    pub median: f64,
    pub highest: f64,
}

impl Spread {
    /// Requires at least one figure; otherwise the median is NaN.
    pub fn new(figures: impl IntoIterator<Item = f64>) -> Self {
        let mut sorted: Vec<f64> = figures.into_iter().collect();
        sorted.sort_by(f64::total_cmp);
        let (Some(lowest), Some(highest)) = (sorted.first(), sorted.last()) else {
            return Self { lowest: f64::NAN, median: f64::NAN, highest: f64::NAN };
        };
        let (upper, lower) = (sorted[sorted.len() / 2], sorted[(sorted.len() - 1) / 2]);
        Self { lowest: *lowest, median: f64::midpoint(lower, upper), highest: *highest }
    }

    /// Returns the spread of the ratios of corresponding figures.
    pub fn of_ratios(figures: impl IntoIterator<Item = f64>, to: impl IntoIterator<Item = f64>) -> Self {
        Self::new(figures.into_iter().zip(to).map(|(figure, to)| figure / to))
    }
}

impl fmt::Display for Spread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let digits = f.precision().unwrap_or(2);
        write!(f, "{:.digits$}", self.median)?;
        // A single figure has no spread.
        if self.lowest < self.highest {
            write!(f, " ({:.digits$}..{:.digits$})", self.lowest, self.highest)?;
        }
        Ok(())
    }
}

/// Converts a count for arithmetic.
#[expect(clippy::cast_precision_loss, reason = "counts of a bench are far below 2^52")]
pub fn precise(count: u64) -> f64 {
    count as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_median_is_the_middle_one_or_between_the_middle_two() {
        assert_eq!(Spread::new([3.0, 1.0, 2.0]), Spread { lowest: 1.0, median: 2.0, highest: 3.0 });
        assert_eq!(Spread::new([4.0, 1.0, 2.0, 3.0]), Spread { lowest: 1.0, median: 2.5, highest: 4.0 });
        assert!(Spread::new([]).median.is_nan());
    }

    #[test]
    fn a_spread_is_shown_if_there_is_one() {
        assert_eq!(format!("{:.1}", Spread::new([3.0, 1.0, 2.0])), "2.0 (1.0..3.0)");
        assert_eq!(format!("{:.0}", Spread::new([2.0])), "2");
    }

    #[test]
    fn ratios_are_taken_run_by_run() {
        let ratios = Spread::of_ratios([1.0, 2.0, 9.0], [2.0, 4.0, 10.0]);
        assert_eq!(ratios, Spread { lowest: 0.5, median: 0.5, highest: 0.9 });
    }
}
