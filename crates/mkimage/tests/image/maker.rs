//! A maker of small ELF files, good and bad.
//!
//! By hand rather than with a library: most of what is tested here is refused by any
//! library that writes ELF.

/// One program header and its bytes.
pub struct Load {
    /// Load address.
    pub paddr: u64,
    /// Link address.
    pub vaddr: u64,
    /// Stored bytes.
    pub data: Vec<u8>,
    /// Memory size.
    pub memory: u64,
}

/// One section header; `data` is only for those that are not part of a segment.
pub struct Section {
    pub name: &'static str,
    pub kind: u32,
    pub flags: u64,
    pub address: u64,
    pub size: u64,
    pub data: Vec<u8>,
}

/// One symbol: name, st_info, section index, value.
pub struct Symbol(pub String, pub u8, pub u16, pub u64);

pub const FUNCTION: u8 = 0x12;
pub const GLOBAL_LABEL: u8 = 0x10;
pub const LABEL: u8 = 0x00;
pub const OBJECT: u8 = 0x11;

pub const PROGBITS: u32 = 1;
pub const RELA: u32 = 4;
pub const NOBITS: u32 = 8;
pub const RELR: u32 = 19;
pub const ALLOC: u64 = 2;
pub const EXECUTE: u64 = 4;

/// A whole ELF.
pub struct Maker {
    pub machine: u16,
    pub kind: u16,
    pub loads: Vec<Load>,
    /// Section 1 onwards.
    pub sections: Vec<Section>,
    pub symbols: Vec<Symbol>,
}

/// Where the room for names is, in [`Maker::image`].
pub const ROOM: usize = 0x1000;

impl Maker {
    /// A good image: header and code in one page, `room` bytes for names in the next,
    /// then 0x3000 bytes of memory that are not stored.
    pub fn image(room: usize) -> Self {
        let mut text = vec![0x1f; 0x1000];
        text[8..16].copy_from_slice(&0_u64.to_le_bytes());
        text[16..24].copy_from_slice(&0x5000_u64.to_le_bytes());
        text[24..32].copy_from_slice(&0b1010_u64.to_le_bytes());
        text[0x38..0x3c].copy_from_slice(b"ARM\x64");
        let segment = |paddr, data: Vec<u8>, memory| Load {
            paddr,
            vaddr: paddr,
            data,
            memory,
        };
        Self {
            machine: 183,
            kind: 3,
            loads: vec![
                segment(0, text, 0x1000),
                segment(ROOM as u64, vec![0; room.max(1)], 0x1000),
                segment(0x2000, Vec::new(), 0x3000),
            ],
            sections: vec![
                Section {
                    name: ".text",
                    kind: PROGBITS,
                    flags: ALLOC | EXECUTE,
                    address: 0,
                    size: 0x1000,
                    data: Vec::new(),
                },
                Section {
                    name: ".symbols",
                    kind: PROGBITS,
                    flags: ALLOC,
                    address: ROOM as u64,
                    size: room as u64,
                    data: Vec::new(),
                },
            ],
            symbols: vec![
                Symbol("$x".into(), LABEL, 1, 0),
                Symbol("__image_start".into(), GLOBAL_LABEL, 1, 0),
                Symbol("_start".into(), GLOBAL_LABEL, 1, 0),
                Symbol("local_label".into(), LABEL, 1, 0x100),
                Symbol(
                    "_ZN5board5parse17h0123456789abcdefE".into(),
                    FUNCTION,
                    1,
                    0x200,
                ),
                Symbol("zz_alias".into(), FUNCTION, 1, 0x200),
                Symbol("vectors".into(), GLOBAL_LABEL, 1, 0x800),
                Symbol("TABLE".into(), OBJECT, 2, 0x1000),
            ],
        }
    }

    /// The file.
    pub fn build(&self) -> Vec<u8> {
        let mut strings = vec![0_u8];
        let mut symtab = vec![0_u8; 24];
        for Symbol(name, info, section, value) in &self.symbols {
            let at = strings.len() as u32;
            strings.extend_from_slice(name.as_bytes());
            strings.push(0);
            symtab.extend_from_slice(&at.to_le_bytes());
            symtab.extend_from_slice(&[*info, 0]);
            symtab.extend_from_slice(&section.to_le_bytes());
            symtab.extend_from_slice(&value.to_le_bytes());
            symtab.extend_from_slice(&0_u64.to_le_bytes());
        }
        let mut names = vec![0_u8];
        let mut name = |text: &str| {
            let at = names.len() as u32;
            names.extend_from_slice(text.as_bytes());
            names.push(0);
            at
        };

        let mut body = Vec::new();
        let base = 64 + 56 * self.loads.len();
        let mut programs = Vec::new();
        for load in &self.loads {
            let offset = (base + body.len()) as u64;
            body.extend_from_slice(&load.data);
            programs.extend_from_slice(&1_u32.to_le_bytes());
            programs.extend_from_slice(&7_u32.to_le_bytes());
            for field in [
                offset,
                load.vaddr,
                load.paddr,
                load.data.len() as u64,
                load.memory,
                1,
            ] {
                programs.extend_from_slice(&field.to_le_bytes());
            }
        }
        let mut headers = vec![0_u8; 64];
        let mut section = |name: u32,
                           kind: u32,
                           link: u32,
                           entry: u64,
                           flags: u64,
                           address: u64,
                           size: u64,
                           offset: u64| {
            headers.extend_from_slice(&name.to_le_bytes());
            headers.extend_from_slice(&kind.to_le_bytes());
            for field in [flags, address, offset, size] {
                headers.extend_from_slice(&field.to_le_bytes());
            }
            headers.extend_from_slice(&link.to_le_bytes());
            headers.extend_from_slice(&0_u32.to_le_bytes());
            headers.extend_from_slice(&1_u64.to_le_bytes());
            headers.extend_from_slice(&entry.to_le_bytes());
        };
        let symtab_index = self.sections.len() as u32 + 1;
        for item in &self.sections {
            let offset = (base + body.len()) as u64;
            body.extend_from_slice(&item.data);
            let link = if item.kind == RELA { symtab_index } else { 0 };
            section(
                name(item.name),
                item.kind,
                link,
                24,
                item.flags,
                item.address,
                item.size,
                offset,
            );
        }
        let mut own = |text: &str, kind, link, entry, data: &[u8]| {
            let offset = (base + body.len()) as u64;
            body.extend_from_slice(data);
            section(
                name(text),
                kind,
                link,
                entry,
                0,
                0,
                data.len() as u64,
                offset,
            );
        };
        own(".symtab", 2, symtab_index + 1, 24, &symtab);
        own(".strtab", 3, 0, 0, &strings);
        let shstrtab = name(".shstrtab");
        let offset = (base + body.len()) as u64;
        body.extend_from_slice(&names);
        section(shstrtab, 3, 0, 0, 0, 0, names.len() as u64, offset);

        let mut file = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        file.extend_from_slice(&self.kind.to_le_bytes());
        file.extend_from_slice(&self.machine.to_le_bytes());
        file.extend_from_slice(&1_u32.to_le_bytes());
        for field in [0_u64, 64, (base + body.len()) as u64] {
            file.extend_from_slice(&field.to_le_bytes());
        }
        file.extend_from_slice(&0_u32.to_le_bytes());
        let sections = self.sections.len() as u16 + 4;
        for field in [64, 56, self.loads.len() as u16, 64, sections, sections - 1] {
            file.extend_from_slice(&field.to_le_bytes());
        }
        file.extend_from_slice(&programs);
        file.extend_from_slice(&body);
        file.extend_from_slice(&headers);
        file
    }
}
