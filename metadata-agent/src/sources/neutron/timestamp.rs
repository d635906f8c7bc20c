//! Parses Keystone's timestamps: `2026-11-23T04:01:44.000000Z`, always UTC.

use std::time::Duration;

/// Returns the seconds since 1970, without the fraction. `None` for anything else.
pub(super) fn seconds(text: &str) -> Option<i64> {
    let (date, time) = text.strip_suffix('Z')?.split_once('T')?;
    let [year, month, day] = numbers(date, '-')?;
    let [hour, minute, second] = numbers(time.split_once('.').map_or(time, |(whole, _)| whole), ':')?;
    let valid = (1..=12).contains(&month)
        && (1..=31).contains(&day)
        && (1970..=9999).contains(&year)
        && hour < 24
        && minute < 60
        && second <= 60;
    valid.then(|| days(year, month, day) * 86_400 + hour * 3600 + minute * 60 + second)
}

/// Returns the time from issue to expiry, independently of the clock of this host.
pub(super) fn between(issued: &str, expires: &str) -> Option<Duration> {
    let lifetime = seconds(expires)?.checked_sub(seconds(issued)?)?;
    u64::try_from(lifetime).ok().map(Duration::from_secs)
}

fn numbers<const N: usize>(text: &str, separator: char) -> Option<[i64; N]> {
    let parts = text.split(separator).map(|part| {
        let digits = (1..=4).contains(&part.len()) && part.bytes().all(|b| b.is_ascii_digit());
        digits.then(|| part.parse().ok()).flatten()
    });
    parts.collect::<Option<Vec<i64>>>()?.try_into().ok()
}

/// Returns the days from 1970-01-01 to a day of the Gregorian calendar. Counts years from March, so
/// that the leap day is the last day of a year.
fn days(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let month_from_march = (month + 9) % 12;
    let day_of_year = (153 * month_from_march + 2) / 5 + day - 1;
    365 * year + year / 4 - year / 100 + year / 400 + day_of_year - 719_468
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timestamps_follow_the_calendar() {
        for (text, want) in [
            ("1970-01-01T00:00:00Z", 0),
            ("2000-02-29T12:00:00.000000Z", 951_825_600),
            ("2001-03-01T00:00:00Z", 983_404_800),
            ("2026-11-23T04:01:44.000000Z", 1_795_406_504),
            ("2100-03-01T00:00:00Z", 4_107_542_400),
        ] {
            assert_eq!(seconds(text), Some(want), "{text}");
        }
        for bad in [
            "",
            "2026-11-23",
            "2026-11-23T04:01:44",
            "2026-13-01T00:00:00Z",
            "2026-1-1T+1:00:00Z",
            "a-b-cTd:e:fZ",
        ] {
            assert_eq!(seconds(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_lifetime_is_the_difference_and_never_negative() {
        let (made, end) = ("2026-12-31T23:59:30.000000Z", "2027-01-01T00:00:30.000000Z");
        assert_eq!(between(made, end), Some(Duration::from_mins(1)));
        assert_eq!(between(end, made), None);
    }
}
