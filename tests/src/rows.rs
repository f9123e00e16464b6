//! The rows of the benchmark: what each is called, what the peers measured, what it
//! must reach; and the file and table they end in.
//!
//! The peers' figures were measured on the same emulator and the same counting of
//! instructions; a row without one is a row the peer has nothing for.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde::Serialize;

/// What is fixed about a row.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    /// Its name in the file.
    pub name: &'static str,
    /// What it counts.
    pub unit: &'static str,
    /// KVM's figure.
    pub kvm: Option<f64>,
    /// Xen's figure.
    pub xen: Option<f64>,
    /// What must be reached; rows without a limit inform.
    pub limit: Option<f64>,
}

const fn row(
    name: &'static str,
    unit: &'static str,
    kvm: Option<f64>,
    xen: Option<f64>,
    limit: Option<f64>,
) -> Row {
    Row {
        name,
        unit,
        kvm,
        xen,
        limit,
    }
}

const COUNT: &str = "instructions";
const A_PAGE: &str = "instructions/page";
const RATIO: &str = "ratio";

/// Every row that a complete run has. A missing one is a failure.
pub const ROWS: &[Row] = &[
    row("hypercall", COUNT, Some(1367.0), Some(477.0), Some(100.0)),
    row("vgic_read", COUNT, Some(2210.0), Some(596.0), Some(450.0)),
    row("ipi", COUNT, Some(5219.0), Some(2175.0), Some(800.0)),
    row("write_fault_wp", A_PAGE, Some(13400.0), None, Some(450.0)),
    row("harvest_clean", A_PAGE, None, None, Some(6.0)),
    row("harvest_dirty", A_PAGE, Some(136.0), None, Some(24.0)),
    row("log_get_64m", COUNT, Some(1928.0), None, Some(1500.0)),
    row(
        "log_enable_256m",
        COUNT,
        Some(510_000.0),
        None,
        Some(20_000.0),
    ),
    row(
        "split_2m",
        "instructions/block",
        Some(900_000.0),
        None,
        Some(6000.0),
    ),
    row("first_touch", A_PAGE, Some(2690.0), None, Some(300.0)),
    row("longest_el2", COUNT, None, None, Some(28_000.0)),
    row("dirty_64m_dbm_ratio", RATIO, Some(64.0), None, Some(1.05)),
    row(
        "linux_boot_ratio",
        RATIO,
        Some(1.31),
        Some(1.02),
        Some(1.05),
    ),
    row(
        "linux_boot_wall_ratio",
        RATIO,
        Some(9.0),
        Some(1.0),
        Some(1.1),
    ),
    row("hypercall_unknown", COUNT, Some(1367.0), None, None),
    row("vgic_typer", COUNT, None, Some(601.0), None),
    row("uart_read", COUNT, Some(6994.0), Some(625.0), Some(300.0)),
    row("uart_read_post", COUNT, None, None, None),
    row("idreg_read", COUNT, None, Some(412.0), None),
    row("sgi_self", COUNT, None, Some(1105.0), Some(280.0)),
    row("ipi_return", COUNT, None, None, None),
    row("timer", COUNT, None, Some(925.0), Some(700.0)),
    row("timer_wfi", COUNT, None, Some(4258.0), None),
    row("loop_64m_untracked", COUNT, Some(3_470_000.0), None, None),
    row("loop_64m_dbm", COUNT, None, None, None),
    row("loop_64m_wp", COUNT, Some(223_000_000.0), None, None),
    row("touch_256m", COUNT, None, None, None),
    row("longest_exit", COUNT, None, None, None),
    row("linux_boot", COUNT, Some(1_150e6), Some(875e6), None),
    row("linux_boot_bare", COUNT, Some(875e6), Some(875e6), None),
    row("linux_boot_exits", "exits", None, None, None),
    row("linux_boot_wall", "seconds", Some(28.0), Some(2.9), None),
    row(
        "linux_boot_wall_bare",
        "seconds",
        Some(3.0),
        Some(3.2),
        None,
    ),
];

/// A row with its value, as it stands in the file.
#[derive(Clone, Debug, Serialize)]
pub struct Measured {
    /// Its name.
    pub name: &'static str,
    /// What was measured.
    pub value: f64,
    /// What it counts.
    pub unit: &'static str,
    /// KVM's figure.
    pub kvm: Option<f64>,
    /// Xen's figure.
    pub xen: Option<f64>,
    /// What must be reached.
    pub limit: Option<f64>,
}

impl Measured {
    /// Is there a limit that it exceeds?
    #[must_use]
    pub fn exceeds(&self) -> bool {
        self.limit.is_some_and(|limit| self.value > limit)
    }
}

/// The values of a run.
#[derive(Clone, Debug, Default)]
pub struct Report {
    rows: Vec<Measured>,
}

impl Report {
    /// Adds a measured value. The name must be one of [`ROWS`], once.
    pub fn add(&mut self, name: &str, value: f64) -> Result<()> {
        let row = ROWS.iter().find(|row| row.name == name);
        let row = row.with_context(|| format!("nobody asked for a row called {name}"))?;
        ensure!(
            self.value(name).is_none(),
            "the row {name} was measured twice"
        );
        ensure!(
            value.is_finite() && value > 0.0,
            "{name} cannot be {value}: the measurement is broken"
        );
        self.rows.push(Measured {
            name: row.name,
            value,
            unit: row.unit,
            kvm: row.kvm,
            xen: row.xen,
            limit: row.limit,
        });
        Ok(())
    }

    /// The value of a row, if it was measured.
    #[must_use]
    pub fn value(&self, name: &str) -> Option<f64> {
        let row = self.rows.iter().find(|row| row.name == name);
        row.map(|row| row.value)
    }

    /// The value of a row that another row is made of.
    pub fn need(&self, name: &str) -> Result<f64> {
        self.value(name)
            .with_context(|| format!("the row {name} is missing"))
    }

    /// Adds the rows that follow from the three loops over 64 MiB.
    pub fn derive_loops(&mut self) -> Result<()> {
        const PAGES: f64 = 16384.0;
        let untracked = self.need("loop_64m_untracked")?;
        let dbm = self.need("loop_64m_dbm")?;
        let protect = self.need("loop_64m_wp")?;
        self.add("dirty_64m_dbm_ratio", dbm / untracked)?;
        self.add("write_fault_wp", (protect - untracked) / PAGES)
    }

    /// The names of rows that were not measured.
    #[must_use]
    pub fn missing(&self) -> Vec<&'static str> {
        let names = ROWS.iter().map(|row| row.name);
        names.filter(|name| self.value(name).is_none()).collect()
    }

    /// The rows over their limits.
    #[must_use]
    pub fn exceeded(&self) -> Vec<&Measured> {
        self.rows.iter().filter(|row| row.exceeds()).collect()
    }

    /// Writes the rows as JSON, in the order of [`ROWS`].
    pub fn write(&self, path: &Path) -> Result<()> {
        let text = serde_json::to_string_pretty(&self.in_order())?;
        std::fs::write(path, text + "\n")
            .with_context(|| format!("cannot write {}", path.display()))
    }

    /// The rows as a table for people.
    #[must_use]
    pub fn table(&self) -> String {
        let mut out = format!(
            "{:<22} {:>15} {:>13} {:>13} {:>9}  {}\n",
            "row", "value", "KVM", "Xen", "limit", "unit"
        );
        for row in self.in_order() {
            let mark = match (row.limit, row.exceeds()) {
                (None, _) => "",
                (Some(_), true) => "  OVER THE LIMIT",
                (Some(_), false) => "  ok",
            };
            out += &format!(
                "{:<22} {:>15} {:>13} {:>13} {:>9}  {}{mark}\n",
                row.name,
                number(Some(row.value)),
                number(row.kvm),
                number(row.xen),
                number(row.limit),
                row.unit,
            );
        }
        out
    }

    fn in_order(&self) -> Vec<&Measured> {
        let named = |row: &Row| self.rows.iter().find(|measured| measured.name == row.name);
        ROWS.iter().filter_map(named).collect()
    }
}

/// A figure with thousands apart, or a dash.
fn number(value: Option<f64>) -> String {
    let Some(value) = value else {
        return "-".to_owned();
    };
    if value < 100.0 {
        return format!("{value:.3}");
    }
    let digits = format!("{value:.0}");
    let mut out = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index) % 3 == 0 {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// Reads `cntvct=N cntfrq=N` anywhere in `text`.
pub fn parse_counter(text: &str) -> Option<(u64, u64)> {
    let field = |name: &str| -> Option<u64> {
        let rest = text.split_once(name)?.1;
        let end = rest.find(|letter: char| !letter.is_ascii_digit());
        rest.get(..end.unwrap_or(rest.len()))?.parse().ok()
    };
    Some((field("cntvct=")?, field("cntfrq=")?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loops_give_the_fault_cost_and_the_ratio() {
        let mut report = Report::default();
        report.add("loop_64m_untracked", 3_000_000.0).expect("add");
        report.add("loop_64m_dbm", 3_060_000.0).expect("add");
        report
            .add("loop_64m_wp", 3_000_000.0 + 16384.0 * 900.0)
            .expect("add");
        report.derive_loops().expect("derive");
        assert!((report.need("dirty_64m_dbm_ratio").expect("row") - 1.02).abs() < 1e-9);
        assert!((report.need("write_fault_wp").expect("row") - 900.0).abs() < 1e-6);
    }

    #[test]
    fn a_missing_row_and_an_exceeded_limit_show() {
        let mut report = Report::default();
        report.add("hypercall", 250.0).expect("add");
        assert_eq!(report.exceeded().len(), 1);
        assert!(report.table().contains("OVER THE LIMIT"));
        assert_eq!(report.missing().len(), ROWS.len() - 1);
        assert!(report.add("hypercall", 1.0).is_err(), "twice");
        assert!(report.add("speed", 1.0).is_err(), "unknown");
        assert!(report.add("ipi", 0.0).is_err(), "not a measurement");
    }

    #[test]
    fn what_guests_print_is_read() {
        assert_eq!(
            parse_counter("x cntvct=87 cntfrq=1000000000\r\n"),
            Some((87, 1_000_000_000))
        );
        assert_eq!(parse_counter("cntvct= cntfrq=1"), None);
    }

    #[test]
    fn figures_are_readable() {
        assert_eq!(number(Some(1_150e6)), "1,150,000,000");
        assert_eq!(number(Some(1.0312)), "1.031");
        assert_eq!(number(None), "-");
    }
}
