// The bits of floats, and numbers of 16 bits as floats.

#ifndef PALLAS_KERNELS_NATIVE_FLOATS_H_
#define PALLAS_KERNELS_NATIVE_FLOATS_H_

#include <cstdint>
#include <cstring>

// Into each of the functions that may use other instructions.
#if defined(__GNUC__) || defined(__clang__)
#define QAT_INLINE inline __attribute__((always_inline))
#else
#define QAT_INLINE inline
#endif

namespace qat {

QAT_INLINE uint32_t Bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

QAT_INLINE float FromBits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

QAT_INLINE float Float(float value) { return value; }
// A bfloat16 is the upper half of a float.
QAT_INLINE float Float(uint16_t bfloat16) {
  return FromBits(uint32_t(bfloat16) << 16);
}

}  // namespace qat

#endif  // PALLAS_KERNELS_NATIVE_FLOATS_H_
