//! No memory for a table, at every request for one: the operation says so or does without, nothing is
//! leaked, no write is lost, and with memory again it goes on. What the heap may refuse is in
//! `tests/heap.rs`.

use super::sim::{Place, Setup, Sim};
use super::world::*;
use crate::fake::{Machine, Refusal};
use crate::types::*;
use crate::{Error, FaultAccess, Features, Outcome, Stage2};
use std::boxed::Box;
use std::sync::Arc;
use std::vec;
use std::vec::Vec;

const IPA: u64 = 0x4000_0000;
/// Two blocks, then pages: behind a hole in the machine's memory no block fits.
const PLACES: [Place; 2] = [
    Place {
        id: 0,
        ipa: IPA,
        pages: 2 * P2M,
        access: Access::ReadWrite,
        pa: RAM,
    },
    Place {
        id: 1,
        ipa: IPA + 4 * MIB,
        pages: P2M + 9,
        access: Access::ReadWrite,
        pa: RAM + GIB + PAGE_SIZE,
    },
];
const PAGES: [u64; 5] = [
    IPA,
    IPA + 3 * PAGE_SIZE,
    IPA + 3 * MIB,
    IPA + 4 * MIB,
    IPA + 6 * MIB,
];

/// Returns how many refusals it met and asked again after.
type Operation = Box<dyn Fn(&Sim) -> usize>;

/// Returns how many requests were refused until now.
fn there_is_memory_again(sim: &Sim) -> usize {
    let refused = sim.world.machine.refused();
    assert!(refused > 0, "there was memory");
    sim.check_counts();
    sim.world.machine.refuse_tables(Refusal::None);
    refused
}

/// The guest writes all pages. Where it is told that there is no memory, there is from then on.
fn write_all(sim: &Sim) -> usize {
    let mut refused = 0;
    for ipa in PAGES {
        while let Err(outcome) = sim.guest(ipa, FaultAccess::Write) {
            assert_eq!(outcome, Outcome::OutOfTables);
            refused += there_is_memory_again(sim);
        }
    }
    refused
}

fn map_all(sim: &Sim) -> usize {
    let mut refused = 0;
    for place in PLACES {
        while let Err(error) = sim.map_ahead(place.id) {
            assert_eq!(error, Error::OutOfTables);
            refused += there_is_memory_again(sim);
        }
    }
    refused
}

/// Every operation in which a table is asked for, and what comes before it; and, last, those that need
/// none and must not ask for one.
fn operations(engine: Engine) -> Vec<(Operation, Operation)> {
    let nothing = || -> Operation { Box::new(|_| 0) };
    let start = |granularity| -> Operation {
        Box::new(move |sim| {
            sim.start(engine, granularity);
            0
        })
    };
    let mapped = |granularity| -> Operation {
        Box::new(move |sim| {
            let refused = map_all(sim);
            sim.start(engine, granularity);
            refused
        })
    };
    let rounds = |sim: &Sim| {
        let round = |_| {
            let refused = write_all(sim);
            sim.harvest();
            refused
        };
        (0..3).map(round).sum()
    };
    let without = |sim: &Sim| {
        write_all(sim);
        sim.harvest();
        sim.stop();
        sim.set_access(0, Access::ReadOnly);
        sim.set_access(0, Access::ReadWrite);
        sim.delete(1);
        sim.add(PLACES[1]);
        0
    };
    vec![
        (nothing(), Box::new(write_all)),
        (nothing(), Box::new(map_all)),
        (start(Granularity::Adaptive), Box::new(write_all)),
        (start(Granularity::Page), Box::new(write_all)),
        // Splitting all there is, and splitting what is dirty.
        (Box::new(map_all), start(Granularity::Page)),
        (mapped(Granularity::Adaptive), Box::new(rounds)),
        (mapped(Granularity::Block), Box::new(without)),
    ]
}

/// Runs the operation with requests refused as `refusal` says. Returns how many were.
fn run(engine: Engine, features: Features, number: usize, refusal: Refusal) -> usize {
    let sim = Sim::new(
        Setup {
            cpus: 1,
            tables: 16,
            ..Setup::new(features, 0)
        }
        .calm(),
    );
    let (before, operation) = operations(engine).swap_remove(number);
    let mut refused = 0;
    sim.alone(|sim| {
        PLACES.into_iter().for_each(|place| sim.add(place));
        before(sim);
        sim.world.machine.refuse_tables(refusal);
        refused = operation(sim) + sim.world.machine.refused();
        sim.check_counts();
        sim.world.machine.refuse_tables(Refusal::None);
        // From here on as ever: a log is on, or can be, and loses nothing.
        if sim.world.stage2.log_status().mode.is_none() {
            sim.start(engine, Granularity::Page);
        }
        write_all(sim);
        sim.harvest();
        write_all(sim);
        sim.last_of_the_log();
    });
    sim.end();
    refused
}

#[test]
fn without_memory_for_a_table_nothing_is_lost_or_leaked() {
    for (engine, features) in engines() {
        let most = operations(engine).len();
        let mut asked = vec![0; most];
        for (number, asked) in asked.iter_mut().enumerate() {
            for refusal in [Refusal::One, Refusal::AllFrom] {
                let ends =
                    (0..40).find(|&after| run(engine, features, number, refusal(after)) == 0);
                *asked = ends.expect("it asks for ever");
            }
        }
        assert_eq!(asked.pop(), Some(0), "{engine:?}");
        assert!(
            asked.iter().all(|&asked| asked > 1),
            "{engine:?}: {asked:?}"
        );
    }
}

#[test]
fn without_memory_for_its_roots_there_is_no_vm() {
    for bits in 32..=48 {
        let machine = Arc::new(Machine::new(32, 1));
        machine.refuse_tables(Refusal::One(0));
        let features = Features {
            pa_bits: 48,
            ..Features::BASELINE
        };
        let new = || Stage2::new(Arc::clone(&machine), bits, vmid(), features);
        assert!(matches!(new(), Err(Error::OutOfTables)), "{bits}");
        assert_eq!(machine.tables_in_use(), 0);
        assert!(new().is_ok());
        assert_eq!(machine.tables_in_use(), 0);
    }
}
