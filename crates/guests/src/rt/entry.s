// Entry of an EL1 payload, by the arm64 boot protocol (Documentation/arch/arm64/booting.rst): x0 is the devicetree,
// MMU and data cache off, any 2 MiB aligned place. Linked at 0; relocates itself.
//
// Nothing is written before the MMU and the caches are on: the provisional tables are constants in the image, which
// the loader has cleaned to memory. So no write can be hidden by a stale cache line, and no maintenance is needed.

.section .head, "ax"
.global _start
_start:
    b       10f                         // code0
    .long   0                           // code1
    .quad   0                           // text_offset
    .quad   __image_end - _start        // image_size
    .quad   0xa                         // little-endian, 4 KiB pages, anywhere in RAM
    .quad   0, 0, 0
    .ascii  "ARM\x64"
    .long   0

10: msr     daifset, #0xf
    mov     x19, x0
    adr     x20, _start
    mrs     x1, CurrentEL
    adr     x0, 91f
    cmp     x1, #(1 << 2)
    b.ne    90f
    adr     x0, 92f
    tst     x20, #0x1fffff              // 2 MiB aligned,
    b.ne    90f
    lsr     x1, x20, #30                // in the GiB that the provisional tables map
    cmp     x1, #1
    b.ne    90f

    adrp    x0, 80f
    add     x0, x0, :lo12:80f
    bl      70f

    // Relocate: every entry must be R_AARCH64_RELATIVE (0x403).
    adrp    x0, __rela_start
    add     x0, x0, :lo12:__rela_start
    adrp    x1, __rela_end
    add     x1, x1, :lo12:__rela_end
20: cmp     x0, x1
    b.hs    30f
    ldp     x2, x3, [x0], #16
    ldr     x4, [x0], #8
    cmp     x3, #0x403
    b.ne    93f
    add     x4, x4, x20
    str     x4, [x20, x2]
    b       20b

30: adrp    x0, __bss_start
    add     x0, x0, :lo12:__bss_start
    adrp    x1, __bss_end
    add     x1, x1, :lo12:__bss_end
31: cmp     x0, x1
    b.hs    32f
    stp     xzr, xzr, [x0], #16
    b       31b

32: mov     x0, #0
    bl      60f
    mov     x0, x19
    bl      {primary}
    b       95f

// Where the other vCPUs come in, by PSCI CPU_ON; x0 is the vCPU's number.
.balign 8
.global __secondary_entry
__secondary_entry:
    msr     daifset, #0xf
    mov     x19, x0
    adrp    x0, {tables}
    add     x0, x0, :lo12:{tables}
    orr     x0, x0, #(1 << 48)          // the ASID that mmu::map chose
    bl      70f
    mov     x0, x19
    bl      60f
    mov     x0, x19
    bl      {secondary}
    b       95f

// Stack, vectors and number of vCPU x0. Clobbers x1, x2.
60: adrp    x1, __stacks
    add     x1, x1, :lo12:__stacks
    add     x2, x0, #1
    lsl     x2, x2, #15
    add     sp, x1, x2
    adrp    x1, {vectors}
    add     x1, x1, :lo12:{vectors}
    msr     vbar_el1, x1
    msr     tpidr_el1, x0
    mov     x29, #0
    isb
    ret

// MMU and caches on with the tables at x0 (TTBR0_EL1's value). Clobbers x1-x3.
70: ldr     x1, =0x04ff                 // 0: normal, write-back; 1: device, nGnRE
    msr     mair_el1, x1
    ldr     x1, =0x00993519             // T0SZ = T1SZ = 25: 39 bits; write-back, inner shareable; no TTBR1 walks
    mrs     x2, id_aa64mmfr0_el1
    and     x2, x2, #7                  // physical size, up to 52 bits read as what 4 KiB pages without LPA2 have
    cmp     x2, #5
    mov     x3, #5
    csel    x2, x2, x3, ls
    orr     x1, x1, x2, lsl #32
    msr     tcr_el1, x1
    msr     ttbr0_el1, x0
    isb
    tlbi    vmalle1
    ic      iallu
    dsb     nsh
    isb
    ldr     x1, =0x30d0180d             // RES1 bits, I, SA, C, M
    msr     sctlr_el1, x1
    isb
    ret

// Entered wrongly: say so on the UART, which is at its reset settings, and stop.
90: movz    x1, #0x0900, lsl #16
96: ldrb    w2, [x0], #1
    cbz     w2, 95f
97: ldr     w3, [x1, #0x18]
    tbnz    w3, #5, 97b                 // transmit FIFO full
    str     w2, [x1]
    b       96b
93: adr     x0, 94f
    b       90b
95: ldr     x0, =0x84000008             // PSCI SYSTEM_OFF
    mrs     x1, CurrentEL
    cmp     x1, #(1 << 2)
    b.ne    98f
    hvc     #0
    b       99f
98: cmp     x1, #(2 << 2)
    b.ne    99f
    smc     #0
99: wfi
    b       99b
91: .asciz  "fail entered at another exception level than EL1; start it as a guest, or with no EL2 or EL3\r\n"
92: .asciz  "fail loaded at a place not 2 MiB aligned or not in the first GiB of RAM; load it at RAM + 2 MiB\r\n"
94: .asciz  "fail a relocation other than R_AARCH64_RELATIVE; link it with -pie\r\n"
.balign 8
.ltorg

// The provisional tables: 1 GiB of devices, the first GiB of RAM. Entries are not global, so that the switch to the
// real tables is a change of ASID and needs no break-before-make.
.section .rodata.tables, "a"
.balign 4096
80: .quad   0x0060000000000c05          // 0: device; AF, nG, XN
    .quad   0x0040000040000f01          // 0x4000_0000: normal, inner shareable; AF, nG, UXN
    .fill   510, 8, 0
