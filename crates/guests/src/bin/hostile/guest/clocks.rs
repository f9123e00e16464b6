//! How the guest's clocks go while a host pauses it: both counters, both timers, the real-time clock, and the two vCPUs' counters
//! against each other.

use core::arch::asm;

use tidemark_guests::rt::exceptions;
use tidemark_guests::rt::gic::{self, Private};
use tidemark_guests::rt::{counter, say};

use super::interrupts::begin;
use super::other;
use super::probe::{probe, snippets};

snippets! {
    set_virtual: "msr cntv_cval_el0, x0", "msr cntv_ctl_el0, x1", "isb";
    set_physical: "msr cntp_cval_el0, x0", "msr cntp_ctl_el0, x1", "isb";
    load: "ldr w0, [x2]";
}

const RTC: u64 = 0x0901_0000;
const PHYSICAL_TIMER: Private = Private(30);
/// How far ahead the timers are set, in seconds.
const AHEAD: u64 = 3;

/// How vCPU 0 passes the time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Meanwhile {
    /// It looks at the clocks all the time.
    Looks,
    /// It waits for an interrupt.
    Waits,
}

fn physical() -> u64 {
    let count;
    // SAFETY: reads a counter.
    unsafe {
        asm!("isb", "mrs {}, cntpct_el0", out(reg) count, options(nomem, nostack, preserves_flags))
    };
    count
}

fn seconds() -> u64 {
    probe(load, [0, 0, RTC, 0, 0, 0]).x[0]
}

/// Sets both timers, says so, waits for them, and tells what passed by each clock. The host pauses in the middle.
pub fn run(meanwhile: Meanwhile) {
    begin(&[Private::VIRTUAL_TIMER, PHYSICAL_TIMER]);
    other::count();
    let frequency = counter::frequency();
    let (began_virtual, began_physical, began) = (counter::now(), physical(), seconds());
    let ahead = AHEAD * frequency;
    let mut early = 0_u64;
    let mut behind = 0_u64;
    probe(set_virtual, [began_virtual + ahead, 1, 0, 0, 0, 0]);
    probe(set_physical, [began_physical + ahead, 1, 0, 0, 0, 0]);
    say!("clocks: armed");
    let mut left = 2;
    while left != 0 {
        if meanwhile == Meanwhile::Waits {
            exceptions::wait_for_interrupt();
        }
        let theirs = other::counted();
        behind += u64::from(counter::now() < theirs);
        let got = gic::acknowledge();
        match got {
            Private::VIRTUAL_TIMER => {
                early += u64::from(counter::now() < began_virtual + ahead);
                probe(set_virtual, [u64::MAX, 0, 0, 0, 0, 0]);
            }
            PHYSICAL_TIMER => {
                early += u64::from(physical() < began_physical + ahead);
                probe(set_physical, [u64::MAX, 0, 0, 0, 0, 0]);
            }
            _ => continue,
        }
        left -= 1;
        gic::end(got);
    }
    let milliseconds = |ticks: u64| ticks.saturating_mul(1000) / frequency;
    let passed_virtual = milliseconds(counter::now() - began_virtual);
    let passed_physical = milliseconds(physical() - began_physical);
    let real = seconds().wrapping_sub(began) as u32;
    let _ = other::calm();
    say!(
        "clocks: virtual {passed_virtual} physical {passed_physical} real {real} early {early} behind {behind} done"
    );
}
