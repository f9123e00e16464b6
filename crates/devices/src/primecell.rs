//! Identification registers common to Arm PrimeCell peripherals.
//!
//! The last 32 bytes of a PrimeCell's page hold one byte a word: PeriphID0-3 at 0xfe0 and PCellID0-3 at
//! 0xff0 (DDI 0183, 3.3.15). An AMBA bus binds drivers by them.

/// The cell id of every PrimeCell, 0xb105f00d.
const CELL_ID: u32 = 0xb105_f00d;

/// Reads the identification register at `offset` of a device with this peripheral id.
pub(crate) fn read(peripheral_id: u32, offset: u64) -> Option<u32> {
    let (word, base) = match offset {
        0xfe0..0xff0 => (peripheral_id, 0xfe0),
        0xff0..0x1000 => (CELL_ID, 0xff0),
        _ => return None,
    };
    if offset & 3 != 0 {
        return None;
    }
    // Offset is within 12 of its base, so the shift is 0, 8, 16 or 24.
    Some(word >> ((offset - base) * 2) & 0xff)
}
