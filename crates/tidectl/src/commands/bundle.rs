//! `bundle`: guests and their files, packed as the boot loader hands them over.

use super::Context;
use super::get::write_safely;
use crate::units::{parse_size, size};
use crate::{Error, Result};
use clap::Args;
use serde::Deserialize;
use serde_json::json;
use std::fs;
use std::path::{Path, PathBuf};
use tidemark_wire::bundle::{
    BootFiles, Builder, Bundle, BundleError, MachineOptions, VmDraft, WhenAllStopped,
};

/// What to pack.
#[derive(Debug, Args)]
#[command(after_help = "\
vms.toml (paths are relative to it):
  [machine]
  when_all_stopped = \"power-off\"     # or \"stay-up\", the default

  [[vm]]
  name = \"debian\"
  vcpus = 2                           # default 1
  memory = \"512MiB\"
  kernel = \"Image\"
  initrd = \"initramfs.cpio.gz\"       # may be left out
  cmdline = \"console=ttyAMA0\"        # may be left out

  [[vm]]
  name = \"u-boot\"
  memory = \"64MiB\"
  firmware = \"u-boot.bin\"            # instead of kernel, initrd and cmdline
  autostart = false                   # default true

Example:
  tidectl bundle vms.toml -o guests.bundle")]
pub struct BundleArgs {
    /// Description of the guests.
    manifest: PathBuf,
    /// Where to write.
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    machine: Machine,
    #[serde(default)]
    vm: Vec<Vm>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Machine {
    #[serde(default)]
    when_all_stopped: Stopped,
}

#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Stopped {
    #[default]
    StayUp,
    PowerOff,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Vm {
    name: String,
    #[serde(default = "one")]
    vcpus: u8,
    memory: String,
    kernel: Option<PathBuf>,
    initrd: Option<PathBuf>,
    cmdline: Option<String>,
    firmware: Option<PathBuf>,
    #[serde(default = "yes")]
    autostart: bool,
    /// There is none; asked for, it is refused with the reason.
    passthrough: Option<toml::Value>,
}

const NO_PASSTHROUGH: &str = "passthrough: no device is passed through to a guest; it would write to \
    memory by itself, and without an SMMU no dirty log would see it. Leave the line out";

fn one() -> u8 {
    1
}

fn yes() -> bool {
    true
}

pub(super) fn run(context: &mut Context, args: &BundleArgs) -> Result<()> {
    let bytes = pack(&args.manifest, &args.output)?;
    write_safely(&args.output, &bytes)?;
    let bundle = Bundle::parse(&bytes)?;
    let vms = &bundle.manifest().vms;
    let json = json!({
        "schema": 1,
        "output": args.output,
        "bytes": bytes.len(),
        "vms": vms.iter().enumerate().map(|(id, vm)| json!({
            "id": id,
            "name": vm.name,
            "vcpus": vm.vcpus,
            "memory_bytes": vm.memory_bytes,
            "autostart": vm.autostart,
        })).collect::<Vec<_>>(),
    });
    context.ui.data(&json, || {
        let names: Vec<&str> = vms.iter().map(|vm| vm.name.as_str()).collect();
        let (path, len) = (args.output.display(), size(bytes.len() as u64));
        format!("{path}: {len}, {} VMs: {}", vms.len(), names.join(", "))
    })
}

/// Reads a description and everything it names, and packs it. `output` must not be one of
/// those files.
///
/// # Errors
/// [`Error::Input`] that says what is wrong where, [`Error::File`] for a file that is named
/// but cannot be read, [`Error::Bundle`] for what the image would refuse.
fn pack(manifest: &Path, output: &Path) -> Result<Vec<u8>> {
    let output = fs::canonicalize(output).ok();
    let apart = |path: &Path| {
        if output.is_some() && fs::canonicalize(path).ok() == output {
            let problem = "it would be overwritten; name another file with -o".into();
            let path = path.into();
            return Err(Error::Input { path, problem });
        }
        Ok(())
    };
    apart(manifest)?;
    let input = |problem: String| Error::Input {
        path: manifest.into(),
        problem,
    };
    let text = fs::read_to_string(manifest).map_err(Error::file(manifest))?;
    let file: File =
        toml::from_str(&text).map_err(|error| input(error.to_string().trim_end().into()))?;
    let dir = manifest.parent().unwrap_or(Path::new(""));
    let when_all_stopped = match file.machine.when_all_stopped {
        Stopped::StayUp => WhenAllStopped::StayUp,
        Stopped::PowerOff => WhenAllStopped::PowerOff,
    };
    let mut builder = Builder::new(MachineOptions { when_all_stopped });
    for vm in file.vm {
        let wrong = |problem: String| input(format!("VM {:?}: {problem}", vm.name));
        if vm.passthrough.is_some() {
            return Err(wrong(NO_PASSTHROUGH.into()));
        }
        let memory_bytes = parse_size(&vm.memory).map_err(&wrong)?;
        let files = [&vm.kernel, &vm.initrd, &vm.firmware];
        for path in files.into_iter().flatten() {
            apart(&dir.join(path))?;
        }
        let boot = boot(dir, &vm).map_err(|error| match error {
            BootError::File(error) => error,
            BootError::Wrong(problem) => wrong(problem.into()),
        })?;
        let (name, vcpus, autostart) = (vm.name, vm.vcpus, vm.autostart);
        builder.vm(VmDraft {
            name,
            vcpus,
            memory_bytes,
            autostart,
            boot,
        });
    }
    // The image's own judgement, with the file that is to be mended.
    builder.finish().map_err(|error| match error {
        BundleError::NoVms => input("no [[vm]] in it".into()),
        error => input(error.to_string()),
    })
}

enum BootError {
    File(Error),
    Wrong(&'static str),
}

fn boot(dir: &Path, vm: &Vm) -> std::result::Result<BootFiles, BootError> {
    let read = |path: &PathBuf| {
        let path = dir.join(path);
        let there = fs::metadata(&path).map_err(|e| BootError::File(Error::file(&path)(e)))?;
        if !there.is_file() && !there.is_dir() {
            let problem = "it is a device or a pipe; name a file".into();
            return Err(BootError::File(Error::Input { path, problem }));
        }
        let bytes = fs::read(&path).map_err(|error| BootError::File(Error::file(&path)(error)))?;
        if bytes.is_empty() {
            let problem = "the file is empty".into();
            return Err(BootError::File(Error::Input { path, problem }));
        }
        Ok(bytes)
    };
    match (&vm.kernel, &vm.firmware) {
        (Some(_), Some(_)) => Err(BootError::Wrong("give kernel or firmware, not both")),
        (None, None) => Err(BootError::Wrong(
            "give kernel = \"...\" or firmware = \"...\"",
        )),
        (None, Some(_)) if vm.initrd.is_some() || vm.cmdline.is_some() => Err(BootError::Wrong(
            "initrd and cmdline belong to a kernel, not to firmware",
        )),
        (None, Some(firmware)) => Ok(BootFiles::Firmware {
            image: read(firmware)?,
        }),
        (Some(kernel), None) => Ok(BootFiles::Kernel {
            kernel: read(kernel).and_then(|bytes| {
                let Err(problem) = check_image(&bytes) else {
                    return Ok(bytes);
                };
                let (path, problem) = (dir.join(kernel), problem.into());
                Err(BootError::File(Error::Input { path, problem }))
            })?,
            initrd: vm.initrd.as_ref().map(read).transpose()?,
            cmdline: vm.cmdline.clone().unwrap_or_default(),
        }),
    }
}

/// Says what a kernel is if it is no arm64 Image: the guest would start it and stay silent.
fn check_image(bytes: &[u8]) -> std::result::Result<(), &'static str> {
    if bytes.get(0x38..0x3c) == Some(b"ARM\x64") {
        Ok(())
    } else if bytes.starts_with(&[0x1f, 0x8b]) {
        Err("it is compressed; unpack it first: gunzip -c FILE > Image")
    } else if bytes.get(4..8) == Some(b"zimg") {
        Err("it is an EFI zboot image; use the Image that is packed in it")
    } else if bytes.starts_with(b"\x7fELF") {
        Err("it is an ELF file; use the Image made of it: objcopy -O binary")
    } else {
        Err("it is no arm64 Image: its header (\"ARM\\x64\" at 0x38) is missing")
    }
}
