//! Where the guests' random numbers come from.
//!
//! One generator is the machine's; each VM has its own, seeded from it anew at every start, so
//! that no guest waits for another's and none can tell what another was given. What goes into
//! the machine's, and when:
//!
//! - at boot, what the boot loader left in `/chosen` (`rng-seed`, `kaslr-seed`), the firmware's
//!   generator (DEN 0098) if it has one, and the jitter of the counter;
//! - at boot and at each start of a guest, RNDR where the CPU has it, and the counter.
//!
//! The best of them is said in the log. Jitter alone is not called entropy: it is all that a
//! guest's addresses are shuffled by then, but nobody tells the guest that it may rely on it.

use crate::arch::lock::{Mutex, rank};
use crate::arch::{random, smc, timer};
use log::{info, warn};
use spin::Once;
use tidemark_devices::random::Generator;

/// The best source there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    /// The CPU.
    Rndr,
    /// The firmware.
    Firmware,
    /// The boot loader.
    BootSeed,
    /// The counter alone.
    Jitter,
}

static SOURCE: Once<Source> = Once::new();
static MACHINE: Mutex<Generator, { rank::MACHINE_RANDOM }> = Mutex::new(Generator::new());

/// Bytes of entropy that are wanted of a source: a secret's worth.
const ENOUGH: usize = 32;
/// Times that the counter is looked at, with a hash of uneven cost between.
const JITTER: usize = 64;

/// Collects what there is; `seeds` are the boot loader's.
pub fn init<'a>(seeds: impl Iterator<Item = &'a [u8]>) {
    let mut machine = MACHINE.lock();
    let mut source = Source::Jitter;
    let mut left = 0;
    for seed in seeds {
        machine.seed(seed);
        // A seed of all zeros was erased by who used it first.
        left += if seed.iter().any(|&byte| byte != 0) {
            seed.len()
        } else {
            0
        };
    }
    if left >= ENOUGH {
        source = Source::BootSeed;
    }
    let mut words = 0;
    while let Some(entropy) = smc::entropy().filter(|_| words < ENOUGH) {
        machine.seed(entropy.map(u64::to_le_bytes).as_flattened());
        words += size_of_val(&entropy);
    }
    if words >= ENOUGH {
        source = Source::Firmware;
    }
    if stir(&mut machine) {
        source = Source::Rndr;
    }
    for _ in 0..JITTER {
        machine.seed(&timer::now().to_le_bytes());
    }
    SOURCE.call_once(|| source);
    let with = "mixed with the counter, by SHA-256";
    match source {
        Source::Rndr => info!("random: RNDR, {with}"),
        Source::Firmware => info!("random: the firmware's generator, {with}"),
        Source::BootSeed => info!("random: the boot loader's seed, {with}"),
        Source::Jitter => warn!(
            "random: the counter's jitter alone; guests get no rng-seed and no TRNG. Have the boot loader pass an rng-seed in /chosen"
        ),
    }
}

/// Mixes in what the CPU has now: whether that was entropy enough.
fn stir(machine: &mut Generator) -> bool {
    let mut words = [[0; 8]; ENOUGH / 8];
    let mut got = 0;
    for word in &mut words {
        if let Some(random) = random::rndr() {
            *word = random.to_le_bytes();
            got += word.len();
        }
    }
    machine.seed(words.as_flattened());
    machine.seed(&timer::now().to_le_bytes());
    got >= ENOUGH
}

/// Whether guests are told that they get entropy.
pub fn is_entropy() -> bool {
    SOURCE.get().is_some_and(|&source| source != Source::Jitter)
}

/// A generator for a guest that starts.
pub fn for_start() -> Generator {
    let secret: [u8; ENOUGH] = {
        let mut machine = MACHINE.lock();
        stir(&mut machine);
        machine.bytes()
    };
    let mut own = Generator::new();
    own.seed(&secret);
    own
}
