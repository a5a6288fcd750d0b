//! `dropout_add`: its calls on each backend, and its checks.

use super::*;
use crate::oracle;
#[cfg(any(feature = "cuda", feature = "emulator"))]
use fused_dropout::device;

/// y = residual + D(x + bias). `residual` and `dy` are `None` for a call in place.
pub trait DropoutAddCalls {
    fn dropout_add<T: Dtype>(
        &self,
        call: &Call,
        x: &[T],
        bias: Option<&[T]>,
        residual: Option<&[T]>,
        y: &mut [T],
    ) -> Result<(), Error>;
    fn dropout_add_backward<T: Dtype>(
        &self,
        call: &Call,
        dy: Option<&[T]>,
        dx: &mut [T],
        dbias: Option<&mut [f32]>,
    ) -> Result<(), Error>;
}

impl DropoutAddCalls for Cpu {
    fn dropout_add<T: Dtype>(
        &self,
        c: &Call,
        x: &[T],
        bias: Option<&[T]>,
        residual: Option<&[T]>,
        y: &mut [T],
    ) -> Result<(), Error> {
        use fused_dropout::cpu::dropout_add;
        match residual {
            Some(r) => dropout_add::forward(self, &c.dropout, c.shape, x, bias, r, y),
            None => dropout_add::forward_in_place(self, &c.dropout, c.shape, x, bias, y),
        }
    }
    fn dropout_add_backward<T: Dtype>(
        &self,
        c: &Call,
        dy: Option<&[T]>,
        dx: &mut [T],
        dbias: Option<&mut [f32]>,
    ) -> Result<(), Error> {
        use fused_dropout::cpu::dropout_add;
        match dy {
            Some(dy) => dropout_add::backward(self, &c.dropout, c.shape, dy, dx, dbias),
            None => dropout_add::backward_in_place(self, &c.dropout, c.shape, dx, dbias),
        }
    }
}

#[cfg(any(feature = "cuda", feature = "emulator"))]
impl<L: Lab> DropoutAddCalls for Kernels<L> {
    fn dropout_add<T: Dtype>(
        &self,
        c: &Call,
        x: &[T],
        bias: Option<&[T]>,
        residual: Option<&[T]>,
        y: &mut [T],
    ) -> Result<(), Error> {
        use device::dropout_add as op;
        self.call(c, &mut |call, d| {
            self.0.reading(x, c.offset, &mut |x| {
                self.0.optional(bias, c.offset / 2, &mut |bias| {
                    self.0.optional(residual, c.offset, &mut |residual| {
                        self.0.with(y, c.offset, &mut |y| match residual {
                            Some(r) => op::forward(call, d, c.shape, x, bias, r, y),
                            None => op::forward_in_place(call, d, c.shape, x, bias, y),
                        })
                    })
                })
            })
        })
    }
    fn dropout_add_backward<T: Dtype>(
        &self,
        c: &Call,
        dy: Option<&[T]>,
        dx: &mut [T],
        dbias: Option<&mut [f32]>,
    ) -> Result<(), Error> {
        use device::dropout_add as op;
        let mut dbias = dbias;
        self.call(c, &mut |call, d| {
            self.0.optional(dy, c.offset, &mut |dy| {
                self.0.with(dx, c.offset, &mut |dx| {
                    self.with_bias_grad(c, dbias.as_deref_mut(), &mut |grad| match dy {
                        Some(dy) => op::backward(call, d, c.shape, dy, dx, grad),
                        None => op::backward_in_place(call, d, c.shape, dx, grad),
                    })
                })
            })
        })
    }
}

/// Runs the checks of one row of the table.
pub fn check<T: Dtype, B: Backend>(backend: &B, call: &Call, tally: &mut Tally) {
    tally.count::<T, B>(backend, "dropout_add", call, forward::<T, B>(backend, call));
    tally.count::<T, B>(backend, "dropout_add dx", call, dx::<T, B>(backend, call));
    tally.count::<T, B>(backend, "dropout_add dbias", call, dbias::<T, B>(backend, call));
}

fn forward<T: Dtype, B: Backend>(backend: &B, call: &Call) -> Result<(), String> {
    let x = values::<T>(elements(call), 2, true);
    let bias = values::<T>(call.shape.cols, 3, true);
    let residual = values::<T>(elements(call), 4, true);
    for bias in [None, Some(&bias[..])] {
        let expected = oracle::dropout_add(&call.dropout, call.shape, &x, bias, &residual);
        let y = output(&x, call, |y| backend.dropout_add(call, &x, bias, Some(&residual), y))?;
        same("y", &y, &expected)?;
        let y = output(&residual, call, |y| backend.dropout_add(call, &x, bias, None, y))?;
        same("y in place", &y, &expected)?;
    }
    Ok(())
}

fn dx<T: Dtype, B: Backend>(backend: &B, call: &Call) -> Result<(), String> {
    let dy = values::<T>(elements(call), 5, true);
    let expected = oracle::dropout(&call.dropout, call.shape, &dy);
    let zeros = vec![T::from_f32(0.0); dy.len()];
    let dx = output(&zeros, call, |dx| backend.dropout_add_backward(call, Some(&dy), dx, None))?;
    same("dx", &dx, &expected)
}

fn dbias<T: Dtype, B: Backend>(backend: &B, call: &Call) -> Result<(), String> {
    for specials in [false, true] {
        let dy = values::<T>(elements(call), 6, specials);
        let expected = oracle::dropout(&call.dropout, call.shape, &dy);
        let sums = oracle::dbias(&call.dropout, call.shape, &dy);
        let mut dbias = Guarded::new(&vec![9.0f32; call.shape.cols], 0);
        let dx = output(&dy, call, |dx| {
            // In place for one of the two.
            let dy = (!specials).then_some(&dy[..]);
            backend.dropout_add_backward(call, dy, dx, Some(dbias.tensor()))
        })?;
        same("dx", &dx, &expected)?;
        same("dbias", &dbias.finish()?, &sums)?;
    }
    Ok(())
}
