//! `keep_mask`: the checks of a row of the table.

use super::*;
use crate::oracle;
use fused_dropout::ops::keep_mask::{Bits, Bytes, bits_len};

pub fn check<B: TestBackend>(backend: &B, call: &Call, tally: &mut Tally) {
    tally.count::<u8, B>(backend, "mask as bytes", call, bytes(backend, call));
    tally.count::<u8, B>(backend, "mask as bits", call, bits(backend, call));
}

fn bytes<B: TestBackend>(backend: &B, call: &Call) -> Result<(), String> {
    let expected = oracle::keep_mask(&call.dropout, call.shape);
    let mut out = backend.tensor(&vec![2u8; expected.len()], call.offset);
    backend.run(call, Bytes { shape: call.shape, out: &mut out })?;
    let out = backend.contents(&out)?;
    match (0..out.len()).find(|&i| out[i] != u8::from(expected[i])) {
        Some(i) => Err(format!("byte {i} is {}", out[i])),
        None => Ok(()),
    }
}

fn bits<B: TestBackend>(backend: &B, call: &Call) -> Result<(), String> {
    let keep = oracle::keep_mask(&call.dropout, call.shape);
    let row = |row: &[bool]| -> Vec<u8> {
        let byte = |octet: &[bool]| {
            octet.iter().enumerate().fold(0, |byte, (j, &keep)| byte | u8::from(keep) << j)
        };
        row.chunks(8).map(byte).collect()
    };
    let expected: Vec<u8> = keep.chunks(call.shape.cols.max(1)).flat_map(row).collect();
    let mut out = backend.tensor(&vec![0xaau8; bits_len(call.shape)], call.offset);
    backend.run(call, Bits { shape: call.shape, out: &mut out })?;
    let out = backend.contents(&out)?;
    match (0..out.len()).find(|&i| out[i] != expected[i]) {
        Some(i) => Err(format!("byte {i} is {:#010b}, not {:#010b}", out[i], expected[i])),
        None => Ok(()),
    }
}
