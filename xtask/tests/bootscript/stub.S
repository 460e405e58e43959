// A kernel for tests of the boot script: says which slot it came from and its command line, then resets
// the machine. Arm64 boot protocol (Linux, Documentation/arch/arm64/booting.rst): 64-byte header, device
// tree in x0, MMU off. QEMU's virt machine: PL011 at 0x09000000, PSCI 1.0 through hvc.

    b       start
    .long   0
    .quad   0                   // text offset
    .quad   end - . + 16        // image size
    .quad   0xa                 // flags: little-endian, 4 KiB pages, anywhere in memory
    .quad   0, 0, 0
    .ascii  "ARM\x64"
    .long   0

start:
    mov     x20, #0x09000000
    adr     x1, words
    bl      say
    // The device tree's total size, big-endian, at 4.
    ldr     w2, [x0, #4]
    rev     w2, w2
    add     x2, x0, x2
find:
    cmp     x0, x2
    b.ge    reset
    // The command line begins with "root=PAR".
    adr     x3, mark
    mov     x4, #0
compare:
    ldrb    w5, [x3, x4]
    cbz     w5, found
    ldrb    w6, [x0, x4]
    add     x4, x4, #1
    cmp     w5, w6
    b.eq    compare
    add     x0, x0, #1
    b       find
found:
    mov     x1, x0
    bl      say
reset:
    adr     x1, over
    bl      say
    ldr     x0, =0x84000009     // PSCI SYSTEM_RESET (Arm DEN 0022, section 5.1)
    hvc     #0
    b       .

say:
    ldrb    w7, [x1], #1
    cbz     w7, said
    str     w7, [x20]
    b       say
said:
    ret

words:
    .asciz  "\nstub " SLOT " ["
mark:
    .asciz  "root=PAR"
over:
    .asciz  "]\n"
    .balign 8
    .ltorg
end:
