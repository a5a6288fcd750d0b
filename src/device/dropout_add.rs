//! `dropout_add` (to be written)
