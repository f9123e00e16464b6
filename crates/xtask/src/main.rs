//! What the Makefile needs that is simpler in Rust than in shell.
#![forbid(unsafe_code)]

use anyhow::Result;
use clap::Parser;
use std::path::PathBuf;
use std::process::ExitCode;

mod imports;
mod rooms;

/// What the Makefile needs that is simpler in Rust than in shell.
#[derive(Debug, Parser)]
enum Command {
    /// Check that each room of the image uses only what lies below it, and that no modules use each other in a circle.
    Rooms {
        /// The project's directory.
        #[arg(default_value = ".")]
        project: PathBuf,
        /// Print which room uses which, and how often.
        #[arg(long)]
        print: bool,
    },
}

fn main() -> Result<ExitCode> {
    let Command::Rooms { project, print } = Command::parse();
    let found = rooms::check(&project)?;
    if print {
        print!("{}", found.uses());
    }
    for wrong in &found.wrong {
        eprintln!("{wrong}");
    }
    Ok(match found.wrong.is_empty() {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    })
}
