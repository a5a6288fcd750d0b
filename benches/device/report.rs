//! The rows that were timed: a table, and a file for the record.

use crate::about::About;
use crate::operators::Case;
use crate::results;
use crate::timer::Spread;
use anyhow::{Context, Result};
use serde::Serialize;
use std::{env, fs};

#[derive(Serialize)]
pub struct Row {
    #[serde(flatten)]
    pub case: Case,
    /// The fewest that it must move.
    pub bytes: usize,
    /// Of a call.
    pub seconds: Spread,
    pub samples: usize,
}

#[derive(Serialize)]
pub struct Report {
    pub device: About,
    pub clocks: Clocks,
    pub copy_bytes_per_second: f64,
    pub rows: Vec<Row>,
    /// What could not be timed, and why.
    pub skipped: Vec<String>,
}

/// What nvidia-smi said.
#[derive(Serialize)]
pub struct Clocks {
    pub before: String,
    pub after: String,
}

impl Row {
    /// What criterion has just recorded for `case` under `group` and `name`.
    ///
    /// # Errors
    /// Where its files are not as expected.
    pub fn recorded(case: Case, group: &str, name: &str) -> Result<Self> {
        #[derive(serde::Deserialize)]
        struct Sample {
            iters: Vec<f64>,
            times: Vec<f64>,
        }
        let path = results::newest(group, name).join("sample.json");
        let text = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let Sample { iters, times } = serde_json::from_slice(&text)?;
        let seconds: Vec<f64> = iters.iter().zip(&times).map(|(n, ns)| ns / n / 1e9).collect();
        let samples = seconds.len();
        Ok(Self { case, bytes: case.bytes(), seconds: Spread::of(seconds), samples })
    }
}

impl Report {
    /// Prints the table.
    pub fn print(&self) {
        let limit = self.copy_bytes_per_second;
        println!("\n{}, driver {}", self.device.device, self.device.driver);
        println!("copy of 1 GiB: {:.0} GB/s, reads and writes together\n", limit / 1e9);
        println!(
            "{:<28} {:<8} {:<5} {:>8} {:>6}  {:>10} {:>10} {:>10}  {:>7}  {:>6}",
            "operator", "pass", "", "rows", "cols", "us", "5 %", "95 %", "GB/s", "share"
        );
        for row in &self.rows {
            let Case { operator, pass, dtype, rows, cols } = row.case;
            let speed = row.bytes as f64 / row.seconds.median;
            let [median, p5, p95] =
                [row.seconds.median, row.seconds.p5, row.seconds.p95].map(|s| s * 1e6);
            println!(
                "{:<28} {:<8} {:<5} {rows:>8} {cols:>6}  {median:>10.2} {p5:>10.2} {p95:>10.2}  \
                 {:>7.0}  {:>5.1}%",
                word(&operator),
                word(&pass),
                word(&dtype),
                speed / 1e9,
                100.0 * speed / limit,
            );
        }
        self.skipped.iter().for_each(|skipped| println!("skipped: {skipped}"));
    }

    /// Writes it to the file that FUSED_DROPOUT_BENCH names, if it names one.
    ///
    /// # Errors
    /// Where it cannot be written.
    pub fn write(&self) -> Result<()> {
        let Some(path) = env::var_os("FUSED_DROPOUT_BENCH") else { return Ok(()) };
        let text = serde_json::to_string_pretty(self)?;
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
    }
}

/// A variant's name as in requests and records.
pub fn word(variant: &impl Serialize) -> String {
    let value = serde_json::to_value(variant).expect("a variant's name");
    value.as_str().expect("a variant's name").to_owned()
}
