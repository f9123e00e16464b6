//! The rows: what each is called, what it must reach; and the file and table they end in.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Serialize;

/// What a value must reach.
#[derive(Clone, Copy, Debug)]
enum Limit {
    AtLeast(f64),
    AtMost(f64),
    /// The row informs.
    None,
}

struct Row {
    name: &'static str,
    unit: &'static str,
    limit: Limit,
}

const fn row(name: &'static str, unit: &'static str, limit: Limit) -> Row {
    Row { name, unit, limit }
}

const RATIO: &str = "ratio";
const ENTRY: &str = "ns/entry";

/// Every row of a complete run.
const ROWS: &[Row] = &[
    row("harvest_clean_over_read", RATIO, Limit::AtLeast(0.8)),
    row("harvest_runs_over_read", RATIO, Limit::AtLeast(0.75)),
    row("harvest_random_over_read", RATIO, Limit::AtLeast(0.65)),
    row("harvest_two_threads", RATIO, Limit::AtLeast(0.8)),
    row("adaptive_over_page", RATIO, Limit::AtLeast(25.0)),
    row("enable_64g_us", "us", Limit::AtMost(1000.0)),
    row("log_bits_per_page", "bits/page", Limit::AtMost(2.0)),
    row("read", ENTRY, Limit::None),
    row("harvest_clean", ENTRY, Limit::None),
    row("harvest_runs", ENTRY, Limit::None),
    row("harvest_random", ENTRY, Limit::None),
];

/// A row with its value, as it stands in the file.
#[derive(Serialize)]
struct Measured {
    name: &'static str,
    value: f64,
    unit: &'static str,
    limit: Option<f64>,
}

/// The values of a run.
#[derive(Default)]
pub struct Report(BTreeMap<&'static str, f64>);

impl Report {
    /// Adds a value; its name must be one of [`ROWS`].
    pub fn add(&mut self, name: &'static str, value: f64) {
        assert!(
            ROWS.iter().any(|row| row.name == name),
            "no row is called {name}"
        );
        assert!(value.is_finite() && value > 0.0, "{name} cannot be {value}");
        self.0.insert(name, value);
    }

    /// The names of rows that were not measured.
    pub fn missing(&self) -> Vec<&'static str> {
        let names = ROWS.iter().map(|row| row.name);
        names.filter(|name| !self.0.contains_key(name)).collect()
    }

    /// The names of rows that miss their limit.
    pub fn missed(&self) -> Vec<&'static str> {
        let missed = |(row, value): &(&Row, f64)| row.met(*value) == Some(false);
        self.rows()
            .filter(missed)
            .map(|(row, _)| row.name)
            .collect()
    }

    /// Writes the rows to `bench/native.json` of the target directory.
    pub fn write(&self) -> std::io::Result<PathBuf> {
        let measured = |(row, value): (&Row, f64)| Measured {
            name: row.name,
            value,
            unit: row.unit,
            limit: row.limit.value(),
        };
        let rows: Vec<Measured> = self.rows().map(measured).collect();
        // Cargo makes this directory for us, inside the target directory it builds into.
        let scratch = Path::new(env!("CARGO_TARGET_TMPDIR"));
        let target = match std::env::var_os("TIDEMARK_TARGET") {
            Some(path) if !path.is_empty() => PathBuf::from(path),
            _ => scratch.parent().unwrap_or(scratch).to_owned(),
        };
        let dir = target.join("bench");
        std::fs::create_dir_all(&dir)?;
        let path = dir.join("native.json");
        std::fs::write(&path, serde_json::to_string_pretty(&rows)? + "\n")?;
        Ok(path)
    }

    /// The rows as a table for people.
    pub fn table(&self) -> String {
        let mut out = format!(
            "{:<26} {:>10}  {:<10} {:>14}\n",
            "row", "value", "unit", "limit"
        );
        for (row, value) in self.rows() {
            let limit = match row.limit {
                Limit::AtLeast(limit) => format!("at least {limit}"),
                Limit::AtMost(limit) => format!("at most {limit}"),
                Limit::None => String::new(),
            };
            let met = match row.met(value) {
                None => "",
                Some(true) => "  met",
                Some(false) => "  NOT MET",
            };
            let name = row.name;
            out += &format!(
                "{name:<26} {value:>10.3}  {:<10} {limit:>14}{met}\n",
                row.unit
            );
        }
        out
    }

    fn rows(&self) -> impl Iterator<Item = (&'static Row, f64)> {
        ROWS.iter()
            .filter_map(|row| Some((row, *self.0.get(row.name)?)))
    }
}

impl Row {
    fn met(&self, value: f64) -> Option<bool> {
        match self.limit {
            Limit::AtLeast(limit) => Some(value >= limit),
            Limit::AtMost(limit) => Some(value <= limit),
            Limit::None => None,
        }
    }
}

impl Limit {
    fn value(self) -> Option<f64> {
        match self {
            Limit::AtLeast(limit) | Limit::AtMost(limit) => Some(limit),
            Limit::None => None,
        }
    }
}
