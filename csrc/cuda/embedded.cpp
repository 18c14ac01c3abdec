// The compiled kernels inside the library: what nvcc has written stands here byte for byte.
__asm__(
    ".pushsection .rodata\n"
    ".balign 64\n"
    ".globl fixmin_cuda_kernels\n"
    ".hidden fixmin_cuda_kernels\n"
    "fixmin_cuda_kernels:\n"
    ".incbin \"" FIXMIN_FATBIN
    "\"\n"
    ".popsection\n");
