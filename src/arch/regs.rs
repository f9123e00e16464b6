//! System registers that `aarch64-cpu` does not have, with the same traits.

macro_rules! register {
    ($(#[$doc:meta])* $name:ident = $asm:literal) => {
        $(#[$doc])*
        pub const $name: system::$name = system::$name;
    };
}

macro_rules! registers {
    ($($(#[$doc:meta])* $name:ident = $asm:literal;)*) => {
        mod system {
            use core::arch::asm;
            use tock_registers::interfaces::{Readable, Writeable};
            $(
                #[allow(non_camel_case_types)]
                #[derive(Clone, Copy)]
                pub struct $name;
                impl Readable for $name {
                    type T = u64;
                    type R = ();
                    #[inline(always)]
                    fn get(&self) -> u64 {
                        let value;
                        // SAFETY: reading this register at EL2 has no effect on memory;
                        // the acknowledge registers change only the GIC's own state.
                        unsafe { asm!(concat!("mrs {}, ", $asm), out(reg) value, options(nostack)) };
                        value
                    }
                }
                impl Writeable for $name {
                    type T = u64;
                    type R = ();
                    #[inline(always)]
                    fn set(&self, value: u64) {
                        // SAFETY: no register of this list holds an address that EL2
                        // itself translates or jumps through.
                        unsafe { asm!(concat!("msr ", $asm, ", {}"), in(reg) value, options(nostack)) };
                    }
                }
            )*
        }
        $(register!($(#[$doc])* $name = $asm);)*
    };
}

registers! {
    /// Interrupt acknowledge, group 1.
    ICC_IAR1_EL1 = "icc_iar1_el1";
    /// End of interrupt (priority drop), group 1.
    ICC_EOIR1_EL1 = "icc_eoir1_el1";
    /// Deactivate an interrupt.
    ICC_DIR_EL1 = "icc_dir_el1";
    /// Priority mask.
    ICC_PMR_EL1 = "icc_pmr_el1";
    /// Binary point, group 1.
    ICC_BPR1_EL1 = "icc_bpr1_el1";
    /// Group 1 enable.
    ICC_IGRPEN1_EL1 = "icc_igrpen1_el1";
    /// Which list registers hold nothing, one bit each.
    ICH_ELRSR_EL2 = "ich_elrsr_el2";
    /// Software-generated interrupt, group 1.
    ICC_SGI1R_EL1 = "icc_sgi1r_el1";
    /// CPU interface control.
    ICC_CTLR = "icc_ctlr_el1";
    /// Virtual MPIDR.
    VMPIDR_EL2 = "vmpidr_el2";
    /// Virtual MIDR.
    VPIDR_EL2 = "vpidr_el2";
    /// Traps of AArch32 system registers.
    HSTR_EL2 = "hstr_el2";
    /// Auxiliary control.
    HACR_EL2 = "hacr_el2";
    /// Extended hypervisor configuration (FEAT_HCX).
    HCRX_EL2 = "s3_4_c1_c2_2";
    /// Fine-grained read traps (FEAT_FGT).
    FG_READ = "s3_4_c1_c1_4";
    /// Fine-grained write traps (FEAT_FGT).
    FG_WRITE = "s3_4_c1_c1_5";
    /// Fine-grained instruction traps (FEAT_FGT).
    FG_INSTRUCTION = "s3_4_c1_c1_6";
    /// Fine-grained debug read traps (FEAT_FGT).
    FG_DEBUG_READ = "s3_4_c3_c1_4";
    /// Fine-grained debug write traps (FEAT_FGT).
    FG_DEBUG_WRITE = "s3_4_c3_c1_5";
    /// Fine-grained activity monitor traps (FEAT_FGT, FEAT_AMUv1).
    FG_ACTIVITY = "s3_4_c3_c1_6";
    /// Fine-grained read traps, second set (FEAT_FGT2).
    FG2_READ = "s3_4_c3_c1_2";
    /// Fine-grained write traps, second set (FEAT_FGT2).
    FG2_WRITE = "s3_4_c3_c1_3";
    /// Fine-grained instruction traps, second set (FEAT_FGT2).
    FG2_INSTRUCTION = "s3_4_c3_c1_7";
    /// Fine-grained debug read traps, second set (FEAT_FGT2).
    FG2_DEBUG_READ = "s3_4_c3_c1_0";
    /// Fine-grained debug write traps, second set (FEAT_FGT2).
    FG2_DEBUG_WRITE = "s3_4_c3_c1_1";
    /// Memory partitioning of EL2, with the traps of EL1's (FEAT_MPAM).
    MPAM2_EL2 = "s3_4_c10_c5_0";
    /// Virtual deferred interrupt status (FEAT_RAS).
    VDISR_EL2 = "s3_4_c12_c1_1";
    /// Virtual SError syndrome (FEAT_RAS).
    VSESR_EL2 = "s3_4_c5_c2_3";
    /// System register interface of EL1.
    ICC_SRE_EL1 = "icc_sre_el1";
    /// EL2 physical timer, compare value.
    CNTHP_CVAL_EL2 = "cnthp_cval_el2";
    /// EL2 physical timer, control.
    CNTHP_CTL = "cnthp_ctl_el2";
    /// Memory model features 2.
    ID_MMFR2 = "id_aa64mmfr2_el1";
    /// Cache type.
    CTR_EL0 = "ctr_el0";
    /// Performance monitors control.
    PMCR_EL0 = "pmcr_el0";
    /// Pending physical interrupts.
    ISR_EL1 = "isr_el1";
    /// Monitor debug configuration.
    MDCR_EL2 = "mdcr_el2";
    /// OS lock.
    OSLAR_EL1 = "oslar_el1";
    /// OS double lock.
    OSDLR_EL1 = "osdlr_el1";
}
