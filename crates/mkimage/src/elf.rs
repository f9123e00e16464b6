//! The ELF as this tool needs it: checked once, then plain data.
//!
//! Invariants of a parsed [`Elf`]: little-endian aarch64, executable or PIE; every
//! segment's file part is inside the file and not longer than its memory part; the only
//! relocations left are `R_AARCH64_RELATIVE`, which is what the start-up code applies.

use object::Endianness;
use object::elf::{self as defs, FileHeader64};
use object::read::elf::{
    FileHeader as _, ProgramHeader as _, Rela as _, SectionHeader as _, Sym as _,
};

/// Why an ELF is refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum Error {
    /// Not an ELF, or a damaged one.
    #[error("not a readable ELF file ({0}); give it the linker's output for the bare-metal target")]
    Unreadable(String),
    /// An ELF for another machine.
    #[error(
        "ELF is for machine {0}, not aarch64 (183); build with --target aarch64-unknown-none-softfloat"
    )]
    Machine(u16),
    /// An object file, a core dump, a relocatable.
    #[error("ELF type {0} is not a linked program (2 or 3); link it first")]
    Type(u16),
    /// Nothing to load.
    #[error("ELF has no loadable segment; does the linker script have PHDRS of type PT_LOAD?")]
    Empty,
    /// A segment whose file part exceeds its memory part.
    #[error(
        "segment at {address:#x} has {file:#x} bytes in the file but only {memory:#x} in memory; the ELF is damaged"
    )]
    LongSegment {
        /// Physical address.
        address: u64,
        /// Bytes in the file.
        file: u64,
        /// Bytes in memory.
        memory: u64,
    },
    /// A relocation the start-up code would skip.
    #[error(
        "relocation of type {kind} at {offset:#x} in {section}: only R_AARCH64_RELATIVE (1027) is applied at start; \
         link with -pie and without undefined symbols"
    )]
    Relocation {
        /// Its type number.
        kind: u32,
        /// The place it patches.
        offset: u64,
        /// The section it is listed in.
        section: String,
    },
    /// Packed relocations.
    #[error(
        "section {0} holds packed relative relocations, which the start-up code does not apply; link without -z pack-relative-relocs"
    )]
    PackedRelocations(String),
}

impl From<object::read::Error> for Error {
    fn from(error: object::read::Error) -> Self {
        Self::Unreadable(error.to_string())
    }
}

/// One PT_LOAD segment.
#[derive(Clone, Copy, Debug)]
pub struct Segment<'a> {
    /// Where it is loaded.
    pub paddr: u64,
    /// Where it is linked.
    pub vaddr: u64,
    /// The part that is in the file.
    pub data: &'a [u8],
    /// How much memory it takes.
    pub memory: u64,
}

/// One section's place, for those with an address.
#[derive(Clone, Debug)]
pub struct Section {
    /// Its name.
    pub name: String,
    /// Where it is linked.
    pub address: u64,
    /// Its length.
    pub size: u64,
    /// Whether the file has its bytes.
    pub kind: SectionKind,
}

/// Whether a section has bytes in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SectionKind {
    /// It has.
    Stored,
    /// `SHT_NOBITS`: only memory.
    MemoryOnly,
}

/// How a symbol was declared, the better witness of a function's name first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum SymbolKind {
    /// `STT_FUNC`: what the compiler makes.
    Function,
    /// A label in assembly that other files see.
    GlobalLabel,
    /// A label in assembly.
    Label,
}

/// A name for an address in executable memory.
#[derive(Clone, Debug)]
pub struct Symbol<'a> {
    /// As the linker has it, mangled.
    pub name: &'a str,
    /// Where it is linked.
    pub address: u64,
    /// How it was declared.
    pub kind: SymbolKind,
}

/// A checked ELF.
#[derive(Debug)]
pub struct Elf<'a> {
    /// The loadable segments, by load address, at least one.
    pub segments: Vec<Segment<'a>>,
    /// The sections that have an address.
    pub sections: Vec<Section>,
    /// The names of code.
    pub code: Vec<Symbol<'a>>,
    /// `__symbols_start` and `__symbols_end`, if both are defined.
    pub symbol_room: Option<(u64, u64)>,
    /// The entry point.
    pub entry: u64,
}

impl<'a> Elf<'a> {
    /// Reads and checks.
    ///
    /// # Errors
    ///
    /// When `bytes` is not an ELF that the start-up code can run; see [`enum@Error`].
    pub fn parse(bytes: &'a [u8]) -> Result<Self, Error> {
        let header = FileHeader64::<Endianness>::parse(bytes)?;
        let endian = header.endian()?;
        if endian != Endianness::Little || header.e_machine(endian) != defs::EM_AARCH64 {
            return Err(Error::Machine(header.e_machine(endian)));
        }
        if !matches!(header.e_type(endian), defs::ET_EXEC | defs::ET_DYN) {
            return Err(Error::Type(header.e_type(endian)));
        }
        let segments = segments(header, bytes)?;
        let table = header.sections(endian, bytes)?;
        let mut sections = Vec::new();
        let mut executable = Vec::new();
        for (index, section) in table.enumerate() {
            let flags = section.sh_flags(endian);
            if flags & u64::from(defs::SHF_ALLOC) == 0 {
                continue;
            }
            let name = String::from_utf8_lossy(table.section_name(endian, section)?).into_owned();
            match section.sh_type(endian) {
                defs::SHT_RELR if section.sh_size(endian) != 0 => {
                    return Err(Error::PackedRelocations(name));
                }
                defs::SHT_RELA => check_relocations(section, endian, bytes, &name)?,
                _ => {}
            }
            if flags & u64::from(defs::SHF_EXECINSTR) != 0 {
                executable.push(index.0);
            }
            sections.push(Section {
                name,
                address: section.sh_addr(endian),
                size: section.sh_size(endian),
                kind: match section.sh_type(endian) {
                    defs::SHT_NOBITS => SectionKind::MemoryOnly,
                    _ => SectionKind::Stored,
                },
            });
        }

        let symbols = table.symbols(endian, bytes, defs::SHT_SYMTAB)?;
        let mut code = Vec::new();
        let (mut room_start, mut room_end) = (None, None);
        for symbol in symbols.iter() {
            // A name that is no text is no help in a backtrace.
            let Ok(name) = std::str::from_utf8(symbol.name(endian, symbols.strings())?) else {
                continue;
            };
            let address = symbol.st_value(endian);
            match name {
                "__symbols_start" => room_start = Some(address),
                "__symbols_end" => room_end = Some(address),
                _ => {}
            }
            // `$x` and `$d` tell code from data for disassemblers (ELF for the Arm
            // Architecture, mapping symbols); they are not names.
            if name.is_empty() || name.starts_with('$') {
                continue;
            }
            if !executable.contains(&usize::from(symbol.st_shndx(endian))) {
                continue;
            }
            let kind = match (symbol.st_type(), symbol.st_bind()) {
                (defs::STT_FUNC, _) => SymbolKind::Function,
                (defs::STT_NOTYPE, defs::STB_LOCAL) => SymbolKind::Label,
                (defs::STT_NOTYPE, _) => SymbolKind::GlobalLabel,
                _ => continue,
            };
            code.push(Symbol {
                name,
                address,
                kind,
            });
        }

        Ok(Self {
            segments,
            sections,
            code,
            symbol_room: room_start.zip(room_end),
            entry: header.e_entry(endian),
        })
    }
}

fn segments<'a>(
    header: &FileHeader64<Endianness>,
    bytes: &'a [u8],
) -> Result<Vec<Segment<'a>>, Error> {
    let endian = header.endian()?;
    let mut segments = Vec::new();
    for segment in header.program_headers(endian, bytes)? {
        if segment.p_type(endian) != defs::PT_LOAD || segment.p_memsz(endian) == 0 {
            continue;
        }
        let (paddr, memory) = (segment.p_paddr(endian), segment.p_memsz(endian));
        let data = segment
            .data(endian, bytes)
            .map_err(|()| Error::Unreadable(format!("the segment at {paddr:#x} is cut short")))?;
        if data.len() as u64 > memory {
            return Err(Error::LongSegment {
                address: paddr,
                file: data.len() as u64,
                memory,
            });
        }
        segments.push(Segment {
            paddr,
            vaddr: segment.p_vaddr(endian),
            data,
            memory,
        });
    }
    if segments.is_empty() {
        return Err(Error::Empty);
    }
    segments.sort_by_key(|segment| segment.paddr);
    Ok(segments)
}

/// The start-up code knows one kind of relocation and skips the rest; a skipped one is
/// a wild pointer much later, so it is refused here.
fn check_relocations(
    section: &defs::SectionHeader64<Endianness>,
    endian: Endianness,
    bytes: &[u8],
    name: &str,
) -> Result<(), Error> {
    let Some((relocations, _)) = section.rela(endian, bytes)? else {
        return Ok(());
    };
    for relocation in relocations {
        // R_AARCH64_NONE is what the linker leaves of a relocation it has resolved.
        let kind = relocation.r_type(endian, false);
        if !matches!(kind, defs::R_AARCH64_RELATIVE | defs::R_AARCH64_NONE) {
            return Err(Error::Relocation {
                kind,
                offset: relocation.r_offset(endian),
                section: name.to_owned(),
            });
        }
    }
    Ok(())
}
