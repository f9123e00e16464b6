// The arm64 Image header and the way from firmware into Rust.
//
// Entered as Linux's boot protocol says (Documentation/arch/arm64/booting.rst):
// MMU off, data cache off or clean for the image, x0 = physical address of the
// devicetree, on one CPU. The image may stand at any 4 KiB boundary.

.section .head, "ax"
.global _start
_start:
    b       entry                       // code0
    .long   0                           // code1
    .quad   0                           // text_offset: anywhere
    .quad   __image_end - _start        // image_size, with bss and stacks
    .quad   0b1010                      // little-endian, 4 KiB pages, anywhere in memory
    .quad   0
    .quad   0
    .quad   0
    .ascii  "ARM\x64"
    .long   0

// Writes the NUL-terminated text at x1 to the early console. Uses x2-x4.
early_print:
    ldr     x2, ={EARLY_UART}
1:  ldrb    w3, [x1], #1
    cbz     w3, 2f
3:  ldr     w4, [x2, #0x18]             // UARTFR
    tbnz    w4, #5, 3b                  // TXFF
    str     w3, [x2]
    b       1b
2:  ret

entry:
    msr     daifset, #0xf
    mov     x20, x0
    mrs     x9, CurrentEL
    cmp     x9, #(1 << 2)
    b.eq    entered_at_el1
    cmp     x9, #(3 << 2)
    b.eq    entered_at_el3
    adr     x19, _start
    tst     x19, #0xfff
    b.ne    misplaced

    // EL2 without E2H (nVHE). A core whose E2H is RES1 cannot run this image.
    mov     x1, #(1 << 31)              // RW: EL1 is AArch64
    dsb     nsh                         // AmpereOne AC04_CPU_23
    msr     hcr_el2, x1
    isb
    mrs     x1, hcr_el2
    tbnz    x1, #34, e2h_is_res1
    ldr     x1, ={SCTLR_OFF}
    msr     sctlr_el2, x1
    isb
    msr     spsel, #1

    // Relative relocations: each place gets the image's address plus the addend.
    adrp    x1, __rela_start
    add     x1, x1, :lo12:__rela_start
    adrp    x2, __rela_end
    add     x2, x2, :lo12:__rela_end
1:  cmp     x1, x2
    b.hs    2f
    ldp     x3, x4, [x1], #16           // r_offset, r_info
    ldr     x5, [x1], #8                // r_addend
    cmp     w4, #1027                   // R_AARCH64_RELATIVE
    b.ne    1b
    add     x5, x5, x19
    str     x5, [x3, x19]
    b       1b
2:
    // Memory past the file may have dirty lines of the loader's; they must not be written
    // back over the zeros. What is written here goes past the caches, so afterwards any
    // line that holds the old bytes goes too (Arm ARM D7.5, mismatched attributes).
    adrp    x1, __bss_start
    add     x1, x1, :lo12:__bss_start
    adrp    x2, __image_end
    add     x2, x2, :lo12:__image_end
    bl      drop_lines
    adrp    x1, __bss_start
    add     x1, x1, :lo12:__bss_start
3:  cmp     x1, x2
    b.hs    4f
    stp     xzr, xzr, [x1], #16
    b       3b
4:  dmb     sy
    mov     x1, x19
    bl      drop_lines
    ic      iallu
    dsb     sy
    isb

    adrp    x1, vectors
    add     x1, x1, :lo12:vectors
    msr     vbar_el2, x1
    msr     tpidr_el2, xzr
    adrp    x1, __boot_stack_top
    add     x1, x1, :lo12:__boot_stack_top
    mov     sp, x1
    mov     x29, xzr
    mov     x30, xzr
    isb

    // Page tables first, with plain stores only: locks need the MMU on.
    mov     x0, x20
    bl      build_boot_tables           // -> x0 = &EnableMmu
    bl      enable_mmu
    mov     x0, x20
    bl      boot_main
    b       .

// Drops the data cache lines of x1..x2 without writing them back. Uses x3 and x4.
drop_lines:
    mrs     x3, ctr_el0
    ubfx    x3, x3, #16, #4             // DminLine
    mov     x4, #4
    lsl     x4, x4, x3
    sub     x3, x4, #1
    bic     x1, x1, x3
1:  dc      ivac, x1
    add     x1, x1, x4
    cmp     x1, x2
    b.lo    1b
    dsb     sy
    ret

// x0 = &EnableMmu (MAIR, TCR, TTBR0, SCTLR). Uses x1-x4.
enable_mmu:
    ldp     x1, x2, [x0]
    ldp     x3, x4, [x0, #16]
    msr     mair_el2, x1
    msr     tcr_el2, x2
    msr     ttbr0_el2, x3
    dsb     sy
    tlbi    alle2
    dsb     nsh
    isb
    msr     sctlr_el2, x4
    isb
    ret

// A secondary CPU, from PSCI CPU_ON: x0 = physical address of its SecondaryBoot
// (EnableMmu, stack, cpu), all of it cleaned to memory by the boot CPU.
.global secondary_entry
secondary_entry:
    msr     daifset, #0xf
    mov     x20, x0
    mov     x1, #(1 << 31)
    dsb     nsh
    msr     hcr_el2, x1
    isb
    ldr     x1, ={SCTLR_OFF}
    msr     sctlr_el2, x1
    isb
    msr     spsel, #1
    msr     tpidr_el2, xzr
    adrp    x1, vectors
    add     x1, x1, :lo12:vectors
    msr     vbar_el2, x1
    bl      enable_mmu
    ldp     x1, x2, [x20, #32]
    mov     sp, x1
    msr     tpidr_el2, x2
    mov     x29, xzr
    mov     x30, xzr
    isb
    mov     x0, x20
    bl      secondary_main
    b       .

entered_at_el1:
    adr     x1, text_el1
    bl      early_print
    ldr     x0, =0x84000008             // PSCI SYSTEM_OFF; at EL1 the conduit is HVC
    hvc     #0
    b       stop
entered_at_el3:
    adr     x1, text_el3
    bl      early_print
    b       stop
misplaced:
    adr     x1, text_misplaced
    bl      early_print
    b       off
e2h_is_res1:
    adr     x1, text_e2h
    bl      early_print
off:
    ldr     x0, =0x84000008
    smc     #0
stop:
    wfe
    b       stop

text_el1:
    .asciz  "tidemark: entered at EL1, but it needs EL2: start QEMU with -M virt,virtualization=on, or let the firmware hand over at EL2. Stopping.\r\n"
text_el3:
    .asciz  "tidemark: entered at EL3, but it needs EL2: run firmware (TF-A) that hands over at EL2, or start QEMU without secure=on. Stopping.\r\n"
text_misplaced:
    .asciz  "tidemark: loaded at an address that is not a multiple of 4 KiB: load the image on a page boundary. Stopping.\r\n"
text_e2h:
    .asciz  "tidemark: this core only has EL2 with E2H (VHE); tidemark needs HCR_EL2.E2H = 0. Stopping.\r\n"
    .balign 4
    .ltorg
