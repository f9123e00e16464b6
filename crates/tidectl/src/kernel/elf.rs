//! ELF files: each loadable segment at its physical address, as QEMU's `load_elf` does.

use super::KernelError;
use object::Endianness;
use object::elf::{self, FileHeader64, ProgramHeader64};
use object::read::elf::{FileHeader as _, ProgramHeader as _};
use tidemark_wire::bundle::{Kernel, RAM_BASE, SEGMENTS_MAX, Segment};

type Header = FileHeader64<Endianness>;

/// Reads the program in an ELF file, for a guest with so much memory.
///
/// # Errors
/// It is for another machine, broken, or not in the guest's memory.
pub fn read(bytes: &[u8], memory: u64) -> Result<Kernel<Vec<u8>>, KernelError> {
    let bad = |error: object::read::Error| KernelError::BadElf(error.to_string());
    check_class(bytes)?;
    let header = Header::parse(bytes).map_err(bad)?;
    let endian = header.endian().map_err(bad)?;
    if header.e_machine(endian) != elf::EM_AARCH64 {
        let machine = format!("machine {}", header.e_machine(endian));
        return Err(KernelError::OtherElf(machine));
    }
    let headers: Vec<_> = header
        .program_headers(endian, bytes)
        .map_err(bad)?
        .iter()
        .filter(|header| header.p_type(endian) == elf::PT_LOAD && header.p_memsz(endian) > 0)
        .collect();
    if headers.is_empty() {
        return Err(KernelError::EmptyElf);
    }
    if headers.len() > SEGMENTS_MAX {
        return Err(KernelError::Segments(headers.len()));
    }
    let mut segments = Vec::new();
    for (index, header) in headers.iter().enumerate() {
        let (address, size) = place(&headers, index, header, endian)?;
        if size == 0 {
            continue;
        }
        let inside = address
            .checked_sub(RAM_BASE)
            .and_then(|offset| offset.checked_add(size))
            .is_some_and(|end| end <= memory);
        if !inside {
            return Err(KernelError::Outside {
                address,
                size,
                memory,
            });
        }
        let file = header
            .data(endian, bytes)
            .map_err(|()| KernelError::BadElf("a segment reaches past its end".into()))?;
        segments.push(Segment {
            address,
            size,
            file: (!file.is_empty()).then(|| file.to_vec()),
        });
    }
    segments.sort_by_key(|segment| segment.address);
    for pair in segments.windows(2) {
        if let [first, second] = pair
            && first.address + first.size > second.address
        {
            return Err(KernelError::Overlap(first.address, second.address));
        }
    }
    let entry = entry(header, &headers, endian);
    let inside = |segment: &Segment<Vec<u8>>| {
        let offset = entry.checked_sub(segment.address);
        offset.is_some_and(|offset| offset < segment.size)
    };
    if !entry.is_multiple_of(4) || !segments.iter().any(inside) {
        return Err(KernelError::Entry(entry));
    }
    // At the start of RAM if that is free, as for firmware.
    let free = segments.iter().all(|segment| segment.address > RAM_BASE);
    Ok(Kernel {
        entry,
        segments,
        initrd: None,
        devicetree: free.then_some(RAM_BASE),
        cmdline: String::new(),
    })
}

/// 64-bit and little-endian; the rest of the header is only then what it seems.
fn check_class(bytes: &[u8]) -> Result<(), KernelError> {
    match (bytes.get(4), bytes.get(5)) {
        (Some(&elf::ELFCLASS64), Some(&elf::ELFDATA2LSB)) => Ok(()),
        (Some(&elf::ELFCLASS64), Some(&elf::ELFDATA2MSB)) => {
            Err(KernelError::OtherElf("a big-endian machine".into()))
        }
        (Some(&elf::ELFCLASS32), _) => Err(KernelError::OtherElf("a 32-bit machine".into())),
        _ => Err(KernelError::BadElf("neither 32-bit nor 64-bit".into())),
    }
}

/// Where a segment goes and how much memory it takes.
///
/// Some files pack their segments close together and move them when they run: then the part
/// that would be zero is over another segment, and is none.
fn place(
    all: &[&ProgramHeader64<Endianness>],
    index: usize,
    header: &ProgramHeader64<Endianness>,
    endian: Endianness,
) -> Result<(u64, u64), KernelError> {
    let wraps = || KernelError::BadElf("a segment's address and size wrap around".into());
    let (address, size, file) = (
        header.p_paddr(endian),
        header.p_memsz(endian),
        header.p_filesz(endian),
    );
    if file > size {
        let problem = format!("the segment at {address:#x} has more in the file than in memory");
        return Err(KernelError::BadElf(problem));
    }
    let end = address.checked_add(size).ok_or_else(wraps)?;
    let zero = address + file..end;
    for (_, other) in all.iter().enumerate().filter(|&(at, _)| at != index) {
        let start = other.p_paddr(endian);
        let end = start.checked_add(other.p_memsz(endian)).ok_or_else(wraps)?;
        if !zero.is_empty() && zero.start < end && start < zero.end {
            return Ok((address, file));
        }
    }
    Ok((address, size))
}

/// The entry point as a physical address: the file has it as a virtual one.
fn entry(header: &Header, all: &[&ProgramHeader64<Endianness>], endian: Endianness) -> u64 {
    let entry = header.e_entry(endian);
    for segment in all {
        let into = entry.checked_sub(segment.p_vaddr(endian));
        if segment.p_flags(endian) & elf::PF_X != 0
            && let Some(into) = into.filter(|into| *into < segment.p_filesz(endian))
        {
            return segment.p_paddr(endian).saturating_add(into);
        }
    }
    entry
}
