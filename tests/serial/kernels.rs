//! Kernels of every kind that QEMU's `-kernel` takes: they start, and find everything where QEMU
//! puts it.

use anyhow::{Context, Result, ensure};
use tidemark_guests::pattern::{Config, Seed};
use tidemark_tests::artifacts::Artifact;
use tidemark_tests::guests::{self, LINUX_COMMAND_LINE, LINUX_PROMPT, Mib};
use tidemark_tests::host::{Host, OracleGuest};
use tidemark_tests::kernels::{self, Segment};
use tidemark_tests::qemu::Payload;
use tidemark_tests::script::Script;

use crate::case::Case;

/// An address in RAM that no kind but ELF would choose.
const LINKED: u64 = 0x4040_0000;
const AARCH64: u16 = 183;

pub fn cases() -> Vec<Case> {
    vec![
        Case::new("kernel_gzip_linux", 120, |script| {
            linux(script, kernels::gzip(&image(Artifact::Kernel)?)?)
        }),
        Case::new("kernel_zboot_linux", 120, |script| {
            let image = image(Artifact::Kernel)?;
            let packed = kernels::gzip(&image)?;
            linux(script, kernels::zboot("gzip", &packed, image.len() as u32))
        }),
        Case::new("kernel_zboot_zstd_oracle", 60, |script| {
            let image = image(Artifact::Oracle)?;
            let packed = kernels::zstd(&image);
            oracle(script, kernels::zboot("zstd", &packed, image.len() as u32))
        }),
        Case::new("kernel_elf_oracle", 60, |script| {
            let file = image(Artifact::Oracle)?;
            let memory = u64::from_le_bytes(
                *file
                    .get(16..)
                    .and_then(|rest| rest.first_chunk())
                    .context("a header")?,
            );
            // Linked elsewhere than it is loaded, as kernels are: the entry point moves with it.
            let linked = 0xffff_8000_0000_0000;
            let segment = Segment {
                address: LINKED,
                linked,
                file,
                memory,
            };
            oracle(script, kernels::elf(AARCH64, linked, &[segment]))
        }),
        Case::new("kernel_image_where_qemu_puts_it", 60, |script| {
            // As much in memory as the initrd would like to have for itself.
            placed_as_by_qemu(script, &probe_image(0, 0x900_0000), "0000000040200000")
        }),
        Case::new(
            "kernel_image_with_text_offset_where_qemu_puts_it",
            60,
            |script| placed_as_by_qemu(script, &probe_image(0x8_0000, 0x2000), "0000000040080000"),
        ),
        Case::new("kernel_flat_where_qemu_puts_it", 60, |script| {
            placed_as_by_qemu(script, &probe(), "0000000040080000")
        }),
        Case::new("kernel_elf_where_qemu_puts_it", 60, elf_as_by_qemu),
        Case::new("kernel_elf_bss_is_zero_at_each_start", 60, bss),
        Case::new("kernel_elf_segment_at_an_odd_address", 60, odd),
    ]
}

fn image(artifact: Artifact) -> Result<Vec<u8>> {
    guests::read(&artifact.path()?)
}

/// Debian's kernel in some form, to its shell.
fn linux(script: &mut Script, kernel: Vec<u8>) -> Result<()> {
    let files = (kernel, Some(image(Artifact::Initramfs)?));
    let guest = guests::of_kernel("linux", 1, Mib(512), files, LINUX_COMMAND_LINE)?;
    let bundle = guests::pack([guest])?;
    let target = script.start_tidemark("virt", &bundle, "console=linux poweroff=idle")?;
    target
        .expect("Booting Linux")
        .context("the kernel did not start")?;
    target.booted();
    target.expect(LINUX_PROMPT).context("no shell")?;
    target.type_line("poweroff -f")?;
    target.powered_off()
}

/// The oracle in some form: it runs and takes commands.
fn oracle(script: &mut Script, kernel: Vec<u8>) -> Result<()> {
    let guest = guests::of_kernel("oracle", 1, Mib(32), (kernel, None), "")?;
    let bundle = guests::pack([guest])?;
    let target = script.start_tidemark("virt", &bundle, "")?;
    target.to_prompt()?;
    let config = Config {
        seed: Seed(5),
        vcpus: 1,
        pages: 10,
        blocks: 0,
        more: 0,
    };
    let mut guest = OracleGuest::attach(Host::connect(target)?, &config)?;
    guest.step()?;
    guest.host.finish();
    target.still_on()
}

/// A program that says where it is, what x0 is, what word is there (or at the start of RAM if x0
/// is 0), and what is 4 KiB behind its start, where it then writes a 1.
fn probe() -> Vec<u8> {
    const CODE: [u32; 36] = [
        0xaa00_03f4, // mov  x20, x0
        0x10ff_fdf5, // adr  x21, its start
        0xd2a1_2009, // mov  x9, the UART
        0x5280_6021, // mov  w1, enabled
        0xb900_3121, // str  w1, [x9, CR]
        0xaa15_03e0, // mov  x0, x21
        0x9400_0011, // bl   print
        0xaa14_03e0, // mov  x0, x20
        0x9400_000f, // bl   print
        0xaa14_03f6, // mov  x22, x20
        0xb500_0056, // cbnz x22, 1f
        0xd2a8_0016, // mov  x22, 0x40000000
        0xb940_02c0, // 1: ldr w0, [x22]
        0x9400_000a, // bl   print
        0x9140_06b6, // add  x22, x21, 4096
        0xb940_02c0, // ldr  w0, [x22]
        0x9400_0007, // bl   print
        0x5280_0021, // mov  w1, 1
        0xb900_02c1, // str  w1, [x22]
        0x5280_0141, // mov  w1, line feed
        0xb900_0121, // str  w1, [x9]
        0xd503_207f, // 2: wfi
        0x17ff_ffff, // b    2b
        0xd280_0202, // print: mov x2, 16
        0x93c0_f000, // 3: ror x0, x0, 60
        0x9240_0c01, // and  x1, x0, 15
        0x9100_c023, // add  x3, x1, '0'
        0x9101_5c24, // add  x4, x1, 'a' - 10
        0xf100_283f, // cmp  x1, 10
        0x9a84_3061, // csel x1, x3, x4, lo
        0xb900_0121, // str  w1, [x9]
        0xf100_0442, // subs x2, x2, 1
        0x54ff_ff01, // b.ne 3b
        0x5280_0401, // mov  w1, ' '
        0xb900_0121, // str  w1, [x9]
        0xd65f_03c0, // ret
    ];
    let mut bytes = 0x1400_0010u32.to_le_bytes().to_vec(); // b past the header
    bytes.resize(64, 0);
    bytes.extend(CODE.iter().flat_map(|word| word.to_le_bytes()));
    bytes
}

/// The same with an Image header.
fn probe_image(text_offset: u64, image_size: u64) -> Vec<u8> {
    let mut bytes = probe();
    for (at, value) in [(8, text_offset), (16, image_size)] {
        if let Some(place) = bytes.get_mut(at..at + 8) {
            place.copy_from_slice(&value.to_le_bytes());
        }
    }
    if let Some(place) = bytes.get_mut(0x38..0x3c) {
        place.copy_from_slice(b"ARM\x64");
    }
    bytes
}

fn probe_elf() -> Vec<u8> {
    let segment = Segment {
        address: LINKED,
        linked: LINKED,
        file: probe(),
        memory: 0x2000,
    };
    kernels::elf(AARCH64, LINKED, &[segment])
}

const MACHINE: &str = "bare-smp1";
const MEMORY: Mib = Mib(512);
/// A devicetree's first word, as it is read.
const MAGIC: &str = "00000000edfe0dd0";

/// What the probe says under QEMU itself.
fn under_qemu(script: &Script, kernel: &[u8], initrd: Option<&[u8]>) -> Result<Vec<String>> {
    let mut bare = Script::new("tests", &format!("{}_bare", script.name()), script.clocks())?;
    let said = (|| {
        let file = bare.path("kernel")?;
        std::fs::write(&file, kernel)?;
        let mut payload = Payload::kernel(file);
        if let Some(initrd) = initrd {
            let file = bare.path("initrd")?;
            std::fs::write(&file, initrd)?;
            payload = payload.initrd(file);
        }
        let target = bare.start(MACHINE, &payload)?;
        Ok(words(&target.rest_of_line()?))
    })();
    match said {
        Ok(said) => bare.conclude(Ok(())).map(|()| said),
        Err(error) => Err(bare.conclude(Err(error)).err().context("it failed")?),
    }
}

fn words(line: &str) -> Vec<String> {
    line.split_whitespace().map(str::to_owned).collect()
}

/// What the probe says as a guest, at its start and after a restart.
fn under_tidemark(
    script: &mut Script,
    kernel: &[u8],
    initrd: Option<&[u8]>,
) -> Result<[Vec<String>; 2]> {
    let files = (kernel.to_vec(), initrd.map(<[u8]>::to_vec));
    let bundle = guests::pack([guests::of_kernel("probe", 1, MEMORY, files, "")?])?;
    let target = script.start_tidemark("virt", &bundle, "")?;
    target.to_prompt()?;
    let mut host = Host::connect(target)?;
    let vm = host.vm("probe")?;
    host.attach(vm)?;
    let first = words(&host.expect(vm, "\n")?);
    host.client().reset(vm)?;
    let second = words(&host.expect(vm, "\n")?);
    host.finish();
    target.still_on()?;
    Ok([first, second])
}

/// The same place, the same x0, a devicetree there.
fn placed_as_by_qemu(script: &mut Script, kernel: &[u8], place: &str) -> Result<()> {
    let initrd = vec![0x5a; 3 << 20];
    let expected = under_qemu(script, kernel, Some(&initrd))?;
    ensure!(
        expected.first().is_some_and(|at| at == place)
            && expected.get(2).is_some_and(|word| word == MAGIC),
        "under QEMU it says {expected:?}"
    );
    let [first, second] = under_tidemark(script, kernel, Some(&initrd))?;
    ensure!(
        first == expected,
        "under QEMU it says {expected:?}, here {first:?}"
    );
    ensure!(
        second.get(..3) == expected.get(..3),
        "after a restart it says {second:?}"
    );
    Ok(())
}

/// QEMU leaves x0 at 0 for an ELF file; here it leads to the devicetree, which is in the same place.
fn elf_as_by_qemu(script: &mut Script) -> Result<()> {
    let expected = under_qemu(script, &probe_elf(), None)?;
    let [mut first, _] = under_tidemark(script, &probe_elf(), None)?;
    let x0 = first.get_mut(1).context("it says x0")?;
    ensure!(x0.as_str() == "0000000040000000", "x0 is {x0}");
    *x0 = "0".repeat(16);
    ensure!(
        first == expected && expected.get(2).is_some_and(|word| word == MAGIC),
        "under QEMU it says {expected:?}, here {first:?}"
    );
    Ok(())
}

/// What the program wrote past its file's end is zero again after a restart.
fn bss(script: &mut Script) -> Result<()> {
    let said = under_tidemark(script, &probe_elf(), None)?;
    for said in said {
        let word = said.get(3).context("it says what is in its BSS")?;
        ensure!(word.bytes().all(|digit| digit == b'0'), "BSS holds {word}");
    }
    Ok(())
}

/// A segment that neither begins nor ends at a word's edge takes no byte but its own.
fn odd(script: &mut Script) -> Result<()> {
    let code = Segment {
        address: LINKED,
        linked: LINKED,
        file: probe(),
        memory: probe().len() as u64,
    };
    let data = Segment {
        address: LINKED + 0x1001,
        linked: LINKED + 0x1001,
        file: vec![0x11, 0x22, 0x33],
        memory: 0x10,
    };
    let elf = kernels::elf(AARCH64, LINKED, &[code, data]);
    let qemu = under_qemu(script, &elf, None)?;
    let [first, second] = under_tidemark(script, &elf, None)?;
    let word = |said: &[String]| said.get(3).cloned().unwrap_or_default();
    // The byte below it is the program's: it stored a 1 over all four.
    let said = [word(&qemu), word(&first), word(&second)];
    let wanted = ["0000000033221100", "0000000033221100", "0000000033221101"];
    ensure!(said == wanted, "in QEMU, first and then: {said:?}");
    Ok(())
}
