//! The bitmaps of a slot by themselves: what a harvest takes of a run of pages, and where one has to look.

use crate::dirty::Dirty;
use std::ops::ControlFlow;
use std::vec::Vec;

/// Takes live bits of `first..end` until `most` words were moved. Returns their pages, and where it stopped.
fn take(dirty: &Dirty, first: u64, end: u64, most: usize) -> (Vec<u64>, u64) {
    let (mut pages, mut words) = (Vec::new(), 0);
    let looked = dirty.take_live(first, end, |moved| {
        assert_eq!(moved.count, moved.pages.count_ones());
        pages.extend((0..64).filter(|bit| moved.pages >> bit & 1 == 1));
        let from = pages.len() - moved.count as usize;
        pages
            .iter_mut()
            .skip(from)
            .for_each(|page| *page += moved.first);
        words += 1;
        if words == most {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    });
    (pages, looked.page)
}

#[test]
fn a_run_within_words_leaves_its_neighbours() {
    let dirty = Dirty::new(3000).unwrap();
    let pages = [3, 70, 75, 127, 128, 600, 2999];
    pages.iter().for_each(|page| dirty.mark(*page));
    dirty.begin_harvest();
    // Neither end is that of a word, and bits are on both sides of each.
    assert_eq!(take(&dirty, 71, 128, 9), (Vec::from([75, 127]), 128));
    assert_eq!(take(&dirty, 71, 128, 9), (Vec::new(), 128));
    assert_eq!(take(&dirty, 0, 70, 9), (Vec::from([3]), 70));
    // One word, and on from where that ended.
    assert_eq!(take(&dirty, 0, u64::MAX, 1), (Vec::from([70]), 128));
    assert_eq!(
        take(&dirty, 128, u64::MAX, 9),
        (Vec::from([128, 600, 2999]), 3000)
    );
    assert_eq!((dirty.live_pages(), dirty.in_flight_pages()), (0, 7));
}

#[test]
fn what_comes_during_a_harvest_may_wait_for_the_next() {
    let dirty = Dirty::new(64 * 1024).unwrap();
    dirty.mark(5);
    dirty.begin_harvest();
    dirty.mark(40_000);
    assert_eq!(take(&dirty, 0, u64::MAX, 9).0, [5]);
    dirty.end_harvest();
    dirty.begin_harvest();
    assert_eq!(take(&dirty, 0, u64::MAX, 9).0, [40_000]);
}

/// What a harvest passes without a look is what it is not to take: live bits of parts that were marked before it began stop it.
#[test]
fn what_is_due_is_not_passed() {
    // A part is 1,024 pages.
    let dirty = Dirty::new(64 * 1024).unwrap();
    dirty.mark(5000);
    dirty.begin_harvest();
    dirty.mark(3000);
    assert_eq!(dirty.idle(0, 512), 512);
    assert_eq!(dirty.idle(2600, 1000), 1000, "a bit of the next harvest");
    // As far as the line of the bitmap in front of it.
    assert_eq!(dirty.idle(0, 8192), 4608);
    assert_eq!(dirty.idle(4100, 4092), 508);
    assert_eq!(dirty.idle(4700, 3000), 0);
    assert_eq!(dirty.idle(4700, 100), 100);
    assert_eq!(dirty.idle(5120, 1024), 1024);
    assert_eq!(dirty.idle(60_000, 60_000), 60_000, "past the end");
    let small = Dirty::new(100).unwrap();
    small.mark(99);
    assert_eq!(small.idle(0, 100), 100, "no harvest was begun");
    small.begin_harvest();
    assert_eq!(small.idle(0, 100), 0);
}

#[test]
fn an_epoch_is_read_only_where_it_may_have_pages() {
    // Parts are 1024 pages, which are 16 words.
    let dirty = Dirty::new(64 * 1024).unwrap();
    let none = dirty.in_flight_marked(0);
    assert!(none.is_empty() && none.start >= 1024);
    for page in [1023, 1024, 50_000] {
        dirty.mark(page);
    }
    dirty.begin_harvest();
    take(&dirty, 0, u64::MAX, 9);
    assert_eq!(dirty.in_flight_marked(0), 0..32);
    assert_eq!(dirty.in_flight_marked(20), 20..32);
    assert_eq!(dirty.in_flight_marked(32), 768..784);
    assert!(dirty.in_flight_marked(784).is_empty());
    dirty.add_run(63 * 1024, 1024);
    assert_eq!(dirty.in_flight_marked(784), 1008..1024);
}
