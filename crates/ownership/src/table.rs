//! The table: one entry a frame, changed by compare-and-swap.

use crate::owner::{Kind, Owner, Pa};
use core::fmt;
use core::sync::atomic::{AtomicU64, Ordering};

/// Bytes in a frame.
pub const FRAME_SIZE: u64 = 4096;

/// Why a transition was refused. Nothing was changed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Error {
    /// The address is not that of a frame in the table.
    NoSuchFrame(Pa),
    /// The frame is not whose it was said to be.
    NotTheOwner {
        /// The frame.
        frame: Pa,
        /// Who was expected.
        expected: Owner,
        /// Who it is.
        owner: Owner,
    },
    /// Frames never go from the one to the other.
    Forbidden {
        /// The first frame asked about.
        frame: Pa,
        /// Whose it is said to be.
        from: Owner,
        /// Whose it should become.
        to: Owner,
    },
    /// The guest frame numbers of the range pass the end of what there is.
    GuestRange(Owner),
    /// The table does not begin on a frame, or passes the end of the address space.
    Base(Pa),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::NoSuchFrame(pa) => write!(
                f,
                "{pa} is no frame of this machine's memory; check the memory map"
            ),
            Error::NotTheOwner {
                frame,
                expected,
                owner,
            } => {
                write!(
                    f,
                    "frame {frame} is {owner}, not {expected}; take another frame or wait for its owner"
                )
            }
            Error::Forbidden { frame, from, to } => {
                write!(
                    f,
                    "frame {frame} is {from} and cannot become {to}; it must be given back first"
                )
            }
            Error::GuestRange(owner) => {
                write!(
                    f,
                    "the range starting as {owner} passes the last guest frame; make it shorter"
                )
            }
            Error::Base(pa) => write!(
                f,
                "a frame table cannot begin at {pa}; use a multiple of 4 KiB that leaves room"
            ),
        }
    }
}

impl core::error::Error for Error {}

/// How many frames are of each kind.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Census([u64; Kind::ALL.len()]);

impl Census {
    /// Returns the frames of one kind.
    pub fn of(&self, kind: Kind) -> u64 {
        self.0.get(kind as usize).copied().unwrap_or(0)
    }

    /// Returns all frames.
    pub fn total(&self) -> u64 {
        self.0.iter().sum()
    }
}

/// The owners of a run of machine memory.
pub struct FrameTable<'t> {
    base: u64,
    entries: &'t [AtomicU64],
}

impl<'t> FrameTable<'t> {
    /// Makes a table over `entries`, one for each frame from `base` on. Zeroed entries are reserved.
    ///
    /// # Errors
    ///
    /// [`Error::Base`] if `base` is not a frame's, or the memory would pass the end of addresses.
    pub fn new(base: Pa, entries: &'t [AtomicU64]) -> Result<Self, Error> {
        let bytes = (entries.len() as u64).checked_mul(FRAME_SIZE);
        let end = bytes.and_then(|bytes| base.0.checked_add(bytes));
        if !base.0.is_multiple_of(FRAME_SIZE) || end.is_none() {
            return Err(Error::Base(base));
        }
        Ok(Self {
            base: base.0,
            entries,
        })
    }

    fn run(&self, first: Pa, frames: u64) -> Result<&'t [AtomicU64], Error> {
        let run = || {
            let offset = first.0.checked_sub(self.base)?;
            let index = usize::try_from(offset / FRAME_SIZE).ok()?;
            let end = index.checked_add(usize::try_from(frames).ok()?)?;
            self.entries
                .get(index..end)
                .filter(|_| offset.is_multiple_of(FRAME_SIZE))
        };
        run().ok_or(Error::NoSuchFrame(first))
    }

    /// Returns the owner of the frame at `pa`, as of now.
    ///
    /// # Errors
    ///
    /// [`Error::NoSuchFrame`].
    pub fn owner(&self, pa: Pa) -> Result<Owner, Error> {
        match self.run(pa, 1)? {
            [entry] => Ok(Owner::unpack(entry.load(Ordering::Acquire))),
            _ => Err(Error::NoSuchFrame(pa)),
        }
    }

    /// Moves `frames` frames from `first` on, all of them or none. For guest memory `from` and `to`
    /// name the first guest frame; the numbers go up with the frames.
    ///
    /// Takes two visits a frame. Whoever must bound it moves a large range in pieces.
    ///
    /// # Errors
    ///
    /// [`Error::NoSuchFrame`], [`Error::NotTheOwner`] and [`Error::Forbidden`], naming the first frame that stood in
    /// the way, and [`Error::GuestRange`].
    pub fn transfer_range(
        &self,
        first: Pa,
        frames: u64,
        from: Owner,
        to: Owner,
    ) -> Result<(), Error> {
        let run = self.run(first, frames)?;
        if !from.may_become(to) {
            return Err(Error::Forbidden {
                frame: first,
                from,
                to,
            });
        }
        // Both ends fit, so everything between does, and the passes below cannot fail on numbers.
        let last = frames.saturating_sub(1);
        from.nth(last).ok_or(Error::GuestRange(from))?;
        to.nth(last).ok_or(Error::GuestRange(to))?;
        for (index, entry) in (0u64..).zip(run) {
            let frame = Pa(first.0 + index * FRAME_SIZE);
            let from_here = from.nth(index).ok_or(Error::GuestRange(from))?;
            if let Err(error) = exchange(entry, frame, from_here, Owner::InTransit) {
                publish(run, index, from);
                return Err(error);
            }
        }
        publish(run, frames, to);
        Ok(())
    }

    /// Adds `frames` frames from the table's `first` on to `census`, each to its kind, as far as there are so many.
    /// Returns the number of the next one, or `None` at the end.
    pub fn count(&self, first: usize, frames: usize, census: &mut Census) -> Option<usize> {
        for entry in self.entries.iter().skip(first).take(frames) {
            let kind = Owner::unpack(entry.load(Ordering::Relaxed)).kind();
            if let Some(count) = census.0.get_mut(kind as usize) {
                *count += 1;
            }
        }
        first
            .checked_add(frames)
            .filter(|next| *next < self.entries.len())
    }
}

fn exchange(entry: &AtomicU64, frame: Pa, from: Owner, to: Owner) -> Result<(), Error> {
    let refused = |now| Error::NotTheOwner {
        frame,
        expected: from,
        owner: Owner::unpack(now),
    };
    let done = entry.compare_exchange(from.pack(), to.pack(), Ordering::AcqRel, Ordering::Acquire);
    done.map(|_| ()).map_err(refused)
}

/// Gives the first `frames` frames of `run`, all in transit and so ours, their owner.
fn publish(run: &[AtomicU64], frames: u64, owner: Owner) {
    for (index, entry) in (0..frames).zip(run) {
        if let Some(owner) = owner.nth(index) {
            entry.store(owner.pack(), Ordering::Release);
        }
    }
}
