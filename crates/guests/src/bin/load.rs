//! A writer of memory: the load of the demo and of the copy test.
//!
//! Maps memory, writes every page of it once, says `load: ready`, then writes one word to page after page in the order
//! and at the rate it is told, and says once a second how many pages it wrote in that second: `load: <pages>`. See
//! [`tidemark_guests::workload::USAGE`].

#![cfg_attr(target_os = "none", no_std, no_main)]

#[cfg(target_os = "none")]
mod program {
    use core::fmt::Write;
    use core::ptr::NonNull;

    use tidemark_guests::el0::{self, Arguments, ExitStatus, Stream};
    use tidemark_guests::pattern::PAGE_BYTES;
    use tidemark_guests::workload::{Choice, Options, USAGE};

    tidemark_guests::el0_main!(main);

    const SECOND: u64 = 1_000_000_000;
    /// Pages between two looks at the clock.
    const STRETCH: u64 = 1024;

    fn main(arguments: Arguments) -> ExitStatus {
        let options = match Options::parse(arguments) {
            Ok(options) => options,
            Err(error) => {
                // Nobody is left to tell if this fails.
                let _ = writeln!(Stream::error(), "load: {error}\n{USAGE}");
                return ExitStatus::USAGE;
            }
        };
        let memory = match el0::map(options.pages * PAGE_BYTES) {
            Ok(place) => Memory {
                place,
                pages: options.pages,
            },
            Err(error) => {
                // As above.
                let _ = writeln!(
                    Stream::error(),
                    "load: no memory for {} pages: {error}; ask for less",
                    options.pages
                );
                return ExitStatus::FAILURE;
            }
        };
        match run(&options, &memory) {
            Ok(()) => ExitStatus::SUCCESS,
            Err(core::fmt::Error) => ExitStatus::FAILURE,
        }
    }

    struct Memory {
        place: NonNull<u64>,
        pages: u64,
    }

    impl Memory {
        fn write(&self, page: u64, value: u64) {
            assert!(page < self.pages, "page {page} of {}", self.pages);
            // SAFETY: the page is mapped, and is only ever written like this.
            unsafe {
                self.place
                    .byte_add((page * PAGE_BYTES) as usize)
                    .write_volatile(value)
            }
        }
    }

    fn run(options: &Options, memory: &Memory) -> core::fmt::Result {
        let mut output = Stream::output();
        (0..options.pages).for_each(|page| memory.write(page, 1));
        writeln!(output, "load: ready")?;
        let mut choice = Choice::new(options);
        let start = el0::now();
        let (mut written, mut reported, mut seconds) = (0_u64, 0_u64, 0_u64);
        loop {
            let elapsed = el0::now().saturating_sub(start);
            if elapsed / SECOND > seconds {
                // After a pause of several seconds there is one line, for all of them.
                seconds = elapsed / SECOND;
                writeln!(output, "load: {}", written - reported)?;
                reported = written;
                if options.seconds.is_some_and(|limit| seconds >= limit) {
                    return Ok(());
                }
            }
            match options.allowance(elapsed, written).min(STRETCH) {
                0 => el0::sleep(5),
                pages => {
                    for _ in 0..pages {
                        written += 1;
                        // Every write changes the page.
                        memory.write(choice.page(), written);
                    }
                }
            }
        }
    }
}

#[cfg(not(target_os = "none"))]
fn main() {
    eprintln!("load runs in a guest: build it for aarch64-unknown-none-softfloat");
}
