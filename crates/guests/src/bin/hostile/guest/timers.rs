//! The physical timer, which is emulated, the virtual one, and waiting.

use tidemark_guests::rt::counter;
use tidemark_guests::rt::gic::{self, Private};

use super::interrupts::{begin, next};
use super::probe::{Snippet, probe, snippets};
use super::{Case, World, interrupts};

snippets! {
    physical_set_value: "msr cntp_tval_el0, x0", "msr cntp_ctl_el0, x1", "isb";
    physical_set_compare: "msr cntp_cval_el0, x0", "msr cntp_ctl_el0, x1", "isb";
    physical_read: "isb", "mrs x0, cntp_ctl_el0", "mrs x1, cntp_cval_el0", "mrs x2, cntp_tval_el0", "mrs x3, cntpct_el0";
    virtual_set_value: "msr cntv_tval_el0, x0", "msr cntv_ctl_el0, x1", "isb";
    virtual_set_compare: "msr cntv_cval_el0, x0", "msr cntv_ctl_el0, x1", "isb";
    virtual_read: "isb", "mrs x0, cntv_ctl_el0", "mrs x1, cntv_cval_el0", "mrs x2, cntv_tval_el0", "mrs x3, cntvct_el0";
    load: "ldr w0, [x2]";
    store: "str w0, [x2]";
    wait: "dsb sy", "wfi";
    event: "sevl", "wfe", "sev", "wfe";
    // wfit x0
    wait_until: ".inst 0xd5031020";
    // wfet x0
    event_until: "sevl", "wfe", ".inst 0xd5031000";
}

/// A timer as the cases use it.
struct Timer {
    interrupt: Private,
    set_value: Snippet,
    set_compare: Snippet,
    read: Snippet,
}

pub fn physical(case: &mut Case, world: &mut World) {
    let timer = Timer {
        interrupt: Private(30),
        set_value: physical_set_value,
        set_compare: physical_set_compare,
        read: physical_read,
    };
    timer.judge(case, world);
}

pub fn virtual_(case: &mut Case, world: &mut World) {
    let timer = Timer {
        interrupt: Private::VIRTUAL_TIMER,
        set_value: virtual_set_value,
        set_compare: virtual_set_compare,
        read: virtual_read,
    };
    timer.judge(case, world);
}

/// The PL031.
const RTC: u64 = 0x0901_0000;
const ENABLE: u64 = 1;
const MASKED: u64 = 0b11;

impl Timer {
    fn off(&self) {
        probe(self.set_compare, [u64::MAX, 0, 0, 0, 0, 0]);
    }

    /// Sets it and checks that its interrupt comes, again after its end while the time is past, and no more once it is off.
    fn fires(&self, case: &mut Case, set: Snippet, value: u64, what: &str) {
        let taken = probe(set, [value, ENABLE, 0, 0, 0, 0]);
        case.quiet(&taken, format_args!("{what}"));
        for turn in 0..2 {
            let got = next();
            case.check(
                got == self.interrupt,
                format_args!("{what}, time {turn}: {got:?}"),
            );
        }
        let control = probe(self.read, [0; 6]).x[0];
        case.check(
            control & 0b111 == 0b101,
            format_args!("{what}: CTL is {control:#b}"),
        );
        self.off();
        self.quiet(case, what);
    }

    fn quiet(&self, case: &mut Case, what: &str) {
        let until = counter::now() + counter::frequency() / 2000;
        while counter::now() < until {}
        // The virtual timer is turned off without an exit: what is in a list register by then stays there until the next, and is spurious.
        if self.interrupt == Private::VIRTUAL_TIMER {
            let late = gic::acknowledge();
            if late == self.interrupt {
                gic::end(late);
            }
        }
        let got = gic::acknowledge();
        case.check(got.0 >= 1020, format_args!("{what}, off: {got:?}"));
        if got.0 < 1020 {
            gic::end(got);
        }
    }

    fn judge(&self, case: &mut Case, world: &mut World) {
        begin(&[self.interrupt]);
        let soon = counter::frequency() / 1000;
        let now = || probe(self.read, [0; 6]).x[3];
        self.fires(case, self.set_value, soon, "TVAL soon");
        self.fires(case, self.set_compare, now() + soon, "CVAL soon");
        self.fires(case, self.set_value, 0, "TVAL 0");
        self.fires(case, self.set_value, u64::from(u32::MAX), "TVAL -1");
        // The comparison is unsigned: before the counter has come so far this is the far future.
        if now() > 0x8000_0000 {
            self.fires(case, self.set_value, 0x8000_0000, "TVAL most negative");
        }
        self.fires(case, self.set_compare, 0, "CVAL 0");
        self.fires(case, self.set_compare, now() - 1, "CVAL past");
        for (what, control) in [("masked", MASKED), ("disabled", 0), ("masked alone", 0b10)] {
            probe(self.set_compare, [0, control, 0, 0, 0, 0]);
            self.quiet(case, what);
            let seen = probe(self.read, [0; 6]).x[0];
            case.check(
                seen & 0b11 == control,
                format_args!("{what}: CTL is {seen:#b}"),
            );
            if control == MASKED {
                case.check(seen & 0b100 != 0, format_args!("masked: ISTATUS is clear"));
            }
        }
        // Unmasked: it comes after all.
        probe(self.set_compare, [0, MASKED, 0, 0, 0, 0]);
        self.fires(case, self.set_compare, 0, "unmasked");
        for compare in [u64::MAX, 1 << 63] {
            probe(self.set_compare, [compare, ENABLE, 0, 0, 0, 0]);
            self.quiet(case, "CVAL far away");
            let x = probe(self.read, [0; 6]).x;
            case.check(
                x[1] == compare && x[0] & 0b100 == 0,
                format_args!("CVAL {compare:#x}: CTL {:#b} CVAL {:#x}", x[0], x[1]),
            );
        }
        // TVAL: written with its sign, read as 32 bits of the distance.
        for _ in 0..64 {
            let value = world.random.next();
            let before = now();
            probe(self.set_value, [value, MASKED, 0, 0, 0, 0]);
            let [_, compare, left, after, ..] = probe(self.read, [0; 6]).x;
            let distance = value as i32 as i64 as u64;
            let spent = compare.wrapping_sub(distance).wrapping_sub(before);
            case.check(
                spent <= after - before,
                format_args!("TVAL {value:#x} at {before:#x} makes CVAL {compare:#x}"),
            );
            let gone = u64::from(
                (compare as u32)
                    .wrapping_sub(left as u32)
                    .wrapping_sub(before as u32),
            );
            case.check(
                left >> 32 == 0 && gone <= after - before,
                format_args!("CVAL {compare:#x} reads as TVAL {left:#x} before {after:#x}"),
            );
        }
        for _ in 0..200 {
            let set = if world.random.next() & 1 == 0 {
                self.set_value
            } else {
                self.set_compare
            };
            let value = world.random.next();
            let control = world.random.next();
            let taken = probe(set, [value, control, 0, 0, 0, 0]);
            case.quiet(&taken, format_args!("{value:#x} with CTL {control:#x}"));
        }
        self.off();
        begin(&[self.interrupt]);
        self.fires(case, self.set_value, soon, "after all that");
    }
}

/// The PL031's alarm comes at its second: to a vCPU that waits, and to one that is busy.
pub fn clock_alarm(case: &mut Case, _world: &mut World) {
    const ALARM: Private = Private(34);
    const DR: u64 = 0;
    const MR: u64 = 0x04;
    const IMSC: u64 = 0x10;
    const RIS: u64 = 0x14;
    const ICR: u64 = 0x1c;
    let get = |register| probe(load, [0, 0, RTC + register, 0, 0, 0]).x[0];
    let put = |register, value| probe(store, [value, 0, RTC + register, 0, 0, 0]);
    begin(&[Private::VIRTUAL_TIMER]);
    put(IMSC, 0);
    put(ICR, 1);
    interrupts::enable_shared(ALARM);
    for waits in [true, false, true] {
        // It counts modulo 2^32, and was set to anything before.
        let set = get(DR) as u32;
        put(MR, set.wrapping_add(1).into());
        put(IMSC, 1);
        if waits {
            // Wakes it if the alarm does not.
            let late = counter::now() + 3 * counter::frequency();
            probe(virtual_set_compare, [late, ENABLE, 0, 0, 0, 0]);
            probe(wait, [0; 6]);
        }
        let got = next();
        probe(virtual_set_compare, [u64::MAX, 0, 0, 0, 0, 0]);
        case.check(
            got == ALARM,
            format_args!("the vCPU waits: {waits}; {got:?} came"),
        );
        let (passed, raw) = ((get(DR) as u32).wrapping_sub(set), get(RIS));
        case.check(
            passed >= 1 && raw == 1,
            format_args!("{passed} seconds after it was set, RIS {raw}"),
        );
        put(ICR, 1);
        put(IMSC, 0);
        let more = gic::acknowledge();
        case.check(more.0 >= 1020, format_args!("after its end: {more:?}"));
    }
}

/// A WFI for each of many timers; one for nothing with something pending.
pub fn wfi_storm(case: &mut Case, _world: &mut World) {
    begin(&[Private::VIRTUAL_TIMER, Private(30)]);
    let step = counter::frequency() / 20_000;
    for turn in 0..600 {
        let at = counter::now() + step;
        let timer = if turn & 1 == 0 {
            probe(virtual_set_compare, [at, ENABLE, 0, 0, 0, 0]);
            Private::VIRTUAL_TIMER
        } else {
            // The two counters are not the same.
            probe(physical_set_value, [step, ENABLE, 0, 0, 0, 0]);
            Private(30)
        };
        case.quiet(&probe(wait, [0; 6]), format_args!("WFI"));
        let got = next();
        case.check(got == timer, format_args!("WFI {turn}: {got:?}"));
        // What was taken and not turned off is pending again: this one must not wait.
        case.quiet(&probe(wait, [0; 6]), format_args!("WFI with one pending"));
        probe(virtual_set_compare, [u64::MAX, 0, 0, 0, 0, 0]);
        probe(physical_set_compare, [u64::MAX, 0, 0, 0, 0, 0]);
        let more = gic::acknowledge();
        if more.0 < 1020 {
            gic::end(more);
        }
    }
}

pub fn wfe(case: &mut Case, _world: &mut World) {
    for _ in 0..2000 {
        case.quiet(&probe(event, [0; 6]), format_args!("WFE"));
    }
}

/// WFIT and WFET are not offered: undefined, or they wait until their time, or, where the syndrome does not tell them from WFI
/// (ISS.TI; QEMU up to 10), for an interrupt, for which there is a timer. They must not wait past that.
pub fn wfit(case: &mut Case, _world: &mut World) {
    begin(&[Private::VIRTUAL_TIMER]);
    for ahead in [0, counter::frequency() / 1000] {
        for snippet in [wait_until, event_until] {
            let now = counter::now();
            let alarm = now + counter::frequency() / 20;
            probe(virtual_set_compare, [alarm, ENABLE, 0, 0, 0, 0]);
            let taken = probe(snippet, [now + ahead, 0, 0, 0, 0, 0]);
            let woken = counter::now();
            probe(virtual_set_compare, [u64::MAX, 0, 0, 0, 0, 0]);
            if taken.count != 0 {
                case.undefined(&taken, format_args!("WFxT"));
            }
            case.check(
                woken < alarm + 2 * counter::frequency(),
                format_args!("WFxT until {:#x} came back at {woken:#x}", now + ahead),
            );
        }
    }
    begin(&[]);
}
