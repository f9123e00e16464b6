//! Against another decoder, and against what instructions do.

mod differential;
mod effects;
