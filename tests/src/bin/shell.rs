//! `make shell`: boots Tidemark with a Linux guest and hands over the terminal.
//!
//! The machine's one line is shared: this terminal shows its text, and `tidectl` works
//! beside it on the socket that is printed at the start.

use anyhow::Result;
use tidemark_tests::artifacts::Artifact;
use tidemark_tests::clocks::Clocks;
use tidemark_tests::guests::{self, Mib};
use tidemark_tests::qemu::Payload;
use tidemark_tests::target::Target;
use tidemark_tests::terminal::{Left, attach};
use tidemark_tests::work::Work;

fn main() -> Result<()> {
    let machine = std::env::args().nth(1).unwrap_or_else(|| "virt".to_owned());
    let work = Work::create("shell", &machine)?;
    let bundle = work.path("guests.bundle");
    std::fs::write(
        &bundle,
        guests::pack([guests::linux("debian", 2, Mib(512))?])?,
    )?;
    let payload = Payload::kernel(Artifact::Image.path()?)
        .initrd(bundle)
        .append("poweroff=never");
    let target = Target::start(work, &machine, &payload, Clocks::usual())?;
    eprintln!("Ctrl-A x leaves and switches the machine off; `help` lists what EL2's shell knows.");
    eprintln!(
        "From another terminal: tidectl --port {} list",
        target.port()
    );
    match attach(target.line())? {
        Left::Asked => eprintln!("\nleft; the machine is switched off"),
        Left::MachineOff => eprintln!("\nthe machine is off"),
    }
    eprintln!(
        "what was said is in {}",
        target.work().path("serial.log").display()
    );
    Ok(())
}
