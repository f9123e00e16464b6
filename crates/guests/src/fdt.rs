//! The little of a devicetree that a payload needs: where RAM is and which CPUs there are.
//!
//! Read by `dtoolkit`, whose reading half needs no allocator: payloads have none. A payload runs under hypervisors that
//! are being written, so a broken tree is an error with a name.

use core::fmt;

use dtoolkit::error::FdtParseError;
use dtoolkit::fdt::{Fdt, FdtNode};
use dtoolkit::{Node, Property};

use crate::pattern::Vcpu;

/// Bytes of header that [`total_size`] reads.
pub const HEADER_BYTES: usize = 8;

const MAGIC: u32 = 0xd00d_feed;

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
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FdtError {
    /// It does not begin as one.
    Magic,
    /// It cannot be read.
    Broken(FdtParseError),
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
            Self::Broken(error) => write!(f, "the devicetree cannot be read: {error}"),
            Self::NoMemory => f.write_str("the devicetree has no memory node with a size"),
            Self::NoCpu => f.write_str("the devicetree has no cpu node"),
        }
    }
}

impl core::error::Error for FdtError {}

/// How long a tree is, by the first bytes of it, before there is a slice of it to read.
///
/// # Errors
///
/// It is not a tree.
pub fn total_size(header: &[u8; HEADER_BYTES]) -> Result<usize, FdtError> {
    let [magic, size] =
        [[0, 1, 2, 3], [4, 5, 6, 7]].map(|at| u32::from_be_bytes(at.map(|at: usize| header[at])));
    if magic != MAGIC {
        return Err(FdtError::Magic);
    }
    Ok(size as usize)
}

/// Reads a tree.
///
/// # Errors
///
/// See [`FdtError`].
pub fn read(blob: &[u8]) -> Result<Machine, FdtError> {
    let root = Fdt::new(blob).map_err(FdtError::Broken)?.root();
    let mut memories = root
        .children()
        .filter(|node| node.name_without_address() == "memory");
    let ram = memories.find_map(ram).ok_or(FdtError::NoMemory)?;
    let mut machine = Machine {
        ram,
        cpus: [Mpidr::default(); Vcpu::MAX],
        count: 0,
    };
    let all = root.children().filter(|node| node.name() == "cpus");
    for (place, cpu) in machine
        .cpus
        .iter_mut()
        .zip(all.flat_map(|node| node.children()).filter_map(cpu))
    {
        *place = cpu;
        machine.count += 1;
    }
    match machine.count {
        0 => Err(FdtError::NoCpu),
        _ => Ok(machine),
    }
}

/// The first piece of a memory node, if it has a size.
fn ram(node: FdtNode<'_>) -> Option<Ram> {
    let first = node.reg().ok()??.next()?;
    let ram = Ram {
        base: first.address().ok()?,
        size: first.size().ok()?,
    };
    (ram.size > 0).then_some(ram)
}

/// The affinity of a node of `/cpus` that is a CPU: there are others (`cpu-map`).
fn cpu(node: FdtNode<'_>) -> Option<Mpidr> {
    let kind = node.property("device_type")?;
    if kind.value() != b"cpu\0" {
        return None;
    }
    let id = node.reg().ok()??.next()?;
    id.address().ok().map(Mpidr)
}

#[cfg(test)]
mod tests {
    use super::*;
    use dtoolkit::error::FdtErrorKind;
    use dtoolkit::model::{DeviceTree, DeviceTreeNode, DeviceTreeProperty};

    type Properties<'a> = &'a [(&'a str, &'a [u32])];

    /// A node of cells; one with `kind` says so as its `device_type`.
    fn node(
        name: &str,
        kind: &str,
        properties: Properties<'_>,
        children: Vec<DeviceTreeNode>,
    ) -> DeviceTreeNode {
        let mut node = DeviceTreeNode::new(name).expect("a name");
        if !kind.is_empty() {
            node.add_property(DeviceTreeProperty::new("device_type", kind).expect("a property"));
        }
        for (name, cells) in properties {
            let value: Vec<u8> = cells.iter().flat_map(|cell| cell.to_be_bytes()).collect();
            node.add_property(
                DeviceTreeProperty::new(*name, value.as_slice()).expect("a property"),
            );
        }
        children.into_iter().for_each(|child| node.add_child(child));
        node
    }

    fn tree(cells: u32, children: Vec<DeviceTreeNode>) -> Vec<u8> {
        let mut tree = DeviceTree::new();
        tree.root = node(
            "",
            "",
            &[("#address-cells", &[cells]), ("#size-cells", &[cells])],
            children,
        );
        tree.to_dtb()
    }

    fn cpus(cells: u32, children: Vec<DeviceTreeNode>) -> DeviceTreeNode {
        node(
            "cpus",
            "",
            &[("#address-cells", &[cells]), ("#size-cells", &[0])],
            children,
        )
    }

    fn virt() -> Vec<u8> {
        let core = node("core0", "", &[("cpu", &[1])], vec![]);
        let map = node(
            "cpu-map",
            "",
            &[],
            vec![node("cluster0", "", &[], vec![core])],
        );
        let cpu = |number: u32| {
            let cache = node("l2-cache", "", &[("reg", &[9])], vec![]);
            node(
                &format!("cpu@{number}"),
                "cpu",
                &[("reg", &[number])],
                vec![cache],
            )
        };
        tree(
            2,
            vec![
                node(
                    "memory@40000000",
                    "memory",
                    &[("reg", &[0, 0x4000_0000, 1, 0x20_0000])],
                    vec![],
                ),
                cpus(1, vec![map, cpu(0), cpu(1)]),
                node(
                    "pl011@9000000",
                    "",
                    &[("reg", &[0, 0x900_0000, 0, 0x1000])],
                    vec![],
                ),
            ],
        )
    }

    #[test]
    fn a_tree_as_virt_has_it() {
        let blob = virt();
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
        let cpu = |number: u32| {
            node(
                &format!("cpu@{number}"),
                "cpu",
                &[("reg", &[number, 7])],
                vec![],
            )
        };
        let memory = node("memory", "", &[("reg", &[0, 4096])], vec![]);
        let blob = tree(1, vec![memory, cpus(2, (0..40).map(cpu).collect())]);
        let machine = read(&blob).expect("a good tree");
        assert_eq!(machine.cpus().len(), Vcpu::MAX);
        assert_eq!(machine.cpus()[3], Mpidr(0x3_0000_0007));
    }

    #[test]
    fn what_is_missing_is_named() {
        let kind = |error| match error {
            FdtError::Broken(error) => error.kind,
            other => panic!("{other}"),
        };
        assert_eq!(total_size(&[0; 8]), Err(FdtError::Magic));
        assert_eq!(kind(read(&[]).unwrap_err()), FdtErrorKind::InvalidLength);
        assert_eq!(
            kind(read(&[0; 64]).unwrap_err()),
            FdtErrorKind::InvalidMagic
        );
        assert_eq!(read(&tree(2, vec![])), Err(FdtError::NoMemory));
        let memory = |cells: &[u32]| node("memory", "", &[("reg", cells)], vec![]);
        assert_eq!(
            read(&tree(1, vec![memory(&[1, 0])])),
            Err(FdtError::NoMemory)
        );
        assert_eq!(read(&tree(1, vec![memory(&[1, 1])])), Err(FdtError::NoCpu));
        // A count of cells that nobody has.
        assert_eq!(
            read(&tree(u32::MAX, vec![memory(&[1, 1])])),
            Err(FdtError::NoMemory)
        );
    }

    #[test]
    fn no_cut_and_no_flipped_byte_makes_it_panic() {
        let blob = virt();
        for length in 0..blob.len() {
            assert!(read(&blob[..length]).is_err(), "{length}");
        }
        for at in 0..blob.len() {
            for value in [0, 1, 0x7f, 0xff] {
                let mut bad = blob.clone();
                bad[at] = value;
                let _ = read(&bad);
            }
        }
    }
}
