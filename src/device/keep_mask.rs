//! `keep_mask` (to be written)
