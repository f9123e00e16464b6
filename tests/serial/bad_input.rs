//! What must not harm the machine: bundles, frames, requests and hosts gone bad.
//!
//! After each of them the same thing is checked: a clear word was said, and the next
//! good thing works as if nothing had happened.

use anyhow::{Context, Result, bail, ensure};
use tidemark_guests::pattern::{Config, Random, Seed};
use tidemark_tests::guests::{self, Mib};
use tidemark_tests::host::{Host, OracleGuest};
use tidemark_tests::oracle::{self, Pages};
use tidemark_tests::script::Script;
use tidemark_tests::target::Target;
use tidemark_wire::PROTOCOL;
use tidemark_wire::bundle::{Boot, Bundle, Manifest};
use tidemark_wire::checksum::crc32c;
use tidemark_wire::message::{
    EngineChoice, ErrorReply, Granularity, Hold, Request, Response, SlotId, VmId,
};

use crate::case::{Case, Place};
use crate::raw::Raw;

pub fn cases() -> Vec<Case> {
    vec![
        Case::new("bad_bundle_not_one", 40, |script| {
            bad_bundle(script, Damage::NotOne)
        }),
        Case::new("bad_bundle_other_format", 40, |script| {
            bad_bundle(script, Damage::OtherFormat)
        }),
        Case::new("bad_bundle_of_before", 40, |script| {
            bad_bundle(script, Damage::FormerFormat)
        }),
        Case::new("bad_bundle_cut_short", 40, |script| {
            bad_bundle(script, Damage::CutShort)
        }),
        Case::new("bad_bundle_manifest_damaged", 40, |script| {
            bad_bundle(script, Damage::Manifest)
        }),
        Case::new("bad_bundle_manifest_forged", 40, |script| {
            bad_bundle(script, Damage::Forged)
        }),
        Case::new("bad_bundle_file_damaged", 40, |script| {
            bad_bundle(script, Damage::File)
        }),
        Case::new("bad_bundle_kernel_out_of_memory", 40, kernel_out_of_memory),
        Case::new("kernel_of_noise", 60, kernel_of_noise),
        Case::new("bad_frames", 90, bad_frames).at(Place::Anywhere),
        Case::new("truncated_frames", 60, truncated_frames).at(Place::Anywhere),
        Case::new("bad_requests", 60, bad_requests).at(Place::Anywhere),
        Case::new("wrong_version", 60, wrong_version).at(Place::Anywhere),
        Case::new("stale_session", 60, stale_session).at(Place::Anywhere),
        Case::new("no_such_vm", 60, no_such_vm).at(Place::Anywhere),
        Case::new("session_ends_amid_pieces", 60, session_ends_amid_pieces),
        Case::new("sessions_of_one_number", 60, sessions_of_one_number),
        Case::new("peer_vanishes_mid_transfer", 90, peer_vanishes).at(Place::Anywhere),
    ]
}

/// Starts a small guest, which every test of bad input wants to see alive afterwards.
pub fn start_oracle(script: &mut Script) -> Result<&mut Target> {
    let bundle = guests::pack([guests::oracle(1, Mib(32))?])?;
    let target = script.start_tidemark("virt", &bundle, "")?;
    target.to_prompt()?;
    // What a request meets must not depend on how fast the guest is loaded.
    target.shell_until("list", "running")?;
    Ok(target)
}

/// The shell answers, and the machine says nothing that looks like a crash.
pub fn shell_answers(target: &mut Target) -> Result<()> {
    target.settle_shell()?;
    let help = target.shell("help")?;
    ensure!(
        help.contains("list"),
        "`help` does not name `list`: {help:?}"
    );
    target.still_on()
}

// ---- bundles

/// One way for a bundle to be wrong.
#[derive(Clone, Copy)]
enum Damage {
    /// Random bytes.
    NotOne,
    /// A format number of the future.
    OtherFormat,
    /// The format before this one.
    FormerFormat,
    /// The end is missing.
    CutShort,
    /// A bit of the manifest is flipped.
    Manifest,
    /// The manifest is nonsense under a checksum that fits it.
    Forged,
    /// A bit of a file is flipped.
    File,
}

fn damaged(bundle: &[u8], damage: Damage, seed: u64) -> Result<Vec<u8>> {
    let mut random = Random(seed);
    let mut bytes = bundle.to_vec();
    let length = usize::try_from(u32_at(&bytes, 12)?)?;
    match damage {
        Damage::NotOne => bytes
            .iter_mut()
            .take(64)
            .for_each(|byte| *byte = (random.next() >> 32) as u8),
        Damage::OtherFormat => put_u32(&mut bytes, 8, 99)?,
        Damage::FormerFormat => put_u32(&mut bytes, 8, 1)?,
        Damage::CutShort => {
            let cut = 32 + random.below(bytes.len() as u64 - 64);
            bytes.truncate(usize::try_from(cut)?);
        }
        Damage::Manifest => {
            let at = 32 + usize::try_from(random.below(length as u64))?;
            *bytes.get_mut(at).context("in the manifest")? ^= 1 << random.below(8);
        }
        Damage::Forged => {
            let manifest = bytes.get_mut(32..32 + length).context("the manifest")?;
            manifest
                .iter_mut()
                .for_each(|byte| *byte = (random.next() >> 32) as u8);
            let crc = crc32c(manifest);
            put_u32(&mut bytes, 24, crc)?;
        }
        Damage::File => {
            // The file begins at the first 4 KiB boundary after the manifest.
            let at = (32 + length).next_multiple_of(4096) + 4096;
            *bytes.get_mut(at).context("in the file")? ^= 1 << random.below(8);
        }
    }
    Ok(bytes)
}

fn u32_at(bytes: &[u8], at: usize) -> Result<u32> {
    let word = bytes
        .get(at..)
        .and_then(|rest| rest.first_chunk())
        .context("a header")?;
    Ok(u32::from_le_bytes(*word))
}

fn put_u32(bytes: &mut [u8], at: usize, value: u32) -> Result<()> {
    put(bytes, at, &value.to_le_bytes())
}

pub fn put(bytes: &mut [u8], at: usize, part: &[u8]) -> Result<()> {
    let place = bytes.get_mut(at..at + part.len()).context("a header")?;
    place.copy_from_slice(part);
    Ok(())
}

/// What the image must say: the same words as the parser here, which it is built with.
fn complaint(bytes: &[u8]) -> Result<String> {
    match Bundle::parse(bytes) {
        Err(error) => Ok(error.to_string()),
        Ok(_) => bail!("nothing is wrong with this bundle"),
    }
}

fn bad_bundle(script: &mut Script, damage: Damage) -> Result<()> {
    let good = guests::pack([guests::oracle(1, Mib(32))?])?;
    let bad = damaged(&good, damage, script.seed())?;
    let target = script.start_tidemark("virt", &bad, "")?;
    target.to_prompt()?;
    let complaint = if matches!(damage, Damage::File) {
        // Files are looked at when their guest is started, which may be after the prompt.
        target.shell_until("list", "failed")?;
        "damaged (CRC-32C)".to_owned()
    } else {
        complaint(&bad)?
    };
    let lines = errors_about(target, &complaint);
    ensure!(lines == 1, "{lines} lines of the log say `{complaint}`");
    no_guest_runs(target)
}

/// A kernel that is not in the guest's memory: `tidectl` makes no such bundle.
fn kernel_out_of_memory(script: &mut Script) -> Result<()> {
    let good = guests::pack([guests::oracle(1, Mib(32))?])?;
    let bundle = Bundle::parse(&good).map_err(|error| anyhow::anyhow!("{error}"))?;
    let mut manifest = bundle.manifest().clone();
    let vm = manifest.vms.first_mut().context("a VM")?;
    if let Boot::Kernel(kernel) = &mut vm.boot
        && let Some(segment) = kernel.segments.first_mut()
    {
        // The oracle's first store would be past its RAM, in the hypervisor's if anywhere.
        segment.address += Mib(32).bytes();
        kernel.entry += Mib(32).bytes();
    }
    let bad = with_manifest(&good, &manifest)?;
    let target = script.start_tidemark("virt", &bad, "")?;
    target.to_prompt()?;
    let lines = errors_about(target, "is not in its memory");
    ensure!(lines == 1, "{lines} lines of the log say what is wrong");
    no_guest_runs(target)
}

/// The same bundle under another manifest of the same length.
fn with_manifest(bundle: &[u8], manifest: &Manifest) -> Result<Vec<u8>> {
    let mut bytes = bundle.to_vec();
    let body = postcard::to_allocvec(manifest)?;
    ensure!(
        body.len() == usize::try_from(u32_at(&bytes, 12)?)?,
        "the manifest would have another length"
    );
    put(&mut bytes, 32, &body)?;
    put_u32(&mut bytes, 24, crc32c(&body))?;
    Ok(bytes)
}

/// Random instructions: whatever a guest executes, EL2 goes on.
fn kernel_of_noise(script: &mut Script) -> Result<()> {
    let mut random = Random(script.seed());
    let kernel = (0..65536).map(|_| (random.next() >> 32) as u8).collect();
    let bundle = guests::pack([
        guests::of_kernel("noise", 1, Mib(32), (kernel, None), "")?,
        guests::oracle(1, Mib(32))?,
    ])?;
    let target = script.start_tidemark("virt", &bundle, "")?;
    target.to_prompt()?;
    // The guest beside it comes up and takes commands.
    let config = Config {
        seed: Seed(random.next()),
        vcpus: 1,
        pages: 10,
        blocks: 0,
        more: 0,
    };
    let mut oracle = OracleGuest::attach(Host::connect(target)?, &config)?;
    oracle.step()?;
    let mut host = oracle.host;
    let noise = host.vm("noise")?;
    host.client().stop(noise)?;
    host.finish();
    target.shell_until("list", "stopped")?;
    shell_answers(target)
}

/// How many errors of the log say `what`; what the shell says does not count.
pub fn errors_about(target: &Target, what: &str) -> usize {
    let text = target.line().text();
    let errors = text.lines().filter(|line| line.contains("ERROR"));
    errors.filter(|line| line.contains(what)).count()
}

pub fn no_guest_runs(target: &mut Target) -> Result<()> {
    let list = target.shell("list")?;
    ensure!(!list.contains("running"), "a guest was started: {list:?}");
    shell_answers(target)
}

// ---- frames

fn bad_frames(script: &mut Script) -> Result<()> {
    let mut random = Random(script.seed());
    let target = start_oracle(script)?;
    let mut raw = Raw::connect(target, 0x1111);
    raw.works(&["oracle"]).context("before anything bad")?;
    for round in 0..40 {
        let mut bytes = raw.frame(&Request::Info { vm: VmId(0) })?;
        let last = bytes.len() as u64 - 2;
        for _ in 0..=random.below(3) {
            let at = usize::try_from(1 + random.below(last))?;
            let byte = bytes.get_mut(at).context("in the frame")?;
            match random.below(3) {
                0 => *byte ^= 1 << random.below(8),
                1 => *byte = random.next() as u8,
                _ => *byte = 0,
            }
        }
        raw.send(&bytes)?;
        // A frame longer than any receiver agreed to, now and then.
        if round % 8 == 0 {
            let mut long = vec![0, 2];
            long.extend((0..3000).map(|_| 1 | random.next() as u8));
            long.push(0);
            raw.send(&long)?;
        }
        raw.works(&["oracle"])
            .with_context(|| format!("after bad frame {round}: {bytes:02x?}"))?;
    }
    raw.close()?;
    shell_answers(target)
}

fn truncated_frames(script: &mut Script) -> Result<()> {
    let target = start_oracle(script)?;
    let mut raw = Raw::connect(target, 0x2222);
    raw.works(&["oracle"]).context("before anything bad")?;
    let whole = raw.frame(&Request::Info { vm: VmId(0) })?;
    for length in 1..whole.len() {
        raw.send(whole.get(..length).unwrap_or_default())?;
        // The next frame begins with its own delimiter, so half a frame costs only itself.
        raw.works(&["oracle"])
            .with_context(|| format!("after {length} of {} bytes", whole.len()))?;
    }
    raw.close()?;
    shell_answers(target)
}

fn bad_requests(script: &mut Script) -> Result<()> {
    let mut random = Random(script.seed());
    let target = start_oracle(script)?;
    let mut raw = Raw::connect(target, 0x3333);
    raw.works(&["oracle"])?;
    for _ in 0..60 {
        // A good frame around a payload that is no request, or one with odd numbers.
        let length = 1 + random.below(40);
        let payload: Vec<u8> = (0..length).map(|_| random.next() as u8).collect();
        // PowerOff and the like are requests: what decodes is not noise, so skip it.
        if Request::decode(&payload).is_ok() {
            continue;
        }
        let bytes = raw.frame_of(&payload)?;
        raw.send(&bytes)?;
        let answer = raw.response(tidemark_tests::clocks::scaled(5))?;
        let answer = answer.with_context(|| format!("no answer to {payload:02x?}"))?;
        let answer = Response::decode(&answer).map_err(|error| anyhow::anyhow!("{error}"))?;
        ensure!(
            matches!(answer, Response::Error(ErrorReply::Malformed)),
            "{payload:02x?} was answered by {answer:?}"
        );
    }
    for (request, wanted) in out_of_range() {
        raw.ask(&request, |response| {
            let refused = matches!(&response, Response::Error(error) if wanted.contains(error));
            ensure!(refused, "{request:?} was answered by {response:?}");
            Ok(())
        })?;
    }
    raw.works(&["oracle"])?;
    raw.close()?;
    shell_answers(target)
}

/// Requests that read well and ask for the impossible, and what may be answered.
fn out_of_range() -> Vec<(Request<'static>, Vec<ErrorReply>)> {
    use tidemark_wire::message::Epoch;
    let vm = VmId(0);
    let slot = SlotId(0);
    let none = ErrorReply::NoSuchEpoch { outstanding: None };
    vec![
        (Request::Info { vm: VmId(77) }, vec![ErrorReply::NoSuchVm]),
        (
            Request::Pause {
                vm: VmId(u16::MAX),
                hold: Hold::Lasting,
            },
            vec![ErrorReply::NoSuchVm],
        ),
        (
            Request::ReadMemory {
                vm,
                ipa: u64::MAX - 7,
                len: 8,
            },
            vec![ErrorReply::OutOfRange],
        ),
        (
            Request::ReadMemory {
                vm,
                ipa: 0x4000_0001,
                len: 8,
            },
            vec![ErrorReply::NeedsAlignment],
        ),
        (
            Request::ReadMemory {
                vm,
                ipa: 0x4000_0000,
                len: !7,
            },
            vec![ErrorReply::OutOfRange, ErrorReply::Malformed],
        ),
        (
            Request::Hash {
                vm,
                slot: SlotId(500),
            },
            vec![ErrorReply::NoSuchSlot, ErrorReply::NotPaused],
        ),
        (Request::Hash { vm, slot }, vec![ErrorReply::NotPaused]),
        (
            Request::DirtyTake {
                vm,
                epoch: Epoch(1),
            },
            vec![ErrorReply::NotLogging],
        ),
        (
            // After this one there would be no greater one.
            Request::DirtyTake {
                vm,
                epoch: Epoch(u64::MAX),
            },
            vec![ErrorReply::OutOfRange],
        ),
        (
            Request::DirtyCommit {
                vm,
                epoch: Epoch(9),
            },
            vec![none, ErrorReply::NotLogging],
        ),
        (
            Request::BitmapRead {
                vm,
                slot,
                epoch: Epoch(9),
                first_page: 0,
                pages: 64,
            },
            vec![none, ErrorReply::NotLogging],
        ),
    ]
}

fn wrong_version(script: &mut Script) -> Result<()> {
    let target = start_oracle(script)?;
    let mut raw = Raw::connect(target, 0x4444);
    for protocol in [0, PROTOCOL + 1, u16::MAX] {
        let refused = raw.hello(protocol)?;
        ensure!(
            refused == Err(ErrorReply::VersionMismatch { target: PROTOCOL }),
            "protocol {protocol} was answered by {refused:?}"
        );
    }
    raw.works(&["oracle"])
        .context("the right version after wrong ones")?;
    raw.close()?;
    shell_answers(target)
}

fn stale_session(script: &mut Script) -> Result<()> {
    let target = start_oracle(script)?;
    let mut first = Raw::connect(target, 0x5555);
    first.works(&["oracle"])?;
    drop(first);
    let mut second = Raw::connect(target, 0x6666);
    second.works(&["oracle"])?;
    drop(second);
    let mut first = Raw::connect(target, 0x5555);
    first.ask(&Request::List, |response| {
        ensure!(
            matches!(response, Response::Error(ErrorReply::StaleSession)),
            "the replaced session was answered by {response:?}"
        );
        Ok(())
    })?;
    first.works(&["oracle"]).context("a new Hello")?;
    first.close()?;
    shell_answers(target)
}

fn no_such_vm(script: &mut Script) -> Result<()> {
    let target = start_oracle(script)?;
    let mut host = Host::connect(target)?;
    match host.client().find("nobody") {
        Err(tidectl::Error::NoSuchVm { known, .. }) => {
            ensure!(known == ["oracle"], "it says there is {known:?}");
        }
        other => bail!("`nobody` was found: {other:?}"),
    }
    match host.client().info(VmId(7)) {
        Err(tidectl::Error::Target {
            reply: ErrorReply::NoSuchVm,
            ..
        }) => {}
        other => bail!("VM 7 is {other:?}"),
    }
    let vm = host
        .vm("oracle")
        .context("after the one that is not there")?;
    host.until_running(vm)?;
    host.finish();
    shell_answers(target)
}

/// A guest whose memory does not compress, so that pieces of it are more than the line holds at once.
fn start_noise(script: &mut Script) -> Result<&mut Target> {
    let mut random = Random(script.seed());
    let kernel = (0..65536).map(|_| (random.next() >> 32) as u8).collect();
    let bundle = guests::pack([guests::of_kernel("noise", 1, Mib(32), (kernel, None), "")?])?;
    let target = script.start_tidemark("virt", &bundle, "")?;
    target.to_prompt()?;
    target.shell_until("list", "running")?;
    Ok(target)
}

/// Long pieces of memory are being made when another host says Hello: none of them comes after its answer.
fn session_ends_amid_pieces(script: &mut Script) -> Result<()> {
    const PIECES: u16 = 12;
    const LONG: u16 = 8192;
    let target = start_noise(script)?;
    let mut raw = Raw::connect(target, 0x4444);
    let hello = Request::Hello {
        protocol: PROTOCOL,
        max_payload: LONG,
    };
    raw.ask(&hello, |response| match response {
        Response::Hello {
            max_payload: LONG, ..
        } => Ok(()),
        other => bail!("Hello was answered by {other:?}"),
    })?;
    let memory = raw.ask(&Request::Info { vm: VmId(0) }, |response| match response {
        Response::Info(info) => Ok(info.slots.first().context("no memory")?.base_ipa),
        other => bail!("Info was answered by {other:?}"),
    })?;
    let mut loaded = None;
    for ipa in (memory..).step_by(0x8_0000).take(16) {
        let vm = VmId(0);
        raw.ask(&Request::ReadMemory { vm, ipa, len: 4096 }, |response| {
            match response {
                Response::Memory { encoding, .. } if encoding.len() > 4096 => loaded = Some(ipa),
                Response::Memory { .. } => {}
                other => bail!("ReadMemory was answered by {other:?}"),
            }
            Ok(())
        })?;
    }
    let base = loaded.context("the kernel is nowhere in the first 8 MiB")?;
    let mut burst = Vec::new();
    for _ in 0..PIECES {
        burst.extend(raw.frame(&Request::ReadMemory {
            vm: VmId(0),
            ipa: base,
            len: 65536,
        })?);
    }
    raw.become_session(0x5555);
    burst.extend(raw.frame(&hello)?);
    let first = raw.last();
    burst.extend(raw.frame(&Request::List)?);
    raw.send(&burst)?;
    let before = raw.all_responses(tidemark_tests::clocks::scaled(20))?;
    // Whatever was left over comes before this.
    let done = raw.frame(&Request::ReadMemory {
        vm: VmId(0),
        ipa: base,
        len: 65536,
    })?;
    raw.send(&done)?;
    let after = raw.all_responses(tidemark_tests::clocks::scaled(20))?;
    let all = [before, after].concat();
    let opened = all
        .iter()
        .position(|(header, _)| (header.seq, header.session) == first);
    let opened = opened.context("Hello was not answered")?;
    let (old, new) = all.split_at(opened);
    ensure!(
        new.iter().all(|(header, _)| header.session == first.1),
        "a session that was over was answered"
    );
    ensure!(
        old.is_sorted_by_key(|(header, _)| header.seq.0),
        "pieces came out of their order"
    );
    let (_, last) = all.last().context("no answer at all")?;
    match Response::decode(last).map_err(|error| anyhow::anyhow!("{error}"))? {
        Response::Memory { encoding, .. } => ensure!(
            encoding.len() > 8000 && last.len() <= usize::from(LONG),
            "a piece of {} bytes in an answer of {}",
            encoding.len(),
            last.len()
        ),
        other => bail!("ReadMemory was answered by {other:?}"),
    }
    raw.close()?;
    shell_answers(target)
}

/// A session may have the number of the one before it, which left pieces behind: none of them is its own.
fn sessions_of_one_number(script: &mut Script) -> Result<()> {
    const LONG: u16 = 8192;
    const BASE: u64 = 0x4020_0000;
    const ELSEWHERE: u64 = 0x4030_0000;
    let target = start_noise(script)?;
    let mut old = Raw::connect(target, 0x4444);
    let mut new = Raw::connect(target, 0x4444);
    let hello = Request::Hello {
        protocol: PROTOCOL,
        max_payload: LONG,
    };
    let read = |ipa, len| Request::ReadMemory {
        vm: VmId(0),
        ipa,
        len,
    };
    old.ask(&hello, |_| Ok(()))?;
    let mut burst = Vec::new();
    // Fewer than the new one asks: the number of its last request, up to which answers are read, is none of the old one's.
    for _ in 0..14 {
        burst.extend(old.frame(&read(BASE, 65536))?);
    }
    burst.extend(old.frame(&Request::Goodbye)?);
    burst.extend(new.frame(&hello)?);
    for _ in 0..16 {
        burst.extend(new.frame(&read(ELSEWHERE, 64))?);
    }
    old.send(&burst)?;
    // Both sessions are on one line: the first Hello is answered there too.
    let (mut hellos, mut answers) = (0, 0);
    for (_, payload) in new.all_responses(tidemark_tests::clocks::scaled(20))? {
        match Response::decode(&payload) {
            Ok(Response::Hello { .. }) => hellos += 1,
            Ok(Response::Memory { ipa, .. }) if hellos == 2 => {
                ensure!(
                    ipa == ELSEWHERE,
                    "a piece of {ipa:#x}, which the session before it had asked for"
                );
                answers += 1;
            }
            _ => {}
        }
    }
    ensure!(
        (hellos, answers) == (2, 16),
        "{hellos} hellos and {answers} answers behind them, of 2 and 16"
    );
    new.close()?;
    shell_answers(target)
}

/// A host that dies between a take and its commit loses nothing: the next one is told.
fn peer_vanishes(script: &mut Script) -> Result<()> {
    let config = Config {
        seed: Seed(script.seed()),
        vcpus: 1,
        pages: 100,
        blocks: 0,
        more: 0,
    };
    let target = start_oracle(script)?;
    let mut guest = OracleGuest::attach(Host::connect(target)?, &config)?;
    let vm = guest.vm;
    guest
        .host
        .dirty_start(vm, EngineChoice::Auto, Granularity::Page)?;
    guest.step()?;
    let first = guest.host.take(vm)?;
    guest.host.commit(vm, &first)?;

    let second = guest.step()?;
    let written = guest.ledger.written_in(second);
    let taken = guest.host.take(vm)?;
    oracle::check_superset(&written, &taken.pages)?;
    // In the middle of the transfer: half a request is the last thing it says.
    guest.host.vanish();
    let mut raw = Raw::connect(target, 0x7777);
    let request = raw.frame(&Request::BitmapRead {
        vm,
        slot: SlotId(0),
        epoch: taken.epoch,
        first_page: 0,
        pages: 512,
    })?;
    raw.send(request.get(..request.len() / 2).unwrap_or_default())?;
    drop(raw);

    let mut host = Host::connect(target).context("the next host")?;
    let status = host.dirty_status(vm)?;
    ensure!(
        status.outstanding.is_none(),
        "the dead host's epoch is still out: {status:?}"
    );
    ensure!(
        status.logging.is_some(),
        "the log stopped with the host: {status:?}"
    );
    let again = host.take(vm)?;
    oracle::check_superset(&written, &again.pages).context("told to the next host")?;
    oracle::check_superset(&taken.pages, &again.pages).context("all that was taken")?;
    host.commit(vm, &again)?;
    let last = host.take(vm)?;
    oracle::check_exact(&Pages::new(), guest.ledger.own(), &last.pages).context("told twice")?;
    host.commit(vm, &last)?;
    host.finish();
    shell_answers(target)
}
