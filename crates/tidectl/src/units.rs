//! Sizes, times and rates, as people write and read them.

use std::time::Duration;

/// Reads `4096`, `4K`, `512MiB`, `2 GiB`. Powers of 1024 throughout, as memory is.
///
/// # Errors
/// A sentence that says what is possible.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, unit) = text.split_at(digits);
    let shift = match unit.trim() {
        "" | "B" => 0,
        "K" | "k" | "KiB" => 10,
        "M" | "MiB" => 20,
        "G" | "GiB" => 30,
        "T" | "TiB" => 40,
        _ => {
            return Err(format!(
                "{text:?} is not a size; write 4096, 4K, 512MiB or 2GiB"
            ));
        }
    };
    number
        .parse::<u64>()
        .ok()
        .and_then(|n| n.checked_mul(1 << shift))
        .ok_or_else(|| format!("{text:?} is not a size; write 4096, 4K, 512MiB or 2GiB"))
}

/// Reads `300ms`, `2s`, `1.5s`, `2m`, and plain seconds.
///
/// # Errors
/// A sentence that says what is possible.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?} is not a time; write 300ms, 2s, 1.5s or 2m");
    let text = text.trim();
    let end = text
        .trim_end_matches(|c: char| c.is_ascii_alphabetic())
        .len();
    let (number, unit) = text.split_at(end);
    let factor = match unit {
        "ms" => 0.001,
        "" | "s" => 1.0,
        "m" | "min" => 60.0,
        _ => return Err(wrong()),
    };
    let seconds = number.trim().parse::<f64>().map_err(|_| wrong())? * factor;
    Duration::try_from_secs_f64(seconds).map_err(|_| wrong())
}

/// Reads an address: decimal or `0x` hexadecimal.
///
/// # Errors
/// A sentence that says what is possible.
pub fn parse_address(text: &str) -> Result<u64, String> {
    let text = text.trim();
    match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(hex) => u64::from_str_radix(&hex.replace('_', ""), 16),
        None => text.parse(),
    }
    .map_err(|_| format!("{text:?} is not an address; write 0x40000000"))
}

/// Writes bytes for people.
#[must_use]
pub fn size(bytes: u64) -> String {
    for (shift, unit) in [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")] {
        if bytes >= 1 << shift {
            let whole = bytes as f64 / (1u64 << shift) as f64;
            return if bytes.is_multiple_of(1 << shift) {
                format!("{whole:.0} {unit}")
            } else {
                format!("{whole:.1} {unit}")
            };
        }
    }
    format!("{bytes} B")
}

/// Writes a rate in MiB/s.
#[must_use]
pub fn rate(bytes: u64, time: Duration) -> String {
    format!("{:.1} MiB/s", mib_per_second(bytes, time))
}

/// Computes a rate in MiB/s; 0 for no time at all.
#[must_use]
pub fn mib_per_second(bytes: u64, time: Duration) -> f64 {
    let seconds = time.as_secs_f64();
    if seconds > 0.0 {
        bytes as f64 / (1 << 20) as f64 / seconds
    } else {
        0.0
    }
}

/// Writes a time for people.
#[must_use]
pub fn duration(time: Duration) -> String {
    let seconds = time.as_secs_f64();
    if seconds < 1.0 {
        format!("{:.0} ms", seconds * 1000.0)
    } else {
        format!("{seconds:.1} s")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(parse_size("512MiB"), Ok(512 << 20));
        assert_eq!(parse_size(" 4K "), Ok(4096));
        assert_eq!(parse_size("2 GiB"), Ok(2 << 30));
        assert_eq!(parse_size("17"), Ok(17));
        for wrong in ["", "MiB", "4MB", "-1", "1.5G", "99999999999T"] {
            assert!(parse_size(wrong).is_err(), "{wrong}");
        }
        assert_eq!(size(512 << 20), "512 MiB");
        assert_eq!(size(1536), "1.5 KiB");
        assert_eq!(size(7), "7 B");
    }

    #[test]
    fn times() {
        assert_eq!(parse_duration("300ms"), Ok(Duration::from_millis(300)));
        assert_eq!(parse_duration("1.5s"), Ok(Duration::from_millis(1500)));
        assert_eq!(parse_duration("2m"), Ok(Duration::from_secs(120)));
        assert_eq!(parse_duration("7"), Ok(Duration::from_secs(7)));
        for wrong in ["", "s", "-1s", "1h", "nan", "inf"] {
            assert!(parse_duration(wrong).is_err(), "{wrong}");
        }
        assert_eq!(duration(Duration::from_millis(20)), "20 ms");
        assert_eq!(duration(Duration::from_millis(1500)), "1.5 s");
    }

    #[test]
    fn addresses() {
        assert_eq!(parse_address("0x4000_0000"), Ok(0x4000_0000));
        assert_eq!(parse_address("4096"), Ok(4096));
        assert!(parse_address("x").is_err());
    }

    #[test]
    fn rates() {
        assert_eq!(rate(3 << 20, Duration::from_secs(2)), "1.5 MiB/s");
        assert_eq!(mib_per_second(1, Duration::ZERO), 0.0);
    }
}
