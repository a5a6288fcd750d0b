//! `dropout` (to be written)
