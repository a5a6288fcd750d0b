//! What the benchmarks share: groups of rows beside a copy, the limit of whatever moves bytes, and the
//! table at the end.

mod results;

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, Criterion, Throughput};
use fused_dropout::Dtype;
use rand_philox::Philox;
use rayon::prelude::*;
use std::time::Duration;

/// A run of criterion, and the rows that it has timed.
pub struct Report {
    criterion: Criterion,
    rows: Vec<Row>,
}

struct Row {
    group: String,
    name: String,
    bytes: usize,
}

/// A group of rows.
pub struct Group<'a> {
    group: BenchmarkGroup<'a, WallTime>,
    rows: &'a mut Vec<Row>,
    name: String,
}

const COPY: &str = "copy";

impl Report {
    /// With the command line's settings.
    pub fn new() -> Self {
        let criterion = Criterion::default()
            .sample_size(20)
            .warm_up_time(Duration::from_millis(500))
            .measurement_time(Duration::from_secs(2))
            .configure_from_args();
        Self { criterion, rows: Vec::new() }
    }

    /// A group whose first row is a copy that moves `bytes` bytes, reads and writes together.
    pub fn group(&mut self, name: &str, bytes: usize) -> Group<'_> {
        let group = self.criterion.benchmark_group(name);
        let mut group = Group { group, rows: &mut self.rows, name: name.to_owned() };
        let from = random::<f32>(bytes / 8);
        let mut to = vec![0.0f32; bytes / 8];
        group.row(COPY, bytes, || copy(&from, &mut to));
        group
    }

    /// Prints each row beside a copy of the same bytes.
    pub fn finish(self) {
        self.criterion.final_summary();
        if self.rows.is_empty() {
            return;
        }
        let width =
            |of: fn(&Row) -> &str| self.rows.iter().map(|row| of(row).len()).max().unwrap_or(0);
        let (group, name) = (width(|row| &row.group), width(|row| &row.name));
        println!(
            "\n{:<group$}  {:<name$}  {:>9}  {:>7}  {:>10}",
            "group", "row", "ms", "GB/s", "times copy"
        );
        for row in &self.rows {
            let Some(seconds) = row.median() else { continue };
            let copy =
                self.rows.iter().find(|other| other.name == COPY && other.group == row.group);
            let times = copy.and_then(|copy| {
                Some(seconds / row.bytes as f64 / copy.median()? * copy.bytes as f64)
            });
            println!(
                "{:<group$}  {:<name$}  {:>9.2}  {:>7.1}  {:>10}",
                row.group,
                row.name,
                seconds * 1e3,
                row.bytes as f64 / seconds / 1e9,
                times.map_or_else(|| "-".to_owned(), |times| format!("{times:.2}")),
            );
        }
    }
}

impl Group<'_> {
    /// Times `f`, which need not move more than `bytes` bytes.
    pub fn row(&mut self, name: &str, bytes: usize, mut f: impl FnMut()) {
        let mut ran = false;
        self.group.throughput(Throughput::Bytes(bytes as u64));
        self.group.bench_function(name, |bencher| {
            ran = true;
            bencher.iter(&mut f);
        });
        if ran {
            self.rows.push(Row { group: self.name.clone(), name: name.to_owned(), bytes });
        }
    }
}

impl Row {
    /// Seconds, as criterion has just recorded them.
    fn median(&self) -> Option<f64> {
        let text =
            std::fs::read(results::newest(&self.group, &self.name).join("estimates.json")).ok()?;
        let estimates: serde_json::Value = serde_json::from_slice(&text).ok()?;
        Some(estimates["median"]["point_estimate"].as_f64()? / 1e9)
    }
}

/// Ordinary values, never zeros.
pub fn random<T: Dtype>(len: usize) -> Vec<T> {
    let mut philox = Philox::from_u64_seed(1);
    (0..len)
        .map(|_| T::from_f32(rand_philox::u32_to_unit_f32(philox.next_u32()) * 4.0 - 2.0))
        .collect()
}

/// A copy on all threads, in pieces as large as the operators' own; memcpy chooses how it stores.
fn copy<T: Copy + Send + Sync>(from: &[T], to: &mut [T]) {
    let chunk = from.len().div_ceil(4 * rayon::current_num_threads());
    to.par_chunks_mut(chunk).zip(from.par_chunks(chunk)).for_each(|(to, from)| {
        to.copy_from_slice(from);
    });
}
