//! The benchmark: what exits, interrupts and tracked writes cost, by the guest's own counter.
//!
//! Under `-icount shift=0,sleep=off` one emulated instruction is one nanosecond of guest time, so the rows are
//! instructions there and repeat. Each loop is written in assembly and the same loop without the operation is taken
//! off, so that a row is the operation alone. The MMU and the caches are on throughout, and what a loop touches has
//! been touched before.
//!
//! The lines are those of [`tidemark_guests::report`]. After `phase <name>` it waits for one byte from the host, which
//! by then has set up what is to be measured: `s` skips the phase, `a` runs it and asks again, any other runs it once.
//!
//! | row | what |
//! |---|---|
//! | `hypercall` | HVC, PSCI_VERSION |
//! | `hypercall_unknown` | HVC, a function nobody serves |
//! | `vgic_read`, `vgic_typer` | load of GICD_IIDR, GICD_TYPER |
//! | `uart_read` | load of the PL011's flag register |
//! | `uart_read_post` | the same with write-back, which leaves no syndrome |
//! | `idreg_read` | MRS of ID_AA64ISAR0_EL1 |
//! | `sgi_self` | send an SGI to oneself, acknowledge and end it, with interrupts masked |
//! | `timer`, `timer_wfi` | from the virtual timer's moment to the vector, spinning or in WFI |
//! | `ipi` | from before the send of an SGI to the other vCPU's vector, mean of 1000 |
//! | `ipi_return` | from there to the sender seeing that it was handled |
//! | `touch_256m` | one store to each page of 256 MiB that nobody has touched, the whole loop |
//! | `loop_64m_untracked`, `loop_64m_dbm`, `loop_64m_wp`, `loop_64m_blocks` | one store to each page of 64 MiB, the whole loop |
//! | `longest_exit` | the longest of the exits that a guest can cause: a write fault on each page, stores and loads all over |
//! | | the GIC's registers, calls, console output |
//!
//! The phases `dbm`, `wp` and `blocks` leave 64 MiB dirty for the host, which measures its side of them.

#![cfg_attr(target_os = "none", no_std, no_main)]

#[cfg(target_os = "none")]
mod guest {
    use core::arch::asm;
    use core::sync::atomic::{AtomicU64, Ordering};

    use tidemark_guests::fdt::Mpidr;
    use tidemark_guests::pattern::{BLOCK_PAGES, Gfn, Layout, PAGE_BYTES, PageRun, Vcpu};
    use tidemark_guests::report::Ready;
    use tidemark_guests::rt::exceptions::{self, Frame};
    use tidemark_guests::rt::gic::{self, Private};
    use tidemark_guests::rt::psci::{self, Function};
    use tidemark_guests::rt::{Boot, console, counter, say, smp};

    tidemark_guests::el1_main!(main);

    /// Operations in a loop, and interrupts in a mean.
    const LOOPS: u64 = 10_000;
    const INTERRUPTS: u64 = 1_000;
    /// The pages of the first loop, 256 MiB, and of the tracked loops, 64 MiB.
    const TOUCHED: u64 = 65_536;
    const TRACKED: u64 = 16_384;

    const SELF: Private = Private(1);
    const OTHER: Private = Private(2);

    /// How many interrupts have been taken, and when the last one's vector was entered.
    static TAKEN: AtomicU64 = AtomicU64::new(0);
    static ENTERED: AtomicU64 = AtomicU64::new(0);
    /// Where the other vCPU is.
    static OTHER_STATE: AtomicU64 = AtomicU64::new(0);
    const LISTENING: u64 = 1;
    const LEAVE: u64 = 2;

    /// Ticks of `LOOPS` turns of a loop around `$body`.
    macro_rules! ticks_of {
        ($body:literal $(, $($operand:tt)*)?) => {{
            let (start, end): (u64, u64);
            // SAFETY: the body keeps to the scratch registers, which are given up here, and writes no memory.
            unsafe {
                asm!(
                    "isb", "mrs {start}, cntvct_el0",
                    "2:", $body, "subs {turns}, {turns}, #1", "b.ne 2b",
                    "isb", "mrs {end}, cntvct_el0",
                    turns = inout(reg) LOOPS => _, start = out(reg) start, end = out(reg) end,
                    $($($operand)*,)?
                    out("x0") _, out("x1") _, out("x2") _, out("x3") _, out("x4") _, out("x5") _, out("x6") _,
                    out("x7") _, out("x8") _, out("x9") _, out("x10") _, out("x11") _, out("x12") _, out("x13") _,
                    out("x14") _, out("x15") _, out("x16") _, out("x17") _, options(nostack)
                );
            }
            end.wrapping_sub(start)
        }};
    }

    /// A row from a loop: once to warm up, once to count.
    macro_rules! row_of {
        ($name:literal, $body:literal $(, $($operand:tt)*)?) => {{
            let empty = ticks_of!("");
            let _ = ticks_of!($body $(, $($operand)*)?);
            let full = ticks_of!($body $(, $($operand)*)?);
            row($name, full.saturating_sub(empty), LOOPS);
        }};
    }

    fn main(boot: Boot) -> ! {
        let cpus = boot.machine.cpus();
        say!(
            "{}",
            Ready {
                payload: "bench",
                ram: boot.ram,
                vcpus: cpus.len() as u8,
                el: 1
            }
        );
        say!("counter {} Hz", counter::frequency());
        exceptions::set_handler(take);
        gic::init_distributor();
        gic::init(&[SELF, Private::VIRTUAL_TIMER]);
        exits();
        interrupts(cpus.first().copied().unwrap_or_default());
        match cpus.get(1) {
            Some(other) => other_vcpu(*other),
            None => say!("skip ipi: there is one vCPU"),
        }
        tracked_writes(&boot);
        // Last: it leaves the interrupt controller in disorder.
        longest_exit(&boot);
        say!("done");
        psci::system_off()
    }

    /// Prints ticks divided by `times`, in nanoseconds.
    fn row(name: &str, ticks: u64, times: u64) {
        let per_second = u128::from(counter::frequency()) * u128::from(times.max(1));
        let value = (u128::from(ticks) * 1_000_000_000 + per_second / 2) / per_second;
        say!("row {name} {value}");
    }

    fn exits() {
        row_of!("hypercall", "mov x0, {f}\nhvc #0", f = in(reg) u64::from(Function::VERSION.0));
        row_of!("hypercall_unknown", "mov x0, {f}\nhvc #0", f = in(reg) u64::from(Function::UNKNOWN.0));
        row_of!("vgic_read", "ldr w0, [{a}]", a = in(reg) gic::iidr());
        row_of!("vgic_typer", "ldr w0, [{a}]", a = in(reg) gic::typer());
        row_of!("uart_read", "ldr w0, [{a}]", a = in(reg) console::flags());
        row_of!("uart_read_post", "ldr w0, [{a}], #0", a = in(reg) console::flags());
        row_of!("idreg_read", "mrs x0, id_aa64isar0_el1");
    }

    fn interrupts(this: Mpidr) {
        row_of!(
            "sgi_self",
            "msr icc_sgi1r_el1, {sgi}\nisb\n3: mrs x0, icc_iar1_el1\ncmp x0, {number}\nb.ne 3b\nmsr icc_eoir1_el1, x0\nisb",
            sgi = in(reg) gic::sgi(SELF, this),
            number = in(reg) u64::from(SELF.0)
        );
        // Long enough for the wait to have begun, short enough for a thousand of them: 50 microseconds.
        let ahead = (counter::frequency() / 20_000).max(16);
        row("timer", timer(ahead, exceptions::unmask), INTERRUPTS);
        // WFI returns for a masked interrupt too, so none can slip in between the check and the wait.
        let asleep = timer(ahead, || {
            exceptions::wait_for_interrupt();
            exceptions::unmask();
        });
        row("timer_wfi", asleep, INTERRUPTS);
    }

    /// Ticks from the timer's moment to the vector, summed over `INTERRUPTS`. `wait` lets interrupts in and may sleep.
    fn timer(ahead: u64, wait: impl Fn()) -> u64 {
        let mut sum = 0;
        for _ in 0..INTERRUPTS {
            let before = TAKEN.load(Ordering::Acquire);
            let at = counter::now() + ahead;
            counter::set_timer(at);
            while TAKEN.load(Ordering::Acquire) == before {
                wait();
                exceptions::mask();
            }
            sum += ENTERED.load(Ordering::Relaxed).saturating_sub(at);
        }
        sum
    }

    fn other_vcpu(cpu: Mpidr) {
        if let Err(refused) = smp::start(Vcpu(1), cpu, listen) {
            say!(
                "fail cpu {:#x} was not started: PSCI error {}",
                cpu.0,
                refused.0
            );
            return;
        }
        if !counter::within(10, || OTHER_STATE.load(Ordering::Acquire) == LISTENING) {
            say!(
                "fail cpu {:#x} was started and did not come within 10 s",
                cpu.0
            );
            return;
        }
        let sgi = gic::sgi(OTHER, cpu);
        let (mut there, mut back) = (0, 0);
        // The first few find cold caches on the way.
        for turn in 0..INTERRUPTS + 10 {
            let before = TAKEN.load(Ordering::Acquire);
            let sent = counter::now();
            gic::send(sgi);
            while TAKEN.load(Ordering::Acquire) == before {
                // Under -icount a YIELD gives the emulator's one thread to the other vCPU.
                smp::pause();
            }
            let seen = counter::now();
            if turn >= 10 {
                let entered = ENTERED.load(Ordering::Relaxed);
                there += entered.saturating_sub(sent);
                back += seen.saturating_sub(entered);
            }
        }
        row("ipi", there, INTERRUPTS);
        row("ipi_return", back, INTERRUPTS);
        // It must be off for what follows: under -icount its instructions would count too.
        OTHER_STATE.store(LEAVE, Ordering::Release);
        if !counter::within(10, || psci::is_off(cpu)) {
            say!("fail cpu {:#x} did not go off within 10 s", cpu.0);
        }
    }

    /// What the other vCPU does: takes interrupts until it may leave.
    fn listen(_vcpu: Vcpu) -> ! {
        gic::init(&[OTHER]);
        exceptions::unmask();
        OTHER_STATE.store(LISTENING, Ordering::Release);
        while OTHER_STATE.load(Ordering::Acquire) != LEAVE {
            smp::pause();
        }
        exceptions::mask();
        psci::cpu_off()
    }

    fn take(frame: &Frame) {
        let interrupt = gic::acknowledge();
        match interrupt {
            Private::VIRTUAL_TIMER => counter::stop_timer(),
            OTHER => {}
            // Spurious: it went away.
            Private(1020..) => return,
            Private(number) => panic!("interrupt {number} was not asked for"),
        }
        ENTERED.store(frame.entered, Ordering::Relaxed);
        gic::end(interrupt);
        TAKEN.fetch_add(1, Ordering::Release);
    }

    fn tracked_writes(boot: &Boot) {
        let Some(touched) = free_blocks(boot) else {
            say!("skip loop_64m: no 256 MiB of free RAM in one piece; give the guest 448 MiB");
            return;
        };
        row("touch_256m", store_to_each(touched), 1);
        let pages = PageRun::new(touched.first, TRACKED);
        // Once more, so that the TLBs know the pages and the code is warm.
        store_to_each(pages);
        for (phase, name) in [
            ("tracked_off", "loop_64m_untracked"),
            ("dbm", "loop_64m_dbm"),
            ("wp", "loop_64m_wp"),
            ("blocks", "loop_64m_blocks"),
        ] {
            loop {
                say!("phase {phase}");
                let answer = console::wait();
                if answer == b's' {
                    break;
                }
                row(name, store_to_each(pages), 1);
                if answer != b'a' {
                    break;
                }
            }
        }
    }

    /// 256 MiB that nothing uses, in whole blocks.
    fn free_blocks(boot: &Boot) -> Option<PageRun> {
        let holes = [boot.image, boot.devicetree];
        let layout = Layout::new(boot.ram, &holes);
        layout.free(boot.ram).find_map(whole_blocks)
    }

    /// The first `TOUCHED` pages of the whole blocks in `run`, if there are so many.
    fn whole_blocks(run: PageRun) -> Option<PageRun> {
        let blocks = PageRun::new(Gfn(run.first.0.next_multiple_of(BLOCK_PAGES)), TOUCHED);
        (blocks.end() <= run.end()).then_some(blocks)
    }

    /// Prints the longest time between two instructions of this guest's that EL2 came in between, and what it was for.
    fn longest_exit(boot: &Boot) {
        let mut longest = Longest::default();
        say!("phase longest");
        if console::wait() == b's' {
            return;
        }
        if let Some(pages) = free_blocks(boot) {
            for page in 0..TRACKED {
                longest.time("a tracked write", page, || {
                    store_to_each(PageRun::new(Gfn(pages.first.0 + page), 1));
                });
            }
        }
        for number in (0..0x20).filter(|number| !psci::ENDS_OR_SLEEPS.contains(number)) {
            for base in [0x8400_0000, 0xc400_0000, 0x8000_0000, 0x8600_0000] {
                longest.time("a call", number, || {
                    psci::call(Function(base + number as u32), 0, 0, 0);
                });
            }
        }
        for _ in 0..64 {
            longest.time("console output", 0, || say!("."));
        }
        // All-ones makes every interrupt that there is enabled, pending and active, and zero does not undo it.
        for value in [None, Some(!0), Some(0)] {
            for offset in (0..gic::BYTES).step_by(4) {
                longest.time("a register of the GIC", offset, || {
                    gic::access(offset, value)
                });
            }
        }
        say!(
            "the longest exit was for {} {:#x}",
            longest.what,
            longest.detail
        );
        row("longest_exit", longest.ticks, 1);
    }

    #[derive(Default)]
    struct Longest {
        ticks: u64,
        what: &'static str,
        detail: u64,
    }

    impl Longest {
        fn time(&mut self, what: &'static str, detail: u64, exit: impl FnOnce()) {
            let start = counter::now();
            exit();
            let ticks = counter::now().wrapping_sub(start);
            if ticks > self.ticks {
                *self = Self {
                    ticks,
                    what,
                    detail,
                };
            }
        }
    }

    /// Ticks for a store to each page.
    fn store_to_each(pages: PageRun) -> u64 {
        let (start, end): (u64, u64);
        // SAFETY: the pages are RAM outside the image and the devicetree, mapped, and used by nothing else.
        unsafe {
            asm!(
                "dsb sy", "isb", "mrs {start}, cntvct_el0",
                "2:", "str {count}, [{at}]", "add {at}, {at}, {page}", "subs {count}, {count}, #1", "b.ne 2b",
                "dsb sy", "isb", "mrs {end}, cntvct_el0",
                count = inout(reg) pages.count => _, at = inout(reg) pages.first.ipa() => _, page = in(reg) PAGE_BYTES,
                start = out(reg) start, end = out(reg) end, options(nostack)
            );
        }
        end.wrapping_sub(start)
    }
}

#[cfg(not(target_os = "none"))]
fn main() {
    eprintln!("bench is a guest: build it for aarch64-unknown-none-softfloat and boot it");
}
