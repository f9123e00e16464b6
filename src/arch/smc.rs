//! Calls to the firmware by the SMC Calling Convention (DEN 0028), its PSCI
//! functions that EL2 uses (DEN 0022), and its entropy (DEN 0098).

use core::arch::asm;

const CPU_ON: u64 = 0xC400_0003;
const SYSTEM_OFF: u64 = 0x8400_0008;
const TRNG_VERSION: u64 = 0x8400_0050;
const TRNG_RND64: u64 = 0xC400_0053;

/// Why the firmware did not start a CPU: its PSCI return code.
#[derive(Debug, Clone, Copy)]
pub struct PsciError(pub i64);

/// Calls firmware by SMC. The conduit at EL2 is always SMC: HVC would come back to EL2.
fn smc(function: u64, arguments: [u64; 3]) -> [u64; 4] {
    let (x0, x1, x2, x3);
    // SAFETY: SMCCC 1.0 firmware preserves all but x0-x17, which are given up here;
    // the PSCI functions called change only CPUs and power, not memory in use.
    unsafe {
        asm!(
            "smc #0",
            inout("x0") function => x0,
            inout("x1") arguments[0] => x1,
            inout("x2") arguments[1] => x2,
            inout("x3") arguments[2] => x3,
            out("x4") _, out("x5") _, out("x6") _, out("x7") _, out("x8") _,
            out("x9") _, out("x10") _, out("x11") _, out("x12") _, out("x13") _,
            out("x14") _, out("x15") _, out("x16") _, out("x17") _,
            options(nostack)
        );
    }
    [x0, x1, x2, x3]
}

/// Starts the CPU `mpidr` at physical address `entry` with `context` in x0.
pub fn cpu_on(mpidr: u64, entry: u64, context: u64) -> Result<(), PsciError> {
    let [status, ..] = smc(CPU_ON, [mpidr, entry, context]);
    match status as i64 {
        0 => Ok(()),
        code => Err(PsciError(code)),
    }
}

/// Entropy from the firmware's generator; `None` where it has none, or none now. Firmware answers
/// -1 to what it does not know, in every version of the convention.
pub fn entropy() -> Option<[u64; 3]> {
    const BITS: u64 = 192;
    let [version, ..] = smc(TRNG_VERSION, [0; 3]);
    if (version as i32) < 0x1_0000 {
        return None;
    }
    let [status, entropy @ ..] = smc(TRNG_RND64, [BITS, 0, 0]);
    (status == 0).then_some(entropy)
}

/// Turns the machine off.
pub fn system_off() -> ! {
    smc(SYSTEM_OFF, [0; 3]);
    // Firmware without SYSTEM_OFF: nothing is left to do but to stay here.
    loop {
        super::barrier::wfe();
    }
}
