//! Shows a mask: a line a row, 0 where an element is dropped, 1 where it is kept.
//!
//!     cargo run --release --example mask -- --seed 42 --stream 7 --rows 4 --cols 20 --p 0.1

#[path = "common/probability.rs"]
mod probability;

use clap::Parser;
use fused_dropout::cpu::Cpu;
use fused_dropout::ops::keep_mask::Bytes;
use fused_dropout::{Dropout, Error, Groups, Key, Probability, RowMap, Shape, Shard};
use probability::probability;
use sha2::{Digest, Sha256};
use std::fmt::Display;
use std::io::{self, BufWriter, Write};
use std::process::ExitCode;

/// Shows which elements dropout drops: a line a row, 0 for dropped and 1 for kept.
///
/// The mask is a function of seed, stream, row and column (CONTRACT.md): the same on every machine,
/// and the same for a part of a tensor as for the whole.
#[derive(Parser)]
#[command(name = "mask", version)]
struct Arguments {
    /// The run's seed
    #[arg(long, value_name = "U64")]
    seed: u64,
    /// The number of the application of dropout
    #[arg(long, value_name = "U64")]
    stream: u64,
    /// Rows to show
    #[arg(long, value_name = "N")]
    rows: u64,
    /// Columns to show
    #[arg(long, value_name = "N")]
    cols: u64,
    /// Probability of dropping, 0 to 1 in steps of 1/65536
    #[arg(long, value_name = "P", allow_negative_numbers = true, value_parser = probability)]
    p: f64,
    /// Logical row of the first row shown, below 2^32
    #[arg(long, value_name = "R", default_value_t = 0)]
    origin_row: u32,
    /// Logical column of the first column shown, a multiple of 8
    #[arg(long, value_name = "C", default_value_t = 0)]
    origin_col: u64,
    /// Consecutive logical rows that share their decisions
    #[arg(long, value_name = "N", default_value_t = 1)]
    group_rows: u32,
    /// One decision for all columns of a row
    #[arg(long)]
    columns_together: bool,
    /// Print the SHA-256 of the lines, each ended by a newline, in place of the lines
    #[arg(long)]
    sha256: bool,
}

/// Bytes of mask that are held at a time.
const BUFFER: u64 = 1 << 20;

fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) if !error.use_stderr() => {
            // --help and --version.
            let _ = error.print();
            return ExitCode::SUCCESS;
        }
        Err(error) => return refuse(one_line(&error)),
    };
    if let Err(error) = check(&arguments) {
        return refuse(error.to_string());
    }
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        // Whoever read the lines has seen enough.
        Err(Failure::Io(error)) if error.kind() == io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(Failure::Io(error)) => {
            warn(error);
            ExitCode::FAILURE
        }
        Err(Failure::Refused(error)) => refuse(error.to_string()),
    }
}

enum Failure {
    Io(io::Error),
    Refused(Error),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Refused(error)
    }
}

fn refuse(why: String) -> ExitCode {
    warn(format!("{why} (--help lists the arguments)"));
    ExitCode::from(2)
}

/// To the standard error, if it is open.
fn warn(line: impl Display) {
    let _ = writeln!(io::stderr(), "mask: {line}");
}

/// What clap says in several lines, its first sentence and the names that belong to it in one.
fn one_line(error: &clap::Error) -> String {
    let text = error.to_string();
    let lines = text.lines().map(str::trim).take_while(|line| !line.is_empty());
    let line = lines.collect::<Vec<_>>().join(" ");
    line.strip_prefix("error: ").unwrap_or(&line).to_owned()
}

/// The mask of rows `row .. row + rows` and columns `col ..`, counted from the origin.
fn part<'a>(a: &Arguments, row: u64, col: u64) -> Result<Dropout<'a>, Error> {
    let rows = RowMap::Contiguous { first: a.origin_row + row as u32 };
    let dropout = Dropout::new(Key::new(a.seed, a.stream), Probability::new(a.p)?);
    let groups = Groups { rows: a.group_rows, columns_together: a.columns_together };
    Ok(dropout.shard(Shard { first_col: a.origin_col + col, rows }).groups(groups))
}

/// Refuses what the library would refuse, before the first line is printed.
fn check(a: &Arguments) -> Result<(), Error> {
    let refused = |argument, expected: &str, given: String| Error::Argument {
        operator: "arguments",
        argument,
        expected: expected.to_owned(),
        given,
    };
    if a.group_rows == 0 {
        return Err(refused("--group-rows", "at least 1", a.group_rows.to_string()));
    }
    if !a.origin_col.is_multiple_of(8) {
        return Err(refused("--origin-col", "a multiple of 8", a.origin_col.to_string()));
    }
    if u64::from(a.origin_row).checked_add(a.rows).is_none_or(|end| end > 1 << 32) {
        let given = format!("{} rows from row {}", a.rows, a.origin_row);
        return Err(refused("--rows", "logical rows below 2^32", given));
    }
    if a.origin_col.checked_add(a.cols).is_none_or(|end| end > fused_dropout::MAX_COLS) {
        let given = format!("{} columns from column {}", a.cols, a.origin_col);
        return Err(refused("--cols", "columns below 2^35", given));
    }
    Ok(())
}

fn run(a: &Arguments) -> Result<(), Failure> {
    // What is realised.
    warn(format!("p = {}/65536", Probability::new(a.p)?.threshold()));
    let mut out = BufWriter::new(io::stdout().lock());
    if !a.sha256 {
        lines(a, &mut |bytes| out.write_all(bytes))?;
        return Ok(out.flush()?);
    }
    let mut hash = Sha256::new();
    lines(a, &mut |bytes| {
        hash.update(bytes);
        Ok(())
    })?;
    let digest: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    writeln!(out, "{digest}")?;
    Ok(out.flush()?)
}

/// Gives the lines to `sink`, a bounded number of rows or, where a row is long, of columns at a time.
fn lines(a: &Arguments, sink: &mut dyn FnMut(&[u8]) -> io::Result<()>) -> Result<(), Failure> {
    let cpu = Cpu::new();
    let width = a.cols.clamp(1, BUFFER);
    let height = (BUFFER / width).max(1);
    let mut mask = Vec::new();
    let mut row = 0;
    while row < a.rows {
        // Several rows at a time only where a row is one piece.
        let rows = if a.cols > width { 1 } else { height.min(a.rows - row) };
        let mut col = 0;
        while col < a.cols {
            let cols = width.min(a.cols - col);
            mask.resize((rows * cols) as usize, 0);
            let shape = Shape::new(rows as usize, cols as usize);
            cpu.run(&part(a, row, col)?, Bytes { shape, out: &mut mask })?;
            mask.iter_mut().for_each(|keep| *keep += b'0');
            col += cols;
            for line in mask.chunks(cols as usize) {
                sink(line)?;
                if col == a.cols {
                    sink(b"\n")?;
                }
            }
        }
        if a.cols == 0 {
            (0..rows).try_for_each(|_| sink(b"\n"))?;
        }
        row += rows;
    }
    Ok(())
}
