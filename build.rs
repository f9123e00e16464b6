//! Hands the linker the image's layout, so that plain `cargo build` links it.

fn main() {
    let root = std::env::var("CARGO_MANIFEST_DIR").unwrap_or_default();
    println!("cargo:rerun-if-changed=linker.ld");
    println!("cargo:rerun-if-changed=boot");
    for arg in [
        &format!("-T{root}/linker.ld"),
        "-pie",
        "--no-dynamic-linker",
        "-znotext",
        "-znorelro",
        "--build-id=none",
        "--orphan-handling=warn",
    ] {
        println!("cargo:rustc-link-arg-bins={arg}");
    }
}
