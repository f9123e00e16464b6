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
    use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

    use tidemark_guests::command::{Command, Detail, HELP, Rounds};
    use tidemark_guests::pattern::{
        self, Config, Gfn, Iteration, Layout, PAGE_BYTES, PageRun, Seed, Store, Sum, Vcpu,
    };
    use tidemark_guests::report::{Configured, Ready, print_runs};
    use tidemark_guests::rt::console::{self, Console, Input};
    use tidemark_guests::rt::exceptions::{self, Stored};
    use tidemark_guests::rt::gic::{self, Private};
    use tidemark_guests::rt::{Boot, counter, mmu, psci, say, smp};

    tidemark_guests::el1_main!(main);

    /// Of a round in which memory is lost, instead of an iteration.
    const LOSE: u64 = 1 << 63;
    /// Where in a page such a round writes: not where the pattern does.
    const LOSE_OFFSET: u64 = 2048;

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
        more: AtomicU32::new(0),
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

    /// The pages that are to be lost.
    static DOOMED: Run = Run::empty();
    /// They are gone, says the host.
    static GONE: AtomicBool = AtomicBool::new(false);
    /// How many of them vCPUs could write all the same.
    static KEPT: AtomicU32 = AtomicU32::new(0);

    struct Settings {
        seed: AtomicU64,
        pages: AtomicU32,
        blocks: AtomicU32,
        more: AtomicU32,
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
            self.more.store(config.more, Ordering::Relaxed);
        }

        fn config(&self, vcpus: u8) -> Config {
            Config {
                seed: Seed(self.seed.load(Ordering::Relaxed)),
                vcpus,
                pages: self.pages.load(Ordering::Relaxed),
                blocks: self.blocks.load(Ordering::Relaxed),
                more: self.more.load(Ordering::Relaxed),
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
        gic::init_distributor();
        gic::init(&[Private::VIRTUAL_TIMER]);
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
        // Asleep, so that the CPUs of a small host are the others'. One alone stays awake: where instructions
        // are counted, a CPU that sleeps lets time run ahead of whoever types.
        let idle = match up {
            1 => console::pause,
            _ => gic::nap,
        };
        loop {
            let mut buffer = [0; 128];
            let line = match console::read_line(&mut buffer, idle) {
                Input::Line(line) => line,
                Input::Unreadable => {
                    say!("error the line is too long or not text");
                    continue;
                }
            };
            match Command::parse(line, config, up) {
                Ok(Command::Configure(new)) => {
                    if !take_over(&boot, config.more, new.more) {
                        continue;
                    }
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
                Ok(Command::Lose(pages)) => lose(&boot, pages, &config),
                Ok(Command::Own) => print("own", [boot.own]),
                Ok(Command::Map) => print("hole", SETTINGS.holes()),
                Ok(Command::Fill) => {
                    for_each_word(&config, |word| {
                        // SAFETY: a word of RAM that is mapped and that nothing but the pattern's stores uses.
                        unsafe { word.write_volatile(0) }
                    });
                    smp::barrier();
                    say!("ok");
                }
                Ok(Command::Sum) => {
                    let mut sum = Sum::NEW;
                    for_each_word(&config, |word| {
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
            let layout = Layout::new(config.memory(SETTINGS.ram.get()), &layout_holes);
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
        gic::init(&[Private::VIRTUAL_TIMER]);
        UP.fetch_add(1, Ordering::Release);
        let mut seen = 0;
        loop {
            // Asleep, not waiting for an event: in between, whoever emulates this machine has time for the host.
            while ROUND.load(Ordering::Acquire) == seen {
                gic::nap();
            }
            seen = ROUND.load(Ordering::Acquire);
            if seen & LOSE != 0 {
                if vcpu.0 < seen as u8 {
                    let mut first = true;
                    write_doomed(|| {
                        READY.fetch_add(u32::from(core::mem::take(&mut first)), Ordering::Release);
                    });
                    WRITTEN.fetch_add(1, Ordering::Release);
                    smp::wake();
                }
                continue;
            }
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
        let layout = Layout::new(config.memory(SETTINGS.ram.get()), &holes);
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
    fn for_each_word(config: &Config, mut each: impl FnMut(*mut u64)) {
        let holes = SETTINGS.holes();
        let memory = config.memory(SETTINGS.ram.get());
        for run in Layout::new(memory, &holes).free(memory) {
            words(run).for_each(&mut each);
        }
    }

    fn words(run: PageRun) -> impl Iterator<Item = *mut u64> {
        let offsets = (0..run.count * PAGE_BYTES).step_by(8);
        offsets.map(move |offset| {
            ptr::with_exposed_provenance_mut((run.first.ipa() + offset) as usize)
        })
    }

    /// Memory was added behind the RAM, or there is less of it: takes over what is new. It must be zero.
    fn take_over(boot: &Boot, before: u32, after: u32) -> bool {
        let first = boot.ram.end().plus(before.into());
        let new = PageRun::new(first, after.saturating_sub(before).into());
        if new.count == 0 {
            return true;
        }
        if !mmu::map_behind(new.first.ipa(), new.count * PAGE_BYTES) {
            say!("error the map does not reach behind the RAM's last GiB, nor from its end");
            return false;
        }
        // SAFETY: mapped above, and the host says it is memory; nothing writes it yet.
        let found = words(new).find(|word| unsafe { word.read_volatile() } != 0);
        if let Some(word) = found {
            say!("fail memory that was added is not zero at {word:p}");
            return false;
        }
        true
    }

    /// Has all vCPUs write the last `pages` pages of memory again and again, until the host, which deletes them
    /// meanwhile, sends a byte. By then none of them may reach a page.
    fn lose(boot: &Boot, pages: u64, config: &Config) {
        static SERIAL: AtomicU64 = AtomicU64::new(0);
        let others = u32::from(config.vcpus) - 1;
        let end = config.memory(boot.ram).end();
        DOOMED.set(PageRun::new(Gfn(end.0 - pages), pages));
        GONE.store(false, Ordering::Relaxed);
        KEPT.store(0, Ordering::Relaxed);
        READY.store(0, Ordering::Relaxed);
        WRITTEN.store(0, Ordering::Relaxed);
        let serial = SERIAL.fetch_add(1, Ordering::Relaxed) + 1;
        let round = LOSE | serial << 8 | u64::from(config.vcpus);
        ROUND.store(round, Ordering::Release);
        smp::wake();
        let mut told = false;
        write_doomed(|| {
            if !told && READY.load(Ordering::Acquire) == others {
                told = true;
                say!("losing");
            }
            if told && console::poll().is_some() {
                GONE.store(true, Ordering::Release);
            }
        });
        smp::wait(|| WRITTEN.load(Ordering::Acquire) == others);
        match KEPT.load(Ordering::Acquire) {
            0 => say!("ok"),
            kept => say!(
                "fail {kept} pages of deleted memory could be written, over all {} vCPUs",
                config.vcpus
            ),
        }
    }

    /// Writes the pages that are to be lost until they are said to be gone, and calls `between` after each turn. Then
    /// tries each of them once more.
    fn write_doomed(mut between: impl FnMut()) {
        let run = DOOMED.get();
        while !GONE.load(Ordering::Acquire) {
            store_into(run);
            between();
        }
        // One by one: a translation may be left of any of them.
        let kept = |page: &Gfn| store_into(PageRun::new(*page, 1)) == Stored::All;
        let kept = run.pages().filter(kept).count();
        KEPT.fetch_add(kept as u32, Ordering::Release);
    }

    /// Writes pages that may be gone, up to the first that is.
    fn store_into(run: PageRun) -> Stored {
        let (first, end) = (run.first.ipa() + LOSE_OFFSET, run.end().ipa());
        // SAFETY: memory that was added, and that the pattern does not write now; or none any more.
        let stored = unsafe { exceptions::store_each(first, end, PAGE_BYTES, u64::MAX) };
        if let Stored::Other(syndrome) = stored {
            say!("fail a store to memory that is deleted raised {syndrome:#x}");
            psci::system_off();
        }
        stored
    }
}

#[cfg(not(target_os = "none"))]
fn main() {
    eprintln!("oracle is a guest: build it for aarch64-unknown-none-softfloat and boot it");
}
