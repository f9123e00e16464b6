//! Ranges of addresses, and what is left of memory once others have had their part.

use core::fmt;

use crate::FRAME_SIZE;

/// A half-open range of physical addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// First address.
    pub start: u64,
    /// First address past it.
    pub end: u64,
}

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}..{:#x}", self.start, self.end)
    }
}

impl Range {
    /// A range by address and size; `None` where it wraps.
    pub fn new(start: u64, size: u64) -> Option<Self> {
        Some(Self {
            start,
            end: start.checked_add(size)?,
        })
    }

    /// A range by address and size; one that would wrap goes to the end of all addresses. For what is
    /// reserved: too much is safe there, nothing is not.
    pub fn up_to(start: u64, size: u64) -> Self {
        Self {
            start,
            end: start.saturating_add(size),
        }
    }

    /// Bytes in it.
    pub fn size(&self) -> u64 {
        self.end.saturating_sub(self.start)
    }

    /// The range widened to whole pages.
    pub fn whole_pages(&self) -> Self {
        let mask = FRAME_SIZE - 1;
        Self {
            start: self.start & !mask,
            end: self.end.saturating_add(mask) & !mask,
        }
    }

    /// Whether the two have an address in common.
    pub fn overlaps(&self, other: &Self) -> bool {
        self.start < other.end && other.start < self.end
    }
}

/// What is left of `memory` without what `taken` goes through, piece by piece from its start.
///
/// `taken` is any number of ranges in any order; they may touch, overlap, be empty, and lie outside. Nothing is
/// kept of them, for there is no heap yet when this is needed: each piece goes through them anew, and so does each
/// range that covers the place reached.
pub fn without<I>(memory: Range, taken: impl Fn() -> I) -> impl Iterator<Item = Range>
where
    I: Iterator<Item = Range>,
{
    let mut at = memory.start;
    core::iter::from_fn(move || {
        while at < memory.end {
            let (mut covered, mut end) = (at, memory.end);
            for range in taken().filter(|range| range.size() > 0) {
                if range.start > covered {
                    end = end.min(range.start);
                } else {
                    covered = covered.max(range.end);
                }
            }
            if covered == at {
                at = end;
                return Some(Range {
                    start: covered,
                    end,
                });
            }
            at = covered;
        }
        None
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec::Vec;

    fn range(start: u64, end: u64) -> Range {
        Range { start, end }
    }

    fn left(memory: Range, taken: &[Range]) -> Vec<Range> {
        without(memory, || taken.iter().copied()).collect()
    }

    #[test]
    fn nothing_taken_leaves_all_and_all_taken_nothing() {
        let memory = range(0x1000, 0x9000);
        assert_eq!(left(memory, &[]), [memory]);
        assert_eq!(left(memory, &[range(0, u64::MAX)]), []);
        assert_eq!(left(range(5, 5), &[]), []);
    }

    #[test]
    fn holes_may_touch_overlap_be_empty_and_come_in_any_order() {
        let memory = range(10, 100);
        let holes = [
            range(60, 70),
            range(0, 12),
            range(20, 30),
            range(30, 40),
            range(25, 35),
            range(50, 50),
            range(95, 200),
        ];
        let wanted = [range(12, 20), range(40, 60), range(70, 95)];
        assert_eq!(left(memory, &holes), wanted);
        let backwards: Vec<_> = holes.into_iter().rev().collect();
        assert_eq!(left(memory, &backwards), wanted);
    }

    /// A list of 64 was kept once, and what did not fit was given to guests.
    #[test]
    fn any_number_of_holes_is_taken() {
        let memory = range(0, 3 * 1000);
        for step in [1_u64, 7, 999] {
            // All of them, in an order that is neither up nor down.
            let holes: Vec<_> = (0..1000)
                .map(|n| n * step % 1000)
                .map(|n| range(3 * n + 1, 3 * n + 2))
                .collect();
            let left = left(memory, &holes);
            assert_eq!(left.len(), 1001);
            for hole in &holes {
                assert!(!left.iter().any(|piece| piece.overlaps(hole)), "{hole:?}");
            }
            assert_eq!(left.iter().map(Range::size).sum::<u64>(), 2 * 1000);
        }
    }

    #[test]
    fn a_reservation_that_would_wrap_reaches_to_the_end() {
        assert_eq!(Range::new(0x8000, u64::MAX), None);
        let all = Range::up_to(0x8000, u64::MAX).whole_pages();
        assert_eq!(
            left(range(0x1000, 0x10000), &[all]),
            [range(0x1000, 0x8000)]
        );
    }

    #[test]
    fn whole_pages_are_not_fewer() {
        assert_eq!(range(0x1fff, 0x2001).whole_pages(), range(0x1000, 0x3000));
        assert_eq!(range(0x1000, 0x2000).whole_pages(), range(0x1000, 0x2000));
    }
}
