//! How to number streams in a trainer of your own.
//!
//! A mask is drawn from (seed, stream, row, column). The seed is the run's. The stream says *which application* of dropout it
//! is: no two applications of a run may share a number, and forward pass, backward pass and recomputation of one application
//! must have the same.
//!
//! # A number that follows from where it is
//!
//! Make the number of the step, the layer and the site, and of nothing else:
//!
//! ```
//! /// Sites of a layer, at most 16.
//! #[derive(Clone, Copy)]
//! enum Site { Embedding, Attention, AttentionOutput, MlpOutput }
//!
//! /// 2^44 steps, 2^16 layers, 2^4 sites.
//! fn stream(step: u64, layer: u64, site: Site) -> u64 {
//!     assert!(step < 1 << 44 && layer < 1 << 16);
//!     step << 20 | layer << 4 | site as u64
//! }
//!
//! use fused_dropout::{Dropout, Key, Probability};
//! let (seed, p) = (42, Probability::new(0.1)?);
//! let drop = Dropout::new(Key::new(seed, stream(3, 1, Site::MlpOutput)), p);
//! assert_eq!(drop.key.stream, (3 << 20) + 19);
//! # let _ = (Site::Embedding, Site::Attention, Site::AttentionOutput);
//! # Ok::<(), fused_dropout::Error>(())
//! ```
//!
//! So a layer that is computed again in the backward pass draws its mask again (activation checkpointing), a resumed run draws
//! what it would have drawn, and a change of one layer changes no other layer's masks. A counter that is increased by every
//! call has none of these properties.
//!
//! # Ranks, shards and micro-batches
//!
//! They do not get streams of their own. Each says which rows and columns of the whole tensor it has, and draws its part of
//! one mask:
//!
//! ```
//! use fused_dropout::{Dropout, Key, Probability, RowMap, Shard};
//! let drop = Dropout::new(Key::new(42, 7), Probability::new(0.1)?);
//! let sequence = 512;
//! // The third micro-batch of four sequences; a row is a token.
//! let first = 3 * 4 * sequence;
//! let micro = drop.shard(Shard { rows: RowMap::Contiguous { first }, ..Shard::WHOLE });
//! // The second half of the columns of a tensor-parallel layer of 4096.
//! let shard = drop.shard(Shard { first_col: 2048, ..Shard::WHOLE });
//! # let _ = (micro, shard);
//! # Ok::<(), fused_dropout::Error>(())
//! ```
//!
//! `first` counts rows: of attention probabilities, `[batch, heads, queries]` rows of keys, a micro-batch begins at
//! `first_sequence * heads * queries`. A slice of the heads or of the queries is a
//! [`RowMap::Attention`](crate::RowMap::Attention).
//!
//! The masks are those of one rank and one batch, whatever the split, bit for bit; sums over rows, the gradients of parameters,
//! are the same within rounding. Data-parallel ranks that need no such equality may take seeds of their own instead.
//!
//! # Other random numbers
//!
//! Philox with the same seed may serve initial values, shuffling and sampling too, as long as its stream numbers are none of
//! the above: for example those with a site that no layer has.
//!
//! # Inside a captured graph
//!
//! A graph replays its parameters as they were captured. [`Dropout::resident`](crate::Dropout::resident) reads the stream number
//! from device memory: write the next step's numbers there before each replay. A drop probability that changes from step to
//! step is read beside it ([`Dropout::resident_p`](crate::Dropout::resident_p)), as the one u64 that
//! [`Probability::packed`](crate::Probability::packed) makes. The p of the host is not looked at then. Without a graph none of
//! this is needed: `Dropout::new(key, p)` with each step's numbers does the same.
//!
//! ```
//! use fused_dropout::{Dropout, Probability, Shape, Source, cpu::Cpu, ops::dropout::Forward};
//! let (backend, shape) = (Cpu::new(), Shape::new(1, 8));
//! let p = Probability::new(0.5)?;
//! for step in 0..4u64 {
//!     // Early dropout. On a GPU these two are buffers in device memory, and the pass is captured once.
//!     let p = if step < 2 { p } else { Probability::ZERO };
//!     let (number, packed) = ([step << 20], [p.packed()]);
//!     let drop = Dropout::<Cpu>::resident(42, &number, p).resident_p(&packed);
//!     let mut x = [1.0f32; 8];
//!     backend.run(&drop, Forward { shape, x: Source::InPlace, y: &mut x })?;
//!     assert_eq!(x.contains(&0.0), step < 2);
//! }
//! # Ok::<(), fused_dropout::Error>(())
//! ```
