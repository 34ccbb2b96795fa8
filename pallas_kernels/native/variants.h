// Which instructions this processor has.

#ifndef PALLAS_KERNELS_NATIVE_VARIANTS_H_
#define PALLAS_KERNELS_NATIVE_VARIANTS_H_

#include <cstdint>

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define QAT_X86 1
#include <immintrin.h>
// A function may use instructions that the rest of the file is not compiled
// for; it is only called where `Supported` says that the processor has them.
#define QAT_AVX2 __attribute__((target("avx2")))
#define QAT_AVX512 \
  __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni")))
#else
#define QAT_X86 0
#endif

namespace qat {

// As in `variants` of __init__.py, which hands over these numbers.
enum Variant : int64_t { kPortable = 0, kAvx2 = 1, kAvx512Vnni = 2 };

// Asks the processor and the operating system.
inline bool Supported(int64_t variant) {
#if QAT_X86
  switch (variant) {
    case kAvx2:
      return __builtin_cpu_supports("avx2");
    case kAvx512Vnni:
      return __builtin_cpu_supports("avx512f") &&
             __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl") &&
             __builtin_cpu_supports("avx512vnni");
  }
#endif
  return variant == kPortable;
}

#if QAT_X86
// sum += the products of four unsigned and four signed bytes, in each of 16
// lanes. Of the intrinsic, GCC 12 copies the sums from register to register,
// and to memory, which halves the speed of loops that keep many of them.
QAT_AVX512 inline void Accumulate(__m512i& sum, __m512i u, __m512i s) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(u), "v"(s));
}
#endif

}  // namespace qat

#endif  // PALLAS_KERNELS_NATIVE_VARIANTS_H_
