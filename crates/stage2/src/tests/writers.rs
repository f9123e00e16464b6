//! A log and a device that writes by itself exclude each other.

use super::world::*;
use crate::Error;
use crate::types::*;
use std::string::ToString;

const IPA: u64 = 0x4000_0000;

#[test]
fn invariant_18_an_unseen_writer_and_a_log_exclude_each_other() {
    let world = World::new(dbm());
    world.slot(0, IPA, P2M, Access::ReadWrite, RAM);
    let stage2 = &world.stage2;
    let start = || stage2.start_log(Engine::Dbm, Granularity::Page);
    stage2.admit_unseen_writer().unwrap();
    stage2.admit_unseen_writer().unwrap();
    stage2.remove_unseen_writer();
    for refused in [
        start(),
        stage2.start_slot_log(SlotId(0), Engine::WriteProtect, Granularity::Block),
        stage2.start_log_all_dirty(Engine::Dbm, Granularity::Page),
    ] {
        assert_eq!(refused, Err(Error::LogBesideUnseenWriter));
        assert!(refused.unwrap_err().to_string().contains("SMMU"));
    }
    stage2.remove_unseen_writer();
    // From the first step of the start to the last of the stop.
    start().unwrap();
    assert_eq!(stage2.admit_unseen_writer(), Err(Error::UnseenWriterOfALog));
    world.start(Engine::Dbm, Granularity::Page);
    assert_eq!(stage2.admit_unseen_writer(), Err(Error::UnseenWriterOfALog));
    let reason = Error::UnseenWriterOfALog.to_string();
    assert!(reason.contains("SMMU") && reason.contains("stop the log"));
    assert_ne!(stage2.stop_log(), Ok(Progress::Done));
    assert_eq!(stage2.admit_unseen_writer(), Err(Error::UnseenWriterOfALog));
    world.stop();
    stage2.admit_unseen_writer().unwrap();
    assert_eq!(start(), Err(Error::LogBesideUnseenWriter));
}
