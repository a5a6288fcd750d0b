//! Holds the crate to the contract's known answers, `tests/vectors/contract.txt`: the functions that
//! state the contract, the CPU at each SIMD level, and the kernels on the host.

use fused_dropout::ops::keep_mask::Bytes;
use fused_dropout::{Dropout, Groups, Key, Probability, RowMap, Shape, Shard, cpu};
use sha2::{Digest, Sha256};

const VECTORS: &str = include_str!("vectors/contract.txt");

/// The fields behind the first one of every line that starts with `kind`.
fn entries(kind: &str) -> Vec<Vec<&'static str>> {
    let lines = VECTORS.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let found: Vec<_> =
        lines.filter(|fields| fields.first() == Some(&kind)).map(|f| f[1..].to_vec()).collect();
    assert!(!found.is_empty(), "no {kind} in the file");
    found
}

fn number(field: &str) -> u64 {
    match field.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).unwrap(),
        None => field.parse().unwrap(),
    }
}

fn numbers(fields: &[&str]) -> Vec<u64> {
    fields.iter().map(|field| number(field)).collect()
}

fn words(numbers: &[u64]) -> [u32; 4] {
    std::array::from_fn(|i| u32::try_from(numbers[i]).unwrap())
}

#[test]
fn philox_words() {
    for entry in entries("philox") {
        let n = numbers(&entry);
        let key = [n[4] as u32, n[5] as u32];
        assert_eq!(rand_philox::philox4x32_10(words(&n), key), words(&n[6..]), "{entry:?}");
    }
}

#[test]
fn philox_keys() {
    for entry in entries("key") {
        let n = numbers(&entry);
        assert_eq!(Key::new(n[0], 0).philox_key(), [n[1] as u32, n[2] as u32], "{entry:?}");
    }
}

#[test]
fn words_of_octets() {
    for entry in entries("words") {
        let n = numbers(&entry);
        let drawn = Key::new(n[0], n[1]).words(n[2] as u32, n[3] as u32);
        assert_eq!(drawn, words(&n[4..]), "{entry:?}");
    }
}

#[test]
fn lanes_of_elements() {
    for entry in entries("lane") {
        let n = numbers(&entry);
        let lane = Key::new(n[0], n[1]).lane(n[2] as u32, n[3]);
        assert_eq!(u64::from(lane), n[4], "{entry:?}");
    }
}

#[test]
fn thresholds_and_scales() {
    for entry in entries("p") {
        let n = numbers(&entry);
        let p = Probability::new(f64::from_bits(n[0])).unwrap();
        assert_eq!(u64::from(p.threshold()), n[1], "{entry:?}");
        assert_eq!(u64::from(p.scale().to_bits()), n[2], "{entry:?}");
        assert_eq!(u64::from(p.keep().to_bits()), n[3], "{entry:?}");
        assert_eq!(p.effective(), n[1] as f64 / 65536.0, "{entry:?}");
    }
}

/// A mask of the file.
struct Mask {
    dropout: Dropout<'static>,
    shape: Shape,
    sha256: &'static str,
}

fn masks() -> Vec<Mask> {
    let row_map = |fields: &[&str]| {
        let n: Vec<u32> = numbers(&fields[1..]).iter().map(|&n| n as u32).collect();
        match (fields[0], &n[..]) {
            ("contiguous", &[first]) => RowMap::Contiguous { first },
            ("blocks", &[first, block, stride]) => RowMap::Blocks { first, block, stride },
            ("attention", &[first, heads, queries, head_stride, batch_stride]) => {
                RowMap::Attention { first, heads, queries, head_stride, batch_stride }
            }
            ("explicit", _) => RowMap::Explicit(n.leak()),
            _ => panic!("{fields:?}"),
        }
    };
    let mask = |fields: &[&'static str], groups: Groups, map: &[&str]| {
        let n = numbers(&fields[..6]);
        let p = Probability::new(f64::from_bits(n[2])).unwrap();
        let shard = Shard { first_col: n[3], rows: row_map(map) };
        Mask {
            dropout: Dropout::new(Key::new(n[0], n[1]), p).shard(shard).groups(groups),
            shape: Shape::new(n[4] as usize, n[5] as usize),
            sha256: fields[6],
        }
    };
    let whole = |entry: Vec<_>| mask(&entry, Groups::NONE, &entry[7..]);
    let grouped = |entry: Vec<_>| {
        let n = numbers(&entry[7..9]);
        mask(&entry, Groups { rows: n[0] as u32, columns_together: n[1] == 1 }, &entry[9..])
    };
    let groups = entries("groups").into_iter().map(grouped);
    entries("mask").into_iter().map(whole).chain(groups).collect()
}

/// Compares masks of one byte an element with the file's.
fn holds(name: &str, keep_mask: impl Fn(&Dropout<'_>, Shape) -> Vec<u8>) {
    for Mask { dropout, shape, sha256 } in masks() {
        let mut text = Vec::new();
        for row in keep_mask(&dropout, shape).chunks(shape.cols) {
            text.extend(row.iter().map(|keep| keep + b'0'));
            text.push(b'\n');
        }
        let digest = Sha256::digest(&text);
        let hex: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(
            hex,
            sha256,
            "{name}: {dropout:?} {shape:?}\n{}",
            String::from_utf8_lossy(&text)
        );
    }
}

#[test]
fn masks_an_element_at_a_time() {
    holds("Key::keeps", |dropout, shape| {
        let Shard { first_col, rows } = dropout.shard;
        let Groups { rows: a_group, columns_together } = dropout.groups;
        let keep = |r, c| {
            let col = if columns_together { 0 } else { first_col + c as u64 };
            dropout.key.keeps(dropout.p, rows.logical(r) / a_group, col)
        };
        let row = |r| (0..shape.cols).map(move |c| u8::from(keep(r, c)));
        (0..shape.rows).flat_map(row).collect()
    });
}

#[test]
fn masks_on_the_cpu() {
    for cpu in cpu::Cpu::levels() {
        holds(&format!("{cpu:?}"), |dropout, shape| {
            let mut out = vec![2; shape.rows * shape.cols];
            cpu.run(dropout, Bytes { shape, out: &mut out }).unwrap();
            out
        });
    }
}

#[cfg(feature = "emulator")]
#[test]
fn masks_of_the_kernels_on_the_host() {
    use fused_dropout::emulator::Emulator;
    let emulator = Emulator::new();
    holds("emulator", |dropout, shape| {
        let mut out = vec![2; shape.rows * shape.cols];
        let bytes = Bytes { shape, out: &mut out };
        match dropout.shard.rows {
            // On a device, a list lies in device memory.
            RowMap::Explicit(list) => {
                let columns = dropout.shard(Shard { rows: RowMap::WHOLE, ..dropout.shard });
                let listed: Dropout<'_, Emulator> = columns.row_list(&list);
                emulator.run(&listed, bytes).unwrap();
            }
            _ => emulator.run(dropout, bytes).unwrap(),
        }
        out
    });
}
