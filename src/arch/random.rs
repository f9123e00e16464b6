//! The CPU's random number instructions (FEAT_RNG, Arm ARM D24.2.129 RNDR).

use aarch64_cpu::registers::ID_AA64ISAR0_EL1;
use core::arch::asm;
use tock_registers::interfaces::Readable;

/// A random number; `None` where this CPU has no such instruction, or gave none a few times.
pub fn rndr() -> Option<u64> {
    if ID_AA64ISAR0_EL1.get() >> 60 & 0xf == 0 {
        return None;
    }
    // It may have nothing to give for the moment.
    (0..10).find_map(|_| {
        let (value, failed): (u64, u64);
        // SAFETY: reads a register that this CPU has, as was just seen; changes flags alone.
        unsafe {
            asm!(
                "mrs {}, s3_3_c2_c4_0",
                "cset {}, eq",
                out(reg) value, out(reg) failed,
                options(nomem, nostack)
            );
        }
        (failed == 0).then_some(value)
    })
}
