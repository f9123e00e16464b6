//! Device registers.

/// A window of device registers that EL2 has mapped as device memory.
#[derive(Clone, Copy, Debug)]
pub struct Mmio {
    base: usize,
    size: usize,
}

// The window is only an address and a length; the devices behind it are shared, and
// their drivers lock.
impl Mmio {
    /// Names a window.
    ///
    /// # Safety
    ///
    /// `base..base + size` is mapped as device memory (or the MMU is off), stays so, and
    /// holds a device whose registers may be read and written at any time without
    /// affecting memory that Rust owns.
    pub const unsafe fn new(base: usize, size: usize) -> Self {
        Self { base, size }
    }

    /// The window's first address.
    pub const fn base(&self) -> usize {
        self.base
    }

    /// Its length in bytes.
    pub const fn size(&self) -> usize {
        self.size
    }

    #[inline(always)]
    fn at<T>(&self, offset: usize) -> *mut T {
        assert!(
            offset + size_of::<T>() <= self.size,
            "device register outside its window"
        );
        (self.base + offset) as *mut T
    }

    /// Reads a 32-bit register.
    #[inline(always)]
    pub fn read32(&self, offset: usize) -> u32 {
        // SAFETY: inside the window (`at`), which `new`'s caller vouched for.
        unsafe { self.at::<u32>(offset).read_volatile() }
    }

    /// Writes a 32-bit register.
    #[inline(always)]
    pub fn write32(&self, offset: usize, value: u32) {
        // SAFETY: as for `read32`.
        unsafe { self.at::<u32>(offset).write_volatile(value) }
    }

    /// Reads a 64-bit register.
    #[inline(always)]
    pub fn read64(&self, offset: usize) -> u64 {
        // SAFETY: as for `read32`.
        unsafe { self.at::<u64>(offset).read_volatile() }
    }

    /// Writes a 64-bit register.
    #[inline(always)]
    pub fn write64(&self, offset: usize, value: u64) {
        // SAFETY: as for `read32`.
        unsafe { self.at::<u64>(offset).write_volatile(value) }
    }

    /// Writes one byte of a register.
    #[inline(always)]
    pub fn write8(&self, offset: usize, value: u8) {
        // SAFETY: as for `read32`.
        unsafe { self.at::<u8>(offset).write_volatile(value) }
    }
}
