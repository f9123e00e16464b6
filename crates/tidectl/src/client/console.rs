//! Consoles: output without gaps, input without doubles.
//!
//! Events may be lost. Each carries its offset, so a gap is seen by the next one, and what
//! is missing is read again from what the target keeps. A gap at the very end is found by
//! asking once in a while.

use super::exchange::Heard;
use super::{Client, Output};
use crate::Result;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};
use tidemark_wire::CONSOLE_WRITE_MAX;
use tidemark_wire::message::{ConsoleFrom, Event, Request, Response, VmId};

/// Quiet after which an attached console is asked whether it has more.
const CHECK_AFTER: Duration = Duration::from_secs(1);

/// Reads after which a console that goes on printing is left for the next poll.
const READS_AT_ONCE: usize = 16;

/// Pause before offering input again to a guest that does not take it.
const INPUT_PAUSE: Duration = Duration::from_millis(10);

/// What is known of each console.
#[derive(Default)]
pub(super) struct Consoles {
    attached: BTreeMap<VmId, Console>,
    /// Input sent to each VM in this session.
    input: BTreeMap<VmId, u64>,
}

struct Console {
    /// Offset of the next byte to hand on.
    next: u64,
    /// Whether something before an event was missing.
    gap: Gap,
    checked: Instant,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Gap {
    None,
    Seen,
}

impl Client {
    /// Has a VM's console output given to the sink from here on, and returns the offset it
    /// begins at. What the target kept is given at once if asked for.
    ///
    /// # Errors
    /// As [`Client::call`].
    pub fn attach(&mut self, vm: VmId, from: ConsoleFrom) -> Result<u64> {
        let request = Request::ConsoleAttach { vm, from };
        let next = self.call(
            "attaching to a console",
            &request,
            |response| match response {
                Response::ConsoleData {
                    offset, data: [], ..
                } => Some(offset),
                _ => None,
            },
        )?;
        // Events tell of what is printed from now on; what was before is read.
        let gap = Gap::Seen;
        self.consoles.attached.insert(
            vm,
            Console {
                next,
                gap,
                checked: Instant::now(),
            },
        );
        self.fill_gaps()?;
        Ok(next)
    }

    /// Ends what [`Client::attach`] began.
    ///
    /// # Errors
    /// As [`Client::call`].
    pub fn detach(&mut self, vm: VmId) -> Result<()> {
        self.consoles.attached.remove(&vm);
        let request = Request::ConsoleDetach { vm };
        self.call(
            "detaching from a console",
            &request,
            |response| match response {
                Response::Ok => Some(()),
                _ => None,
            },
        )
    }

    /// Hands outputs to the sink for at most `time`, returning early when there were some.
    ///
    /// # Errors
    /// A closed line, Ctrl-C, or, on an attached console, a target that no longer answers.
    pub fn poll(&mut self, time: Duration) -> Result<()> {
        let attached = !self.consoles.attached.is_empty();
        let time = if attached {
            time.min(CHECK_AFTER)
        } else {
            time
        };
        let heard = self.take_in_for("waiting for output", time)?;
        if heard == Heard::Nothing {
            for console in self.consoles.attached.values_mut() {
                if console.checked.elapsed() >= CHECK_AFTER {
                    console.gap = Gap::Seen;
                }
            }
        }
        self.fill_gaps()
    }

    /// Hands on what the target keeps of an attached console that no event has brought yet. True when that was all;
    /// a console that goes on printing, or has much to tell, is not read to its end at once.
    ///
    /// # Errors
    /// As [`Client::call`].
    pub fn catch_up(&mut self, vm: VmId) -> Result<bool> {
        self.fill_gap(vm)?;
        let console = self.consoles.attached.get(&vm);
        Ok(console.is_none_or(|console| console.gap == Gap::None))
    }

    /// Takes an event in.
    pub(super) fn event(&mut self, event: &Event<'_>) {
        match *event {
            Event::Console { vm, offset, data } => self.console_event(vm, offset, data),
            Event::Log { data } => (self.sink)(Output::Log(data)),
            Event::VmState { vm, state } => (self.sink)(Output::VmState { vm, state }),
        }
    }

    fn console_event(&mut self, vm: VmId, offset: u64, data: &[u8]) {
        let Some(console) = self.consoles.attached.get_mut(&vm) else {
            return;
        };
        if console.gap == Gap::Seen || offset > console.next {
            // Something before it is missing: it will all be read again, in order.
            console.gap = Gap::Seen;
            return;
        }
        self.hand_on(vm, offset, data);
    }

    /// Gives the sink what it has not had of `data`.
    fn hand_on(&mut self, vm: VmId, offset: u64, data: &[u8]) {
        let Some(console) = self.consoles.attached.get_mut(&vm) else {
            return;
        };
        let known = usize::try_from(console.next.saturating_sub(offset)).unwrap_or(usize::MAX);
        let Some(fresh @ [_, ..]) = data.get(known..) else {
            return;
        };
        let offset = console.next;
        console.next += fresh.len() as u64;
        console.checked = Instant::now();
        (self.sink)(Output::Console {
            vm,
            offset,
            data: fresh,
        });
    }

    fn fill_gaps(&mut self) -> Result<()> {
        let gaps: Vec<VmId> = self
            .consoles
            .attached
            .iter()
            .filter(|(_, console)| console.gap == Gap::Seen)
            .map(|(&vm, _)| vm)
            .collect();
        for vm in gaps {
            self.fill_gap(vm)?;
        }
        Ok(())
    }

    /// Reads what is missing until there is no more, or for a while: a guest that prints
    /// faster than the line carries must not keep its own input waiting.
    fn fill_gap(&mut self, vm: VmId) -> Result<()> {
        for _ in 0..READS_AT_ONCE {
            let Some(console) = self.consoles.attached.get_mut(&vm) else {
                break;
            };
            // Events count again from here; one that comes ahead of `next` meanwhile means
            // there is still more to read.
            console.gap = Gap::None;
            console.checked = Instant::now();
            let next = console.next;
            let (offset, data) = self.read_console(vm, next)?;
            let Some(console) = self.consoles.attached.get_mut(&vm) else {
                break;
            };
            if let Some(bytes) = offset.checked_sub(console.next).filter(|&bytes| bytes > 0) {
                console.next = offset;
                (self.sink)(Output::Missed { vm, bytes });
            }
            let quiet = data.is_empty();
            self.hand_on(vm, offset, &data);
            if !quiet {
                continue;
            }
            match self.consoles.attached.get(&vm) {
                Some(Console { gap: Gap::Seen, .. }) => {}
                _ => return Ok(()),
            }
        }
        if let Some(console) = self.consoles.attached.get_mut(&vm) {
            console.gap = Gap::Seen;
        }
        Ok(())
    }

    /// Reads console output from `offset`; returns what there is and where it really begins.
    ///
    /// # Errors
    /// As [`Client::call`].
    pub fn read_console(&mut self, vm: VmId, offset: u64) -> Result<(u64, Vec<u8>)> {
        let request = Request::ConsoleRead { vm, offset };
        self.call("reading a console", &request, |response| match response {
            Response::ConsoleData { offset, data, .. } => Some((offset, data.to_vec())),
            _ => None,
        })
    }

    /// Offers input to a VM and returns how much of it was taken, which may be none.
    ///
    /// # Errors
    /// As [`Client::call`].
    pub fn offer_input(&mut self, vm: VmId, bytes: &[u8]) -> Result<usize> {
        let data = bytes
            .get(..bytes.len().min(CONSOLE_WRITE_MAX))
            .unwrap_or(bytes);
        let offset = self.consoles.input.get(&vm).copied().unwrap_or(0);
        let request = Request::ConsoleWrite { vm, offset, data };
        let next = self.call(
            "typing into a console",
            &request,
            |response| match response {
                Response::ConsoleAccepted { next_offset } => Some(next_offset),
                _ => None,
            },
        )?;
        self.consoles.input.insert(vm, next);
        let taken = usize::try_from(next.saturating_sub(offset)).unwrap_or(usize::MAX);
        Ok(taken.min(data.len()))
    }

    /// Types all of `bytes`, waiting for the guest to take them.
    ///
    /// # Errors
    /// As [`Client::call`], and [`crate::Error::TooSlow`] when the guest takes nothing for a timeout.
    pub fn type_input(&mut self, vm: VmId, mut bytes: &[u8]) -> Result<()> {
        let mut moved = Instant::now();
        while !bytes.is_empty() {
            let taken = self.offer_input(vm, bytes)?;
            bytes = bytes.get(taken..).unwrap_or(&[]);
            if taken > 0 {
                moved = Instant::now();
            } else if moved.elapsed() > self.options.timeout {
                let after = self.options.timeout;
                let what = format!("VM {vm} does not read its console");
                return Err(crate::Error::TooSlow { what, after });
            } else {
                self.take_in_for("waiting for the guest to read", INPUT_PAUSE)?;
            }
        }
        Ok(())
    }
}
