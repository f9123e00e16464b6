//! The little of a devicetree that a payload needs: where RAM is and which CPUs there are.
//!
//! Reads the flattened format of the Devicetree Specification 0.4, chapter 5, by one forward walk over the structure
//! block. A payload runs under hypervisors that are being written, so a broken tree is an error with a name. A
//! devicetree crate is not used: those in the workspace need an allocator, which payloads do not have.

use core::fmt;

use crate::pattern::Vcpu;

/// Bytes of header that [`total_size`] reads.
pub const HEADER_BYTES: usize = 8;

const MAGIC: u32 = 0xd00d_feed;
const BEGIN_NODE: u32 = 1;
const END_NODE: u32 = 2;
const PROP: u32 = 3;
const NOP: u32 = 4;
const END: u32 = 9;

/// A piece of RAM, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ram {
    /// The address of its first byte.
    pub base: u64,
    /// How many bytes.
    pub size: u64,
}

/// A CPU's affinity, as PSCI CPU_ON wants it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Mpidr(pub u64);

/// What the tree says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Machine {
    /// The first piece of RAM.
    pub ram: Ram,
    cpus: [Mpidr; Vcpu::MAX],
    count: usize,
}

impl Machine {
    /// The CPUs, in the tree's order, at most [`Vcpu::MAX`].
    #[must_use]
    pub fn cpus(&self) -> &[Mpidr] {
        self.cpus.get(..self.count).unwrap_or(&[])
    }
}

/// What is wrong with a tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FdtError {
    /// It does not begin as one.
    Magic,
    /// It ends early, or an offset points outside.
    Truncated,
    /// A token that there is not, at this offset in the structure block.
    Token(usize),
    /// No memory node with a size.
    NoMemory,
    /// No CPU.
    NoCpu,
}

impl fmt::Display for FdtError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Magic => {
                f.write_str("no devicetree where x0 points at entry; give the guest one")
            }
            Self::Truncated => f.write_str("the devicetree ends early"),
            Self::Token(at) => write!(
                f,
                "the devicetree has an unknown token at {at:#x} of its structure block"
            ),
            Self::NoMemory => f.write_str("the devicetree has no memory node with a size"),
            Self::NoCpu => f.write_str("the devicetree has no cpu node"),
        }
    }
}

impl core::error::Error for FdtError {}

/// How long a tree is, by the first bytes of it.
///
/// # Errors
///
/// It is not a tree.
pub fn total_size(header: &[u8; HEADER_BYTES]) -> Result<usize, FdtError> {
    if word(header, 0) != Some(MAGIC) {
        return Err(FdtError::Magic);
    }
    word(header, 4)
        .map(|size| size as usize)
        .ok_or(FdtError::Truncated)
}

/// Reads a tree.
///
/// # Errors
///
/// See [`FdtError`].
pub fn read(blob: &[u8]) -> Result<Machine, FdtError> {
    if word(blob, 0) != Some(MAGIC) {
        return Err(FdtError::Magic);
    }
    let offset = |at| {
        word(blob, at)
            .map(|offset| offset as usize)
            .ok_or(FdtError::Truncated)
    };
    let structure = blob.get(offset(8)?..).ok_or(FdtError::Truncated)?;
    let strings = blob.get(offset(12)?..).ok_or(FdtError::Truncated)?;
    let mut walk = Walk {
        structure,
        strings,
        at: 0,
    };
    let mut machine = Found::default();
    let mut node = Node::default();
    let mut depth = 0_u32;
    loop {
        match walk.next()? {
            Token::Begin(name) => {
                // A node's properties come before its children, so what it has to say is known here.
                machine.note(&node);
                depth = depth.saturating_add(1);
                node = Node {
                    place: Place::of(depth, name, node.place),
                    reg: &[],
                    kind: b"",
                };
                machine.enter(node.place);
            }
            Token::Prop(name, value) => match (node.place, name) {
                (Place::Root, b"#address-cells") => machine.root.address = cells(value),
                (Place::Root, b"#size-cells") => machine.root.size = cells(value),
                (Place::Cpus, b"#address-cells") => machine.cpu_cells = cells(value),
                (_, b"reg") => node.reg = value,
                (_, b"device_type") => node.kind = value,
                _ => {}
            },
            Token::End => {
                machine.note(&node);
                node = Node {
                    place: node.place.parent(depth),
                    reg: &[],
                    kind: b"",
                };
                depth = depth.saturating_sub(1);
            }
            Token::Over => return machine.finish(),
        }
    }
}

#[derive(Clone, Copy, Default)]
enum Place {
    #[default]
    Root,
    Cpus,
    Cpu,
    Memory,
    Other,
}

impl Place {
    fn of(depth: u32, name: &[u8], parent: Self) -> Self {
        match (depth, name, parent) {
            (1, _, _) => Self::Root,
            (2, b"cpus", _) => Self::Cpus,
            (2, name, _) if name == b"memory" || name.starts_with(b"memory@") => Self::Memory,
            (3, name, Self::Cpus) if name.starts_with(b"cpu@") => Self::Cpu,
            // Below /cpus there are other nodes (cpu-map); remember where we are while we pass them.
            (3.., _, Self::Cpus | Self::Cpu) => Self::Cpu,
            _ => Self::Other,
        }
    }

    /// Where one is after the end of a node that is `depth` deep.
    fn parent(self, depth: u32) -> Self {
        match (depth, self) {
            (0..=2, _) => Self::Root,
            (3, Self::Cpu) => Self::Cpus,
            (_, place) => place,
        }
    }
}

#[derive(Default)]
struct Node<'a> {
    place: Place,
    reg: &'a [u8],
    kind: &'a [u8],
}

struct Cells {
    address: usize,
    size: usize,
}

struct Found {
    root: Cells,
    cpu_cells: usize,
    ram: Option<Ram>,
    cpus: [Mpidr; Vcpu::MAX],
    count: usize,
}

impl Default for Found {
    fn default() -> Self {
        // The defaults of chapter 2.3.5.
        Self {
            root: Cells {
                address: 2,
                size: 1,
            },
            cpu_cells: 2,
            ram: None,
            cpus: [Mpidr::default(); Vcpu::MAX],
            count: 0,
        }
    }
}

impl Found {
    fn enter(&mut self, place: Place) {
        if let Place::Cpus = place {
            self.cpu_cells = 2;
        }
    }

    fn note(&mut self, node: &Node<'_>) {
        match node.place {
            Place::Memory if self.ram.is_none() => {
                let Some((base, rest)) = number(node.reg, self.root.address) else {
                    return;
                };
                let Some((size, _)) = number(rest, self.root.size) else {
                    return;
                };
                self.ram = (size > 0).then_some(Ram { base, size });
            }
            Place::Cpu if node.kind == b"cpu\0" => {
                let Some((id, _)) = number(node.reg, self.cpu_cells) else {
                    return;
                };
                if let Some(slot) = self.cpus.get_mut(self.count) {
                    *slot = Mpidr(id);
                    self.count += 1;
                }
            }
            _ => {}
        }
    }

    fn finish(self) -> Result<Machine, FdtError> {
        let ram = self.ram.ok_or(FdtError::NoMemory)?;
        if self.count == 0 {
            return Err(FdtError::NoCpu);
        }
        Ok(Machine {
            ram,
            cpus: self.cpus,
            count: self.count,
        })
    }
}

enum Token<'a> {
    Begin(&'a [u8]),
    Prop(&'a [u8], &'a [u8]),
    End,
    Over,
}

struct Walk<'a> {
    structure: &'a [u8],
    strings: &'a [u8],
    /// Only grows, so the walk ends.
    at: usize,
}

impl<'a> Walk<'a> {
    fn next(&mut self) -> Result<Token<'a>, FdtError> {
        loop {
            let start = self.at;
            match self.word()? {
                BEGIN_NODE => {
                    let name =
                        until_nul(self.structure.get(self.at..).ok_or(FdtError::Truncated)?)?;
                    self.skip(name.len() + 1)?;
                    return Ok(Token::Begin(name));
                }
                PROP => {
                    let length = self.word()? as usize;
                    let name = self.word()? as usize;
                    let name = until_nul(self.strings.get(name..).ok_or(FdtError::Truncated)?)?;
                    let rest = self.structure.get(self.at..).ok_or(FdtError::Truncated)?;
                    let value = rest.get(..length).ok_or(FdtError::Truncated)?;
                    self.skip(length)?;
                    return Ok(Token::Prop(name, value));
                }
                END_NODE => return Ok(Token::End),
                NOP => {}
                END => return Ok(Token::Over),
                _ => return Err(FdtError::Token(start)),
            }
        }
    }

    fn word(&mut self) -> Result<u32, FdtError> {
        let word = word(self.structure, self.at).ok_or(FdtError::Truncated)?;
        self.at += 4;
        Ok(word)
    }

    /// Passes `bytes` and what pads them to a multiple of four.
    fn skip(&mut self, bytes: usize) -> Result<(), FdtError> {
        let end = self
            .at
            .checked_add(bytes)
            .and_then(|end| end.checked_next_multiple_of(4));
        self.at = end
            .filter(|end| *end <= self.structure.len())
            .ok_or(FdtError::Truncated)?;
        Ok(())
    }
}

fn until_nul(bytes: &[u8]) -> Result<&[u8], FdtError> {
    let end = bytes
        .iter()
        .position(|byte| *byte == 0)
        .ok_or(FdtError::Truncated)?;
    bytes.get(..end).ok_or(FdtError::Truncated)
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    let end = at.checked_add(4)?;
    bytes.get(at..end)?.try_into().ok().map(u32::from_be_bytes)
}

/// A `#...-cells` value; what is absurd reads as 0 cells, which gives no number.
fn cells(value: &[u8]) -> usize {
    word(value, 0).map_or(0, |cells| if cells <= 2 { cells as usize } else { 0 })
}

/// The number in the first `cells` cells, and what follows.
fn number(bytes: &[u8], cells: usize) -> Option<(u64, &[u8])> {
    if cells == 0 {
        return None;
    }
    let mut number = 0_u64;
    for cell in 0..cells {
        number = (number << 32) | u64::from(word(bytes, cell * 4)?);
    }
    Some((number, bytes.get(cells * 4..)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Builds trees in the format, so that the tests need no compiler for them.
    #[derive(Default)]
    struct Tree {
        structure: Vec<u8>,
        strings: Vec<u8>,
    }

    impl Tree {
        fn word(&mut self, word: u32) -> &mut Self {
            self.structure.extend(word.to_be_bytes());
            self
        }
        fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
            self.structure.extend(bytes);
            self.structure
                .resize(self.structure.len().next_multiple_of(4), 0);
            self
        }
        fn begin(&mut self, name: &str) -> &mut Self {
            self.word(BEGIN_NODE)
                .bytes(&[name.as_bytes(), b"\0"].concat())
        }
        fn end(&mut self) -> &mut Self {
            self.word(END_NODE)
        }
        fn prop(&mut self, name: &str, value: &[u8]) -> &mut Self {
            let at = self.strings.len() as u32;
            self.strings.extend([name.as_bytes(), b"\0"].concat());
            self.word(PROP)
                .word(value.len() as u32)
                .word(at)
                .bytes(value)
        }
        fn cells(&mut self, name: &str, cells: &[u32]) -> &mut Self {
            let value: Vec<u8> = cells.iter().flat_map(|cell| cell.to_be_bytes()).collect();
            self.prop(name, &value)
        }
        fn blob(&mut self) -> Vec<u8> {
            self.word(END);
            let structure = 40_u32;
            let strings = structure + self.structure.len() as u32;
            let total = strings + self.strings.len() as u32;
            let header = [
                MAGIC,
                total,
                structure,
                strings,
                0,
                17,
                16,
                0,
                self.strings.len() as u32,
                0,
            ];
            let mut blob: Vec<u8> = header.iter().flat_map(|word| word.to_be_bytes()).collect();
            blob.extend(&self.structure);
            blob.extend(&self.strings);
            blob
        }
    }

    fn virt() -> Tree {
        let mut tree = Tree::default();
        tree.begin("")
            .cells("#address-cells", &[2])
            .cells("#size-cells", &[2])
            .word(NOP);
        tree.begin("memory@40000000")
            .prop("device_type", b"memory\0")
            .cells("reg", &[0, 0x4000_0000, 1, 0x20_0000])
            .end();
        tree.begin("cpus")
            .cells("#address-cells", &[1])
            .cells("#size-cells", &[0]);
        tree.begin("cpu-map")
            .begin("cluster0")
            .begin("core0")
            .cells("cpu", &[1])
            .end()
            .end()
            .end();
        for cpu in 0..2 {
            tree.begin(&format!("cpu@{cpu}"))
                .prop("device_type", b"cpu\0")
                .cells("reg", &[cpu]);
            tree.begin("l2-cache").cells("reg", &[9]).end().end();
        }
        tree.end();
        tree.begin("pl011@9000000")
            .cells("reg", &[0, 0x900_0000, 0, 0x1000])
            .prop("compatible", b"arm,pl011\0")
            .end();
        tree.end();
        tree
    }

    #[test]
    fn a_tree_as_virt_has_it() {
        let blob = virt().blob();
        let header = blob.first_chunk().expect("a header");
        assert_eq!(total_size(header), Ok(blob.len()));
        let machine = read(&blob).expect("a good tree");
        assert_eq!(
            machine.ram,
            Ram {
                base: 0x4000_0000,
                size: 0x1_0020_0000
            }
        );
        assert_eq!(machine.cpus(), [Mpidr(0), Mpidr(1)]);
    }

    #[test]
    fn more_cpus_than_a_guest_may_have_are_left_out() {
        let mut tree = Tree::default();
        tree.begin("")
            .cells("#address-cells", &[1])
            .cells("#size-cells", &[1]);
        tree.begin("memory")
            .cells("reg", &[0, 4096])
            .end()
            .begin("cpus")
            .cells("#address-cells", &[2]);
        for cpu in 0..40 {
            tree.begin(&format!("cpu@{cpu}"))
                .prop("device_type", b"cpu\0")
                .cells("reg", &[cpu, 7])
                .end();
        }
        let blob = tree.end().end().blob();
        let machine = read(&blob).expect("a good tree");
        assert_eq!(machine.cpus().len(), Vcpu::MAX);
        assert_eq!(machine.cpus()[3], Mpidr(0x3_0000_0007));
    }

    #[test]
    fn what_is_missing_is_named() {
        assert_eq!(total_size(&[0; 8]), Err(FdtError::Magic));
        assert_eq!(read(&[]), Err(FdtError::Magic));
        assert_eq!(
            read(&Tree::default().begin("").end().blob()),
            Err(FdtError::NoMemory)
        );
        let mut tree = Tree::default();
        tree.begin("")
            .begin("memory")
            .cells("reg", &[0, 1, 1])
            .end()
            .end();
        assert_eq!(read(&tree.blob()), Err(FdtError::NoCpu));
        assert_eq!(
            read(&Tree::default().word(7).blob()),
            Err(FdtError::Token(0))
        );
    }

    #[test]
    fn no_cut_and_no_flipped_byte_makes_it_panic() {
        let blob = virt().blob();
        for length in 0..blob.len() {
            // Only the padding of the strings can go without being missed.
            let _ = read(&blob[..length]);
        }
        assert_eq!(read(&blob[..60]), Err(FdtError::Truncated));
        for at in 0..blob.len() {
            for value in [0, 1, 0x7f, 0xff] {
                let mut bad = blob.clone();
                bad[at] = value;
                let _ = read(&bad);
            }
        }
    }
}
