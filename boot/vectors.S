// Exception vectors of EL2, the way out of a guest and the way back in.
//
// EL2 runs with every DAIF mask set, so the only exceptions it takes from itself
// are its own mistakes: they end in `el2_exception`. From a guest, x0-x30, ELR and
// SPSR go to the Context that TPIDR_EL2's first word points to; nothing else moves
// (no HCR, VTTBR, FP or timer register is touched on this path).

.macro ventry label
    .balign 0x80
    b       \label
.endm

// The stack is at its top when a guest runs; 16 bytes of it hold x0 and x1.
.macro exit_to handler
    .balign 0x80
    stp     x0, x1, [sp, #-16]!
    mrs     x0, tpidr_el2
    ldr     x0, [x0, #{CPU_CONTEXT}]
    stp     x2, x3, [x0, #16]
    ldp     x2, x3, [sp], #16
    stp     x2, x3, [x0]
    adr     x1, \handler
    b       exit_save
.endm

.section .text.vectors, "ax"
.balign 0x800
.global vectors
vectors:
    ventry  el2_sync_sp0
    ventry  el2_irq_sp0
    ventry  el2_fiq_sp0
    ventry  el2_serror_sp0
    ventry  el2_sync
    ventry  el2_irq
    ventry  el2_fiq
    ventry  el2_serror
    exit_to guest_sync
    exit_to guest_irq
    exit_to guest_fiq
    exit_to guest_serror
    exit_to guest_aarch32
    exit_to guest_aarch32
    exit_to guest_aarch32
    exit_to guest_aarch32

.balign 64
exit_save:
    stp     x4, x5, [x0, #32]
    stp     x6, x7, [x0, #48]
    stp     x8, x9, [x0, #64]
    stp     x10, x11, [x0, #80]
    stp     x12, x13, [x0, #96]
    stp     x14, x15, [x0, #112]
    stp     x16, x17, [x0, #128]
    stp     x18, x19, [x0, #144]
    stp     x20, x21, [x0, #160]
    stp     x22, x23, [x0, #176]
    stp     x24, x25, [x0, #192]
    stp     x26, x27, [x0, #208]
    stp     x28, x29, [x0, #224]
    mrs     x2, elr_el2
    mrs     x3, spsr_el2
    stp     x30, x2, [x0, #240]
    str     x3, [x0, #256]
    mov     x29, xzr                    // a backtrace ends here
    blr     x1                          // handler(&mut Context) -> *mut Context
.global enter_guest
enter_guest:                            // x0 = Context to run; the stack is at its top
    ldp     x30, x2, [x0, #240]
    ldr     x3, [x0, #256]
    msr     elr_el2, x2
    msr     spsr_el2, x3
    ldp     x4, x5, [x0, #32]
    ldp     x6, x7, [x0, #48]
    ldp     x8, x9, [x0, #64]
    ldp     x10, x11, [x0, #80]
    ldp     x12, x13, [x0, #96]
    ldp     x14, x15, [x0, #112]
    ldp     x16, x17, [x0, #128]
    ldp     x18, x19, [x0, #144]
    ldp     x20, x21, [x0, #160]
    ldp     x22, x23, [x0, #176]
    ldp     x24, x25, [x0, #192]
    ldp     x26, x27, [x0, #208]
    ldp     x28, x29, [x0, #224]
    ldp     x2, x3, [x0, #16]
    ldp     x0, x1, [x0]
    eret
    // No speculation past the ERET (Arm ARM B2.3.10, SB without FEAT_SB).
    dsb     nsh
    isb

// The first entry of a CPU into a guest: x0 = Context, x1 = top of this CPU's stack.
.global start_guest
start_guest:
    mov     sp, x1
    b       enter_guest

// Fatal from here on, so the guest's SP_EL0 and ELR_EL1 serve as scratch: the stack
// itself may be what went wrong.
.macro fatal label, kind
\label:
    msr     sp_el0, x0
    mov     x0, sp
    msr     elr_el1, x0
    mov     x0, #\kind
    b       fatal_save
.endm
fatal el2_sync_sp0, 4
fatal el2_irq_sp0, 5
fatal el2_fiq_sp0, 6
fatal el2_serror_sp0, 7
fatal el2_sync, 0
fatal el2_irq, 1
fatal el2_fiq, 2
fatal el2_serror, 3

fatal_save:
    msr     spsr_el1, x0
    mrs     x0, tpidr_el2
    cbz     x0, 1f
    ldr     x0, [x0, #{CPU_EMERGENCY}]
    b       2f
1:  adrp    x0, __emergency_stack_top
    add     x0, x0, :lo12:__emergency_stack_top
2:  mov     sp, x0
    sub     sp, sp, #288
    stp     x2, x3, [sp, #16]
    stp     x4, x5, [sp, #32]
    stp     x6, x7, [sp, #48]
    stp     x8, x9, [sp, #64]
    stp     x10, x11, [sp, #80]
    stp     x12, x13, [sp, #96]
    stp     x14, x15, [sp, #112]
    stp     x16, x17, [sp, #128]
    stp     x18, x19, [sp, #144]
    stp     x20, x21, [sp, #160]
    stp     x22, x23, [sp, #176]
    stp     x24, x25, [sp, #192]
    stp     x26, x27, [sp, #208]
    stp     x28, x29, [sp, #224]
    mrs     x2, sp_el0
    stp     x2, x1, [sp]
    mrs     x2, elr_el2
    stp     x30, x2, [sp, #240]
    mrs     x2, spsr_el2
    mrs     x3, elr_el1
    stp     x2, x3, [sp, #256]
    mov     x0, sp
    mrs     x1, spsr_el1
    bl      el2_exception
    b       .
