//! The bundle of guests, where the boot loader put it: read at boot, and again at every
//! restart of a guest.

use crate::mm;
use crate::mm::map::MemoryMap;
use log::{error, info};
use spin::Once;
use tidemark_wire::bundle::Bundle;

static BUNDLE: Once<Bundle<'static>> = Once::new();

/// The bundle, once it was read.
pub fn get() -> Option<&'static Bundle<'static>> {
    BUNDLE.get()
}

/// Reads the bundle. What is wrong with it is said, and then there is none.
pub fn read(map: &MemoryMap) -> Option<&'static Bundle<'static>> {
    let bytes = match mm::bundle(map) {
        Ok(Some(bytes)) => bytes,
        Ok(None) => {
            info!(
                "no bundle of guests was handed over (QEMU: -initrd FILE; U-Boot: booti IMAGE BUNDLE:SIZE FDT; `tidectl bundle` makes one)"
            );
            return None;
        }
        Err((place, why)) => {
            error!(
                "bundle: {place}, where the boot loader says the initrd is, {why}; load it elsewhere"
            );
            return None;
        }
    };
    let bundle = match Bundle::parse(bytes) {
        Ok(bundle) => bundle,
        Err(error) => {
            error!("bundle: {error}; no guest is started");
            return None;
        }
    };
    Some(BUNDLE.call_once(|| bundle))
}
