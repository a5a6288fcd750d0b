//! `keep_mask`: its calls on each backend, and its checks.

use super::*;
use crate::oracle;
#[cfg(any(feature = "cuda", feature = "emulator"))]
use fused_dropout::device;

/// The mask as bits or bytes.
pub trait KeepMaskCalls {
    fn keep_mask(&self, call: &Call, bits: bool, out: &mut [u8]) -> Result<(), Error>;
}

impl KeepMaskCalls for Cpu {
    fn keep_mask(&self, c: &Call, bits: bool, out: &mut [u8]) -> Result<(), Error> {
        use fused_dropout::cpu::keep_mask;
        match bits {
            true => keep_mask::bits(self, &c.dropout, c.shape, out),
            false => keep_mask::bytes(self, &c.dropout, c.shape, out),
        }
    }
}

#[cfg(any(feature = "cuda", feature = "emulator"))]
impl<L: Lab> KeepMaskCalls for Kernels<L> {
    fn keep_mask(&self, c: &Call, bits: bool, out: &mut [u8]) -> Result<(), Error> {
        use device::keep_mask as op;
        self.call(c, &mut |call, d| {
            self.0.with(out, c.offset, &mut |out| match bits {
                true => op::bits(call, d, c.shape, out),
                false => op::bytes(call, d, c.shape, out),
            })
        })
    }
}

/// Runs the checks of one row of the table.
pub fn check<B: Backend>(backend: &B, call: &Call, tally: &mut Tally) {
    tally.count::<u8, B>(backend, "mask as bytes", call, bytes(backend, call));
    tally.count::<u8, B>(backend, "mask as bits", call, bits(backend, call));
}

fn bytes<B: Backend>(backend: &B, call: &Call) -> Result<(), String> {
    let expected = oracle::keep_mask(&call.dropout, call.shape);
    let mut out = vec![2; expected.len()];
    backend.keep_mask(call, false, &mut out).map_err(|error| error.to_string())?;
    match (0..out.len()).find(|&i| out[i] != u8::from(expected[i])) {
        Some(i) => Err(format!("byte {i} is {}", out[i])),
        None => Ok(()),
    }
}

fn bits<B: Backend>(backend: &B, call: &Call) -> Result<(), String> {
    let keep = oracle::keep_mask(&call.dropout, call.shape);
    let row = |row: &[bool]| -> Vec<u8> {
        let byte = |octet: &[bool]| {
            octet.iter().enumerate().fold(0, |byte, (j, &keep)| byte | u8::from(keep) << j)
        };
        row.chunks(8).map(byte).collect()
    };
    let expected: Vec<u8> = keep.chunks(call.shape.cols.max(1)).flat_map(row).collect();
    let mut out = vec![0xaa; fused_dropout::ops::keep_mask::bits_len(call.shape)];
    backend.keep_mask(call, true, &mut out).map_err(|error| error.to_string())?;
    match (0..out.len()).find(|&i| out[i] != expected[i]) {
        Some(i) => Err(format!("byte {i} is {:#010b}, not {:#010b}", out[i], expected[i])),
        None => Ok(()),
    }
}
