//! PSCI by HVC: the calls a payload makes (Arm DEN 0022, SMC calling convention DEN 0028).

use core::arch::asm;

use crate::fdt::Mpidr;

/// A function of the SMC calling convention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Function(pub u32);

impl Function {
    /// PSCI_VERSION
    pub const VERSION: Self = Self(0x8400_0000);
    /// A number in the hypervisor's range (vendor-specific) that nobody serves.
    pub const UNKNOWN: Self = Self(0x8600_7fff);
    const CPU_OFF: Self = Self(0x8400_0002);
    const CPU_ON: Self = Self(0xc400_0003);
    const AFFINITY_INFO: Self = Self(0xc400_0004);
    const SYSTEM_OFF: Self = Self(0x8400_0008);
    const SYSTEM_RESET: Self = Self(0x8400_0009);
}

/// Numbers of functions after which a caller does not go on, or not at once: CPU_SUSPEND, CPU_OFF, SYSTEM_OFF,
/// SYSTEM_RESET, CPU_FREEZE, CPU_DEFAULT_SUSPEND, SYSTEM_SUSPEND, SYSTEM_RESET2.
pub const ENDS_OR_SLEEPS: [u64; 8] = [0x1, 0x2, 0x8, 0x9, 0xb, 0xc, 0xe, 0x12];

/// An error code of PSCI.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refused(pub i64);

/// Makes a call. What it does to memory is the callee's business: turning things off, or starting code elsewhere.
#[inline]
pub fn call(function: Function, a: u64, b: u64, c: u64) -> i64 {
    let result: i64;
    // SAFETY: by the calling convention only x0-x17 change (version 1.0 of it) and no memory does; the calls made
    // here either do not return or start a vCPU at an entry that keeps to its own stack.
    unsafe {
        asm!(
            "hvc #0",
            inout("x0") u64::from(function.0) => result,
            inout("x1") a => _, inout("x2") b => _, inout("x3") c => _,
            out("x4") _, out("x5") _, out("x6") _, out("x7") _, out("x8") _, out("x9") _, out("x10") _,
            out("x11") _, out("x12") _, out("x13") _, out("x14") _, out("x15") _, out("x16") _, out("x17") _,
            options(nostack),
        );
    }
    result
}

/// PSCI_VERSION
#[must_use]
pub fn version() -> i64 {
    call(Function::VERSION, 0, 0, 0)
}

/// CPU_ON
///
/// # Errors
///
/// What the hypervisor answers.
///
/// # Safety
///
/// `entry` is the address of code that can run on that CPU with the MMU off and `context` in x0.
pub unsafe fn cpu_on(cpu: Mpidr, entry: u64, context: u64) -> Result<(), Refused> {
    match call(Function::CPU_ON, cpu.0, entry, context) {
        0 => Ok(()),
        code => Err(Refused(code)),
    }
}

/// Whether a CPU is off, by AFFINITY_INFO.
#[must_use]
pub fn is_off(cpu: Mpidr) -> bool {
    call(Function::AFFINITY_INFO, cpu.0, 0, 0) == 1
}

/// CPU_OFF for the caller.
pub fn cpu_off() -> ! {
    call(Function::CPU_OFF, 0, 0, 0);
    crate::say!("fail CPU_OFF came back");
    system_off()
}

/// SYSTEM_OFF
pub fn system_off() -> ! {
    call(Function::SYSTEM_OFF, 0, 0, 0);
    stop()
}

/// SYSTEM_RESET
pub fn system_reset() -> ! {
    call(Function::SYSTEM_RESET, 0, 0, 0);
    crate::say!("fail SYSTEM_RESET came back");
    system_off()
}

fn stop() -> ! {
    loop {
        // SAFETY: waits.
        unsafe { asm!("wfi", options(nomem, nostack, preserves_flags)) };
    }
}
