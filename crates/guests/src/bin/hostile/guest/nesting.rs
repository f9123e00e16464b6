//! More interrupts active at once than there are list registers: by preemption, and with EOImode 1 by leaving them so.

use core::arch::asm;

use tidemark_guests::fdt::Mpidr;
use tidemark_guests::rt::counter;
use tidemark_guests::rt::gic::{self, Private};

use super::interrupts::{self, NONE, begin};
use super::probe::Register;
use super::{Case, World, other};

/// The virtual timer at the bottom, and all SGIs above it, each more urgent than the last.
const DEPTH: u32 = 17;
const ALL: [Private; DEPTH as usize] = {
    let mut all = [Private(27); DEPTH as usize];
    let mut sgi = 0;
    while sgi < 16 {
        all[sgi + 1] = Private(sgi as u32);
        sgi += 1;
    }
    all
};
const CONTROL: Register = Register(3, 0, 12, 12, 4);
const SPLIT: u64 = 2;

/// How the guest ends interrupts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ends {
    /// EOImode 0.
    Whole,
    /// EOImode 1, deactivated in any order after all priorities are dropped.
    Split,
}

fn deactivate(interrupt: Private) {
    // SAFETY: deactivates an interrupt that was taken.
    unsafe {
        asm!("msr icc_dir_el1, {}", "isb", in(reg) u64::from(interrupt.0), options(nostack, preserves_flags))
    };
}

/// Makes the interrupt at this depth pending.
fn raise(depth: u32) {
    match depth {
        0 => counter::set_timer(0),
        _ => gic::send(gic::sgi(ALL[depth as usize], Mpidr(0))),
    }
}

/// Waits for one, and takes it.
fn take() -> Private {
    let mut got = NONE;
    let _ = counter::within(2, || {
        got = gic::acknowledge();
        got.0 < 1020
    });
    got
}

/// Checks that just these are active.
fn active(case: &mut Case, expected: u32, what: &str) {
    let read = interrupts::word(0x300);
    case.check(
        read == expected,
        format_args!("{what}: {read:#010x} are active, not {expected:#010x}"),
    );
}

fn bit(interrupt: Private) -> u32 {
    1 << interrupt.0
}

fn start(ends: Ends) {
    begin(&[]);
    gic::init(&ALL);
    for (depth, interrupt) in (0..).zip(ALL) {
        interrupts::priority(interrupt, 0xf0 - 8 * depth);
    }
    if ends == Ends::Split {
        CONTROL.write(SPLIT);
    }
}

/// Takes all of them, one preempting the other. Gives which are active.
fn nest(case: &mut Case) -> u32 {
    let mut taken = 0;
    for depth in 0..DEPTH {
        raise(depth);
        let got = take();
        case.check(
            got == ALL[depth as usize],
            format_args!("depth {depth}: {got:?} came"),
        );
        // What runs, and what is less urgent, does not preempt it.
        for again in 1..=depth {
            raise(again);
        }
        let more = gic::acknowledge();
        case.check(
            more == NONE,
            format_args!("depth {depth}: {more:?} came as well"),
        );
        taken |= bit(ALL[depth as usize]);
        active(case, taken, "nested");
    }
    counter::stop_timer();
    taken
}

/// Each SGI came once more while it ran: it comes at the end of what is above it, and no other does.
fn unwind(case: &mut Case, mut taken: u32, ends: Ends) {
    for depth in (0..DEPTH).rev() {
        let ended = ALL[depth as usize];
        gic::end(ended);
        if ends == Ends::Split {
            active(case, taken, "priority dropped");
            deactivate(ended);
        }
        taken &= !bit(ended);
        active(case, taken, "ended");
        let got = gic::acknowledge();
        let expected = if depth == 0 { NONE } else { ended };
        case.check(
            got == expected,
            format_args!("after the end of depth {depth}: {got:?} came"),
        );
        if got == NONE {
            continue;
        }
        gic::end(got);
        if ends == Ends::Split {
            deactivate(got);
        }
        active(case, taken, "ended again");
    }
}

/// All at one priority, none deactivated before all were taken.
fn leave_all_active(case: &mut Case, world: &mut World) {
    start(Ends::Split);
    for interrupt in ALL {
        interrupts::priority(interrupt, 0x80);
    }
    let mut taken = 0;
    for depth in 0..DEPTH {
        raise(depth);
        let got = take();
        case.check(
            got == ALL[depth as usize],
            format_args!("{depth} active: {got:?} came"),
        );
        gic::end(got);
        taken |= bit(got);
        active(case, taken, "none deactivated");
    }
    counter::stop_timer();
    let mut left = ALL;
    for count in (1..=left.len()).rev() {
        let which = world.random.below(count as u64) as usize;
        left[..count].swap(which, count - 1);
        deactivate(left[count - 1]);
        taken &= !bit(left[count - 1]);
        active(case, taken, "deactivated");
    }
    let got = gic::acknowledge();
    case.check(got == NONE, format_args!("after all: {got:?} came"));
}

pub fn deep(case: &mut Case, world: &mut World) {
    if !other::busy() {
        return case.fail(format_args!("the other vCPU does not come"));
    }
    for ends in [Ends::Whole, Ends::Split, Ends::Whole] {
        start(ends);
        let taken = nest(case);
        unwind(case, taken, ends);
    }
    leave_all_active(case, world);
    // A priority that a handler changes is not the one it runs at.
    start(Ends::Whole);
    let taken = nest(case);
    for (depth, interrupt) in (0..).zip(ALL) {
        interrupts::priority(interrupt, 8 * depth);
    }
    for (depth, interrupt) in (0..DEPTH).zip(ALL).rev() {
        gic::end(interrupt);
        let left = taken
            & ALL[..depth as usize]
                .iter()
                .fold(0, |all, one| all | bit(*one));
        active(case, left, "ended with other priorities");
        interrupts::write_bit(0x280, interrupt);
    }
    let _ = other::calm();
    interrupts::works(case, world);
}
