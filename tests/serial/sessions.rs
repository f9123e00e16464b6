//! What a session holds is given back when it ends, however it does, and not before.
//!
//! After a host that died no other one comes here: EL2's own shell is asked, so what is seen was done by EL2.

use anyhow::{Context, Result, bail, ensure};
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::Duration;
use tidectl::client::{Client, Options};
use tidectl::link::Link;
use tidemark_guests::pattern::{Config, Seed};
use tidemark_tests::artifacts::Artifact;
use tidemark_tests::guests::{self, Mib};
use tidemark_tests::host::{Host, OracleGuest};
use tidemark_tests::script::Script;
use tidemark_tests::target::Target;
use tidemark_wire::PROTOCOL;
use tidemark_wire::message::{
    ConsoleFrom, EngineChoice, ErrorReply, Granularity, Hold, Request, Response, VmId, VmState,
};

use crate::case::Case;
use crate::raw::Raw;

pub fn cases() -> Vec<Case> {
    vec![
        Case::new(
            "session_of_a_tool_killed_in_its_last_round",
            180,
            |script| copy_ends(script, End::Killed),
        ),
        Case::new(
            "session_of_a_tool_hung_up_in_its_last_round",
            180,
            |script| copy_ends(script, End::HungUp),
        ),
        Case::new("session_of_a_line_cut_in_the_last_round", 180, |script| {
            copy_ends(script, End::Cut)
        }),
        Case::new("session_holds_while_it_is_heard_of", 120, held_while_heard),
        Case::new("session_ends_and_what_lasts_stays", 120, what_lasts_stays),
    ]
}

/// How a copy comes to its end.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum End {
    /// SIGKILL: it puts nothing back.
    Killed,
    /// SIGHUP: it puts everything back.
    HungUp,
    /// It cannot reach the machine any more.
    Cut,
}

fn copy_ends(script: &mut Script, end: End) -> Result<()> {
    let config = Config {
        seed: Seed(script.seed()),
        vcpus: 2,
        pages: 1000,
        blocks: 16,
        more: 0,
    };
    let bundle = guests::pack([guests::oracle(2, Mib(64))?])?;
    let dir = script.path("copy")?;
    let target = script.start_tidemark("virt", &bundle, "")?;
    target.to_prompt()?;
    let mut guest = OracleGuest::attach(Host::connect(target)?, &config)?;
    guest.start_free(0)?;
    let vm = guest.vm;
    guest.host.finish();

    // Whoever runs the tests may have hang-ups ignored, as `nohup` does.
    let mut tool = Command::new("env")
        .arg("--default-signal=HUP")
        .arg(Artifact::Tidectl.path()?)
        .args(["--port", &target.port(), "--timeout", "2s"])
        .args(["dirty", "copy", "oracle", "--granularity", "block"])
        // The whole copy takes its time, and so does the last round, with all that was written meanwhile.
        .args(["--rounds", "0", "--image-dir"])
        .arg(dir)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .context("tidectl")?;
    let paused = until_paused(&mut tool);
    let ended = paused.and_then(|()| end_it(&mut tool, target, end));
    // Whatever went wrong, no tool is left behind.
    let _ = tool.kill();
    let _ = tool.wait();
    ended?;

    target.settle_shell()?;
    target
        .shell_until("list", "running")
        .context("the guest is still paused")?;
    target
        .shell_until("dirty status oracle", "no dirty log")
        .context("its log is still on")?;
    let mut host = Host::connect(target).context("the next host")?;
    host.client().attach(vm, ConsoleFrom::Now)?;
    // It ends its run in order when told.
    host.client().type_input(vm, b" ")?;
    host.expect(vm, "stopped ")
        .context("the guest does not run")?;
    host.finish();
    target.still_on()
}

/// Reads what the tool says until it has paused the guest.
fn until_paused(tool: &mut Child) -> Result<()> {
    let said = tool.stderr.take().context("it is piped")?;
    let mut all = String::new();
    for line in BufReader::new(said).lines() {
        let line = line?;
        if line.contains("paused for the last round") {
            return Ok(());
        }
        all += &line;
    }
    bail!("the tool never paused the guest; it said: {all}")
}

fn end_it(tool: &mut Child, target: &Target, end: End) -> Result<()> {
    match end {
        End::Killed => tool.kill()?,
        End::HungUp => {
            let kill = format!("kill -HUP {}", tool.id());
            let status = Command::new("sh").args(["-c", &kill]).status()?;
            ensure!(status.success(), "`{kill}` ended with {status}");
        }
        End::Cut => target.line().cut_client(),
    }
    let status = tool.wait()?;
    let wanted = match end {
        End::Killed => None,
        End::HungUp => Some(130),
        End::Cut => Some(3),
    };
    ensure!(
        status.code() == wanted,
        "the tool ended with {status}; was it over already?"
    );
    Ok(())
}

/// Starts a guest, and waits until it runs.
fn start(script: &mut Script) -> Result<&mut Target> {
    let bundle = guests::pack([guests::oracle(1, Mib(32))?])?;
    let target = script.start_tidemark("virt", &bundle, "")?;
    target.to_prompt()?;
    target.shell_until("list", "running")?;
    Ok(target)
}

const VM: VmId = VmId(0);

/// More than the shortest patience there is, and than what a look at it may be late.
const LONG: Duration = Duration::from_secs(4);

/// An owner that is busy with something else loses nothing; one that is gone does.
fn held_while_heard(script: &mut Script) -> Result<()> {
    let target = start(script)?;
    let link = Link::open(&target.port().parse().map_err(anyhow::Error::msg)?)?;
    let options = Options {
        // The shortest there is.
        patience: Duration::ZERO,
        ..Options::for_pace(link.pace)
    };
    let mut client = Client::open(link, options)?;
    client.start_log(
        VM,
        EngineChoice::Auto,
        Granularity::Page,
        Hold::Session,
        &mut |_, _| {},
    )?;
    client.pause(VM, Hold::Session)?;
    // As long as it hashes a file of its own, say.
    std::thread::sleep(LONG);
    let state = client.info(VM)?.summary.state;
    ensure!(state == VmState::Paused, "a busy host's guest is {state}");
    ensure!(
        client.log_status(VM)?.logging.is_some(),
        "a busy host's log is off"
    );
    // Two hold it, and it goes on when neither does.
    client.pause(VM, Hold::Lasting)?;
    let state = client.resume(VM, Hold::Session)?;
    ensure!(
        state == VmState::Paused,
        "held by one of two, it is {state}"
    );
    client.pause(VM, Hold::Session)?;
    let state = client.resume(VM, Hold::Lasting)?;
    ensure!(
        state == VmState::Paused,
        "held by the other of two, it is {state}"
    );
    client.close();
    ensure!(
        target.shell("list")?.contains("running"),
        "the session said goodbye, and its pause is there"
    );
    target.shell_until("dirty status oracle", "no dirty log")?;

    let mut raw = Raw::connect(target, 0x5151);
    hold(&mut raw, Hold::Session)?;
    target.shell_until("list", "running")?;
    target.shell_until("dirty status oracle", "no dirty log")?;
    raw.ask(&Request::List, |response| {
        ensure!(
            response == Response::Error(ErrorReply::StaleSession),
            "a session that was given up is answered {response:?}"
        );
        Ok(())
    })?;
    target.still_on()
}

/// A session that is over takes back nothing that was asked for to last.
fn what_lasts_stays(script: &mut Script) -> Result<()> {
    let target = start(script)?;
    let mut raw = Raw::connect(target, 0x6161);
    hold(&mut raw, Hold::Lasting)?;
    target.expect("nothing heard of the host's session")?;
    let mut client = Host::connect(target)?;
    let state = client.info(VM)?.summary.state;
    ensure!(state == VmState::Paused, "a lasting pause: it is {state}");
    ensure!(
        client.dirty_status(VM)?.logging.is_some(),
        "a lasting log is off"
    );
    client.client().resume(VM, Hold::Lasting)?;
    client.dirty_stop(VM)?;
    client.finish();
    target.still_on()
}

/// Opens a session of the shortest patience that takes a log and a pause, and says no more.
fn hold(raw: &mut Raw, hold: Hold) -> Result<()> {
    raw.hello(PROTOCOL)?
        .map_err(|error| anyhow::anyhow!("{error}"))?;
    for request in [
        Request::KeepAlive { patience_ms: 1000 },
        Request::DirtyStart {
            vm: VM,
            engine: EngineChoice::Auto,
            granularity: Granularity::Page,
            hold,
        },
        Request::Pause { vm: VM, hold },
    ] {
        let done = |response: Response<'_>| match response {
            Response::Ok | Response::State(VmState::Paused) => Ok(true),
            Response::Progress { .. } | Response::State(VmState::Running) => Ok(false),
            other => bail!("{request:?} was answered {other:?}"),
        };
        while !raw.ask(&request, done)? {}
    }
    Ok(())
}
