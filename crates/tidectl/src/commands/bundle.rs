//! `bundle`: guests and their files, packed as the boot loader hands them over.

use super::Context;
use super::get::write_safely;
use crate::kernel::{self, KernelError, Kind};
use crate::units::{parse_size, size};
use crate::{Error, Result};
use clap::Args;
use serde::Deserialize;
use serde_json::json;
use std::fs;
use std::path::{Path, PathBuf};
use tidemark_wire::bundle::{
    Boot, BootFiles, Builder, Bundle, BundleError, Clock, Firmware, MachineOptions, Payload,
    VmDraft, VmSpec, WhenAllStopped, flash_contents,
};
use tidemark_wire::granule::Granule;

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
  kernel = \"Image\"                    # arm64 Image, also packed (gzip, zstd, EFI zboot);
                                      # ELF; or flat: code from its first byte on
  initrd = \"initramfs.cpio.gz\"       # may be left out
  cmdline = \"console=ttyAMA0\"        # may be left out
  clock = \"stop\"                     # while it is paused, the default; \"run\": it sees the time go by

  [[vm]]
  name = \"u-boot\"
  memory = \"64MiB\"
  firmware = \"u-boot.bin\"            # instead of a kernel; with one, firmware for QEMU's virt
                                      # starts it (EDK2 does, by its EFI stub)
  variables = \"AAVMF_VARS.fd\"        # flash at the first start; left out: erased
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

#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum WhilePaused {
    #[default]
    Stop,
    Run,
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
    variables: Option<PathBuf>,
    #[serde(default = "yes")]
    autostart: bool,
    #[serde(default)]
    clock: WhilePaused,
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
    let (bytes, kinds) = pack(&args.manifest, &args.output)?;
    write_safely(&args.output, &bytes)?;
    let bundle = Bundle::parse(&bytes)?;
    let vms = &bundle.manifest().vms;
    let json = json!({
        "schema": 1,
        "output": args.output,
        "bytes": bytes.len(),
        "vms": vms.iter().zip(&kinds).enumerate().map(|(id, (vm, kind))| json!({
            "id": id,
            "name": vm.name,
            "vcpus": vm.vcpus,
            "memory_bytes": vm.memory_bytes,
            "autostart": vm.autostart,
            "boot": kind.map_or("firmware", Kind::name),
            "clock": match vm.clock {
                Clock::Stop => "stop",
                Clock::Run => "run",
            },
            "kernel_pages": pages_of(&bundle, vm).map(|granule| granule.to_string()),
        })).collect::<Vec<_>>(),
    });
    context.ui.done(&json, || {
        let name = |(vm, kind): (&VmSpec, &Option<Kind>)| match kind {
            // What is not known is started all the same: better to say so.
            Some(Kind::Flat) => format!("{} (a flat binary)", vm.name),
            _ => vm.name.clone(),
        };
        let names: Vec<String> = vms.iter().zip(&kinds).map(name).collect();
        let (path, len) = (args.output.display(), size(bytes.len() as u64));
        format!("{path}: {len}, {} VMs: {}", vms.len(), names.join(", "))
    })
}

/// The page size that a VM's kernel is built for: not every CPU has each.
fn pages_of(bundle: &Bundle<'_>, vm: &VmSpec) -> Option<Granule> {
    let of = |file| Granule::of_image(bundle.unchecked_blob(file)?);
    match &vm.boot {
        Boot::Kernel(kernel) => kernel
            .segments
            .iter()
            .filter_map(|segment| segment.file)
            .find_map(of),
        Boot::Firmware(firmware) => firmware
            .kernel
            .as_ref()
            .and_then(|payload| of(payload.kernel)),
    }
}

/// Reads a description and everything it names, and packs it. `output` must not be one of
/// those files. Beside the bundle: what kind each guest's kernel is, `None` for firmware.
///
/// # Errors
/// [`Error::Input`] that says what is wrong where, [`Error::File`] for a file that is named
/// but cannot be read, [`Error::Bundle`] for what the image would refuse.
fn pack(manifest: &Path, output: &Path) -> Result<(Vec<u8>, Vec<Option<Kind>>)> {
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
    let mut kinds = Vec::new();
    for vm in file.vm {
        let wrong = |problem: String| input(format!("VM {:?}: {problem}", vm.name));
        if vm.passthrough.is_some() {
            return Err(wrong(NO_PASSTHROUGH.into()));
        }
        let memory_bytes = parse_size(&vm.memory).map_err(&wrong)?;
        let files = [&vm.kernel, &vm.initrd, &vm.firmware, &vm.variables];
        for path in files.into_iter().flatten() {
            apart(&dir.join(path))?;
        }
        let (boot, kind) = boot(dir, &vm, memory_bytes).map_err(|error| match error {
            BootError::File(error) => error,
            BootError::Wrong(problem) => wrong(problem.into()),
        })?;
        kinds.push(kind);
        let (name, vcpus, autostart) = (vm.name, vm.vcpus, vm.autostart);
        builder.vm(VmDraft {
            name,
            vcpus,
            memory_bytes,
            autostart,
            boot,
            clock: match vm.clock {
                WhilePaused::Stop => Clock::Stop,
                WhilePaused::Run => Clock::Run,
            },
        });
    }
    // The image's own judgement, with the file that is to be mended.
    let bytes = builder.finish().map_err(|error| match error {
        BundleError::NoVms => input("no [[vm]] in it".into()),
        error => input(error.to_string()),
    })?;
    Ok((bytes, kinds))
}

enum BootError {
    File(Error),
    Wrong(&'static str),
}

fn boot(
    dir: &Path,
    vm: &Vm,
    memory: u64,
) -> std::result::Result<(BootFiles, Option<Kind>), BootError> {
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
    let wrong = |problem| Err(BootError::Wrong(problem));
    let of = |kernel: &Path| {
        let path = dir.join(kernel);
        |error: KernelError| {
            let problem = error.to_string();
            BootError::File(Error::Input { path, problem })
        }
    };
    match (&vm.kernel, &vm.firmware) {
        (None, None) => wrong("give kernel = \"...\" or firmware = \"...\""),
        (_, None) if vm.variables.is_some() => {
            wrong("variables belong to firmware, not to a kernel alone")
        }
        (None, Some(_)) if vm.initrd.is_some() || vm.cmdline.is_some() => {
            wrong("initrd and cmdline belong to a kernel, not to firmware alone")
        }
        (kernel, Some(firmware)) => {
            let payload = kernel.as_ref().map(|kernel| {
                Ok(Payload {
                    kernel: kernel::unpack_for_firmware(read(kernel)?).map_err(of(kernel))?,
                    initrd: vm.initrd.as_ref().map(read).transpose()?,
                    cmdline: vm.cmdline.clone().unwrap_or_default(),
                })
            });
            let image = read(firmware)?;
            if flash_contents(&image).is_empty() {
                let problem = "there is no firmware in it, only what erased flash holds; name the file that has the \
                               code"
                    .into();
                let path = dir.join(firmware);
                return Err(BootError::File(Error::Input { path, problem }));
            }
            let firmware = Firmware {
                image,
                variables: vm.variables.as_ref().map(read).transpose()?,
                kernel: payload.transpose()?,
            };
            Ok((BootFiles::Firmware(firmware), None))
        }
        (Some(kernel), None) => {
            let initrd = vm.initrd.as_ref().map(read).transpose()?;
            let cmdline = vm.cmdline.clone().unwrap_or_default();
            let (kind, kernel) =
                kernel::lay_out(read(kernel)?, initrd, cmdline, memory).map_err(of(kernel))?;
            Ok((BootFiles::Kernel(kernel), Some(kind)))
        }
    }
}
