//! Many CPUs at once: every interrupt sent arrives.

use core::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use super::*;

const RECEIVERS: usize = 2;
const SENDERS: usize = 2;
const ROUNDS: u32 = 4000;
const SPI_ROUNDS: u32 = 4000;
const EDGE_SPI: u32 = 48;
const LOST: Duration = Duration::from_secs(20);

/// What senders and receivers share beside the controller.
struct Machine {
    vgic: Vgic,
    waiting: [AtomicBool; RECEIVERS],
    /// Interrupts taken, by vCPU and SGI.
    taken: [[AtomicU32; SENDERS]; RECEIVERS],
    spis_taken: AtomicU32,
    done: AtomicBool,
}

impl Machine {
    /// Does what a hypervisor does with a kick: wakes whoever waits. A vCPU that runs looks at its mail by itself here.
    fn kick(&self, kick: Kick, threads: &[thread::Thread]) {
        for target in kick.iter() {
            if self.waiting[target.index()].load(Ordering::SeqCst) {
                threads[target.index()].unpark();
            }
        }
    }

    /// Waits until `counter` is `value`.
    fn await_count(&self, counter: &AtomicU32, value: u32, what: &str) {
        let start = Instant::now();
        while counter.load(Ordering::SeqCst) != value {
            assert!(start.elapsed() < LOST, "{what} number {value} was lost");
            assert!(counter.load(Ordering::SeqCst) <= value, "{what} came twice");
            thread::yield_now();
        }
    }
}

/// Runs one vCPU: enter, take everything, wait for more, as the run loop of the image does.
fn receive(machine: &Machine, index: usize, threads: &std::sync::OnceLock<Vec<thread::Thread>>) {
    let me = vcpu(index);
    let mut cpu = CpuInterface::new(4);
    while threads.get().is_none() {
        thread::yield_now();
    }
    let threads = threads.get().expect("set by the test");
    while !machine.done.load(Ordering::SeqCst) {
        machine.kick(machine.vgic.sync(me, &mut cpu), threads);
        while let Some(intid) = cpu.acknowledge() {
            cpu.end(intid);
            match machine.taken[index].get(intid as usize) {
                Some(counter) => counter.fetch_add(1, Ordering::SeqCst),
                None => machine.spis_taken.fetch_add(1, Ordering::SeqCst),
            };
        }
        machine.kick(machine.vgic.sync(me, &mut cpu), threads);
        machine.waiting[index].store(true, Ordering::SeqCst);
        if !machine.vgic.has_deliverable(me) && !machine.vgic.needs_sync(me) {
            thread::park_timeout(Duration::from_secs(60));
        }
        machine.waiting[index].store(false, Ordering::SeqCst);
    }
}

#[test]
fn no_interrupt_is_lost() {
    let machine = Arc::new(Machine {
        vgic: Vgic::new(RECEIVERS),
        waiting: Default::default(),
        taken: Default::default(),
        spis_taken: AtomicU32::new(0),
        done: AtomicBool::new(false),
    });
    let vgic = &machine.vgic;
    let _ = vgic.mmio_write(V0, Frame::Distributor, 0, AccessSize::Word, 1);
    for index in 0..RECEIVERS {
        let frame = Frame::Redistributor(vcpu(index));
        let _ = vgic.mmio_write(V0, frame, GICR_SGI + 0x100, AccessSize::Word, 0xffff);
    }
    let _ = vgic.mmio_write(
        V0,
        Frame::Distributor,
        0x104,
        AccessSize::Word,
        1 << (EDGE_SPI - 32),
    );
    let _ = vgic.mmio_write(V0, Frame::Distributor, 0xc0c, AccessSize::Word, 0xaaaa_aaaa);

    let threads = Arc::new(std::sync::OnceLock::new());
    let receivers: Vec<_> = (0..RECEIVERS)
        .map(|index| {
            let (machine, threads) = (machine.clone(), threads.clone());
            thread::spawn(move || receive(&machine, index, &threads))
        })
        .collect();
    let handles = receivers
        .iter()
        .map(|receiver| receiver.thread().clone())
        .collect();
    threads.set(handles).expect("set once");
    let threads = threads.get().expect("just set");

    thread::scope(|scope| {
        for sender in 0..SENDERS {
            let machine = &machine;
            scope.spawn(move || {
                let mut sent = [0; RECEIVERS];
                for round in 0..ROUNDS {
                    // One target, the other, or both: a pattern that differs between the senders.
                    let targets = u64::from((round + sender as u32) % 3 + 1);
                    let value = (sender as u64) << 24 | targets;
                    machine.kick(machine.vgic.sgi(V0, value, SgiRegister::Group1), threads);
                    for (index, sent) in sent.iter_mut().enumerate() {
                        *sent += (targets >> index & 1) as u32;
                        machine.await_count(&machine.taken[index][sender], *sent, "SGI");
                    }
                }
            });
        }
        let machine = &machine;
        scope.spawn(move || {
            let spi = Spi::new(EDGE_SPI).expect("an SPI");
            for round in 1..=SPI_ROUNDS {
                let offset = 0x6000 + 8 * u64::from(EDGE_SPI);
                let route = |target| {
                    let frame = Frame::Distributor;
                    let kick =
                        machine
                            .vgic
                            .mmio_write(V0, frame, offset, AccessSize::Double, target);
                    machine.kick(kick, threads);
                };
                route(u64::from(round / 2 % 2));
                machine.kick(machine.vgic.set_spi_level(spi, Level::High), threads);
                // It may be on its way to one vCPU when the other is named.
                route(u64::from(round % 2));
                machine.kick(machine.vgic.set_spi_level(spi, Level::Low), threads);
                machine.await_count(&machine.spis_taken, round, "SPI");
            }
        });
    });

    machine.done.store(true, Ordering::SeqCst);
    for thread in threads {
        thread.unpark();
    }
    for receiver in receivers {
        receiver.join().expect("a receiver failed");
    }
}

/// A receiver that syncs without pause, so that many SGIs are sent in the middle of a sync.
#[test]
fn an_sgi_sent_into_a_running_sync_is_not_lost() {
    const COUNTED: u32 = 3;
    let vgic = Vgic::new(2);
    let _ = vgic.mmio_write(V0, Frame::Distributor, 0, AccessSize::Word, 1);
    let _ = vgic.mmio_write(
        V0,
        Frame::Redistributor(V0),
        GICR_SGI + 0x100,
        AccessSize::Word,
        0xffff,
    );
    let taken = AtomicU32::new(0);
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut cpu = CpuInterface::new(4);
            while !done.load(Ordering::SeqCst) {
                let _ = vgic.sync(V0, &mut cpu);
                while let Some(intid) = cpu.acknowledge() {
                    cpu.end(intid);
                    if intid == COUNTED {
                        taken.fetch_add(1, Ordering::SeqCst);
                    }
                }
            }
        });
        scope.spawn(|| {
            for round in 1..=100_000 {
                let _ = vgic.sgi(vcpu(1), u64::from(COUNTED) << 24 | 1, SgiRegister::Group1);
                let start = Instant::now();
                while taken.load(Ordering::SeqCst) != round {
                    if start.elapsed() > LOST {
                        done.store(true, Ordering::SeqCst);
                        panic!("SGI number {round} was lost");
                    }
                    core::hint::spin_loop();
                }
            }
            done.store(true, Ordering::SeqCst);
        });
    });
}
