//! Calls to the firmware by the SMC Calling Convention (DEN 0028), and its PSCI
//! functions that EL2 uses (DEN 0022).

use core::arch::asm;

const CPU_ON: u64 = 0xC400_0003;
const SYSTEM_OFF: u64 = 0x8400_0008;

/// Why the firmware did not start a CPU: its PSCI return code.
#[derive(Debug, Clone, Copy)]
pub struct PsciError(pub i64);

/// Calls firmware by SMC. The conduit at EL2 is always SMC: HVC would come back to EL2.
fn smc(function: u64, arguments: [u64; 3]) -> u64 {
    let result;
    // SAFETY: SMCCC 1.0 firmware preserves all but x0-x17, which are given up here;
    // the PSCI functions called change only CPUs and power, not memory in use.
    unsafe {
        asm!(
            "smc #0",
            inout("x0") function => result,
            inout("x1") arguments[0] => _,
            inout("x2") arguments[1] => _,
            inout("x3") arguments[2] => _,
            out("x4") _, out("x5") _, out("x6") _, out("x7") _, out("x8") _,
            out("x9") _, out("x10") _, out("x11") _, out("x12") _, out("x13") _,
            out("x14") _, out("x15") _, out("x16") _, out("x17") _,
            options(nostack)
        );
    }
    result
}

/// Starts the CPU `mpidr` at physical address `entry` with `context` in x0.
pub fn cpu_on(mpidr: u64, entry: u64, context: u64) -> Result<(), PsciError> {
    match smc(CPU_ON, [mpidr, entry, context]) as i64 {
        0 => Ok(()),
        code => Err(PsciError(code)),
    }
}

/// Turns the machine off.
pub fn system_off() -> ! {
    smc(SYSTEM_OFF, [0; 3]);
    // Firmware without SYSTEM_OFF: nothing is left to do but to stay here.
    loop {
        super::barrier::wfe();
    }
}
