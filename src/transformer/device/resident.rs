//! What of each dropout lies in device memory, so that a captured graph finds other numbers at each step.

use super::Runtime;
use crate::device::Address;
use crate::error::Error;
use crate::mask::Probability;
use crate::tensor::Readable;
use crate::transformer::streams::{DropoutSchedule, Site, stream};
use std::collections::HashMap;

/// A dropout of the model, as it is at every step.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Place {
    pub layer: usize,
    pub site: Site,
    pub p: Probability,
    pub schedule: DropoutSchedule,
}

impl Place {
    /// Its numbers at a step: the stream number, and the probability as [`Probability::packed`].
    fn numbers(&self, step: u64) -> Result<[u64; NUMBERS], Error> {
        let p = self.schedule.at(step, self.p);
        Ok([stream(step, self.layer, self.site)?, p.packed()])
    }
}

/// Numbers of a place.
const NUMBERS: usize = 2;

/// The numbers of each place that a step has used, in device memory.
pub(super) struct Places<D: Runtime> {
    step: u64,
    /// Which one each is.
    indices: HashMap<Place, usize>,
    /// All of them, in order.
    host: Vec<Place>,
    /// The numbers of [`CHUNK`] places each. They never move: a captured graph has their addresses.
    device: Vec<D::Buffer<u64>>,
}

/// Places of a buffer.
const CHUNK: usize = 256;

/// One number of a buffer.
pub(super) struct Slot<'a, D: Runtime> {
    numbers: &'a D::Buffer<u64>,
    index: usize,
}

// SAFETY: `Places::get`, which alone makes slots, takes the index of a number in the buffer, which
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

impl<D: Runtime> Places<D> {
    pub fn new(step: u64) -> Self {
        Self { step, indices: HashMap::new(), host: Vec::new(), device: Vec::new() }
    }

    /// The step whose numbers lie in device memory.
    pub fn step(&self) -> u64 {
        self.step
    }

    /// The stream number and the probability of a place, where it has them.
    pub fn get(&self, place: &Place) -> Option<[Slot<'_, D>; NUMBERS]> {
        let index = *self.indices.get(place)?;
        let numbers = &self.device[index / CHUNK];
        let first = index % CHUNK * NUMBERS;
        Some([0, 1].map(|number| Slot { numbers, index: first + number }))
    }

    /// Numbers for a place that has none.
    pub fn add(&mut self, device: &D, place: Place) -> Result<(), Error> {
        place.numbers(self.step)?;
        let index = self.host.len();
        if index == CHUNK * self.device.len() {
            self.device.push(device.zeros(CHUNK * NUMBERS)?);
        }
        self.host.push(place);
        self.upload(device, index / CHUNK)?;
        self.indices.insert(place, index);
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
        let places = self.host.chunks(CHUNK).nth(chunk).unwrap_or_default();
        let numbers = places.iter().map(|place| place.numbers(self.step));
        let numbers = numbers.collect::<Result<Vec<_>, _>>()?;
        device.write(&mut self.device[chunk], numbers.as_flattened())
    }
}
