//! The oracle: a guest that writes pages and says which.
//!
//! It is the judge of dirty tracking, so what it says must be true: it says a page was written only after every vCPU
//! has executed a DSB behind its stores, and says all of them before it says the iteration is done. What it writes is
//! chosen by [`tidemark_guests::pattern`]; the console protocol is in [`tidemark_guests::report`] and
//! [`tidemark_guests::command`].
//!
//! Concurrency: vCPU 0 reads commands and speaks. In an iteration the vCPUs meet, begin together, write, and report
//! to vCPU 0. `ROUND` carries the iteration and the number of vCPUs in one word, so that a vCPU which looks late
//! cannot join an iteration it is not part of.

#![cfg_attr(target_os = "none", no_std, no_main)]

#[cfg(target_os = "none")]
mod guest {
    use core::arch::asm;
    use core::ptr;
    use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

    use tidemark_guests::command::{Command, Detail, HELP, Rounds};
    use tidemark_guests::pattern::{
        self, Config, Gfn, Iteration, Layout, PAGE_BYTES, PageRun, Seed, Store, Sum, Vcpu,
    };
    use tidemark_guests::report::{Configured, Ready, print_runs};
    use tidemark_guests::rt::console::{self, Console, Input};
    use tidemark_guests::rt::{Boot, counter, psci, say, smp};

    tidemark_guests::el1_main!(main);

    /// `iteration << 8 | vcpus` of the iteration to take part in; 0 before the first.
    static ROUND: AtomicU64 = AtomicU64::new(0);
    /// How many of the other vCPUs are ready to write.
    static READY: AtomicU32 = AtomicU32::new(0);
    /// The iteration whose writes may begin.
    static GO: AtomicU64 = AtomicU64::new(0);
    /// How many of the other vCPUs have written.
    static WRITTEN: AtomicU32 = AtomicU32::new(0);
    /// vCPUs that came up, vCPU 0 among them.
    static UP: AtomicU32 = AtomicU32::new(1);

    /// What the iteration is made from. Changed only while no vCPU but 0 is in one.
    static SETTINGS: Settings = Settings {
        seed: AtomicU64::new(0),
        pages: AtomicU32::new(0),
        blocks: AtomicU32::new(0),
        ram: Run::empty(),
        holes: [const { Run::empty() }; 2],
    };
    /// What each vCPU found it had written: pages, and a sum over its runs.
    static OUTCOMES: [Outcome; Vcpu::MAX] = [const {
        Outcome {
            pages: AtomicU64::new(0),
            sum: AtomicU64::new(0),
        }
    }; Vcpu::MAX];

    struct Settings {
        seed: AtomicU64,
        pages: AtomicU32,
        blocks: AtomicU32,
        ram: Run,
        holes: [Run; 2],
    }

    struct Run {
        first: AtomicU64,
        count: AtomicU64,
    }

    impl Run {
        const fn empty() -> Self {
            Self {
                first: AtomicU64::new(0),
                count: AtomicU64::new(0),
            }
        }

        fn set(&self, run: PageRun) {
            self.first.store(run.first.0, Ordering::Relaxed);
            self.count.store(run.count, Ordering::Relaxed);
        }

        fn get(&self) -> PageRun {
            PageRun::new(
                Gfn(self.first.load(Ordering::Relaxed)),
                self.count.load(Ordering::Relaxed),
            )
        }
    }

    struct Outcome {
        pages: AtomicU64,
        sum: AtomicU64,
    }

    /// Pages and sum of what is written in an iteration, by the writer or by the reporter.
    struct Tally {
        pages: u64,
        sum: Sum,
    }

    impl Tally {
        const NEW: Self = Self {
            pages: 0,
            sum: Sum::NEW,
        };

        fn add(&mut self, run: PageRun) {
            self.pages += run.count;
            self.sum.add(run.first.0);
            self.sum.add(run.count);
        }
    }

    impl Settings {
        fn set(&self, config: &Config) {
            self.seed.store(config.seed.0, Ordering::Relaxed);
            self.pages.store(config.pages, Ordering::Relaxed);
            self.blocks.store(config.blocks, Ordering::Relaxed);
        }

        fn config(&self, vcpus: u8) -> Config {
            Config {
                seed: Seed(self.seed.load(Ordering::Relaxed)),
                vcpus,
                pages: self.pages.load(Ordering::Relaxed),
                blocks: self.blocks.load(Ordering::Relaxed),
            }
        }

        fn holes(&self) -> [PageRun; 2] {
            self.holes.each_ref().map(Run::get)
        }
    }

    fn main(boot: Boot) -> ! {
        // The image is one hole although the pattern could well overwrite the rest of it: a guest that has lost its
        // code cannot be asked what it did.
        SETTINGS.ram.set(boot.ram);
        for (slot, hole) in SETTINGS.holes.iter().zip([boot.image, boot.devicetree]) {
            slot.set(hole);
        }
        let up = start_others(&boot);
        let mut config = Config {
            vcpus: up,
            ..Config::default()
        };
        let mut last = Iteration(0);
        say!(
            "{}",
            Ready {
                payload: "oracle",
                ram: boot.ram,
                vcpus: up,
                el: 1
            }
        );
        loop {
            let mut buffer = [0; 128];
            let line = match console::read_line(&mut buffer) {
                Input::Line(line) => line,
                Input::Unreadable => {
                    say!("error the line is too long or not text");
                    continue;
                }
            };
            match Command::parse(line, config, up) {
                Ok(Command::Configure(new)) => {
                    config = new;
                    say!(
                        "ok {}",
                        Configured {
                            config,
                            next: Iteration(last.0 + 1)
                        }
                    );
                }
                Ok(Command::Step) => last = run(last, &config, Rounds::Count(1), Detail::Runs),
                Ok(Command::Free(rounds, detail)) => last = run(last, &config, rounds, detail),
                Ok(Command::Own) => print("own", [boot.own]),
                Ok(Command::Map) => print("hole", SETTINGS.holes()),
                Ok(Command::Fill) => {
                    for_each_word(|word| {
                        // SAFETY: a word of RAM that is mapped and that nothing but the pattern's stores uses.
                        unsafe { word.write_volatile(0) }
                    });
                    smp::barrier();
                    say!("ok");
                }
                Ok(Command::Sum) => {
                    let mut sum = Sum::NEW;
                    for_each_word(|word| {
                        // SAFETY: as for `Fill`, and no vCPU writes while vCPU 0 is here.
                        sum.add(unsafe { word.read_volatile() });
                    });
                    say!("sum {:#x}", sum.0);
                }
                Ok(Command::Off) => psci::system_off(),
                Ok(Command::Reset) => psci::system_reset(),
                Ok(Command::Help) => {
                    say!("{HELP}");
                    say!("ok");
                }
                Err(error) => say!("error {error}"),
            }
        }
    }

    /// Starts every other vCPU and says which did not come; how many there are then.
    fn start_others(boot: &Boot) -> u8 {
        let mut up = 1_u8;
        for cpu in boot.machine.cpus().iter().skip(1) {
            // Numbers are given to those that come, so that they have no gaps.
            if let Err(refused) = smp::start(Vcpu(up), *cpu, work) {
                say!(
                    "warning: cpu {:#x} was not started: PSCI error {}",
                    cpu.0,
                    refused.0
                );
                continue;
            }
            if !counter::within(10, || UP.load(Ordering::Acquire) > u32::from(up)) {
                // It may still come, onto a stack that would then be another's: no more are started.
                say!(
                    "warning: cpu {:#x} was started and did not come within 10 s",
                    cpu.0
                );
                break;
            }
            up += 1;
        }
        up
    }

    /// Runs iterations after `last`; the number of the last one run.
    fn run(last: Iteration, config: &Config, rounds: Rounds, detail: Detail) -> Iteration {
        let mut iteration = last;
        let mut left = rounds;
        loop {
            match &mut left {
                Rounds::Count(0) => return iteration,
                Rounds::Count(count) => *count -= 1,
                Rounds::UntilInput => {
                    if console::poll().is_some() {
                        say!("stopped {iteration}");
                        return iteration;
                    }
                }
            }
            iteration.0 += 1;
            iterate(iteration, config);
            let layout_holes = SETTINGS.holes();
            let layout = Layout::new(SETTINGS.ram.get(), &layout_holes);
            for vcpu in (0..config.vcpus).map(Vcpu) {
                check(&layout, config, vcpu, iteration);
                if let Detail::Runs = detail {
                    let runs =
                        pattern::writes(&layout, config, vcpu, iteration).map(|write| write.run);
                    // The console takes everything, so there is no error to look at.
                    let _ = print_runs(&mut Console, format_args!("w {iteration} {vcpu}"), runs);
                }
            }
            say!("done {iteration}");
        }
    }

    /// One iteration, on all its vCPUs at once.
    fn iterate(iteration: Iteration, config: &Config) {
        SETTINGS.set(config);
        let others = u32::from(config.vcpus) - 1;
        READY.store(0, Ordering::Relaxed);
        WRITTEN.store(0, Ordering::Relaxed);
        ROUND.store(
            iteration.0 << 8 | u64::from(config.vcpus),
            Ordering::Release,
        );
        smp::wake();
        smp::wait(|| READY.load(Ordering::Acquire) == others);
        say!("begin {iteration}");
        GO.store(iteration.0, Ordering::Release);
        smp::wake();
        write(Vcpu(0), iteration, config);
        smp::wait(|| WRITTEN.load(Ordering::Acquire) == others);
        smp::barrier();
    }

    /// What the other vCPUs do, for good.
    fn work(vcpu: Vcpu) -> ! {
        UP.fetch_add(1, Ordering::Release);
        let mut seen = 0;
        loop {
            smp::wait(|| ROUND.load(Ordering::Acquire) != seen);
            seen = ROUND.load(Ordering::Acquire);
            let (iteration, vcpus) = (Iteration(seen >> 8), seen as u8);
            if vcpu.0 >= vcpus {
                continue;
            }
            let config = SETTINGS.config(vcpus);
            READY.fetch_add(1, Ordering::Release);
            smp::wake();
            // Writing at once is the point, so this wait does not sleep.
            while GO.load(Ordering::Acquire) != iteration.0 {
                smp::pause();
            }
            write(vcpu, iteration, &config);
            WRITTEN.fetch_add(1, Ordering::Release);
            smp::wake();
        }
    }

    /// Writes what `vcpu` has to in `iteration`; its stores are complete on return.
    fn write(vcpu: Vcpu, iteration: Iteration, config: &Config) {
        let holes = SETTINGS.holes();
        let layout = Layout::new(SETTINGS.ram.get(), &holes);
        let mut tally = Tally::NEW;
        for write in pattern::writes(&layout, config, vcpu, iteration) {
            for Store { ipa, value } in write.stores(vcpu, iteration) {
                // SAFETY: the pattern keeps to RAM outside the image and the devicetree, which is mapped and used by
                // nothing else. One instruction, also when it is not aligned: the target would have the compiler
                // make bytes of it.
                unsafe {
                    asm!("str {}, [{}]", in(reg) value, in(reg) ipa, options(nostack, preserves_flags))
                };
            }
            tally.add(write.run);
        }
        smp::barrier();
        if let Some(outcome) = OUTCOMES.get(usize::from(vcpu.0)) {
            outcome.pages.store(tally.pages, Ordering::Relaxed);
            outcome.sum.store(tally.sum.0, Ordering::Relaxed);
        }
    }

    /// Checks that what will be said is what was written.
    fn check(layout: &Layout<'_>, config: &Config, vcpu: Vcpu, iteration: Iteration) {
        let mut tally = Tally::NEW;
        for write in pattern::writes(layout, config, vcpu, iteration) {
            tally.add(write.run);
        }
        let outcome = OUTCOMES.get(usize::from(vcpu.0));
        let written = outcome.map(|outcome| {
            (
                outcome.pages.load(Ordering::Relaxed),
                outcome.sum.load(Ordering::Relaxed),
            )
        });
        if written != Some((tally.pages, tally.sum.0)) {
            say!(
                "fail iteration {iteration}: vcpu {vcpu} wrote other pages than it was to; this guest is not to be trusted"
            );
            psci::system_off();
        }
    }

    fn print(word: &str, runs: impl IntoIterator<Item = PageRun>) {
        let runs = runs.into_iter().filter(|run| run.count > 0);
        // The console takes everything, so there is no error to look at.
        let _ = print_runs(&mut Console, format_args!("{word}"), runs);
        say!("ok");
    }

    /// Every word of every page that the pattern may write, in ascending order.
    fn for_each_word(mut each: impl FnMut(*mut u64)) {
        let holes = SETTINGS.holes();
        let ram = SETTINGS.ram.get();
        for run in Layout::new(ram, &holes).free(ram) {
            for word in (0..run.count * PAGE_BYTES).step_by(8) {
                each(ptr::with_exposed_provenance_mut(
                    (run.first.ipa() + word) as usize,
                ));
            }
        }
    }
}

#[cfg(not(target_os = "none"))]
fn main() {
    eprintln!("oracle is a guest: build it for aarch64-unknown-none-softfloat and boot it");
}
