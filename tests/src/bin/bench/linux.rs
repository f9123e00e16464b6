//! How long Linux takes from its start to `/init`, with Tidemark under it and with
//! nothing under it.
//!
//! Like for like: the machine without a hypervisor gets the very devicetree that the
//! guest saw (read out of the guest), so the kernel probes the same devices; the same
//! command line, memory, initramfs and CPU model (less what Tidemark hides, as far as QEMU can: see
//! `qemu/bare-*.toml`). The time is the guest's own counter,
//! which starts at zero with the guest; `/init` prints it as its first act.

use anyhow::{Context, Result, ensure};
use tidemark_tests::artifacts::Artifact;
use tidemark_tests::clocks::Clocks;
use tidemark_tests::guests::{self, LINUX_COMMAND_LINE, LINUX_PROMPT, Mib};
use tidemark_tests::host::Host;
use tidemark_tests::qemu::Payload;
use tidemark_tests::rows::{Report, parse_counter};
use tidemark_tests::script::Script;
use tidemark_tests::target::Target;

/// Counted boots of each kind; medians are taken. Counting instructions
/// does not make a Linux boot repeat: KASLR and the time of day differ, about one in a
/// hundred from boot to boot.
const BOOTS: usize = 3;

/// And boots by the wall, of which one takes half as long again as another: medians of seven gave ratios from 0.96 to
/// 1.25 for one image, two of fifteen 1.03 and 1.09.
const BOOTS_BY_THE_WALL: usize = 15;

const MEMORY: Mib = Mib(512);

/// Measures all rows about booting Linux.
pub fn measure(report: &mut Report) -> Result<()> {
    let mut devicetree = Vec::new();
    let (mut counts, mut bare_counts, mut exits) = (Vec::new(), Vec::new(), Vec::new());
    let (mut walls, mut bare_walls) = (Vec::new(), Vec::new());
    for round in 1..=BOOTS {
        // In turn, so that a machine that gets slower meanwhile slows both.
        let boot = tidemark(&format!("linux-icount-{round}"), "virt-smp1-icount")?;
        counts.push(boot.counter.instructions());
        exits.push(boot.exits as f64);
        devicetree = boot.devicetree;
        let counter = bare(
            &format!("bare-icount-{round}"),
            "bare-smp1-icount",
            &devicetree,
        )?;
        bare_counts.push(counter.instructions());
    }
    for round in 1..=BOOTS_BY_THE_WALL {
        let under = || tidemark(&format!("linux-wall-{round}"), "virt-smp1");
        let bare = || bare(&format!("bare-wall-{round}"), "bare-smp1", &devicetree);
        // Each goes first as often as the other.
        let (boot, counter) = if round % 2 == 0 {
            let counter = bare()?;
            (under()?, counter)
        } else {
            (under()?, bare()?)
        };
        walls.push(boot.counter.seconds());
        bare_walls.push(counter.seconds());
    }
    let by_round = walls.iter().zip(&bare_walls);
    let by_round: Vec<f64> = by_round.map(|(wall, bare)| wall / bare).collect();
    eprintln!(
        "bench: counted boots {counts:.0?}, bare {bare_counts:.0?}; seconds {walls:.2?}, bare {bare_walls:.2?}, \
         by round {by_round:.2?}, the middle one {:.3}",
        median(&mut by_round.clone())?
    );
    let (count, bare_count) = (median(&mut counts)?, median(&mut bare_counts)?);
    report.add("linux_boot", count)?;
    report.add("linux_boot_bare", bare_count)?;
    report.add("linux_boot_ratio", count / bare_count)?;
    // A ratio near one is believable only beside how often the guest did leave for EL2.
    report.add("linux_boot_exits", median(&mut exits)?)?;
    let (wall, bare_wall) = (median(&mut walls)?, median(&mut bare_walls)?);
    report.add("linux_boot_wall", wall)?;
    report.add("linux_boot_wall_bare", bare_wall)?;
    report.add("linux_boot_wall_ratio", wall / bare_wall)
}

/// What one boot under Tidemark told.
struct Boot {
    counter: Counter,
    devicetree: Vec<u8>,
    exits: u64,
}

/// A counter and its frequency as `/init` printed them.
#[derive(Clone, Copy, Debug)]
struct Counter {
    ticks: u64,
    frequency: u64,
}

impl Counter {
    fn seconds(self) -> f64 {
        self.ticks as f64 / self.frequency as f64
    }

    /// Under `-icount shift=0` an instruction takes a nanosecond.
    fn instructions(self) -> f64 {
        self.seconds() * 1e9
    }
}

/// Boots Linux under Tidemark; returns its time, the devicetree it saw, and how often it
/// left for EL2 on the way.
fn tidemark(name: &str, machine: &str) -> Result<Boot> {
    run(name, |script| {
        let bundle = guests::pack([guests::linux("linux", 1, MEMORY)?])?;
        let target = script.start_tidemark(machine, &bundle, "console=linux poweroff=idle")?;
        let counter = to_init(target)?;
        let mut host = Host::connect(target)?;
        let vm = host.vm("linux")?;
        let exits = host.info(vm)?.counters.exits;
        host.finish();
        let devicetree = read_devicetree(target)?;
        target.type_line("poweroff -f")?;
        target.powered_off()?;
        Ok(Boot {
            counter,
            devicetree,
            exits,
        })
    })
}

/// Boots Linux with no hypervisor on the devices of `devicetree`.
fn bare(name: &str, machine: &str, devicetree: &[u8]) -> Result<Counter> {
    run(name, |script| {
        let path = script.path("guest.dtb")?;
        std::fs::write(&path, devicetree)?;
        let payload = Payload::kernel(Artifact::Kernel.path()?)
            .initrd(Artifact::Initramfs.path()?)
            .append(LINUX_COMMAND_LINE)
            .devicetree(path);
        let target = script.start(machine, &payload)?;
        let counter = to_init(target)?;
        target.type_line("poweroff -f")?;
        target.ended()?;
        Ok(counter)
    })
}

fn run<T>(name: &str, body: impl FnOnce(&mut Script) -> Result<T>) -> Result<T> {
    eprintln!("bench: {name}");
    // Counting instructions is slower than the wall clocks of the tests assume.
    let clocks = Clocks::usual()
        .with_boot(60)
        .with_silence(30)
        .with_total(240);
    let mut script = Script::new("bench", name, clocks)?;
    let (value, result) = match body(&mut script) {
        Ok(value) => (Some(value), Ok(())),
        Err(error) => (None, Err(error)),
    };
    script.conclude(result)?;
    value.context("no value")
}

/// Waits for `/init` to say the time, and for its shell.
fn to_init(target: &mut Target) -> Result<Counter> {
    target
        .expect("Booting Linux")
        .context("the kernel did not start")?;
    target.booted();
    target
        .expect("cntvct=")
        .context("/init did not say the time")?;
    let line = format!("cntvct={}", target.rest_of_line()?);
    let (ticks, frequency) =
        parse_counter(&line).with_context(|| format!("/init said `{line}`"))?;
    ensure!(ticks > 0 && frequency > 0, "/init said `{line}`");
    target.expect(LINUX_PROMPT).context("no shell")?;
    Ok(Counter { ticks, frequency })
}

/// Reads the devicetree that the guest was given.
fn read_devicetree(target: &Target) -> Result<Vec<u8>> {
    const MAGIC: [u8; 4] = [0xd0, 0x0d, 0xfe, 0xed];
    target.type_line("base64 /sys/firmware/fdt; echo the $((40 + 2)) end")?;
    let said = target.expect("the 42 end")?;
    target.expect(LINUX_PROMPT)?;
    let text = said.split_once('\n').map_or("", |(_, said)| said);
    let bytes = decode_base64(text).context("the guest's devicetree in base64")?;
    ensure!(
        bytes.starts_with(&MAGIC),
        "what the guest calls its devicetree is none"
    );
    Ok(bytes)
}

/// Base64 as `busybox base64` writes it. A dependency for these lines would be more to
/// read than they are.
fn decode_base64(text: &str) -> Option<Vec<u8>> {
    let mut out = Vec::new();
    let (mut bits, mut held) = (0u32, 0);
    for byte in text.bytes().filter(|byte| !byte.is_ascii_whitespace()) {
        let value = match byte {
            b'A'..=b'Z' => byte - b'A',
            b'a'..=b'z' => byte - b'a' + 26,
            b'0'..=b'9' => byte - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            b'=' => break,
            _ => return None,
        };
        bits = bits << 6 | u32::from(value);
        held += 6;
        if held >= 8 {
            held -= 8;
            out.push((bits >> held) as u8);
            bits &= (1 << held) - 1;
        }
    }
    Some(out)
}

fn median(values: &mut [f64]) -> Result<f64> {
    values.sort_by(f64::total_cmp);
    values
        .get(values.len() / 2)
        .copied()
        .context("nothing was measured")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_is_undone() {
        assert_eq!(
            decode_base64("AP//\nEA==").as_deref(),
            Some(&[0, 255, 255, 16][..])
        );
        assert_eq!(decode_base64("aGVsbG8=").as_deref(), Some(&b"hello"[..]));
        assert_eq!(decode_base64("a*b"), None);
    }

    #[test]
    fn the_median_is_in_the_middle() {
        assert!((median(&mut [3.0, 1.0, 2.0]).expect("some") - 2.0).abs() < 1e-9);
        assert!(median(&mut []).is_err());
    }
}
