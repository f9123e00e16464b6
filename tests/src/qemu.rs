//! One QEMU process: its command line, its serial line, and its end.
//!
//! QEMU connects to sockets that the harness already listens on. The other way round
//! (QEMU as the server) either loses the first bytes or blocks until someone comes.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::machine::{Machine, RamBacking};
use crate::qmp::Qmp;
use crate::work::Work;

/// Who starts what runs on a machine.
#[derive(Clone, Debug)]
pub enum Starter {
    /// QEMU itself: `-kernel`.
    Kernel(PathBuf),
    /// Firmware (`-bios`), which finds these files in RAM at these addresses.
    Firmware {
        /// The firmware.
        image: PathBuf,
        /// Files and where they lie.
        loaded: Vec<(PathBuf, u64)>,
    },
}

/// What is started on a machine.
#[derive(Clone, Debug)]
pub struct Payload {
    /// What comes first.
    pub starter: Starter,
    /// `-initrd`.
    pub initrd: Option<PathBuf>,
    /// `-append`.
    pub append: String,
    /// `-dtb`, where QEMU's own is not wanted.
    pub devicetree: Option<PathBuf>,
    /// Where its RAM lives.
    pub ram: RamBacking,
}

impl Payload {
    /// A kernel alone.
    #[must_use]
    pub fn kernel(kernel: PathBuf) -> Self {
        Self {
            starter: Starter::Kernel(kernel),
            initrd: None,
            append: String::new(),
            devicetree: None,
            ram: RamBacking::Private,
        }
    }

    /// Firmware, with files in RAM at their addresses.
    #[must_use]
    pub fn firmware(image: PathBuf, loaded: Vec<(PathBuf, u64)>) -> Self {
        Self {
            starter: Starter::Firmware { image, loaded },
            ..Self::kernel(PathBuf::new())
        }
    }

    /// The same with an initrd.
    #[must_use]
    pub fn initrd(mut self, initrd: PathBuf) -> Self {
        self.initrd = Some(initrd);
        self
    }

    /// The same with a command line.
    #[must_use]
    pub fn append(mut self, append: &str) -> Self {
        append.clone_into(&mut self.append);
        self
    }

    /// The same with a devicetree of its own.
    #[must_use]
    pub fn devicetree(mut self, path: PathBuf) -> Self {
        self.devicetree = Some(path);
        self
    }

    /// The same with a file behind its RAM.
    #[must_use]
    pub fn ram_in_file(mut self) -> Self {
        self.ram = RamBacking::File;
        self
    }
}

/// A QEMU that runs, or has ended. Killed when dropped.
#[derive(Debug)]
pub struct Qemu {
    child: Child,
    qmp: Option<Qmp>,
    stderr: PathBuf,
}

/// How long QEMU may take from its start to its connections.
const CONNECT: Duration = Duration::from_secs(15);

impl Qemu {
    /// Starts `payload` on `machine` and returns the process and its serial line.
    ///
    /// Leaves the command line in `command.txt` and QEMU's own words in `qemu.log` of
    /// the run's directory.
    pub fn start(work: &Work, machine: &Machine, payload: &Payload) -> Result<(Self, UnixStream)> {
        let program = program();
        let serial = work.socket("serial");
        let control = work.socket("qmp");
        let serial_at = UnixListener::bind(&serial)?;
        let control_at = UnixListener::bind(&control)?;

        let ram = match payload.ram {
            RamBacking::Private => None,
            RamBacking::File => Some(work.path("ram")),
        };
        let mut arguments = machine.arguments(ram.as_deref());
        connect_argument(&mut arguments, "serial", &serial);
        arguments.extend(["-serial".into(), "chardev:serial".into()]);
        connect_argument(&mut arguments, "qmp", &control);
        arguments.extend(["-mon".into(), "chardev=qmp,mode=control".into()]);
        match &payload.starter {
            Starter::Kernel(kernel) => arguments.extend(["-kernel".into(), kernel.into()]),
            Starter::Firmware { image, loaded } => {
                arguments.extend(["-bios".into(), image.into()]);
                for (file, address) in loaded {
                    let mut value = OsString::from("loader,force-raw=on,file=");
                    value.push(file);
                    value.push(format!(",addr={address:#x}"));
                    arguments.extend(["-device".into(), value]);
                }
            }
        }
        if let Some(initrd) = &payload.initrd {
            arguments.extend(["-initrd".into(), initrd.clone().into()]);
        }
        if !payload.append.is_empty() {
            arguments.extend(["-append".into(), payload.append.clone().into()]);
        }
        if let Some(devicetree) = &payload.devicetree {
            arguments.extend(["-dtb".into(), devicetree.clone().into()]);
        }
        std::fs::write(
            work.path("command.txt"),
            command_line(&program, &arguments) + "\n",
        )?;

        let stderr = work.path("qemu.log");
        let log = File::create(&stderr)?;
        let child = Command::new(&program)
            .args(&arguments)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| {
                format!(
                    "cannot start {}; `make setup` installs QEMU, TIDEMARK_QEMU names another",
                    program.display()
                )
            })?;
        let mut qemu = Self {
            child,
            qmp: None,
            stderr,
        };
        let line = qemu.accept(&serial_at).context("the serial line")?;
        let control = qemu.accept(&control_at).context("the control socket")?;
        // An image that stops at once takes QEMU with it before it can answer. That is for
        // the script to judge; all that is lost here is the registers of a hang.
        qemu.qmp = Qmp::greet(control).ok();
        Ok((qemu, line))
    }

    /// Waits for QEMU to connect, and notices when it ends instead.
    fn accept(&mut self, listener: &UnixListener) -> Result<UnixStream> {
        listener.set_nonblocking(true)?;
        let deadline = Instant::now() + CONNECT;
        loop {
            match listener.accept() {
                Ok((stream, _)) => {
                    stream.set_nonblocking(false)?;
                    return Ok(stream);
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error.into()),
            }
            if let Some(status) = self.child.try_wait()? {
                bail!("QEMU ended at once ({status}): {}", self.own_words());
            }
            if Instant::now() > deadline {
                bail!("QEMU did not connect within {CONNECT:?}");
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// What QEMU itself wrote.
    #[must_use]
    pub fn own_words(&self) -> String {
        let text = std::fs::read_to_string(&self.stderr).unwrap_or_default();
        text.trim().to_owned()
    }

    /// Its exit status, if it has ended.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        Ok(self.child.try_wait()?)
    }

    /// Waits for its end.
    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            if Instant::now() > deadline {
                bail!("the machine is still on after {limit:?}");
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Where every CPU is: the first question about a machine that hangs.
    pub fn registers(&mut self) -> Result<String> {
        let qmp = self.qmp.as_mut().context("no control socket")?;
        qmp.monitor("info registers -a")
    }

    /// Its process id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// QEMU: `TIDEMARK_QEMU`, else the one on the path.
#[must_use]
pub fn program() -> OsString {
    std::env::var_os("TIDEMARK_QEMU").unwrap_or_else(|| OsString::from("qemu-system-aarch64"))
}

/// The oldest QEMU that all tests run on (`qemu_wanted` of tools/lib/qemu.sh).
pub const WANTED: (u32, u32) = (10, 0);

/// Refuses a QEMU older than [`WANTED`]; `why` says what it lacks.
pub fn require_wanted(why: &str) -> Result<()> {
    let program = program();
    let output = Command::new(&program)
        .arg("--version")
        .output()
        .with_context(|| format!("cannot start {}", program.display()))?;
    let said = String::from_utf8_lossy(&output.stdout);
    let found = version(&said).with_context(|| format!("no version in {said:?}"))?;
    let ((major, minor), (wanted, wanted_minor)) = (found, WANTED);
    if found < WANTED {
        bail!(
            "needs QEMU {wanted}.{wanted_minor} or newer ({why}), and {} is {major}.{minor}: \
             `make setup` installs one, TIDEMARK_QEMU names one",
            program.display()
        );
    }
    Ok(())
}

/// Major and minor number in what `--version` prints.
fn version(said: &str) -> Option<(u32, u32)> {
    let numbers = said.split_once("version ")?.1;
    let mut numbers = numbers.split(|letter: char| !letter.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// Adds a socket that QEMU connects to.
fn connect_argument(arguments: &mut Vec<OsString>, id: &str, path: &Path) {
    let mut value = OsString::from(format!("socket,id={id},path="));
    value.push(path);
    arguments.extend(["-chardev".into(), value]);
}

/// A command line that can be pasted into a shell.
fn command_line(program: &OsStr, arguments: &[OsString]) -> String {
    let words = std::iter::once(program).chain(arguments.iter().map(OsString::as_os_str));
    let quoted = words.map(|word| {
        let word = word.to_string_lossy();
        let plain = |letter: char| letter.is_ascii_alphanumeric() || "-_./,=:+".contains(letter);
        if !word.is_empty() && word.chars().all(plain) {
            word.into_owned()
        } else {
            format!("'{}'", word.replace('\'', "'\\''"))
        }
    });
    quoted.collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_is_read() {
        let said = "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)\n";
        assert_eq!(version(said), Some((7, 2)));
        assert!(version("QEMU emulator version 10.0.2").unwrap() >= WANTED);
        assert_eq!(version("QEMU"), None);
    }

    #[test]
    fn a_command_line_can_be_pasted() {
        let arguments = ["-append".into(), "console=ttyAMA0 it's".into()];
        let line = command_line(OsStr::new("qemu"), &arguments);
        assert_eq!(line, r"qemu -append 'console=ttyAMA0 it'\''s'");
    }
}
