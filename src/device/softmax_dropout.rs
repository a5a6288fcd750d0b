//! `softmax_dropout` (to be written)
