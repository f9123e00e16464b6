//! mkimage
fn main() {}
