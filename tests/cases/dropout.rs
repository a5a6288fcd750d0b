//! `dropout`: its calls on each backend, and its checks.

use super::*;
use crate::oracle;
#[cfg(any(feature = "cuda", feature = "emulator"))]
use fused_dropout::device;

/// y = D(x), forward or backward. `x` is `None` for a call in place.
pub trait DropoutCalls {
    fn dropout<T: Dtype>(&self, call: &Call, x: Option<&[T]>, y: &mut [T]) -> Result<(), Error>;
}

impl DropoutCalls for Cpu {
    fn dropout<T: Dtype>(&self, c: &Call, x: Option<&[T]>, y: &mut [T]) -> Result<(), Error> {
        use fused_dropout::cpu::dropout;
        match x {
            Some(x) if c.offset.is_multiple_of(2) => {
                dropout::forward(self, &c.dropout, c.shape, x, y)
            }
            Some(x) => dropout::backward(self, &c.dropout, c.shape, x, y),
            None if c.offset.is_multiple_of(2) => {
                dropout::forward_in_place(self, &c.dropout, c.shape, y)
            }
            None => dropout::backward_in_place(self, &c.dropout, c.shape, y),
        }
    }
}

#[cfg(any(feature = "cuda", feature = "emulator"))]
impl<L: Lab> DropoutCalls for Kernels<L> {
    fn dropout<T: Dtype>(&self, c: &Call, x: Option<&[T]>, y: &mut [T]) -> Result<(), Error> {
        use device::dropout as op;
        self.call(c, &mut |call, d| {
            self.0.optional(x, c.offset, &mut |x| {
                self.0.with(y, c.offset, &mut |y| match x {
                    Some(x) if c.offset.is_multiple_of(2) => op::forward(call, d, c.shape, x, y),
                    Some(x) => op::backward(call, d, c.shape, x, y),
                    None if c.offset.is_multiple_of(2) => op::forward_in_place(call, d, c.shape, y),
                    None => op::backward_in_place(call, d, c.shape, y),
                })
            })
        })
    }
}

/// Runs the checks of one row of the table.
pub fn check<T: Dtype, B: Backend>(backend: &B, call: &Call, tally: &mut Tally) {
    tally.count::<T, B>(backend, "dropout", call, dropout::<T, B>(backend, call));
}

fn dropout<T: Dtype, B: Backend>(backend: &B, call: &Call) -> Result<(), String> {
    let x = values::<T>(elements(call), 1, true);
    let expected = oracle::dropout(&call.dropout, call.shape, &x);
    let mut shifted = Guarded::new(&x, call.offset);
    let x_view = &*shifted.tensor();
    let y =
        output(&vec![T::from_f32(5.0); x.len()], call, |y| backend.dropout(call, Some(x_view), y))?;
    same("y", &y, &expected)?;
    let y = output(&x, call, |y| backend.dropout(call, None, y))?;
    same("y in place", &y, &expected)
}
