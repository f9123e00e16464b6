//! Where the linker put the parts of the image (linker.ld).

use super::Range;

macro_rules! symbols {
    ($($(#[$doc:meta])* $name:ident = $symbol:ident;)*) => {
        unsafe extern "C" { $(static $symbol: u8;)* }
        $(
            $(#[$doc])*
            pub fn $name() -> usize {
                &raw const $symbol as usize
            }
        )*
    };
}

symbols! {
    /// First address of the image, and of its code.
    image_start = __image_start;
    /// End of the code.
    text_end = __text_end;
    /// End of what is only read.
    rodata_end = __rodata_end;
    /// The page below the boot stack that stays unmapped.
    stack_guard = __stack_guard;
    /// Bottom of the boot stack.
    boot_stack_bottom = __boot_stack_bottom;
    /// Top of the boot stack.
    boot_stack_top = __boot_stack_top;
    /// Top of the boot CPU's stack for fatal exceptions.
    emergency_stack_top = __emergency_stack_top;
    /// End of the image, stacks included.
    image_end = __image_end;
    /// Function names for the crash console.
    symbols_start = __symbols_start;
    /// Their end.
    symbols_end = __symbols_end;
}

/// The whole image.
pub fn image() -> Range {
    Range {
        start: image_start() as u64,
        end: image_end() as u64,
    }
}
