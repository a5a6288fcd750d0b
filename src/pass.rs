//! Every pass of every operator, and who computes it on which backend.
//!
//! A pass is described once, in [`ops`](crate::ops): a structure with its tensors by name. [`Backend::run`] checks the
//! description and gives it to the CPU's code or to the kernels' launches.

use crate::cpu::{self, Cpu};
use crate::device::{self, Device, Launch};
use crate::dtype::Dtype;
use crate::error::Error;
use crate::mask::Probability;
use crate::ops::{self, AsDropout, MaskParams, Shape};
use crate::tensor::Memory;

/// Where operators run: the CPU, or a [`Device`].
pub trait Backend: Memory + Sized {
    /// Runs one pass of an operator.
    ///
    /// # Errors
    /// [`Error::Argument`] where the arguments do not fit each other: it names the operator and the field, and nothing
    /// is written then. Otherwise what a device says.
    fn run<'a, P: Pass<'a, Self>>(
        &self,
        dropout: &impl AsDropout<Self>,
        pass: P,
    ) -> Result<(), Error>
    where
        Self: 'a;
}

/// A pass of an operator on tensors in memory `M`: the structures `Forward` and `Backward` in the modules of
/// [`ops`](crate::ops). Sealed.
pub trait Pass<'a, M: Memory>: sealed::Pass<'a, M> {}

impl<'a, M: Memory, P: sealed::Pass<'a, M>> Pass<'a, M> for P {}

#[allow(private_interfaces)] // nobody outside of the crate can name these functions
mod sealed {
    use super::*;

    pub trait Pass<'a, M: Memory>: Sized {
        /// The operator's name in errors.
        const OPERATOR: &'static str;
        /// The same pass on tensors in another memory.
        type On<N: Memory + 'a>: Pass<'a, N>;

        /// Itself, as one of the above.
        fn on(self) -> Self::On<M>;
        /// Refuses tensors that do not fit each other, and answers the shape of the mask.
        fn check(&self) -> Result<Shape, Error>;
        fn on_cpu(pass: Self::On<Cpu>, cpu: &Cpu, draw: &MaskParams<'_>) -> Result<(), Error>;
        fn on_device<D: Device>(pass: Self::On<D>, to: Launch<'_, D>) -> Result<(), Error>;
    }
}

/// One line a pass: its description, the CPU's function, and the device's.
macro_rules! passes {
    ($($operator:ident: $Pass:ident $(<$T:ident>)?, $function:ident;)*) => {$(
        #[allow(private_interfaces)]
        impl<'a, $($T: Dtype,)? M: Memory> sealed::Pass<'a, M> for ops::$operator::$Pass<'a, $($T,)? M> {
            const OPERATOR: &'static str = ops::$operator::NAME;
            type On<N: Memory + 'a> = ops::$operator::$Pass<'a, $($T,)? N>;

            fn on(self) -> Self {
                self
            }

            fn check(&self) -> Result<Shape, Error> {
                self.check()
            }

            fn on_cpu(pass: Self::On<Cpu>, cpu: &Cpu, draw: &MaskParams<'_>) -> Result<(), Error> {
                cpu::$operator::$function(pass, cpu, draw)
            }

            fn on_device<D: Device>(pass: Self::On<D>, to: Launch<'_, D>) -> Result<(), Error> {
                device::$operator::$function(pass, to)
            }
        }
    )*};
}

passes! {
    bias_act_dropout: Forward<T>, forward;
    bias_act_dropout: Backward<T>, backward;
    dropout: Forward<T>, forward;
    dropout: Backward<T>, backward;
    dropout_add: Forward<T>, forward;
    dropout_add: Backward<T>, backward;
    dropout_add_norm: Forward<T>, forward;
    dropout_add_norm: Backward<T>, backward;
    embedding_dropout: Forward<T>, forward;
    embedding_dropout: Backward<T>, backward;
    embedding_dropout: ForwardNorm<T>, forward_norm;
    embedding_dropout: BackwardNorm<T>, backward_norm;
    keep_mask: Bits, bits;
    keep_mask: Bytes, bytes;
    softmax_dropout: Forward<T>, forward;
    softmax_dropout: Backward<T>, backward;
    swiglu_dropout: Forward<T>, forward;
    swiglu_dropout: Backward<T>, backward;
}

impl Backend for Cpu {
    fn run<'a, P: Pass<'a, Self>>(
        &self,
        dropout: &impl AsDropout<Self>,
        pass: P,
    ) -> Result<(), Error> {
        let (shape, dropout) = (pass.check()?, dropout.of_memory());
        let resident = dropout.resident_parts(P::OPERATOR, shape.rows, self)?;
        let mut draw = dropout.mask_params(P::OPERATOR, shape)?;
        if let Some(stream) = resident.stream {
            draw.key.stream = stream[0];
        }
        if let Some(packed) = resident.p {
            let p = Probability::of_packed(packed[0]).ok_or_else(|| {
                let given = format!("{:#x}", packed[0]);
                Error::argument(P::OPERATOR, "p", "what Probability::packed makes", given)
            })?;
            (draw.threshold, draw.scale) = (p.threshold(), p.scale());
        }
        if let Some(list) = resident.row_list {
            draw.rows = crate::RowMap::Explicit(list);
        }
        P::on_cpu(pass.on(), self, &draw)
    }
}

impl<D: Device> Backend for D {
    fn run<'a, P: Pass<'a, Self>>(
        &self,
        dropout: &impl AsDropout<Self>,
        pass: P,
    ) -> Result<(), Error>
    where
        Self: 'a,
    {
        let (shape, dropout) = (pass.check()?, dropout.of_memory());
        let draw = dropout.mask_params(P::OPERATOR, shape)?;
        let resident = dropout.resident_parts(P::OPERATOR, shape.rows, self)?;
        P::on_device(pass.on(), Launch::new(self, P::OPERATOR, &draw, &resident)?)
    }
}
