//! Test guests and beds.
