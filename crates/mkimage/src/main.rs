//! `mkimage`: arguments and files around the library.

#![forbid(unsafe_code)]

use std::ffi::OsString;
use std::path::Path;
use std::process::ExitCode;

const USAGE: &str = "\
usage: mkimage ELF OUT               the hypervisor's arm64 Image, with function names
       mkimage --flat ELF OUT        only flatten (guests)
       mkimage --initramfs DIR OUT   pack DIR as a Linux initramfs (cpio, uncompressed)";

enum Job {
    Image,
    Flat,
    Initramfs,
}

fn main() -> ExitCode {
    let mut arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    if arguments
        .iter()
        .any(|argument| argument == "--help" || argument == "-h")
    {
        println!("{USAGE}");
        return ExitCode::SUCCESS;
    }
    let job = match arguments.first().and_then(|first| first.to_str()) {
        Some("--flat") => Job::Flat,
        Some("--initramfs") => Job::Initramfs,
        Some(option) if option.starts_with('-') => {
            eprintln!("mkimage: no option {option}\n{USAGE}");
            return ExitCode::from(2);
        }
        _ => Job::Image,
    };
    if !matches!(job, Job::Image) {
        arguments.remove(0);
    }
    let [input, output] = arguments.as_slice() else {
        eprintln!("{USAGE}");
        return ExitCode::from(2);
    };
    match run(&job, Path::new(input), Path::new(output)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("mkimage: {}: {message}", Path::new(input).display());
            ExitCode::FAILURE
        }
    }
}

fn run(job: &Job, input: &Path, output: &Path) -> Result<(), String> {
    let bytes = match job {
        Job::Initramfs => mkimage::initramfs::pack(input).map_err(|error| error.to_string())?,
        Job::Flat => mkimage::flat(&read(input)?).map_err(|error| error.to_string())?,
        Job::Image => {
            let image = mkimage::image(&read(input)?).map_err(|error| error.to_string())?;
            if let Some(warning) = image.symbols.warning() {
                eprintln!("mkimage: warning: {warning}");
            }
            image.bytes
        }
    };
    std::fs::write(output, bytes)
        .map_err(|error| format!("cannot write {}: {error}", output.display()))
}

fn read(path: &Path) -> Result<Vec<u8>, String> {
    std::fs::read(path).map_err(|error| error.to_string())
}
