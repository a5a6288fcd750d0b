//! The kernels as a backend: how tensors get to a device and back. The calls are written once, for every
//! device.

use super::Call;
use fused_dropout::device::{self, Device, Readable, Writable};
use fused_dropout::ops::sum_rows::workspace_len;
use fused_dropout::{Dropout, Error, RowMap};

/// A device to test, and the way of a host tensor to it. `Tensor` starts `offset` elements into
/// its allocation, whose other elements are canaries.
pub trait Lab: Sized {
    type D: Device;
    fn name(&self) -> String;
    fn device(&self) -> &Self::D;
    /// Runs `work` on `host` as a tensor of the device, and brings it back into `host`.
    fn with<T: bytemuck::Pod>(
        &self,
        host: &mut [T],
        offset: usize,
        work: &mut dyn FnMut(&mut dyn Writable<T, Self::D>) -> Result<(), Error>,
    ) -> Result<(), Error>;
    /// Runs `work` on a copy of `host` that is only read.
    fn reading<T: bytemuck::Pod>(
        &self,
        host: &[T],
        offset: usize,
        work: &mut dyn FnMut(&dyn Readable<T, Self::D>) -> Result<(), Error>,
    ) -> Result<(), Error>;
    /// The same with a tensor that need not be there.
    fn optional<T: bytemuck::Pod>(
        &self,
        host: Option<&[T]>,
        offset: usize,
        work: &mut dyn FnMut(Option<&dyn Readable<T, Self::D>>) -> Result<(), Error>,
    ) -> Result<(), Error> {
        match host {
            Some(host) => self.reading(host, offset, &mut |tensor| work(Some(tensor))),
            None => work(None),
        }
    }
    fn optional_out<T: bytemuck::Pod>(
        &self,
        host: Option<&mut [T]>,
        work: &mut dyn FnMut(Option<&mut dyn Writable<T, Self::D>>) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.optional_out_at(host, 0, work)
    }
    fn optional_out_at<T: bytemuck::Pod>(
        &self,
        host: Option<&mut [T]>,
        offset: usize,
        work: &mut dyn FnMut(Option<&mut dyn Writable<T, Self::D>>) -> Result<(), Error>,
    ) -> Result<(), Error> {
        match host {
            Some(host) => self.with(host, offset, &mut |tensor| work(Some(tensor))),
            None => work(None),
        }
    }
}

/// A laboratory as a backend.
pub struct Kernels<L>(pub L);

impl<L: Lab> Kernels<L> {
    /// Runs `work` with the bias gradient that `dbias` asks for.
    pub fn with_bias_grad(
        &self,
        c: &Call,
        dbias: Option<&mut [f32]>,
        work: &mut dyn FnMut(Option<device::BiasGrad<'_, L::D>>) -> Result<(), Error>,
    ) -> Result<(), Error> {
        // What lies in a workspace before a call must not matter.
        let mut workspace = vec![f32::NAN; workspace_len(c.shape)];
        self.0.optional_out(dbias, &mut |dbias| {
            let Some(dbias) = dbias else {
                return work(None);
            };
            self.0.with(&mut workspace, 0, &mut |workspace| {
                work(Some(device::BiasGrad { dbias: &mut *dbias, workspace }))
            })
        })
    }

    /// Runs `work` with the call's key: an explicit row list and, for odd offsets, the stream
    /// number in device memory.
    pub fn call(
        &self,
        c: &Call,
        work: &mut dyn FnMut(&device::Call<'_, L::D>, &Dropout<'_>) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let list = match c.dropout.place.rows {
            RowMap::Explicit(list) => Some(list),
            _ => None,
        };
        let mut dropout = c.dropout;
        if list.is_some() {
            dropout.place.rows = RowMap::WHOLE;
        }
        let number = [dropout.key.stream];
        let number = (c.offset % 2 == 1).then_some(&number[..]);
        if number.is_some() {
            dropout.key.stream = 999; // must not be looked at
        }
        self.0.optional(list, 0, &mut |list| {
            self.0.optional(number, 0, &mut |number| {
                let mut call = device::Call::on(self.0.device());
                if let Some(list) = list {
                    call = call.row_list(list);
                }
                if let Some(number) = number {
                    call = call.stream_number(number);
                }
                work(&call, &dropout)
            })
        })
    }
}

/// The emulator: host tensors as they are; it copies them between guard zones itself.
#[cfg(feature = "emulator")]
pub struct Emulated {
    pub emulator: fused_dropout::emulator::Emulator,
    pub name: String,
}

#[cfg(feature = "emulator")]
impl Lab for Emulated {
    type D = fused_dropout::emulator::Emulator;
    fn name(&self) -> String {
        self.name.clone()
    }
    fn device(&self) -> &Self::D {
        &self.emulator
    }
    fn with<T: bytemuck::Pod>(
        &self,
        mut host: &mut [T],
        _: usize,
        work: &mut dyn FnMut(&mut dyn Writable<T, Self::D>) -> Result<(), Error>,
    ) -> Result<(), Error> {
        work(&mut host)
    }
    fn reading<T: bytemuck::Pod>(
        &self,
        host: &[T],
        _: usize,
        work: &mut dyn FnMut(&dyn Readable<T, Self::D>) -> Result<(), Error>,
    ) -> Result<(), Error> {
        work(&host)
    }
}
