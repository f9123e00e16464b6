//! The last things that happened in a simulated run, for whoever has to find out why it failed.

use super::*;

/// What happened, for whoever has to find out why.
pub(super) enum Happened {
    Machine(Event),
    /// And so many more behind it, changed alike.
    Descriptor(Scope, Write, u64),
    Begins(&'static str),
    Returns(&'static str),
    Access(u64, FaultAccess, Result<(), Outcome>),
    Stored(u64, u64),
    Host(String),
}

impl fmt::Display for Happened {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Happened::Machine(event) => write!(f, "{event:x?}"),
            Happened::Descriptor(scope, write, more) => {
                let Write { old, new, how, .. } = write;
                let Scope { start, level, .. } = scope;
                write!(f, "{start:#x} level {level}: {old:#x} -> {new:#x} {how:?}")?;
                if *more > 0 {
                    write!(f, ", and {more} behind it")?;
                }
                Ok(())
            }
            Happened::Begins(name) => write!(f, "{name} ..."),
            Happened::Returns(name) => write!(f, "... {name}"),
            Happened::Access(ipa, access, result) => write!(f, "{access:?} {ipa:#x}: {result:?}"),
            Happened::Stored(ipa, content) => write!(f, "stored {content} at {ipa:#x}"),
            Happened::Host(what) => write!(f, "host: {what}"),
        }
    }
}

#[derive(Default)]
pub(super) struct Trace {
    last: VecDeque<(usize, Happened)>,
}

impl Sim {
    pub(super) fn explain(&self) {
        std::eprintln!("{:?}\nThe last things that happened:", self.setup);
        for (cpu, happened) in &lock(&self.trace).last {
            std::eprintln!("  CPU {cpu}: {happened}");
        }
    }

    pub(super) fn happened(&self, happened: Happened) {
        const LENGTH: usize = 400;
        let mut trace = lock(&self.trace);
        let cpu = self.world.machine.current_pe();
        if let Happened::Descriptor(scope, write, _) = &happened
            && let Some((by, Happened::Descriptor(first, other, more))) = trace.last.back_mut()
            && *by == cpu
            && first.start + (*more + 1) * (first.end - first.start) == scope.start
            && first.level == scope.level
            && (other.old ^ other.new ^ write.old ^ write.new) & 0x0000_ffff_ffff_f000
                == other.old ^ other.new ^ write.old ^ write.new
        {
            *more += 1;
            return;
        }
        if trace.last.len() == LENGTH {
            trace.last.pop_front();
        }
        trace.last.push_back((cpu, happened));
    }
}
