//! Level-sensitive interrupts: pending for as long as the line is high, whatever keeps them from being taken meanwhile.
//!
//! IHI 0069, 4.1.2. Beside each case vCPU 1 is busy, so that on a machine with one CPU this one is switched out and in
//! in the middle of everything.

use tidemark_guests::rt::counter;
use tidemark_guests::rt::gic::{self, Private};

use super::interrupts::{self, NONE, begin, next};
use super::probe::{Register, Snippet, probe, snippets};
use super::{Case, World, other};

snippets! {
    virtual_timer: "msr cntv_cval_el0, x0", "msr cntv_ctl_el0, x1", "isb";
    physical_timer: "msr cntp_cval_el0, x0", "msr cntp_ctl_el0, x1", "isb";
    load: "ldr w0, [x2]";
    store: "str w0, [x2]";
}

const RTC: u64 = 0x0901_0000;
const UART: u64 = 0x0900_0000;
const PRIORITY_MASK: Register = Register(3, 0, 4, 6, 0);

/// A device with a line.
#[derive(Clone, Copy)]
enum Source {
    /// A timer, by what writes its CVAL and CTL.
    Timer(Private, Snippet),
    /// The PL031's alarm.
    Clock,
    /// The PL011, which has sent something.
    Uart,
}

/// Ways to make the line low. Devices with only one do the same for all.
#[derive(Clone, Copy, Debug)]
enum Low {
    Off,
    Masked,
    Later,
}

fn put(register: u64, value: u64) {
    probe(store, [value, 0, register, 0, 0, 0]);
}

impl Source {
    fn interrupt(self) -> Private {
        match self {
            Self::Timer(interrupt, _) => interrupt,
            Self::Clock => Private(34),
            Self::Uart => Private(33),
        }
    }

    fn raise(self) {
        match self {
            Self::Timer(_, set) => drop(probe(set, [0, 1, 0, 0, 0, 0])),
            Self::Clock => {
                put(RTC + 0x10, 1);
                let now = probe(load, [0, 0, RTC, 0, 0, 0]).x[0];
                put(RTC + 0x04, now);
            }
            Self::Uart => put(UART + 0x38, 1 << 5),
        }
    }

    fn lower(self, low: Low) {
        match (self, low) {
            (Self::Timer(_, set), Low::Off) => drop(probe(set, [0, 0, 0, 0, 0, 0])),
            (Self::Timer(_, set), Low::Masked) => drop(probe(set, [0, 0b11, 0, 0, 0, 0])),
            (Self::Timer(_, set), Low::Later) => drop(probe(set, [u64::MAX, 1, 0, 0, 0, 0])),
            (Self::Clock, Low::Off) => put(RTC + 0x1c, 1),
            (Self::Clock, _) => put(RTC + 0x10, 0),
            (Self::Uart, _) => put(UART + 0x38, 0),
        }
    }
}

/// One source under test.
struct Level<'a> {
    source: Source,
    case: &'a mut Case,
}

impl Level<'_> {
    fn pending(&self) -> bool {
        interrupts::bit(0x200, self.source.interrupt())
    }

    /// The line is high: it is seen before long.
    fn high(&mut self, what: &str) {
        self.source.raise();
        let seen = counter::within(2, || self.pending());
        self.case
            .check(seen, format_args!("{what}: raised, and not pending"));
    }

    /// The line is low: that is seen at once.
    fn low(&mut self, low: Low, what: &str) {
        self.source.lower(low);
        let seen = self.pending();
        self.case
            .check(!seen, format_args!("{what}: low ({low:?}), and pending"));
    }

    fn comes(&mut self, what: &str) {
        let got = next();
        let want = self.source.interrupt();
        self.case
            .check(got == want, format_args!("{what}: {got:?} came"));
    }

    fn quiet(&mut self, what: &str) {
        let until = counter::now() + counter::frequency() / 5000;
        while counter::now() < until {}
        let got = gic::acknowledge();
        self.case
            .check(got == NONE, format_args!("{what}: {got:?} came"));
        if got != NONE {
            gic::end(got);
        }
    }

    /// Longer than a time slice: on a machine with one CPU the other vCPU runs.
    fn while_others_run(&self) {
        let until = counter::now() + counter::frequency() / 100;
        while counter::now() < until {}
    }

    fn set(&self, base: usize) {
        interrupts::write_bit(base, self.source.interrupt());
    }

    fn begin(&mut self, low: Low) {
        begin(&[]);
        self.source.lower(low);
        interrupts::enable_only(self.source.interrupt());
    }

    fn judge(&mut self, low: Low) {
        self.begin(low);
        self.high("free");
        self.comes("free");
        self.comes("and again, high all the while");
        self.low(low, "free");
        self.quiet("free");

        self.set(0x180);
        self.high("disabled");
        self.quiet("disabled");
        self.low(low, "disabled");
        self.high("disabled, again");
        self.while_others_run();
        self.low(low, "disabled, again");
        self.set(0x100);
        self.quiet("enabled, low before");
        self.set(0x180);
        self.high("disabled, a third time");
        self.source.lower(low);
        self.set(0x100);
        self.quiet("enabled, low before, and nobody looked");
        self.set(0x180);
        self.high("disabled, then enabled");
        self.set(0x280);
        let seen = self.pending();
        self.case
            .check(seen, format_args!("ICPENDR took what the line holds"));
        self.set(0x100);
        self.comes("enabled, still high");
        self.low(low, "enabled, then taken");
        self.quiet("enabled, then taken");

        interrupts::groups(0);
        self.high("its group off");
        self.low(low, "its group off");
        interrupts::groups(2);
        self.quiet("its group on, low before");

        PRIORITY_MASK.write(0);
        self.high("masked");
        self.while_others_run();
        self.low(low, "masked");
        PRIORITY_MASK.write(0xff);
        self.quiet("unmasked, low before");

        self.high("taken");
        let got = gic::acknowledge();
        self.case.check(
            got == self.source.interrupt(),
            format_args!("taken: {got:?}"),
        );
        let state = (self.pending(), interrupts::bit(0x300, got));
        self.case.check(
            state == (true, true),
            format_args!("taken, line high: pending and active are {state:?}"),
        );
        self.while_others_run();
        self.low(low, "taken");
        let active = interrupts::bit(0x300, got);
        self.case
            .check(active, format_args!("taken, line low: not active"));
        self.high("taken, high again");
        gic::end(got);
        self.comes("high again at its end");
        self.low(low, "ended");
        self.quiet("ended");

        // The latch that ISPENDR sets is not the line.
        self.set(0x180);
        self.set(0x200);
        self.high("by hand and by its line");
        self.source.lower(low);
        let seen = self.pending();
        self.case
            .check(seen, format_args!("ISPENDR went with the line"));
        self.set(0x100);
        self.comes("by hand");
        self.quiet("by hand");
    }

    /// A shared one that goes to the other vCPU, which does not take it, and comes back.
    fn moved(&mut self, low: Low) {
        let interrupt = self.source.interrupt();
        self.begin(low);
        interrupts::route(interrupt, 1);
        self.high("at the other vCPU");
        self.quiet("at the other vCPU");
        self.source.lower(low);
        let fell = counter::within(2, || !self.pending());
        self.case
            .check(fell, format_args!("it stays pending at the other vCPU"));
        interrupts::route(interrupt, 0);
        self.quiet("back, low before");
        interrupts::route(interrupt, 1);
        self.high("at the other vCPU again");
        interrupts::route(interrupt, 0);
        self.comes("back");
        self.low(low, "back");
        self.quiet("back");
    }
}

fn judge(case: &mut Case, source: Source) {
    if !other::busy() {
        return case.fail(format_args!("the other vCPU does not come"));
    }
    let mut level = Level { source, case };
    for low in [Low::Off, Low::Masked, Low::Later] {
        level.judge(low);
        if matches!(source, Source::Clock | Source::Uart) {
            level.moved(low);
        }
        level.source.lower(Low::Off);
        level.source.lower(Low::Masked);
    }
    let _ = other::calm();
    begin(&[]);
}

pub fn virtual_timer_(case: &mut Case, _world: &mut World) {
    judge(case, Source::Timer(Private::VIRTUAL_TIMER, virtual_timer));
}

pub fn physical_timer_(case: &mut Case, _world: &mut World) {
    judge(case, Source::Timer(Private(30), physical_timer));
}

pub fn clock(case: &mut Case, _world: &mut World) {
    judge(case, Source::Clock);
}

pub fn uart(case: &mut Case, _world: &mut World) {
    judge(case, Source::Uart);
}
