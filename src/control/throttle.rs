//! The throttle: a quota of pages for each vCPU while a log is on.
//!
//! When a vCPU must wait is `tidemark_stage2::quota`'s to say. It is asked at write faults
//! (`exits::abort`) and, under DBM, for each turn on a CPU (`sched`), by what harvests found (`work`).
//! The limit is the VM's: it outlives logs, sessions and restarts, and without a log nobody waits.
//!
//! Concurrency: anyone may change a limit at any time. A vCPU that waits by the old one asks again at
//! once; one that runs is called out of its guest to ask.

use crate::arch::timer;
use crate::sched::SCHEDULER;
use crate::vm::Vm;
use tidemark_stage2::{Count, Limit, Stalls, Ticks};
use tidemark_wire::message::{self, ErrorReply};
use tidemark_wire::{QUOTA_INTERVAL_MS_MAX, QUOTA_INTERVAL_MS_MIN};

/// What harvests are measured from: a moment, and how long the VM's vCPUs had run by then in all.
#[derive(Clone, Copy, Debug)]
pub struct Mark {
    at: u64,
    ran: u64,
}

/// Notes this moment.
pub fn mark(vm: &Vm) -> Mark {
    let now = timer::now();
    let ran = |sum: u64, ran: Ticks| sum.saturating_add(ran.0);
    Mark {
        at: now,
        ran: vm
            .vcpus()
            .iter()
            .map(|vcpu| vcpu.meter.ran(Count(now)))
            .fold(0, ran),
    }
}

/// Sets or lifts a VM's quota.
///
/// # Errors
///
/// It is out of bounds.
pub fn set(vm: &'static Vm, quota: Option<message::Quota>) -> Result<(), ErrorReply> {
    let limit = match quota {
        None => None,
        Some(quota) => Some(limit(quota).ok_or(ErrorReply::BadQuota)?),
    };
    if vm.quota.limit() != limit {
        vm.quota.set(limit);
        ask_again(vm);
    }
    Ok(())
}

fn limit(quota: message::Quota) -> Option<Limit> {
    if !(QUOTA_INTERVAL_MS_MIN..=QUOTA_INTERVAL_MS_MAX).contains(&quota.interval_ms) {
        return None;
    }
    let interval = timer::ticks(u64::from(quota.interval_ms) * 1000);
    Limit::new(quota.pages.into(), Ticks(interval))
}

/// A VM's quota, as it was set.
pub fn quota(vm: &Vm) -> Option<message::Quota> {
    vm.quota.limit().map(|limit| message::Quota {
        pages: limit.pages() as u32,
        interval_ms: (timer::in_microseconds(limit.interval().0) / 1000) as u32,
    })
}

/// What the throttle has cost a VM's vCPUs.
pub fn stalls(vm: &Vm) -> Stalls {
    let (limit, now) = (vm.quota.limit(), Count(timer::now()));
    vm.vcpus()
        .iter()
        .map(|vcpu| vcpu.meter.stalls(limit, now))
        .sum()
}

/// Tells the throttle what a harvest under DBM found between two marks.
pub fn harvested(vm: &'static Vm, found: u64, from: Mark, to: Mark) {
    let before = vm.quota.duty();
    let ran = Ticks(to.ran.saturating_sub(from.ran));
    let span = Ticks(to.at.saturating_sub(from.at));
    let after = vm.quota.harvested(found, ran, span);
    // Who has turns asks at the end of each. Who has none, or needs none any more, is told.
    if before.is_some() != after.is_some() {
        ask_again(vm);
    }
}

/// A log has begun or ended: what harvests told is of no use any more, and nobody waits for it.
pub fn log_changed(vm: &'static Vm) {
    vm.quota.forget_harvests();
    ask_again(vm);
}

fn ask_again(vm: &'static Vm) {
    for vcpu in vm.vcpus() {
        SCHEDULER.ask_again(vcpu);
    }
}
