//! Accesses to the emulated devices.

use super::{Effects, external, instruction};
use crate::arch::el1;
use crate::arch::exception::Syndrome;
use crate::arch::timer::{self, NEVER};
use crate::vm::flash::{Answer, FlashError, Wanted};
use crate::vm::memory::ERASED;
use crate::vm::vcpu::Vcpu;
use crate::vm::{Vm, count, unix_time};
use core::sync::atomic::Ordering::*;
use tidemark_devices::AccessSize;
use tidemark_devices::pl011::Pl011;
use tidemark_devices::pl031::{Pl031, UnixSeconds};
use tidemark_devices::vgic::{Frame, Kick};
use tidemark_devices::virt::{self, Device, RTC_INTERRUPT, UART_INTERRUPT};
use tidemark_stage2::FaultAccess;

/// It is an access by a walk of stage 1 (data abort ISS).
const S1PTW: u64 = 1 << 7;
/// It is a store.
const WRITE: u64 = 1 << 6;

/// Does what a load or store to a device says (data abort ISS: SAS, SSE, SRT, SF, WnR).
#[inline(never)]
pub fn access(vcpu: &'static Vcpu, syndrome: Syndrome, device: Device) -> Effects {
    if matches!(device, Device::FwCfg(_)) && vcpu.vm.fw_cfg.is_none() {
        external::abort(vcpu, syndrome);
        return Effects::NONE;
    }
    let size = AccessSize::from_sas(syndrome.0 >> 22);
    begin(vcpu);
    if syndrome.0 & WRITE != 0 {
        return write(vcpu, device, size, operand(vcpu, syndrome, size));
    }
    let (value, effects) = read(vcpu, device, size);
    set_operand(vcpu, syndrome, size, value);
    effects
}

/// One access: takes a store's value, gives a load's.
#[inline(always)]
fn one(
    vcpu: &'static Vcpu,
    device: Device,
    size: AccessSize,
    value: Option<u64>,
) -> (u64, Effects) {
    match value {
        Some(value) => (0, write(vcpu, device, size, value)),
        None => read(vcpu, device, size),
    }
}

/// What a load or store to flash is that no syndrome tells more of than `access`.
fn flash_wanted(vcpu: &Vcpu, syndrome: Syndrome, access: FaultAccess) -> Wanted {
    const VALID: u64 = 1 << 24;
    // The order of a big-endian guest's bytes is the instruction's affair.
    let big_endian = el1::is_big_endian(vcpu.context.pstate());
    if access == FaultAccess::Execute || big_endian || syndrome.0 & (VALID | S1PTW) != VALID {
        return Wanted::Other(access);
    }
    let size = AccessSize::from_sas(syndrome.0 >> 22);
    match access {
        FaultAccess::Write => Wanted::Store(size, operand(vcpu, syndrome, size)),
        _ => Wanted::Load(size),
    }
}

/// Does an access to flash, on the page at `page`, that stage 2 does not let through: by the syndrome or, if that says
/// too little, by the instruction.
///
/// # Errors
///
/// The VM cannot go on.
pub fn flash(
    vcpu: &'static Vcpu,
    syndrome: Syndrome,
    page: u64,
    access: FaultAccess,
) -> Result<(), FlashError> {
    let ipa = page | el1::far() & 0xfff;
    // Without firmware in it a bank is erased, and nothing changes that.
    let mut bank = match &vcpu.vm.flash {
        Some(flash) => Some(flash.open(&vcpu.vm.memory, ipa)?),
        None => None,
    };
    let mut answer = |ipa, wanted| match (&mut bank, wanted) {
        (Some(bank), _) => bank.access(ipa, wanted),
        (None, Wanted::Other(_)) => Ok(Answer::Nothing),
        (None, _) => Ok(Answer::Done(ERASED)),
    };
    match answer(ipa, flash_wanted(vcpu, syndrome, access))? {
        Answer::Done(value) => {
            let size = AccessSize::from_sas(syndrome.0 >> 22);
            begin(vcpu);
            if access != FaultAccess::Write {
                set_operand(vcpu, syndrome, size, value);
            }
            return Ok(());
        }
        Answer::Again => return Ok(()),
        Answer::Nothing => {}
    }
    if access == FaultAccess::Execute || syndrome.0 & S1PTW != 0 {
        external::abort(vcpu, syndrome);
        return Ok(());
    }
    let mut failed = None;
    instruction::access(vcpu, syndrome, page, |ipa, size, value| {
        let wanted = value.map_or(Wanted::Load(size), |value| Wanted::Store(size, value));
        match answer(ipa, wanted) {
            Ok(Answer::Done(value)) => value,
            // Its slot was seen to above, and nobody came between.
            Ok(Answer::Again | Answer::Nothing) => ERASED,
            Err(error) => {
                failed = Some(error);
                ERASED
            }
        }
    });
    failed.map_or(Ok(()), Err)
}

/// What a store puts there.
fn operand(vcpu: &Vcpu, syndrome: Syndrome, size: AccessSize) -> u64 {
    let register = (syndrome.0 >> 16 & 0x1f) as usize;
    let bits = 8 * size.bytes() as u32;
    vcpu.context.x(register) & (u64::MAX >> (64 - bits))
}

/// Gives a load what it reads.
#[inline(always)]
fn set_operand(vcpu: &Vcpu, syndrome: Syndrome, size: AccessSize, value: u64) {
    let register = (syndrome.0 >> 16 & 0x1f) as usize;
    vcpu.context.set_x(register, extend(value, size, syndrome));
}

/// What answers at `ipa` that is not memory. A page may hold less than a page of it.
pub fn at(vm: &Vm, ipa: u64) -> Option<Device> {
    virt::decode(ipa).filter(|device| !matches!(device, Device::FwCfg(_)) || vm.fw_cfg.is_some())
}

/// Before the accesses of a load that had no syndrome, from `device` on: those from the interrupt controller are made with
/// what is known of list registers after this. To ask each time would be up to 16 syncs of this CPU's, and as many interrupts to
/// others, in one exit.
#[inline(never)]
pub fn prepare_load(vcpu: &'static Vcpu, device: Device) -> Effects {
    match device {
        Device::Gic(frame, offset) => Effects::kick(refresh(vcpu, frame, offset)),
        _ => Effects::NONE,
    }
}

/// One access of an instruction that had no syndrome: takes a store's value, gives a load's.
///
/// What is 64 bits wide is two accesses to a device whose registers have 32, as on QEMU and on such a bus.
#[inline(never)]
pub fn bus(vcpu: &'static Vcpu, ipa: u64, size: AccessSize, value: Option<u64>) -> (u64, Effects) {
    let Some(device) = virt::decode(ipa) else {
        return (ERASED, Effects::NONE);
    };
    match device {
        Device::Gic(frame, offset) if value.is_none() => {
            let value = vcpu.vm.vgic.mmio_read(vcpu.index, frame, offset, size);
            (value, Effects::NONE)
        }
        Device::Gic(..) | Device::FwCfg(_) => one(vcpu, device, size, value),
        _ if size == AccessSize::Double => {
            let (low, first) = one(
                vcpu,
                device,
                AccessSize::Word,
                value.map(|value| value & 0xffff_ffff),
            );
            let (high, second) = bus(
                vcpu,
                ipa + 4,
                AccessSize::Word,
                value.map(|value| value >> 32),
            );
            (low & 0xffff_ffff | high << 32, first.and(second))
        }
        _ => one(vcpu, device, size, value),
    }
}

/// Steps over a load or store, and counts it.
#[inline(always)]
fn begin(vcpu: &Vcpu) {
    count(&vcpu.vm.counters.mmio);
    vcpu.context.skip_instruction();
}

/// What a load of `size` leaves in its register (ISS.SSE and ISS.SF).
fn extend(value: u64, size: AccessSize, syndrome: Syndrome) -> u64 {
    const SIGN_EXTEND: u64 = 1 << 21;
    const WIDE: u64 = 1 << 15;
    let unused = 64 - 8 * size.bytes() as u32;
    let value = if syndrome.0 & SIGN_EXTEND != 0 {
        ((value << unused) as i64 >> unused) as u64
    } else {
        value << unused >> unused
    };
    if syndrome.0 & WIDE != 0 {
        value
    } else {
        value & 0xffff_ffff
    }
}

/// Has those vCPUs tell what is in their list registers that a read there is about: this one at once, the others are to be
/// kicked.
#[inline(always)]
fn refresh(vcpu: &'static Vcpu, frame: Frame, offset: u64) -> Kick {
    let stale = vcpu.vm.vgic.refresh(frame, offset);
    if stale.is_none() {
        return Kick::NONE;
    }
    vcpu.sync().union(stale.without(vcpu.index))
}

// Always a part of its two callers: the way of an access with a syndrome is the frequent one, and makes no call.
#[inline(always)]
fn read(vcpu: &'static Vcpu, device: Device, size: AccessSize) -> (u64, Effects) {
    let vm = vcpu.vm;
    match device {
        Device::Gic(frame, offset) => {
            let kick = refresh(vcpu, frame, offset);
            let value = vm.vgic.mmio_read(vcpu.index, frame, offset, size);
            (value, Effects::kick(kick))
        }
        Device::Uart(offset) => {
            let (value, kick) = with_uart(vm, |uart| uart.read(offset & !3));
            (u64::from(value), Effects::kick(kick))
        }
        Device::Rtc(offset) => {
            let (value, effects) = with_clock(vm, |clock, now| clock.read(offset & !3, now));
            (u64::from(value), effects)
        }
        Device::FwCfg(offset) => {
            let fw_cfg = vm.fw_cfg.as_ref();
            let value = fw_cfg.map_or(0, |fw_cfg| fw_cfg.lock().read(offset, size));
            (value, Effects::NONE)
        }
        // A transport with no device: virtio 1.2, 4.2.3.1: device id 0 is to be ignored.
        Device::Virtio(_, 0x000) => (0x7472_6976, Effects::NONE),
        Device::Virtio(_, 0x004) => (2, Effects::NONE),
        Device::Virtio(..) => (0, Effects::NONE),
    }
}

#[inline(always)]
fn write(vcpu: &'static Vcpu, device: Device, size: AccessSize, value: u64) -> Effects {
    let vm = vcpu.vm;
    match device {
        Device::Gic(frame, offset) => {
            Effects::kick(vm.vgic.mmio_write(vcpu.index, frame, offset, size, value))
        }
        Device::Uart(offset) => {
            // Kept before anyone hears of the interrupt, which another vCPU may take for leave to write the next.
            let (output, kick) = with_uart(vm, |uart| {
                let byte = uart.write(offset & !3, value as u32)?;
                vm.console.put(byte);
                Some(())
            });
            match output {
                Some(()) => Effects::kick(kick).with_output(),
                None => Effects::kick(kick),
            }
        }
        Device::Rtc(offset) => {
            let ((), effects) = with_clock(vm, |clock, now| {
                clock.write(offset & !3, value as u32, now);
            });
            effects
        }
        Device::FwCfg(offset) => {
            if let Some(fw_cfg) = &vm.fw_cfg {
                fw_cfg.lock().write(offset, size, value);
            }
            Effects::NONE
        }
        Device::Virtio(..) => Effects::NONE,
    }
}

/// Does something with a VM's UART, and tells the interrupt controller its line if that changed. Under the UART's lock
/// to the end: two CPUs must not tell their levels in the wrong order.
#[inline(always)]
fn with_uart<T>(vm: &Vm, action: impl FnOnce(&mut Pl011) -> T) -> (T, Kick) {
    let mut uart = vm.uart.lock();
    let room = uart.rx_room();
    let value = action(&mut uart);
    if uart.rx_room() > room {
        // What is typed while there is room does not wait: only what makes more of it has to look.
        receive(vm, &mut uart);
    }
    let kick = match uart.irq_change() {
        Some(level) => vm.vgic.set_spi_level(UART_INTERRUPT, level),
        None => Kick::NONE,
    };
    (value, kick)
}

/// Moves typed bytes into the guest's FIFO, as far as there is room.
#[inline(never)]
fn receive(vm: &Vm, uart: &mut Pl011) {
    while uart.rx_room() > 0 {
        let Some(byte) = vm.console.next_input() else {
            break;
        };
        // There is room.
        let _ = uart.push_rx(byte);
    }
}

/// Does something with a VM's clock, and tells the interrupt controller its line. Under the
/// clock's lock to the end, for the same reason.
///
/// While an alarm is set the clock is looked at each second, its resolution. Waking at the
/// alarm's own second was rejected: a guest that sets another one all the time would have the
/// watching CPU interrupted each time, whomever it runs.
#[inline(always)]
fn with_clock<T>(vm: &Vm, action: impl FnOnce(&mut Pl031, UnixSeconds) -> T) -> (T, Effects) {
    let mut clock = vm.clock.lock();
    let second = timer::seconds();
    let now = unix_time(second);
    let value = action(&mut clock, now);
    let sets = clock.next_alarm(now).is_some() && vm.alarm.load(Relaxed) == NEVER;
    if sets {
        vm.alarm.store(timer::count_at(second + 1), Relaxed);
    }
    let effects = Effects::kick(vm.vgic.set_spi_level(RTC_INTERRUPT, clock.irq_level()));
    match sets {
        true => (value, effects.with_alarm()),
        false => (value, effects),
    }
}

/// A second has begun in which a VM's alarm may be due.
pub fn alarm(vm: &Vm) -> Effects {
    let ((), effects) = with_clock(vm, |clock, now| {
        vm.alarm.store(NEVER, Relaxed);
        clock.tick(now);
    });
    effects
}

/// Puts the devices into the state of a machine that was just switched on, their lines too.
pub fn reset(vm: &Vm) {
    // Nobody is to be told: no vCPU runs. In one step, or a part of what is typed meanwhile would go.
    let ((), _) = with_uart(vm, |uart| {
        vm.console.forget_input();
        uart.reset();
    });
    if let Some(flash) = &vm.flash {
        flash.reset();
    }
    if let Some(fw_cfg) = &vm.fw_cfg {
        fw_cfg.lock().reset();
    }
    let mut clock = vm.clock.lock();
    *clock = Pl031::new();
    vm.alarm.store(NEVER, Relaxed);
    let _ = vm.vgic.set_spi_level(RTC_INTERRUPT, clock.irq_level());
}

/// Input came for a guest: its FIFO is filled and its interrupt raised, from any CPU.
pub fn input_arrived(vm: &Vm) -> Kick {
    let ((), kick) = with_uart(vm, |uart| receive(vm, uart));
    kick
}
