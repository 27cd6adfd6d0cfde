// Included in the namespace of an instruction set. Subnormal numbers cost a hundred cycles each on many processors: inside
// our calls they are zero.
struct FlushSubnormals {
#ifdef GK_X86
  unsigned before = _mm_getcsr();
  FlushSubnormals() { _mm_setcsr(before | 0x8040); }
  ~FlushSubnormals() { _mm_setcsr(before); }
#elif defined(__aarch64__)
  uint64_t before;
  static void set(uint64_t fpcr) { asm volatile("msr fpcr, %0" ::"r"(fpcr)); }
  FlushSubnormals() {
    asm volatile("mrs %0, fpcr" : "=r"(before));
    set(before | uint64_t(1) << 24);
  }
  ~FlushSubnormals() { set(before); }
#endif
};
