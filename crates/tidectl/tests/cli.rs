//! The binary: what it prints where, and with which exit code it ends.

#[path = "support/fake.rs"]
mod fake;

use fake::line::{Faults, Socket, listen};
use fake::vm::{Slot, Vm};
use fake::{Target, lock, temp_dir};
use serde_json::Value;
use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tidemark_wire::bundle::{Boot, Bundle};
use tidemark_wire::message::{Engine, Granularity, Hold, Logging, SlotAccess, VmState};

struct Stage {
    target: Arc<Mutex<Target>>,
    dir: PathBuf,
    socket: Socket,
}

impl Stage {
    fn new(name: &str) -> Self {
        Self::with_faults(name, Faults::default())
    }

    fn with_faults(name: &str, faults: Faults) -> Self {
        let slots = vec![
            Slot::new(0, 0x4000_0000, 130, SlotAccess::ReadWrite),
            Slot::new(3, 0x8000_0000, 70, SlotAccess::ReadWrite),
        ];
        let mut vm = Vm::new("debian", slots);
        vm.writes = 1;
        let target = Target::new(vec![vm]);
        let dir = temp_dir(name);
        let socket = listen(&target, name, faults);
        Self {
            target,
            dir,
            socket,
        }
    }

    fn logging(self) -> Self {
        let log = Logging {
            engine: Engine::Dbm,
            granularity: Granularity::Page,
        };
        lock(&self.target).vms[0].logging = Some(log);
        self
    }

    fn paused(self) -> Self {
        {
            let vm = &mut lock(&self.target).vms[0];
            vm.state = VmState::Paused;
            vm.holds.insert(Hold::Lasting as u8);
        }
        self
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = bare(args);
        command
            .env("TIDECTL_PORT", self.socket.port())
            .current_dir(&self.dir);
        command
    }

    fn run(&self, args: &[&str]) -> Output {
        self.command(args)
            .stdin(Stdio::null())
            .output()
            .expect("tidectl runs")
    }

    fn ok(&self, args: &[&str]) -> String {
        let output = self.run(args);
        assert_eq!(output.status.code(), Some(0), "{args:?}: {output:?}");
        text(&output.stdout)
    }

    fn json(&self, args: &[&str]) -> Value {
        let value: Value = serde_json::from_str(&self.ok(args)).expect("JSON");
        assert_eq!(value["schema"], 1);
        value
    }

    /// Runs something that fails; returns its exit code, error code and words.
    fn fails(&self, args: &[&str]) -> (i32, String, String) {
        let mut with_json = vec!["--json"];
        with_json.extend(args);
        failed(self.run(&with_json))
    }
}

fn bare(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tidectl"));
    command.args(args).env_remove("TIDECTL_PORT");
    command
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).expect("UTF-8")
}

fn failed(output: Output) -> (i32, String, String) {
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    let last = out.lines().last().unwrap_or_default();
    let value: Value = serde_json::from_str(last).unwrap_or_else(|_| panic!("JSON: {out:?} {err}"));
    let code = output.status.code().expect("no signal");
    assert_eq!(value["error"]["exit_code"], code);
    assert!(err.starts_with("tidectl: "), "{err}");
    (
        code,
        value["error"]["code"].as_str().expect("a code").into(),
        err,
    )
}

fn write(dir: &Path, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
    let path = dir.join(name);
    fs::write(&path, content).expect("a temporary file");
    path
}

fn type_into(mut command: Command, input: &str) -> Output {
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command.spawn().expect("tidectl runs");
    child
        .stdin
        .take()
        .expect("piped")
        .write_all(input.as_bytes())
        .expect("it reads");
    finish(child)
}

fn finish(child: Child) -> Output {
    child.wait_with_output().expect("it ends")
}

#[test]
fn list_and_info() {
    let stage = Stage::new("list");
    let list = stage.ok(&["list"]);
    assert!(
        list.contains("debian") && list.contains("running"),
        "{list}"
    );
    let list = stage.json(&["list", "--json"]);
    assert_eq!(list["vms"][0]["name"], "debian");
    assert_eq!(list["vms"][0]["memory_bytes"], 200 * 4096);
    let info = stage.ok(&["info", "0"]);
    assert!(info.contains("slot 3: 0x80000000..0x80046000"), "{info}");
    let info = stage.json(&["--json", "info", "debian"]);
    assert_eq!(info["slots"][1]["pages"], 70);
    assert_eq!(info["mappings"]["blocks_2m"], 8);
}

#[test]
fn exit_codes_tell_failures_apart() {
    let stage = Stage::new("codes");
    let (code, name, words) = stage.fails(&["info", "nobody"]);
    assert_eq!((code, name.as_str()), (5, "no-such-vm"));
    assert!(words.contains("there is: debian"), "{words}");
    let (code, name, _) = stage.fails(&["hash", "debian"]);
    assert_eq!((code, name.as_str()), (5, "not-paused"));
    let (code, name, words) = stage.fails(&["dirty", "get", "debian"]);
    assert_eq!((code, name.as_str()), (2, "usage"), "{words}");
    let (code, name, words) = stage.fails(&["dirty", "get", "debian", "-o", "x"]);
    assert_eq!((code, name.as_str()), (5, "not-logging"));
    assert!(words.contains("dirty start"), "{words}");

    lock(&stage.target).protocol = 9;
    let (code, name, words) = stage.fails(&["list"]);
    assert_eq!((code, name.as_str()), (4, "version-mismatch"));
    assert!(
        words.contains("hint: use the tidectl that was built with the image"),
        "{words}"
    );

    lock(&stage.target).mute = true;
    let (code, name, words) = stage.fails(&["list", "--timeout", "200ms"]);
    assert_eq!((code, name.as_str()), (3, "no-answer"));
    assert!(words.contains("another program attached"), "{words}");
}

#[test]
fn ports_that_are_not_there() {
    let (code, name, words) = failed(bare(&["--json", "list"]).output().expect("it runs"));
    assert_eq!((code, name.as_str()), (2, "usage"));
    assert!(words.contains("--port"), "{words}");
    for port in [
        "unix:/nonexistent/socket",
        "tcp:127.0.0.1:1",
        "/dev/nonexistent",
    ] {
        let output = bare(&["--json", "--port", port, "list"])
            .output()
            .expect("it runs");
        let (code, name, words) = failed(output);
        assert_eq!((code, name.as_str()), (3, "cannot-open-port"), "{port}");
        assert!(words.contains(port), "{words}");
    }
    let output = bare(&["--port", "tcp:nowhere", "list"])
        .output()
        .expect("it runs");
    assert_eq!(output.status.code(), Some(2));
}

#[test]
fn lifecycle() {
    let stage = Stage::new("life");
    assert_eq!(stage.ok(&["pause", "debian"]), "debian: paused\n");
    let hashes = stage.json(&["hash", "debian", "--json"]);
    assert_eq!(hashes["slots"].as_array().expect("a list").len(), 2);
    let one = stage.ok(&["hash", "debian", "--slot", "3"]);
    let hash = hashes["slots"][1]["sha256"].as_str().expect("a hash");
    assert_eq!(one, format!("{hash}  slot-3\n"));
    assert_eq!(
        stage.json(&["--json", "resume", "0"])["vm"]["state"],
        "running"
    );
    assert_eq!(stage.ok(&["reset", "debian"]), "debian: running\n");
    assert_eq!(stage.ok(&["stop", "debian"]), "debian: stopped\n");
    let costs = stage.ok(&["costs"]);
    assert!(
        costs.contains("60.0 us") && costs.contains("25.5 us"),
        "{costs}"
    );
    let costs = stage.json(&["costs", "--json"]);
    assert_eq!(costs["costs"][0]["task"], "stretch");
    assert_eq!(costs["costs"][0]["longest_us"], 25.5);
    assert_eq!(stage.ok(&["power-off"]), "powered off\n");
}

#[test]
fn dirty_start_status_stop() {
    let stage = Stage::new("dirty");
    let status = stage.json(&["--json", "dirty", "status", "debian"]);
    assert_eq!(status["logging"], Value::Null);
    let args = ["--json", "dirty", "start", "debian", "--engine", "wp"];
    let status = stage.json(&args);
    assert_eq!(status["logging"]["engine"], "wp");
    assert_eq!(status["logging"]["granularity"], "page");
    stage.json(&args);
    let other = ["dirty", "start", "debian", "--engine", "dbm"];
    assert_eq!(stage.fails(&other).1, "already-logging");
    assert!(
        stage
            .ok(&["dirty", "status", "debian"])
            .contains("engine wp")
    );
    assert!(
        stage
            .ok(&["dirty", "stop", "debian"])
            .contains("dirty log off")
    );
    stage.ok(&["dirty", "stop", "debian"]);
}

#[test]
fn dirty_quota_is_set_shown_and_lifted() {
    let stage = Stage::new("quota");
    let status = stage.json(&["--json", "dirty", "status", "debian"]);
    assert_eq!(status["quota"], Value::Null);
    assert_eq!(status["stalls"]["count"], 0);
    let set = ["dirty", "quota", "debian", "--pages", "50"];
    let status = stage.json(&[&["--json"], &set[..], &["--per", "1s"]].concat());
    assert_eq!(status["quota"]["pages"], 50);
    assert_eq!(status["quota"]["interval_ms"], 1000);
    assert_eq!(status["stalls"]["count"], 3);
    assert_eq!(status["stalls"]["seconds"], 0.27);
    assert_eq!(status["stalls"]["percent"], 90);
    // A tenth of a second if nothing is said, and also without a log.
    assert_eq!(
        stage.ok(&set),
        "debian: dirty log off\n\
         each vCPU may dirty 50 pages in 100 ms; 3 stalls of 270 ms in all, 90 % of the time now\n"
    );
    for (arguments, says) in [
        (
            &["--pages", "50", "--per", "9ms"][..],
            "it may be 10 ms to 1.0 s",
        ),
        (
            &["--pages", "50", "--per", "1.1s"],
            "it may be 10 ms to 1.0 s",
        ),
        (&["--pages", "0"], "0 is not in 1.."),
        (&["--pages", "50", "--off"], "cannot be used with"),
        (&["--per", "100ms", "--off"], "cannot be used with"),
        (&[], "--pages <N>"),
    ] {
        let output = stage.run(&[&["dirty", "quota", "debian"], arguments].concat());
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {said}");
        assert!(said.contains(says), "{arguments:?}: {said}");
    }
    assert_eq!(
        stage.ok(&["dirty", "quota", "debian", "--off"]),
        "debian: dirty log off\n"
    );
}

#[test]
fn memory_slots_come_and_go() {
    let stage = Stage::new("slots");
    let slot_of = |args: &[&str]| stage.json(&[&["--json", "slot"], args].concat());
    // Without more said: the lowest number that is free, behind all that is there.
    let added = slot_of(&["add", "debian", "--size", "4MiB"]);
    assert_eq!(added["slot"], 4);
    let slot = &added["slots"][2];
    assert_eq!(slot["base_ipa"], 0x8020_0000_u64);
    assert_eq!((&slot["pages"], &slot["id"]), (&1024.into(), &4.into()));
    let exact = [
        "add",
        "debian",
        "--size",
        "2M",
        "--base",
        "0x1_0000_0000",
        "--slot",
        "9",
    ];
    // Once more is as good as once.
    for _ in 0..2 {
        assert_eq!(
            stage.ok(&[&["slot"], &exact[..]].concat()),
            "debian: slot 9 added: 0x100000000, 2 MiB\n"
        );
    }
    assert_eq!(slot_of(&exact)["slots"].as_array().map(Vec::len), Some(4));
    let delete = ["slot", "delete", "debian"];
    let say = |id: &'static str| stage.run(&[&delete[..], &[id]].concat());
    assert_eq!(text(&say("4").stdout), "debian: slot 4 deleted\n");
    let refused: [(&[&str], i32, &str); 8] = [
        (&["delete", "debian", "0"], 5, "slots 3 to 18 can be added"),
        (&["delete", "debian", "7"], 5, "no such memory slot"),
        (
            &["add", "debian", "--size", "2M", "--slot", "9"],
            5,
            "another slot of that number",
        ),
        (
            &["add", "debian", "--size", "2M", "--base", "0x80000000"],
            5,
            "slot 3 has some of these addresses",
        ),
        (&["add", "debian", "--size", "3M"], 2, "a multiple of 2 MiB"),
        (&["add", "debian", "--size", "1G"], 2, "up to 512 MiB"),
        (&["add", "debian", "--size", "0"], 2, "a multiple of 2 MiB"),
        (&["add", "debian"], 2, "--size"),
    ];
    for (args, code, says) in refused {
        let output = stage.run(&[&["slot"], args].concat());
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{args:?}: {said}");
        assert!(said.contains(says), "{args:?}: {said}");
    }
    for _ in 0..14 {
        stage.ok(&["slot", "add", "debian", "--size", "2M"]);
    }
    let (code, _, said) = stage.fails(&["slot", "add", "debian", "--size", "2M"]);
    assert_eq!(code, 2);
    assert!(said.contains("`tidectl slot delete` one"), "{said}");
}

#[test]
fn dirty_get_writes_what_kvm_would() {
    let stage = Stage::new("get").logging().paused();
    {
        let mut state = lock(&stage.target);
        for (slot, page) in [(0, 0), (0, 129), (1, 69)] {
            state.vms[0].write(slot, page, 1);
        }
    }
    let said = stage.json(&[
        "--json",
        "dirty",
        "get",
        "debian",
        "-o",
        "b",
        "--heatmap",
        "b.png",
    ]);
    assert_eq!(said["dirty_pages"], 3);
    assert_eq!(said["committed"], true);
    let raw = fs::read(stage.dir.join("b")).expect("a bitmap");
    let mut wanted = vec![0; 5 * 8];
    wanted[0] = 1;
    wanted[2 * 8] = 2;
    wanted[4 * 8] = 1 << 5;
    assert_eq!(raw, wanted);
    let sidecar = fs::read(stage.dir.join("b.json")).expect("a sidecar");
    let sidecar: Value = serde_json::from_slice(&sidecar).expect("JSON");
    assert_eq!(sidecar["schema"], 1);
    assert_eq!(sidecar["vm"]["name"], "debian");
    assert_eq!(sidecar["granule_shift"], 12);
    assert_eq!(sidecar["slots"][1]["id"], 3);
    assert_eq!(sidecar["slots"][1]["base_ipa"], 0x8000_0000_u64);
    assert_eq!(sidecar["slots"][1]["offset_bytes"], 24);
    assert_eq!(sidecar["engine"], "dbm");
    assert!(
        fs::read(stage.dir.join("b.png"))
            .expect("a picture")
            .starts_with(b"\x89PNG")
    );
    assert!(!stage.dir.join("b.part").exists());
    let again = stage.json(&["--json", "dirty", "get", "debian", "-o", "b"]);
    assert_eq!(again["dirty_pages"], 0, "it was committed");
}

#[test]
fn dirty_get_prints_ranges_and_can_peek() {
    let stage = Stage::new("peek").logging().paused();
    (5..9).for_each(|page| lock(&stage.target).vms[0].write(0, page, 1));
    for _ in 0..2 {
        let got = stage.json(&["dirty", "get", "debian", "--format", "json", "--peek"]);
        assert_eq!(got["slots"][0]["ranges"][0]["ipa"], 0x4000_5000);
        assert_eq!(got["slots"][0]["ranges"][0]["pages"], 4);
    }
    stage.ok(&["dirty", "get", "debian", "--format", "json", "-o", "r.json"]);
    let file: Value =
        serde_json::from_slice(&fs::read(stage.dir.join("r.json")).expect("a file")).expect("JSON");
    assert_eq!(file["dirty_pages"], 4);
    let got = stage.json(&["dirty", "get", "debian", "--format", "json"]);
    assert_eq!(got["dirty_pages"], 0);
}

#[test]
fn dirty_get_that_cannot_write_loses_nothing() {
    let stage = Stage::new("full").logging().paused();
    (0..7).for_each(|page| lock(&stage.target).vms[0].write(0, page, 1));
    let (code, name, words) = stage.fails(&["dirty", "get", "debian", "-o", "missing/dir/b"]);
    assert_eq!((code, name.as_str()), (1, "file"));
    assert!(words.contains("missing/dir/b"), "{words}");
    // A device that is always full, as standard output.
    let full = fs::File::options()
        .write(true)
        .open("/dev/full")
        .expect("a full device");
    let output = stage
        .command(&["dirty", "get", "debian", "--format", "json"])
        .stdout(full)
        .output()
        .expect("it runs");
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let got = stage.json(&["dirty", "get", "debian", "--format", "json"]);
    assert_eq!(got["dirty_pages"], 7);
}

#[test]
fn dirty_get_on_a_line_that_closes_loses_nothing() {
    let faults = Faults {
        vanish_after: Some(7),
        ..Faults::default()
    };
    let stage = Stage::with_faults("gone", faults).logging().paused();
    (0..7).for_each(|page| lock(&stage.target).vms[0].write(0, page, 1));
    let (code, name, words) = stage.fails(&["dirty", "get", "debian", "-o", "b"]);
    assert_eq!((code, name.as_str()), (3, "line-closed"), "{words}");
    assert!(words.contains("nothing is lost"), "{words}");
    assert!(!stage.dir.join("b").exists());
    let socket = listen(&stage.target, "gone2", Faults::default());
    let mut command = stage.command(&["dirty", "get", "debian", "--format", "json"]);
    let output = command.env("TIDECTL_PORT", socket.port()).output();
    let output = output.expect("it runs");
    let got: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(got["dirty_pages"], 7);
}

fn kill(signal: &str, child: &Child) {
    let pid = child.id();
    // The shell's own: a small system has no program of that name.
    let kill = Command::new("sh")
        .args(["-c", &format!("kill -{signal} {pid}")])
        .status()
        .expect("kill runs");
    assert!(kill.success());
}

/// A tool in the middle of a harvest of seven pages.
fn harvesting(stage: &Stage, command: &mut Command) -> Child {
    (0..7).for_each(|page| lock(&stage.target).vms[0].write(0, page, 1));
    // Slow enough to be caught in the middle.
    lock(&stage.target).vms[0].slowness = u64::MAX - 1;
    let child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("it runs");
    let begun = Instant::now();
    while lock(&stage.target).vms[0].outstanding.is_none() {
        assert!(begun.elapsed() < Duration::from_secs(10));
        std::thread::sleep(Duration::from_millis(5));
    }
    child
}

#[test]
fn signals_give_the_epoch_back() {
    for signal in ["INT", "TERM", "HUP"] {
        let stage = Stage::new(&format!("sig{signal}")).logging().paused();
        // Whoever runs the tests may have it ignored, by `nohup` or in the background of a script.
        let mut command = Command::new("env");
        command
            .arg(format!("--default-signal={signal}"))
            .arg(env!("CARGO_BIN_EXE_tidectl"))
            .args(["--json", "dirty", "get", "debian", "-o", "b"])
            .env("TIDECTL_PORT", stage.socket.port())
            .current_dir(&stage.dir);
        let child = harvesting(&stage, &mut command);
        kill(signal, &child);
        let (code, name, _) = failed(finish(child));
        assert_eq!((code, name.as_str()), (130, "interrupted"), "{signal}");
        let state = lock(&stage.target);
        assert_eq!(state.vms[0].outstanding, None, "{signal}");
        assert_eq!(state.vms[0].dirty(), 7, "{signal}");
    }
}

#[test]
fn a_hang_up_that_is_to_be_ignored_is() {
    let stage = Stage::new("nohup").logging().paused();
    let get = format!(
        "trap '' HUP; exec {} dirty get debian -o b",
        env!("CARGO_BIN_EXE_tidectl")
    );
    let mut command = Command::new("sh");
    command
        .args(["-c", &get])
        .env("TIDECTL_PORT", stage.socket.port())
        .current_dir(&stage.dir);
    let child = harvesting(&stage, &mut command);
    kill("HUP", &child);
    std::thread::sleep(Duration::from_millis(300));
    // And then the harvest is over.
    lock(&stage.target).vms[0].slowness = 0;
    let output = finish(child);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
}

#[test]
fn dirty_rate_counts_and_leaves_no_log_behind() {
    let stage = Stage::new("rate");
    lock(&stage.target).vms[0].writes = 20;
    let out = stage.ok(&["--json", "dirty", "rate", "debian", "30ms", "3"]);
    let samples: Vec<Value> = out
        .lines()
        .map(|line| serde_json::from_str(line).expect("JSON"))
        .collect();
    assert_eq!(samples.len(), 3);
    for (n, sample) in samples.iter().enumerate() {
        assert_eq!(sample["n"], n + 1);
        assert!(
            sample["unique_pages"].as_u64().expect("a number") > 0,
            "{sample}"
        );
        assert!(
            sample["interval_seconds"].as_f64().expect("a number") >= 0.03,
            "{sample}"
        );
        assert_eq!(sample["granule_bytes"], 4096);
    }
    assert_eq!(lock(&stage.target).vms[0].logging, None);
    assert_eq!(
        stage
            .ok(&["dirty", "rate", "debian", "10ms", "2", "-T"])
            .lines()
            .count(),
        3
    );
}

#[test]
fn dirty_rate_does_not_take_from_somebody_elses_log() {
    let stage = Stage::new("rate2").logging();
    let (code, _, words) = stage.fails(&["dirty", "rate", "debian", "10ms", "1"]);
    assert_eq!(code, 2);
    assert!(words.contains("--discard"), "{words}");
    stage.ok(&["dirty", "rate", "debian", "10ms", "1", "--discard"]);
    assert!(lock(&stage.target).vms[0].logging.is_some(), "it goes on");
}

#[test]
fn dirty_copy_is_exact_and_says_so() {
    let stage = Stage::new("copy");
    let args = [
        "--json",
        "dirty",
        "copy",
        "debian",
        "--image-dir",
        "c",
        "--heatmap",
        "c.png",
    ];
    let report = stage.json(&args);
    assert_eq!(report["verified"], true);
    let pages = |name: &str| report[name].as_u64().expect("a number");
    assert!(pages("verified_pages") > 0);
    assert_eq!(
        pages("verified_pages") + pages("written_meanwhile_pages"),
        200
    );
    assert_eq!(report["rounds"][0]["phase"], "whole");
    assert_eq!(report["rounds"][0]["pages"], 200);
    let last = report["rounds"]
        .as_array()
        .expect("a list")
        .last()
        .expect("rounds");
    assert_eq!(last["phase"], "last");
    let hash = report["slots"][1]["sha256"].as_str().expect("a hash");
    let sum = Command::new("sha256sum")
        .arg(stage.dir.join("c/slot-3.bin"))
        .output();
    assert!(text(&sum.expect("sha256sum runs").stdout).starts_with(hash));
    assert!(stage.dir.join("c.png").exists());
    assert!(!stage.dir.join("c/slot-3.bin.partial").exists());
    let said = stage.ok(&[
        "dirty",
        "copy",
        "debian",
        "--image-dir",
        "c",
        "--rounds",
        "1",
        "--verify",
        "paused",
    ]);
    assert!(said.contains("exact after 3 rounds"), "{said}");
    assert!(said.contains("200 of 200 pages verified"), "{said}");
    // It has not been compared everywhere, and is not called exact.
    let said = stage.ok(&["dirty", "copy", "debian", "--image-dir", "c"]);
    assert!(said.contains("copied in"), "{said}");
}

#[test]
fn dirty_copy_lets_the_guest_go_though_nobody_reads_what_it_says() {
    const PIPE: usize = 64 << 10;
    // Room for the words on the copy of all memory, and not for those that it is paused.
    const ROOM: usize = 95;
    let stage = Stage::new("unread");
    let (mut reader, mut writer) = std::io::pipe().expect("a pipe");
    writer.write_all(&[b'.'; PIPE - ROOM]).expect("it fits");
    let args = [
        "dirty",
        "copy",
        "debian",
        "--image-dir",
        "c",
        "--rounds",
        "0",
    ];
    let mut child = stage
        .command(&args)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(writer)
        .spawn()
        .expect("tidectl runs");
    let asked = |name: &str| {
        let target = lock(&stage.target);
        target.requests.iter().any(|request| request == name)
    };
    let begun = Instant::now();
    while !asked("Ok Resume") && begun.elapsed() < Duration::from_secs(20) {
        std::thread::sleep(Duration::from_millis(10));
    }
    let (paused, resumed) = (asked("Ok Pause"), asked("Ok Resume"));
    let mut said = Vec::new();
    reader.read_to_end(&mut said).expect("all it said");
    assert!(child.wait().expect("it ends").success());
    assert!(paused && resumed, "paused {paused}, resumed {resumed}");
    let said = text(&said);
    for words in [
        "all memory: 200 pages",
        "paused for the last",
        "last round: ",
        "verified: ",
    ] {
        assert!(said.contains(words), "{said}");
    }
}

#[test]
fn dirty_copy_that_is_wrong_exits_with_seven() {
    let stage = Stage::new("wrong");
    {
        let mut state = lock(&stage.target);
        state.vms[0].misses_every = Some(3);
        state.vms[0].writes = 5;
    }
    let (code, name, words) = stage.fails(&["dirty", "copy", "debian", "--image-dir", "c"]);
    assert_eq!((code, name.as_str()), (7, "mismatch"));
    assert!(
        words.contains("pages are not what the guest has"),
        "{words}"
    );
    let there = |name: &str| stage.dir.join("c").join(name).exists();
    assert!(there("slot-3.bin.partial"), "what was copied is kept");
    assert!(!there("slot-3.bin"), "under a name that says what it is");
}

#[test]
fn monitor_types_what_is_piped_and_prints_what_comes() {
    let stage = Stage::new("monitor");
    lock(&stage.target).vms[0].print(b"long ago\n");
    let output = type_into(stage.command(&["monitor"]), "uname -a\nexit\n");
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert_eq!(text(&output.stdout), "uname -a\nexit\n", "the guest echoes");
    assert_eq!(lock(&stage.target).vms[0].typed, b"uname -a\nexit\n");
    let output = type_into(stage.command(&["monitor", "debian", "--history"]), "");
    assert_eq!(text(&output.stdout), "long ago\nuname -a\nexit\n");
}

#[test]
fn monitor_prints_nothing_of_broken_frames_and_names_the_damage() {
    for seed in 0..3 {
        let faults = Faults {
            seed,
            // Requests are lost as often, and cost half a second each.
            flip: 10,
            cut: 5,
            ..Faults::default()
        };
        let stage = Stage::with_faults(&format!("damaged{seed}"), faults);
        let lines: String = (0..100)
            .map(|n| format!("the guest's line {n}\n"))
            .collect();
        lock(&stage.target).vms[0].print(lines.as_bytes());
        let args = ["monitor", "--history", "--until", "line 99\n"];
        let output = type_into(stage.command(&args), "");
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(0), "seed {seed}: {said}");
        assert_eq!(text(&output.stdout), lines, "seed {seed}");
        assert!(!said.contains("the guest's"), "seed {seed}: {said}");
        assert!(said.contains("frames came damaged"), "seed {seed}: {said}");
        assert!(said.contains("@BAUD"), "seed {seed}: {said}");
    }
}

#[test]
fn a_line_with_nothing_whole_on_it_is_called_damaged() {
    let faults = Faults {
        seed: 1,
        cut: 100,
        ..Faults::default()
    };
    let stage = Stage::with_faults("nothing-whole", faults);
    let (code, name, words) = stage.fails(&["--timeout", "1s", "list"]);
    assert_eq!((code, name.as_str()), (3, "no-answer"));
    assert!(words.contains("frames came damaged"), "{words}");
    assert!(words.contains("@BAUD"), "{words}");
}

#[test]
fn monitor_waits_for_a_text_or_a_deadline() {
    let stage = Stage::new("until");
    let begun = Instant::now();
    let output = type_into(
        stage.command(&["monitor", "--until", "login:"]),
        "the login: is\n",
    );
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert!(begun.elapsed() < Duration::from_secs(5));
    let never = [
        "--json",
        "monitor",
        "debian",
        "--until",
        "never",
        "--deadline",
        "300ms",
    ];
    let output = type_into(stage.command(&never), "x");
    assert_eq!(output.status.code(), Some(6), "{output:?}");
    assert_eq!(text(&output.stdout), "x", "only what the guest printed");
    assert!(text(&output.stderr).contains("not done within 300 ms"));
}

#[test]
fn monitor_tells_a_guest_that_ended_from_one_that_said_it() {
    for (until, code) in [
        (None, 0),
        (Some("login:"), 5),
        // It comes after the news of the end, and no event brings it.
        (Some("power down"), 0),
    ] {
        let stage = Stage::new("ended");
        lock(&stage.target).vms[0].stops_at = Some(b"exit\n");
        let mut args = vec!["monitor", "debian"];
        args.extend(until.iter().flat_map(|text| ["--until", text]));
        let output = type_into(stage.command(&args), "exit\n");
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{until:?}: {output:?}");
        assert_eq!(text(&output.stdout), "exit\npower down\n", "{until:?}");
        if code != 0 {
            assert!(said.contains("is stopped: it has not printed"), "{said}");
            assert!(said.contains("tidectl info"), "{said}");
        }
    }
}

#[test]
fn monitor_needs_a_name_when_there_are_several() {
    let stage = Stage::new("several");
    lock(&stage.target).vms.push(Vm::new("other", vec![]));
    let output = stage.run(&["monitor"]);
    assert_eq!(output.status.code(), Some(5));
    let words = text(&output.stderr);
    assert!(words.contains("debian, other"), "{words}");
}

/// A terminal pair: the tool's side and the person's.
fn terminal() -> (fs::File, fs::File) {
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    let person = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).expect("a terminal");
    grantpt(&person).expect("a terminal");
    unlockpt(&person).expect("a terminal");
    let name = ptsname(&person, Vec::new()).expect("its name");
    let path = name.to_str().expect("UTF-8");
    let tool = fs::File::options()
        .read(true)
        .write(true)
        .open(path)
        .expect("a terminal");
    (tool, person.into())
}

fn is_raw(terminal: &fs::File) -> bool {
    let modes = rustix::termios::tcgetattr(terminal).expect("a terminal");
    !modes
        .local_modes
        .contains(rustix::termios::LocalModes::ICANON)
}

#[test]
fn consoles_on_a_terminal_are_raw_until_they_are_left() {
    let stage = Stage::new("raw");
    for command in ["monitor", "shell"] {
        let (tool, mut person) = terminal();
        assert!(!is_raw(&tool));
        let child = stage
            .command(&[command])
            .stdin(tool.try_clone().expect("a handle"))
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("it runs");
        let begun = Instant::now();
        while !is_raw(&tool) {
            assert!(begun.elapsed() < Duration::from_secs(10));
            std::thread::sleep(Duration::from_millis(5));
        }
        // Ctrl-C is a key like any other.
        person.write_all(b"he\x03lp\r").expect("a terminal");
        std::thread::sleep(Duration::from_millis(300));
        person.write_all(&[0x1D]).expect("a terminal");
        let output = finish(child);
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        let out = text(&output.stdout);
        let wanted = if command == "monitor" {
            "he\x03lp\r"
        } else {
            "he\x03lp?"
        };
        assert!(out.contains(wanted), "{command}: {out:?}");
        assert!(!is_raw(&tool), "{command} puts the terminal back");
    }
}

#[test]
fn shell_is_a_plain_terminal() {
    let stage = Stage::new("shell");
    let output = type_into(
        stage.command(&["shell", "--linger", "300ms"]),
        "help\nnonsense\n",
    );
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert_eq!(
        text(&output.stdout),
        "commands: help, list\r\n> nonsense?\r\n> "
    );
    let state = lock(&stage.target);
    assert!(
        state.requests.is_empty() && state.session.is_none(),
        "no frame was sent"
    );
}

#[test]
fn bundle_packs_and_explains() {
    let dir = temp_dir("bundle");
    let mut image = [7; 5000];
    image[8..24].fill(0);
    image[0x38..0x3c].copy_from_slice(b"ARM\x64");
    write(&dir, "Image", image);
    write(&dir, "packed", b"\x1f\x8b\x08 and so on");
    let mut gzip = Vec::new();
    flate2::read::GzEncoder::new(&image[..], flate2::Compression::fast())
        .read_to_end(&mut gzip)
        .expect("it packs");
    write(&dir, "Image.gz", gzip);
    write(&dir, "initrd", [8; 10]);
    write(&dir, "u-boot.bin", [9; 10]);
    write(&dir, "empty", "");
    write(&dir, "erased", vec![0xff; 300 << 10]);
    write(&dir, "blank", vec![0; 64 << 20]);
    write(&dir, "elf", b"\x7fELF\x01\x01\x01");
    write(&dir, "large", vec![1; 48 << 20]);
    let good = "[machine]\nwhen_all_stopped = \"power-off\"\n\
                [[vm]]\nname = \"debian\"\nvcpus = 2\nmemory = \"512MiB\"\n\
                kernel = \"Image\"\ninitrd = \"initrd\"\ncmdline = \"quiet\"\n\
                [[vm]]\nname = \"fw\"\nmemory = \"64MiB\"\nfirmware = \"u-boot.bin\"\n\
                variables = \"initrd\"\nkernel = \"Image.gz\"\ninitrd = \"packed\"\n\
                cmdline = \"x\"\nautostart = false\n";
    let pack = |toml: &str| {
        let path = write(&dir, "vms.toml", toml);
        // From another directory: paths are relative to the description.
        bare(&["--json", "bundle", path.to_str().expect("UTF-8"), "-o"])
            .arg(dir.join("out.bundle"))
            .output()
            .expect("it runs")
    };
    let output = pack(good);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let value: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(value["vms"][1]["name"], "fw");
    assert_eq!(value["vms"][0]["boot"], "image");
    assert_eq!(value["vms"][1]["boot"], "firmware");
    let bytes = fs::read(dir.join("out.bundle")).expect("a bundle");
    let bundle = Bundle::parse(&bytes).expect("a good bundle");
    assert_eq!(bundle.manifest().vms[0].memory_bytes, 512 << 20);
    assert!(!bundle.manifest().vms[1].autostart);
    // Firmware is handed plain files: of the kernel what QEMU hands it, unpacked, and all else as it is.
    let files = bundle.manifest().vms[1].boot.blobs();
    let files: Vec<_> = files
        .map(|blob| bundle.blob(blob).expect("intact"))
        .collect();
    let wanted: [&[u8]; 4] = [&[9; 10], &[8; 10], &image, b"\x1f\x8b\x08 and so on"];
    assert_eq!(files, wanted);
    let Boot::Firmware(firmware) = &bundle.manifest().vms[1].boot else {
        panic!("firmware was packed")
    };
    assert_eq!(firmware.kernel.as_ref().expect("a kernel").cmdline, "x");

    let vm = "[[vm]]\nname = \"a\"\nmemory = \"64MiB\"\n";
    let kernel = "kernel = \"Image\"\n";
    for (toml, wanted) in [
        (String::new(), "no [[vm]]"),
        (
            format!("{vm}{kernel}{vm}{kernel}"),
            "two VMs are named \"a\"",
        ),
        (vm.to_string(), "give kernel = \"...\" or firmware"),
        (
            format!("{vm}{kernel}variables = \"initrd\"\n"),
            "variables belong to firmware",
        ),
        (
            format!("{vm}firmware = \"u-boot.bin\"\ncmdline = \"x\"\n"),
            "belong to a kernel",
        ),
        (
            format!("{vm}kernel = \"missing\"\n"),
            "missing: No such file",
        ),
        (format!("{vm}kernel = \"empty\"\n"), "the file is empty"),
        (
            format!("{vm}firmware = \"erased\"\n"),
            "erased: there is no firmware in it",
        ),
        (
            format!("{vm}firmware = \"blank\"\n"),
            "blank: there is no firmware in it",
        ),
        (format!("{vm}kernel = \"packed\"\n"), "cannot be unpacked"),
        (
            format!("{vm}firmware = \"u-boot.bin\"\nkernel = \"packed\"\n"),
            "cannot be unpacked",
        ),
        (format!("{vm}kernel = \"elf\"\n"), "a 32-bit machine"),
        (
            format!("{vm}kernel = \"Image\"\ninitrd = \"large\"\n"),
            "raise `memory`",
        ),
        (format!("{vm}kernel = \"out.bundle\"\n"), "-o"),
        (
            format!("{vm}kernel = \"/dev/zero\"\n"),
            "a device or a pipe",
        ),
        (format!("{vm}{kernel}vcpus = 17\n"), "17 vCPUs; 1 to 16"),
        (format!("{vm}{kernel}vcpu = 2\n"), "unknown field `vcpu`"),
        (
            format!("{vm}{kernel}passthrough = [\"0000:01:00.0\"]\n"),
            "without an SMMU no dirty log would see it",
        ),
        (
            format!("[[vm]]\nname = \"a\"\nmemory = \"64MB\"\n{kernel}"),
            "is not a size",
        ),
        (
            format!("[[vm]]\nname = \"a\"\nmemory = \"63MiB\"\n{kernel}"),
            "multiple of 2 MiB",
        ),
        (
            format!("[[vm]]\nname = \"7\"\nmemory = \"64MiB\"\n{kernel}"),
            "not digits alone",
        ),
        (
            format!("[[vm]]\nmemory = \"2MiB\"\n{kernel}"),
            "missing field `name`",
        ),
        ("[[vm]\n".into(), "TOML parse error"),
        (
            "[machine]\nwhen_all_stopped = \"explode\"\n".into(),
            "unknown variant",
        ),
    ] {
        let (code, _, words) = failed(pack(&toml));
        assert_eq!(code, 1, "{toml}: {words}");
        assert!(words.contains(wanted), "{toml}: {words}");
        assert_eq!(
            fs::read(dir.join("out.bundle")).expect("the old one"),
            bytes,
            "untouched"
        );
    }
}

#[test]
fn completions_and_help() {
    for shell in ["bash", "zsh", "fish"] {
        let output = bare(&["completions", shell]).output().expect("it runs");
        assert!(text(&output.stdout).contains("power-off"), "{shell}");
    }
    for command in [
        &["list"][..],
        &["info"],
        &["monitor"],
        &["pause"],
        &["resume"],
        &["reset"],
        &["stop"],
        &["power-off"],
        &["costs"],
        &["hash"],
        &["dirty", "start"],
        &["dirty", "stop"],
        &["dirty", "status"],
        &["dirty", "get"],
        &["dirty", "rate"],
        &["dirty", "copy"],
        &["shell"],
        &["bundle"],
        &["completions"],
    ] {
        let output = bare(command).arg("--help").output().expect("it runs");
        assert!(
            text(&output.stdout).contains("Example"),
            "{command:?} has no example"
        );
    }
}

#[test]
fn shell_is_heard_after_a_frame_that_was_cut_off() {
    let stage = Stage::new("cutoff");
    let path = stage.socket.0.clone();
    // The target keeps its decoder over a reconnect, as EL2 does: so does this connection.
    let (ours, mut theirs) = std::os::unix::net::UnixStream::pair().expect("a socket pair");
    let listener = {
        fs::remove_file(&path).expect("a socket");
        std::os::unix::net::UnixListener::bind(&path).expect("a socket")
    };
    let target = Arc::clone(&stage.target);
    std::thread::spawn(move || fake::line::serve(&target, ours, &Faults::default()));
    theirs.write_all(&[0, 3, 1, 1, 5]).expect("half a frame");
    std::thread::spawn(move || {
        let (mut tool, _) = listener.accept().expect("the tool");
        let (mut from, mut to) = (tool.try_clone().expect("a handle"), theirs.try_clone());
        let to = to.as_mut().expect("a handle");
        std::thread::scope(|scope| {
            scope.spawn(|| std::io::copy(&mut from, to));
            let _ = std::io::copy(&mut theirs, &mut tool);
        });
    });
    let output = type_into(stage.command(&["shell", "--linger", "300ms"]), "help\n");
    assert_eq!(text(&output.stdout), "commands: help, list\r\n> ");
}

#[test]
fn a_reader_that_leaves_is_not_an_accident() {
    let stage = Stage::new("pipe");
    let (reader, writer) = std::os::unix::net::UnixStream::pair().expect("a socket pair");
    // Before it starts: otherwise it may be through before the reader leaves.
    drop(reader);
    let child = stage
        .command(&["list"])
        .stdout(std::os::fd::OwnedFd::from(writer))
        .stderr(Stdio::piped())
        .spawn()
        .expect("it runs");
    let output = finish(child);
    assert_eq!(
        (output.status.code(), text(&output.stderr).as_str()),
        (Some(1), "")
    );
}

#[test]
fn what_was_done_is_not_told_to_who_asked_for_quiet() {
    let stage = Stage::new("hush").logging();
    write(&stage.dir, "u-boot.bin", [0x14; 4096]);
    write(
        &stage.dir,
        "vms.toml",
        "[[vm]]\nname = \"u\"\nmemory = \"64MiB\"\nfirmware = \"u-boot.bin\"\n",
    );
    for args in [
        &["bundle", "vms.toml", "-o", "b"][..],
        &["pause", "debian"],
        &["resume", "debian"],
        &["reset", "debian"],
        &["dirty", "get", "debian", "-o", "bits"],
        &["dirty", "engine", "debian", "wp"],
        &["dirty", "stop", "debian"],
    ] {
        let mut quiet = vec!["-q"];
        quiet.extend(args);
        let output = stage.run(&quiet);
        let said = (text(&output.stdout), text(&output.stderr));
        assert_eq!(output.status.code(), Some(0), "{args:?}: {said:?}");
        assert_eq!(said, (String::new(), String::new()), "{args:?}");
    }
    // What was asked for is data.
    assert!(stage.ok(&["-q", "list"]).contains("debian"));
    assert!(
        stage
            .ok(&["-q", "dirty", "status", "debian"])
            .contains("debian")
    );
}

#[test]
fn a_command_line_that_makes_no_sense_is_told_in_json_too() {
    for args in [
        &["--json", "nosuch"][..],
        &["dirty", "get", "--json"],
        &["--json", "list", "--bogus"],
        &["--json", "dirty", "copy", "debian", "--rounds", "many"],
    ] {
        let (code, name, words) = failed(bare(args).output().expect("it runs"));
        assert_eq!((code, name.as_str()), (2, "usage"), "{args:?}: {words}");
    }
    let plain = bare(&["dirty", "get"]).output().expect("it runs");
    assert_eq!(
        (plain.status.code(), text(&plain.stdout)),
        (Some(2), String::new())
    );
    assert!(text(&plain.stderr).contains("Usage"), "{plain:?}");
    let help = bare(&["--json", "--help"]).output().expect("it runs");
    assert_eq!(help.status.code(), Some(0));
    assert!(text(&help.stdout).contains("make shell"), "{help:?}");
}

#[test]
fn a_full_disk_leaves_no_part_of_a_bitmap() {
    let stage = Stage::new("full").logging().paused();
    (0..7).for_each(|page| lock(&stage.target).vms[0].write(0, page, 1));
    std::os::unix::fs::symlink("/dev/full", stage.dir.join("full")).expect("a link");
    let full = ["dirty", "get", "debian", "-o", "full", "--heatmap", "h.png"];
    let (code, name, _) = stage.fails(&full);
    assert_eq!((code, name.as_str()), (1, "file"));
    // Nor does a name that cannot be had.
    fs::create_dir(stage.dir.join("b.json")).expect("a directory");
    let (code, name, _) = stage.fails(&["dirty", "get", "debian", "-o", "b"]);
    assert_eq!((code, name.as_str()), (1, "file"));
    let mut left: Vec<String> = fs::read_dir(&stage.dir)
        .expect("a directory")
        .map(|entry| {
            entry
                .expect("an entry")
                .file_name()
                .to_string_lossy()
                .into()
        })
        .collect();
    left.sort();
    assert_eq!(left, ["b.json", "full"]);
    assert_eq!(lock(&stage.target).vms[0].dirty(), 7, "they are told again");
}

#[test]
fn list_says_why_a_vm_failed() {
    let stage = Stage::new("failed");
    assert!(!stage.ok(&["list"]).contains("REASON"));
    {
        let vm = &mut lock(&stage.target).vms[0];
        vm.state = VmState::Failed;
        vm.reason = "65536 MiB are not free".into();
    }
    let said = stage.ok(&["list"]);
    assert!(
        said.contains("REASON") && said.contains("65536 MiB"),
        "{said}"
    );
    let list = stage.json(&["--json", "list"]);
    assert_eq!(list["vms"][0]["reason"], "65536 MiB are not free");
}

#[test]
fn a_reset_of_a_vm_that_is_starting_says_that_it_adds_nothing() {
    let stage = Stage::new("starting");
    lock(&stage.target).vms[0].state = VmState::Starting;
    let said = stage.ok(&["reset", "debian"]);
    assert!(said.contains("starting already"), "{said}");
    assert_eq!(
        stage.json(&["--json", "reset", "debian"])["was_starting"],
        true
    );
    lock(&stage.target).vms[0].state = VmState::Running;
    assert_eq!(
        stage.json(&["--json", "reset", "debian"])["was_starting"],
        false
    );
}

#[test]
fn quiet_is_quiet() {
    let stage = Stage::new("quiet");
    let output = stage.run(&["-q", "dirty", "copy", "debian", "--image-dir", "c"]);
    assert_eq!(
        (output.status.code(), text(&output.stderr).as_str()),
        (Some(0), "")
    );
}
