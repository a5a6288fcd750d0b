//! What of a key lies in device memory, so that a captured graph finds other numbers at each step.

use super::Runtime;
use crate::device::Address;
use crate::error::Error;
use crate::tensor::Readable;
use crate::transformer::streams::{Site, stream};
use std::collections::HashMap;

/// Stream numbers in device memory, one for each layer and site that a step has used.
pub(super) struct Streams<D: Runtime> {
    step: u64,
    /// Where each number lies.
    slots: HashMap<(usize, Site), usize>,
    /// Whose numbers lie there, in order.
    host: Vec<(usize, Site)>,
    /// [`CHUNK`] numbers each. They never move: a captured graph has their addresses.
    device: Vec<D::Buffer<u64>>,
}

/// Stream numbers of a buffer.
const CHUNK: usize = 256;

/// One number of a buffer.
pub(super) struct Slot<'a, D: Runtime> {
    numbers: &'a D::Buffer<u64>,
    index: usize,
}

// SAFETY: `Streams::get`, which alone makes slots, takes the index of a number in the buffer, which
// is as long as it was when it was made.
unsafe impl<D: Runtime> Readable<u64, D> for Slot<'_, D> {
    fn elements(&self) -> usize {
        1
    }

    fn read<'a>(&'a self, device: &'a D) -> Result<Address<'a, D>, Error> {
        let mut address = self.numbers.read(device)?;
        address.pointer += (self.index * size_of::<u64>()) as u64;
        Ok(address)
    }
}

impl<D: Runtime> Streams<D> {
    pub fn new(step: u64) -> Self {
        Self { step, slots: HashMap::new(), host: Vec::new(), device: Vec::new() }
    }

    /// The step whose numbers lie in device memory.
    pub fn step(&self) -> u64 {
        self.step
    }

    /// The number of a layer and site, where it has one.
    pub fn get(&self, layer: usize, site: Site) -> Option<Slot<'_, D>> {
        let index = *self.slots.get(&(layer, site))?;
        Some(Slot { numbers: &self.device[index / CHUNK], index: index % CHUNK })
    }

    /// A number for a layer and site that has none.
    pub fn add(&mut self, device: &D, layer: usize, site: Site) -> Result<(), Error> {
        stream(self.step, layer, site)?;
        let index = self.host.len();
        if index == CHUNK * self.device.len() {
            self.device.push(device.zeros(CHUNK)?);
        }
        self.host.push((layer, site));
        self.upload(device, index / CHUNK)?;
        self.slots.insert((layer, site), index);
        Ok(())
    }

    /// The numbers of another step.
    pub fn advance(&mut self, device: &D, step: u64) -> Result<(), Error> {
        if self.step == step {
            return Ok(());
        }
        self.step = step;
        (0..self.device.len()).try_for_each(|chunk| self.upload(device, chunk))
    }

    fn upload(&mut self, device: &D, chunk: usize) -> Result<(), Error> {
        let sites = self.host.chunks(CHUNK).nth(chunk).unwrap_or_default();
        let numbers = sites.iter().map(|&(layer, site)| stream(self.step, layer, site));
        device.write(&mut self.device[chunk], &numbers.collect::<Result<Vec<_>, _>>()?)
    }
}
