//! One SIMD&FP register of the guest that this CPU has loaded. The image is built without them, so they hold the
//! guest's values whenever EL2 runs (boot/fp.S moves them at a switch of vCPUs).

unsafe extern "C" {
    /// Stores register `n` modulo 32 (boot/fp.S).
    safe fn vector_store(n: usize, to: &mut u128);
    /// Loads it.
    safe fn vector_load(n: usize, from: &u128);
}

/// Reads one, 0 to 31.
pub fn read(n: usize) -> u128 {
    let mut value = 0;
    vector_store(n, &mut value);
    value
}

/// Writes one, 0 to 31, all 128 bits.
pub fn write(n: usize, value: u128) {
    vector_load(n, &value);
}
