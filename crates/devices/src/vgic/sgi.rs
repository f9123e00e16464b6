//! SGIs: decoding what a guest wrote to an ICC_SGI register, and the fast way to the targets.
//!
//! One `fetch_or` a target, no lock: see the parent's section on concurrency.

use core::sync::atomic::Ordering;

use super::{Kick, SgiRegister, Vgic};
use crate::{MAX_VCPUS, VcpuIndex};

/// Aff3 (55:48), RS (47:44), Aff2 (39:32) and Aff1 (23:16), all 0 for every vCPU there is.
const OTHER_AFFINITY: u64 = 0x00ff_f0ff_00ff_0000;
const ROUTING_MODE: u64 = 1 << 40;
const INTID_SHIFT: u32 = 24;
const TARGETS: u32 = (1 << MAX_VCPUS) - 1;

impl Vgic {
    /// Sends the SGI a guest asked for by writing `value` to `register`.
    ///
    /// With one security state SGI1R reaches an SGI of either group, SGI0R and ASGI1R one that its target has in group 0.
    #[inline]
    pub fn sgi(&self, from: VcpuIndex, value: u64, register: SgiRegister) -> Kick {
        let mut targets = if value & ROUTING_MODE != 0 {
            !Kick::one(from).mask()
        } else if value & OTHER_AFFINITY == 0 {
            value as u32 & TARGETS
        } else {
            0
        };
        targets &= self.all().mask();
        let bit = 1u32 << (value >> INTID_SHIFT & 15);
        if register != SgiRegister::Group1 {
            targets = self.in_group0(targets, bit);
        }
        let kick = Kick(targets);
        self.post(kick, u64::from(bit));
        kick
    }

    /// Keeps those targets that have the interrupt in group 0.
    fn in_group0(&self, targets: u32, bit: u32) -> u32 {
        Kick(targets)
            .iter()
            .filter(|target| {
                let bank = self.bank(*target);
                bank.is_some_and(|bank| bank.private.lock().word.group1 & bit == 0)
            })
            .fold(Kick::NONE, |kick, target| kick.union(Kick::one(target)))
            .mask()
    }

    /// Gives the private interrupts mailed to a vCPU and not looked at yet.
    pub(super) fn mailed(&self, vcpu: VcpuIndex) -> u32 {
        self.bank(vcpu)
            .map_or(0, |bank| bank.mail.load(Ordering::SeqCst) as u32)
    }
}
