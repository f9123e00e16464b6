//! `make run`: the whole path on a real guest, shown as it happens.
//!
//! Boots Tidemark on QEMU with Debian's Linux in it (2 vCPUs, 512 MiB), has a program in
//! the guest write memory, and tracks which pages it writes: rounds by the hardware's
//! dirty bit, then rounds by write protection. Leaves in `target/demo/`:
//!
//! | file | what |
//! |---|---|
//! | `serial.log` | everything that was said on the machine's line, with times |
//! | `rounds.jsonl` | one JSON object a round |
//! | `bitmap.bin`, `bitmap.json` | the last round's bitmap in KVM's layout, and what it means |
//! | `heatmap.png` | how often each page was dirty, over all rounds |
//!
//! Any step that fails ends it with a status that is not 0 and a line that names the step.

mod rounds;
mod table;

use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use tidemark_tests::artifacts::{Artifact, target_dir};
use tidemark_tests::clocks::Clocks;
use tidemark_tests::guests::{self, LINUX_PROMPT, Mib};
use tidemark_tests::host::Host;
use tidemark_tests::qemu::Payload;
use tidemark_tests::target::Target;
use tidemark_tests::work::Work;
use tidemark_wire::message::{EngineChoice, VmId};

use crate::rounds::{Rounds, Tracked};

/// The guest's name in the bundle.
const GUEST: &str = "debian";

/// What the guest is given to do: a program that goes through memory in order, and one
/// that returns to a few places.
const LOADS: [&str; 2] = ["load 160 seq 48 0", "load 96 hot 32 0"];

fn main() -> ExitCode {
    let mut steps = Steps::default();
    match demo(&mut steps) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("demo: failed at step {}: {error:#}", steps.now);
            ExitCode::FAILURE
        }
    }
}

/// Where the demo is, for the message when it fails.
#[derive(Default)]
struct Steps {
    count: u32,
    now: String,
}

impl Steps {
    fn begin(&mut self, what: &str) {
        self.count += 1;
        self.now = format!("{} ({what})", self.count);
        println!("{}. {what}", self.count);
    }
}

fn demo(steps: &mut Steps) -> Result<()> {
    let rounds = asked_rounds()?;
    steps.begin("pack the guest into a bundle");
    let work = Work::at(target_dir().join("demo"))?;
    let bundle = work.path("guests.bundle");
    std::fs::write(&bundle, guests::pack([guests::linux(GUEST, 2, Mib(512))?])?)?;
    let payload = Payload::kernel(Artifact::Image.path()?)
        .initrd(bundle)
        // To show blocks being split, and put back together.
        .append("leaves=blocks");

    steps.begin("boot Tidemark with Debian's Linux in it");
    let clocks = Clocks::usual().with_total(170);
    let mut target = Target::start(work, "virt", &payload, clocks)?;
    let result = run(steps, &mut target, rounds);
    if let Err(error) = &result {
        target.keep_evidence(error);
        eprintln!(
            "demo: what was said is in {}",
            target.work().path("serial.log").display()
        );
    }
    result
}

fn asked_rounds() -> Result<u32> {
    let mut arguments = std::env::args().skip(1);
    match (arguments.next().as_deref(), arguments.next()) {
        (None, _) => Ok(rounds::USUAL),
        (Some("--rounds"), Some(count)) => {
            let count = count.parse().ok().filter(|count| (1..=40).contains(count));
            count.context("--rounds takes 1 to 40")
        }
        (Some(other), _) => bail!("`{other}` is not an option; `--rounds N` is the only one"),
    }
}

fn run(steps: &mut Steps, target: &mut Target, count: u32) -> Result<()> {
    target.to_prompt()?;
    let mut host = Host::connect(target)?;
    println!("   {}", host.client().image());
    let vm = host.vm(GUEST)?;
    host.attach(vm)?;
    host.expect(vm, LINUX_PROMPT)
        .context("Linux did not get to its shell")?;
    host.type_line(vm, "uname -r; nproc")?;
    let said = host.expect(vm, LINUX_PROMPT)?;
    let said: Vec<&str> = said.lines().skip(1).map(str::trim).collect();
    println!(
        "   the guest's shell is up: Linux {} vCPUs",
        said.join(", ")
    );

    steps.begin("start programs in the guest that write memory");
    start_loads(&mut host, vm)?;

    let mut rounds = Rounds::begin(target.work(), GUEST)?;
    for (engine, name) in [
        (EngineChoice::Dbm, "the hardware's dirty bit"),
        (EngineChoice::WriteProtect, "write protection"),
    ] {
        steps.begin(&format!("track dirty pages by {name}, {count} rounds"));
        rounds.track(&mut host, &Tracked { vm, engine, count })?;
    }

    steps.begin("write the results");
    let files = rounds.finish()?;

    steps.begin("power off");
    host.client().power_off()?;
    host.finish();
    target.powered_off()?;

    println!(
        "\nall went well in {:.0} s; see",
        target.clocks().elapsed().as_secs_f64()
    );
    println!("  {}", target.work().path("serial.log").display());
    for file in files {
        println!("  {}", file.display());
    }
    Ok(())
}

fn start_loads(host: &mut Host, vm: VmId) -> Result<()> {
    for (number, load) in LOADS.iter().enumerate() {
        host.type_line(vm, &format!("{load} >/tmp/load{number} 2>&1 &"))?;
        host.expect(vm, LINUX_PROMPT)?;
        // The marker is computed, so that the echo of what is typed cannot pass for it,
        // wherever the guest's line editor breaks the line.
        let marker = 40 + number;
        let ask = format!(
            "until grep -q ready /tmp/load{number} || ! kill -0 $!; do sleep 0.1; done; \
             echo counted $((30 + 10 + {number})) $(grep -c ready /tmp/load{number})"
        );
        host.type_line(vm, &ask)?;
        host.expect(vm, &format!("counted {marker} "))?;
        let count = host.expect(vm, "\n")?;
        if count.trim() != "1" {
            host.type_line(vm, &format!("cat /tmp/load{number}; echo end $((40 + 2))"))?;
            let said = host.expect(vm, "end 42")?;
            bail!("`{load}` does not run: {said}");
        }
        host.expect(vm, LINUX_PROMPT)?;
        println!("   {load}");
    }
    Ok(())
}
