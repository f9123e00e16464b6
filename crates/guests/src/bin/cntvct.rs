//! Prints the virtual counter and its frequency: run first in a guest, it tells how long the guest took to get there,
//! by the guest's own clock.

#![cfg_attr(target_os = "none", no_std, no_main)]

#[cfg(target_os = "none")]
mod program {
    use core::arch::asm;
    use core::fmt::Write;

    use tidemark_guests::el0::{Arguments, ExitStatus, Stream};

    tidemark_guests::el0_main!(main);

    fn main(_: Arguments) -> ExitStatus {
        let (count, frequency): (u64, u64);
        // SAFETY: reads two registers that Linux lets programs read.
        unsafe {
            asm!("isb", "mrs {}, cntvct_el0", "mrs {}, cntfrq_el0", out(reg) count, out(reg) frequency, options(nostack));
        }
        match writeln!(Stream::output(), "cntvct={count} cntfrq={frequency}") {
            Ok(()) => ExitStatus::SUCCESS,
            Err(_) => ExitStatus::FAILURE,
        }
    }
}

#[cfg(not(target_os = "none"))]
fn main() {
    eprintln!("cntvct runs in a guest: build it for aarch64-unknown-none-softfloat");
}
