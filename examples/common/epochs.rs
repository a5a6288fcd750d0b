//! The order in which a training takes its data.

use super::draws::draws;

/// The numbers below `items`, in endless epochs: every number once an epoch, each time in another order.
pub struct Epochs {
    items: usize,
    seed: u64,
    /// The epoch whose order is at hand.
    epoch: u64,
    order: Vec<usize>,
}

/// What random numbers are drawn for.
const ORDER: u64 = 0;

impl Epochs {
    pub fn new(items: usize, seed: u64) -> Self {
        Self { items, seed, epoch: 0, order: shuffled(items, seed, 0, ORDER) }
    }

    /// What step `step` takes, `batch` pairs of an epoch and a number: it follows from seed and step alone.
    pub fn batch(&mut self, step: u64, batch: usize) -> Vec<(u64, usize)> {
        let first = step * batch as u64;
        (first..first + batch as u64).map(|place| self.at(place)).collect()
    }

    fn at(&mut self, place: u64) -> (u64, usize) {
        let items = self.items as u64;
        let epoch = place / items;
        if epoch != self.epoch {
            self.epoch = epoch;
            self.order = shuffled(self.items, self.seed, epoch, ORDER);
        }
        (epoch, self.order[(place % items) as usize])
    }
}

/// The numbers below `count` in a random order (Fisher and Yates).
pub fn shuffled(count: usize, seed: u64, step: u64, purpose: u64) -> Vec<usize> {
    let mut philox = draws(seed, step, purpose);
    let mut order: Vec<usize> = (0..count).collect();
    for last in (1..count).rev() {
        order.swap(last, philox.bounded(last as u32 + 1) as usize);
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_epoch_has_every_number_once_and_steps_need_no_history() {
        let mut epochs = Epochs::new(10, 7);
        let places: Vec<_> = (0..15).flat_map(|step| epochs.batch(step, 4)).collect();
        for (number, epoch) in places.chunks(10).enumerate() {
            assert!(epoch.iter().all(|item| item.0 == number as u64));
            let mut items: Vec<_> = epoch.iter().map(|item| item.1).collect();
            items.sort_unstable();
            assert_eq!(items, (0..10).collect::<Vec<_>>());
        }
        let order = |epoch: usize| places[10 * epoch..][..10].iter().map(|item| item.1);
        assert!(!order(0).eq(order(1)));
        assert_eq!(epochs.batch(2, 4), places[8..12]);
        assert_ne!(Epochs::new(10, 8).batch(0, 10), Epochs::new(10, 7).batch(0, 10));
    }
}
