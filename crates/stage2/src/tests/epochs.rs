//! Take, commit, abort: nothing is lost whenever the host goes away.

use super::world::*;
use crate::types::*;
use crate::{Error, Features, LogMode, LogStage};
use std::vec::Vec;

const IPA: u64 = 0x4000_0000;

fn page(number: u64) -> u64 {
    IPA + number * PAGE_SIZE
}

fn logging(engine: Engine, features: Features, pages: u64) -> World {
    let world = World::sized(features, 39, 600, 2);
    world.slot(0, IPA, pages, Access::ReadWrite, RAM);
    world.map_all(0);
    world.start(engine, Granularity::Page);
    world
}

#[test]
fn invariant_19_an_aborted_epoch_is_reported_again_with_what_came_since() {
    for (engine, features) in engines() {
        let world = logging(engine, features, 3 * P2M);
        world.write(0, page(1));
        world.el2_write(page(2));
        let (epoch, taken) = world.take();
        assert_eq!(taken, set([page(1), page(2)]));
        world.write(0, page(3));
        world.stage2.abort(epoch).unwrap();
        assert_eq!(world.stage2.log_status().outstanding, None);
        let (second, taken) = world.take();
        assert_eq!(taken, set([page(1), page(2), page(3)]));
        world.stage2.abort(second).unwrap();
        assert_eq!(world.harvest(), set([page(1), page(2), page(3)]));
        assert!(world.harvest().is_empty());
    }
}

#[test]
fn invariant_19_an_abort_at_any_step_loses_nothing_and_reports_nothing_committed() {
    let pages = 20 * P2M;
    for (engine, features) in engines() {
        for steps in 0..40 {
            let world = logging(engine, features, pages);
            // A committed epoch's bits are still in the bitmaps when the next take begins.
            let old = (0..pages).step_by(3).map(page).collect::<Vec<_>>();
            old.iter().for_each(|ipa| world.touch(0, *ipa));
            assert_eq!(world.harvest(), set(old));
            let new = set((1..pages).step_by(97).map(page));
            new.iter().for_each(|ipa| world.touch(0, *ipa));
            let epoch = world.new_epoch();
            let mut done = false;
            for _ in 0..steps {
                done = world.stage2.take(epoch).unwrap() == Progress::Done;
            }
            if steps > 0 {
                world.stage2.abort(epoch).unwrap();
            }
            assert_eq!(world.harvest(), new, "{engine:?} after {steps} steps");
            if done {
                break;
            }
            assert!(steps < 39, "a take of 40 MiB needs more than 39 steps");
        }
    }
}

#[test]
fn a_block_mapped_around_the_cursor_is_reported_from_its_beginning() {
    // Under write protection no harvest of everything goes through holes.
    let world = World::sized(dbm(), 39, 64, 1);
    world.slot(0, IPA, 8 * P1G, Access::ReadWrite, RAM);
    world.start(Engine::Dbm, Granularity::Block);
    let epoch = world.new_epoch();
    // The hole is long; the guest maps a block of it when the harvest is in the middle of that.
    let mut mapped = None;
    while let Progress::More { done, .. } = world.stage2.take(epoch).unwrap() {
        // It is in what was given out last.
        if done > 0 && mapped.is_none() {
            let block = (IPA + done * PAGE_SIZE - 1) & !(GIB - 1);
            mapped = Some(block);
            world.write(0, block);
        }
    }
    let reported = world.read_epoch(epoch);
    assert_eq!(Some(reported), mapped.map(|block| span(block, GIB)));
}

#[test]
fn an_epoch_is_the_hosts_until_it_is_settled() {
    let world = logging(Engine::Dbm, dbm(), P2M);
    let stage2 = &world.stage2;
    let none = |asked| Error::NoSuchEpoch {
        asked: Epoch(asked),
        outstanding: None,
    };
    assert_eq!(stage2.commit(Epoch(5)), Err(none(5)));
    assert_eq!(stage2.abort(Epoch(5)), Err(none(5)));
    assert_eq!(stage2.taken(Epoch(5)).unwrap_err(), none(5));
    assert!(matches!(
        stage2.take(Epoch(5)).unwrap(),
        Progress::More { .. }
    ));
    assert_eq!(
        stage2.commit(Epoch(5)),
        Err(Error::TakeUnfinished(Epoch(5)))
    );
    assert_eq!(
        stage2.in_flight(SlotId(0), Epoch(5)).err(),
        Some(Error::TakeUnfinished(Epoch(5)))
    );
    assert_eq!(
        stage2.set_engine(Engine::WriteProtect),
        Err(Error::TakeUnfinished(Epoch(5)))
    );
    assert_eq!(
        stage2.take(Epoch(6)),
        Err(Error::EpochOutstanding(Epoch(5)))
    );
    finish(|| stage2.take(Epoch(5))).unwrap();
    assert_eq!(stage2.take(Epoch(5)), Ok(Progress::Done));
    assert_eq!(
        stage2.take(Epoch(6)),
        Err(Error::EpochOutstanding(Epoch(5)))
    );
    assert_eq!(stage2.stop_log(), Err(Error::EpochOutstanding(Epoch(5))));
    let other = Error::NoSuchEpoch {
        asked: Epoch(4),
        outstanding: Some(Epoch(5)),
    };
    assert_eq!(stage2.commit(Epoch(4)), Err(other));
    assert_eq!(
        stage2.in_flight(SlotId(9), Epoch(5)).err(),
        Some(Error::NoSuchSlot(SlotId(9)))
    );
    assert_eq!(stage2.log_status().outstanding, Some(Epoch(5)));
    stage2.commit(Epoch(5)).unwrap();
    assert_eq!(stage2.log_status().last_committed, Some(Epoch(5)));
    let stale = |asked| {
        Err(Error::StaleEpoch {
            asked: Epoch(asked),
            last: Epoch(5),
        })
    };
    assert_eq!(stage2.take(Epoch(5)), stale(5));
    assert_eq!(stage2.take(Epoch(1)), stale(1));
    assert_eq!(stage2.in_flight(SlotId(0), Epoch(5)).err(), Some(none(5)));
}

#[test]
fn a_repeated_request_gets_the_same_answer() {
    let world = logging(Engine::WriteProtect, Features::BASELINE, P2M);
    let (epoch, _) = world.take();
    world.stage2.commit(epoch).unwrap();
    world.stage2.commit(epoch).unwrap();
    assert_eq!(
        world.stage2.abort(epoch),
        Err(Error::NoSuchEpoch {
            asked: epoch,
            outstanding: None
        })
    );
    let (epoch, _) = world.take();
    world.stage2.abort(epoch).unwrap();
    world.stage2.abort(epoch).unwrap();
    assert_eq!(
        world.stage2.commit(epoch),
        Err(Error::NoSuchEpoch {
            asked: epoch,
            outstanding: None
        })
    );
    assert_eq!(world.stage2.abort_outstanding(), None);
    let (epoch, _) = world.take();
    assert_eq!(world.stage2.abort_outstanding(), Some(epoch));
}

#[test]
fn a_log_has_one_life_at_a_time() {
    let world = World::sized(Features::BASELINE, 39, 64, 2);
    world.slot(0, IPA, P2M, Access::ReadWrite, RAM);
    let stage2 = &world.stage2;
    let (wp, dbm) = (Engine::WriteProtect, Engine::Dbm);
    assert_eq!(stage2.best_engine(), wp);
    assert_eq!(
        stage2.start_log(dbm, Granularity::Page),
        Err(Error::EngineUnavailable)
    );
    assert_eq!(stage2.take(Epoch(1)), Err(Error::NotLogging));
    assert_eq!(stage2.stop_log(), Err(Error::NotLogging));
    assert_eq!(stage2.set_engine(wp), Err(Error::NotLogging));
    assert_eq!(
        stage2.start_slot_log(SlotId(3), wp, Granularity::Page),
        Err(Error::NoSuchSlot(SlotId(3)))
    );
    stage2.start_log(wp, Granularity::Page).unwrap();
    assert_eq!(stage2.log_status().stage, LogStage::Starting);
    assert_eq!(stage2.take(Epoch(1)), Err(Error::Busy));
    assert_eq!(
        stage2.start_log(wp, Granularity::Block),
        Err(Error::AlreadyLogging)
    );
    world.start(wp, Granularity::Page);
    assert_eq!(
        stage2.start_log(wp, Granularity::Page),
        Err(Error::AlreadyLogging)
    );
    let mode = LogMode {
        engine: wp,
        granularity: Granularity::Page,
    };
    assert_eq!(
        (stage2.log_status().stage, stage2.log_status().mode),
        (LogStage::On, Some(mode))
    );
    assert_eq!(stage2.set_engine(dbm), Err(Error::EngineUnavailable));
    stage2.stop_log().unwrap();
    assert_eq!(stage2.start_log(wp, Granularity::Page), Err(Error::Busy));
    assert_eq!(stage2.take(Epoch(1)), Err(Error::Busy));
    world.stop();
    assert_eq!(stage2.log_status().stage, LogStage::Off);
}

#[test]
fn a_second_log_starts_empty_and_its_numbers_go_on() {
    for (engine, features) in engines() {
        let world = logging(engine, features, 2 * P2M);
        world.write(0, page(5));
        finish(|| world.stage2.take(Epoch(9))).unwrap();
        world.write(0, page(6));
        world.el2_write(page(7));
        world.stage2.abort(Epoch(9)).unwrap();
        assert!(world.stage2.log_status().live_pages >= 2);
        world.stop();
        world.el2_write(page(8));
        world.write(0, page(9));
        world.start(engine, Granularity::Page);
        assert_eq!(world.stage2.log_status().live_pages, 0);
        // Else a step of the old log's last epoch, long on its way, could begin it anew.
        let (asked, last) = (Epoch(9), Epoch(9));
        assert_eq!(
            world.stage2.take(asked),
            Err(Error::StaleEpoch { asked, last })
        );
        finish(|| world.stage2.take(Epoch(10))).unwrap();
        assert!(world.read_epoch(Epoch(10)).is_empty(), "{engine:?}");
    }
}

#[test]
fn a_log_can_be_stopped_while_it_starts() {
    for (engine, features) in engines() {
        for steps in 1..12 {
            let world = World::sized(features, 39, 64, 2);
            world.slot(0, IPA, 6 * P2M, Access::ReadWrite, RAM);
            world.map_all(0);
            let before = world.leaves();
            let mut last = Progress::Done;
            for _ in 0..steps {
                last = world.stage2.start_log(engine, Granularity::Page).unwrap();
                world.write(0, page(5));
                if last == Progress::Done {
                    break;
                }
            }
            world.stop();
            assert_eq!(world.leaves(), before);
            if last == Progress::Done {
                break;
            }
        }
    }
}

#[test]
fn what_is_written_while_a_log_starts_may_be_reported_and_what_comes_after_must_be() {
    for (engine, features) in engines() {
        let world = World::sized(features, 39, 64, 2);
        world.slot(0, IPA, 8 * P2M, Access::ReadWrite, RAM);
        world.map_all(0);
        (0..8).for_each(|block| world.touch(0, page(block * P2M)));
        while world.stage2.start_log(engine, Granularity::Page).unwrap() != Progress::Done {
            world.write(0, page(3));
        }
        // CPU 0 had all of it writable in its TLB.
        let written = set((0..8).map(|block| page(block * P2M + block)));
        written.iter().for_each(|ipa| world.touch(0, *ipa));
        (0..8).for_each(|block| world.touch(0, page(block * P2M)));
        let mut expected = written.clone();
        expected.extend((0..8).map(|block| page(block * P2M)));
        let reported = world.harvest();
        assert!(reported.is_superset(&expected));
        expected.insert(page(3));
        assert!(reported.is_subset(&expected));
    }
}

#[test]
fn live_pages_counts_what_is_noted() {
    let world = logging(Engine::WriteProtect, Features::BASELINE, P2M);
    world.write(0, page(1));
    world.write(0, page(2));
    assert_eq!(world.stage2.log_status().live_pages, 2);
    let (epoch, _) = world.take();
    assert_eq!(world.stage2.log_status().live_pages, 0);
    world.stage2.abort(epoch).unwrap();
    assert_eq!(world.stage2.log_status().live_pages, 2);
    world.harvest();
    assert_eq!(world.stage2.log_status().live_pages, 0);
}

#[test]
fn steps_are_bounded() {
    // 2 GiB in pages: a step may visit a few tables, never all 1024.
    let world = World::sized(Features::BASELINE, 39, 2000, 2);
    world.slot(0, IPA, 2 * P1G, Access::ReadWrite, RAM + PAGE_SIZE);
    let count = |mut step: std::boxed::Box<dyn FnMut() -> Progress + '_>| {
        let mut steps = 1;
        while step() != Progress::Done {
            steps += 1;
        }
        steps
    };
    let mut from = 0;
    let ahead = count(std::boxed::Box::new(|| {
        let progress = world.stage2.map_ahead(SlotId(0), from).unwrap();
        if let Progress::More { done, .. } = progress {
            from = done;
        }
        progress
    }));
    assert!(ahead >= 16, "{ahead}");
    let wp = Engine::WriteProtect;
    let start = count(std::boxed::Box::new(|| {
        world.stage2.start_log(wp, Granularity::Page).unwrap()
    }));
    assert!(start >= 500, "{start}");
    (0..2 * P1G)
        .step_by(8)
        .for_each(|number| world.touch(0, page(number)));
    let take = count(std::boxed::Box::new(|| {
        world.stage2.take(Epoch(1)).unwrap()
    }));
    assert!(take >= 32, "{take}");
    world.stage2.commit(Epoch(1)).unwrap();
    let stop = count(std::boxed::Box::new(|| world.stage2.stop_log().unwrap()));
    assert!(stop >= 500, "{stop}");
    let delete = count(std::boxed::Box::new(|| {
        world.stage2.delete_slot(SlotId(0)).unwrap()
    }));
    assert!(delete >= 64, "{delete}");
    assert_eq!(world.machine.tables_in_use(), 1);
}

#[test]
fn a_step_finds_fewer_dirty_pages_than_it_passes_clean_ones() {
    for (engine, features) in engines() {
        let pages = 8 * P2M;
        let world = logging(engine, features, pages);
        let steps = || {
            let epoch = world.new_epoch();
            let mut steps = 0;
            finish(|| {
                steps += 1;
                world.stage2.take(epoch)
            })
            .unwrap();
            world.stage2.commit(epoch).unwrap();
            steps
        };
        let clean = steps();
        for number in 0..pages {
            world.write(0, page(number));
        }
        assert!(steps() >= clean + 4, "{engine:?}");
    }
}
