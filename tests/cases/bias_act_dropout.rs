//! `bias_act_dropout`: its calls on each backend, and its checks.

use super::*;
use crate::oracle;
use fused_dropout::Activation;
#[cfg(any(feature = "cuda", feature = "emulator"))]
use fused_dropout::device;

/// y = D(act(x + bias)). `x` and `dy` are `None` for a call in place.
pub trait BiasActDropoutCalls {
    fn bias_act_dropout<T: Dtype>(
        &self,
        call: &Call,
        activation: Activation,
        x: Option<&[T]>,
        bias: Option<&[T]>,
        y: &mut [T],
    ) -> Result<(), Error>;
    fn bias_act_dropout_backward<T: Dtype>(
        &self,
        call: &Call,
        activation: Activation,
        x: &[T],
        bias: Option<&[T]>,
        dy: Option<&[T]>,
        dx: &mut [T],
        dbias: Option<&mut [f32]>,
    ) -> Result<(), Error>;
}

impl BiasActDropoutCalls for Cpu {
    fn bias_act_dropout<T: Dtype>(
        &self,
        c: &Call,
        a: Activation,
        x: Option<&[T]>,
        bias: Option<&[T]>,
        y: &mut [T],
    ) -> Result<(), Error> {
        use fused_dropout::cpu::bias_act_dropout as op;
        match x {
            Some(x) => op::forward(self, &c.dropout, c.shape, a, x, bias, y),
            None => op::forward_in_place(self, &c.dropout, c.shape, a, y, bias),
        }
    }
    fn bias_act_dropout_backward<T: Dtype>(
        &self,
        c: &Call,
        a: Activation,
        x: &[T],
        bias: Option<&[T]>,
        dy: Option<&[T]>,
        dx: &mut [T],
        dbias: Option<&mut [f32]>,
    ) -> Result<(), Error> {
        use fused_dropout::cpu::bias_act_dropout as op;
        match dy {
            Some(dy) => op::backward(self, &c.dropout, c.shape, a, x, bias, dy, dx, dbias),
            None => op::backward_in_place(self, &c.dropout, c.shape, a, x, bias, dx, dbias),
        }
    }
}

#[cfg(any(feature = "cuda", feature = "emulator"))]
impl<L: Lab> BiasActDropoutCalls for Kernels<L> {
    fn bias_act_dropout<T: Dtype>(
        &self,
        c: &Call,
        a: Activation,
        x: Option<&[T]>,
        bias: Option<&[T]>,
        y: &mut [T],
    ) -> Result<(), Error> {
        use device::bias_act_dropout as op;
        self.call(c, &mut |call, d| {
            self.0.optional(bias, c.offset / 2, &mut |bias| {
                self.0.optional(x, c.offset, &mut |x| {
                    self.0.with(y, c.offset, &mut |y| match x {
                        Some(x) => op::forward(call, d, c.shape, a, x, bias, y),
                        None => op::forward_in_place(call, d, c.shape, a, y, bias),
                    })
                })
            })
        })
    }
    fn bias_act_dropout_backward<T: Dtype>(
        &self,
        c: &Call,
        a: Activation,
        x: &[T],
        bias: Option<&[T]>,
        dy: Option<&[T]>,
        dx: &mut [T],
        dbias: Option<&mut [f32]>,
    ) -> Result<(), Error> {
        use device::bias_act_dropout as op;
        let mut dbias = dbias;
        self.call(c, &mut |call, d| {
            self.0.reading(x, c.offset, &mut |x| {
                self.0.optional(bias, c.offset / 2, &mut |bias| {
                    self.0.optional(dy, c.offset, &mut |dy| {
                        self.0.with(dx, c.offset, &mut |dx| {
                            self.with_bias_grad(c, dbias.as_deref_mut(), &mut |grad| match dy {
                                Some(dy) => {
                                    op::backward(call, d, c.shape, a, x, bias, dy, dx, grad)
                                }
                                None => {
                                    op::backward_in_place(call, d, c.shape, a, x, bias, dx, grad)
                                }
                            })
                        })
                    })
                })
            })
        })
    }
}

/// Runs the checks of one row of the table.
pub fn check<T: Dtype, B: Backend>(backend: &B, call: &Call, tally: &mut Tally) {
    // Two activations a row, so that neighbours in the table go through all of them.
    let count = Activation::ALL.len();
    let first = call.shape.rows + call.shape.cols + call.dropout.p.threshold() as usize % count;
    for activation in [first, first + 3].map(|i| Activation::ALL[i % count]) {
        let name = |pass: &str| format!("bias_act_dropout {activation:?} {pass}");
        let result = forward::<T, B>(backend, call, activation);
        tally.count::<T, B>(backend, &name("y"), call, result);
        let result = backward::<T, B>(backend, call, activation);
        tally.count::<T, B>(backend, &name("dx, dbias"), call, result);
    }
}

/// Values up to 14 on both sides, where every activation is flat.
fn far_out<T: Dtype>(len: usize, salt: u64, specials: bool) -> Vec<T> {
    let values = values::<T>(len, salt, specials).into_iter();
    values.map(|x| T::from_f32(x.to_f32() * 7.0)).collect()
}

fn forward<T: Dtype, B: Backend>(backend: &B, call: &Call, a: Activation) -> Result<(), String> {
    let x = far_out::<T>(elements(call), 10, true);
    let bias = values::<T>(call.shape.cols, 11, true);
    for bias in [None, Some(&bias[..])] {
        let expected = oracle::bias_act_dropout(&call.dropout, call.shape, a, &x, bias);
        let y = output(&vec![T::from_f32(5.0); x.len()], call, |y| {
            backend.bias_act_dropout(call, a, Some(&x), bias, y)
        })?;
        within("y", &y, &expected)?;
        let again = output(&x, call, |y| backend.bias_act_dropout(call, a, None, bias, y))?;
        same("y in place, against y", &again, &y)?;
    }
    Ok(())
}

fn backward<T: Dtype, B: Backend>(backend: &B, call: &Call, a: Activation) -> Result<(), String> {
    for specials in [false, true] {
        let x = far_out::<T>(elements(call), 12, specials);
        let bias = values::<T>(call.shape.cols, 13, specials);
        let bias = specials.then_some(&bias[..]);
        let dy = match specials {
            true => some_special::<T>(elements(call), call.shape.cols, 14),
            false => values::<T>(elements(call), 14, false),
        };
        let (expected, sums) =
            oracle::bias_act_dropout_backward(&call.dropout, call.shape, a, &x, bias, &dy);
        let mut dbias = Guarded::new(&vec![9.0f32; call.shape.cols], 0);
        let dx = output(&dy, call, |dx| {
            // In place for one of the two.
            let dy = specials.then_some(&dy[..]);
            let dbias = Some(dbias.tensor());
            backend.bias_act_dropout_backward(call, a, &x, bias, dy, dx, dbias)
        })?;
        within("dx", &dx, &expected)?;
        within("dbias", &dbias.finish()?, &sums)?;
        let alone = output(&dy, call, |dx| {
            backend.bias_act_dropout_backward(call, a, &x, bias, Some(&dy), dx, None)
        })?;
        same("dx without dbias, against dx", &alone, &dx)?;
    }
    Ok(())
}
