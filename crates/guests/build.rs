//! Gives each bare-metal binary its link arguments, so that a plain `cargo build` is enough.

use std::env;
use std::path::PathBuf;

/// EL1 payloads: flat images that boot by the arm64 boot protocol.
const PAYLOADS: [&str; 3] = ["oracle", "bench", "hostile"];
/// EL0 programs: static Linux executables without a libc.
const PROGRAMS: [&str; 2] = ["load", "cntvct"];

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=link/el1.ld");
    // On the build machine only the library is of use; the binaries are stubs there.
    if env::var("CARGO_CFG_TARGET_OS").as_deref() != Ok("none") {
        return;
    }
    let root = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets this"));
    let script = root.join("link/el1.ld");
    for payload in PAYLOADS {
        let arg = |arg: &str| println!("cargo:rustc-link-arg-bin={payload}={arg}");
        arg(&format!("-T{}", script.display()));
        // The payload relocates itself: the boot protocol lets a loader choose the place.
        arg("-pie");
        arg("--no-dynamic-linker");
        arg("-znotext");
    }
    for program in PROGRAMS {
        let arg = |arg: &str| println!("cargo:rustc-link-arg-bin={program}={arg}");
        arg("-no-pie");
        arg("-e_start");
    }
}
