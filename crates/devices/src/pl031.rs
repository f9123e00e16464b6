//! The PL031 real-time clock.
//!
//! # Purpose
//!
//! Shows the guest the wall-clock seconds its host gives, plus what the guest added by setting the
//! clock, and raises an interrupt at the alarm second. A Linux guest reads it once at boot.
//!
//! # Invariants
//!
//! - The device holds no time: every access is given one. Seconds wrap at 2^32 as the counter does.
//! - The alarm fires on equality being reached, once each time MR is written (DDI 0224, 2.2.2).
//!
//! # Concurrency
//!
//! `&mut self`; the owner locks. The owner calls [`Pl031::tick`] at [`Pl031::next_alarm`].
//!
//! Specification: DDI 0224 (PL031), chapter 3.

use crate::{Level, primecell};

#[cfg(test)]
mod tests;

/// Part 0x031 by Arm, revision 1: what QEMU's `virt` shows; Linux's `rtc-pl031` binds to it.
const PERIPHERAL_ID: u32 = 0x0014_1031;

const DR: u64 = 0x00;
const MR: u64 = 0x04;
const LR: u64 = 0x08;
const CR: u64 = 0x0c;
const IMSC: u64 = 0x10;
const RIS: u64 = 0x14;
const MIS: u64 = 0x18;
const ICR: u64 = 0x1c;

/// Seconds since 1970, as the counter holds them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct UnixSeconds(pub u32);

/// All a PL031 remembers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Pl031State {
    /// What the guest sees minus the time given, wrapping.
    pub offset: u32,
    /// MR.
    pub match_value: u32,
    /// LR as last written.
    pub load: u32,
    /// IMSC bit 0.
    pub mask: u32,
    /// RIS bit 0.
    pub raw: u32,
    /// 1 while an alarm is set and has not fired.
    pub armed: u32,
}

/// A PL031.
#[derive(Debug, Default)]
pub struct Pl031 {
    state: Pl031State,
}

impl Pl031 {
    /// Makes a clock that shows the time it is given.
    pub const fn new() -> Self {
        Self {
            state: Pl031State {
                offset: 0,
                match_value: 0,
                load: 0,
                mask: 0,
                raw: 0,
                armed: 0,
            },
        }
    }

    /// Reads a register.
    pub fn read(&mut self, offset: u64, now: UnixSeconds) -> u32 {
        self.tick(now);
        match offset {
            DR => self.counter(now),
            MR => self.state.match_value,
            LR => self.state.load,
            // Enabled since ever: once started, CR reads one until reset (DDI 0224, 3.3.4).
            CR => 1,
            IMSC => self.state.mask,
            RIS => self.state.raw,
            MIS => self.state.raw & self.state.mask,
            _ => primecell::read(PERIPHERAL_ID, offset).unwrap_or(0),
        }
    }

    /// Writes a register. The level may have changed afterwards.
    pub fn write(&mut self, offset: u64, value: u32, now: UnixSeconds) {
        self.tick(now);
        match offset {
            MR => {
                self.state.match_value = value;
                self.state.armed = 1;
                self.tick(now);
            }
            LR => {
                self.state.load = value;
                self.state.offset = value.wrapping_sub(now.0);
                self.tick(now);
            }
            IMSC => self.state.mask = value & 1,
            ICR => self.state.raw &= !value,
            _ => {}
        }
    }

    /// Takes note of the time: fires the alarm when its second has come.
    pub fn tick(&mut self, now: UnixSeconds) {
        if self.state.armed != 0 && self.until_alarm(now) == 0 {
            self.state.armed = 0;
            self.state.raw = 1;
        }
    }

    /// Gives the time at which [`Pl031::tick`] has something to do that the guest would see.
    pub fn next_alarm(&self, now: UnixSeconds) -> Option<UnixSeconds> {
        (self.state.armed != 0 && self.state.mask != 0)
            .then(|| UnixSeconds(now.0.wrapping_add(self.until_alarm(now))))
    }

    /// Gives the interrupt line.
    pub fn irq_level(&self) -> Level {
        if self.state.raw & self.state.mask != 0 {
            Level::High
        } else {
            Level::Low
        }
    }

    /// Gives all it remembers.
    pub fn save(&self) -> Pl031State {
        self.state
    }

    /// Takes up what [`Pl031::save`] gave.
    pub fn restore(&mut self, state: &Pl031State) {
        self.state = Pl031State {
            mask: state.mask & 1,
            raw: state.raw & 1,
            ..*state
        };
    }

    fn counter(&self, now: UnixSeconds) -> u32 {
        now.0.wrapping_add(self.state.offset)
    }

    /// Seconds until the alarm; 0 when it is due. A tick may come late, so half the counter's range counts as past.
    fn until_alarm(&self, now: UnixSeconds) -> u32 {
        let left = self.state.match_value.wrapping_sub(self.counter(now));
        if left > u32::MAX / 2 { 0 } else { left }
    }
}
