// The int8 codes of a few tokens, and maybe RMSNorm before it.
//
//   y = x / sqrt(mean(x^2) + eps) * gain, of the type of x; or y = x
//   size = max(max |y|, 1e-5)
//   codes = round(y * (127 / size)), half to even    scale = size / 127
//
// Plain loops, which the compiler makes vectors of. Where a token has a number
// that is not finite, its scale says so, and its codes are 0.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "floats.h"
#include "variants.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace qat {
namespace {

constexpr float kTiny = 1e-5f;  // As of reference.py.
constexpr int64_t kSums = 64;   // Of squares, one after the other.
constexpr uint32_t kInfinity = 0x7f800000;

struct Problem {
  const void* x;      // [M, K], float32 or bfloat16.
  const float* gain;  // [K], or null: no norm.
  float eps;
  int8_t* codes;  // [M, K].
  float* scale;   // [M].
  float* y;       // [K], of the token at hand.
  int64_t M, K;
};

// Rounded to the type of x. What is not finite stays so.
QAT_INLINE float Rounded(float value, float) { return value; }
QAT_INLINE float Rounded(float value, uint16_t) {
  const uint32_t bits = Bits(value);
  const uint32_t even = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u;
  return FromBits((bits & 0x7fffffff) >= kInfinity ? bits : even);
}

template <typename T>
QAT_INLINE void Norm(const T* x, const Problem& q) {
  float sums[kSums] = {};
  int64_t k = 0;
  for (; k + kSums <= q.K; k += kSums) {
    for (int64_t i = 0; i < kSums; ++i) {
      sums[i] += Float(x[k + i]) * Float(x[k + i]);
    }
  }
  for (; k < q.K; ++k) sums[k % kSums] += Float(x[k]) * Float(x[k]);
  for (int64_t n = kSums / 2; n > 0; n /= 2) {
    for (int64_t i = 0; i < n; ++i) sums[i] += sums[i + n];
  }
  const float inverse = 1 / std::sqrt(sums[0] / float(q.K) + q.eps);
  for (k = 0; k < q.K; ++k) {
    q.y[k] = Rounded(Float(x[k]) * inverse * q.gain[k], T());
  }
}

template <typename T>
QAT_INLINE void Codes(const T* y, int64_t K, int8_t* codes, float* scale) {
  // Floats that are not negative are ordered as their bits, NaN above infinity.
  int32_t most = 0;
  for (int64_t k = 0; k < K; ++k) {
    const auto size = int32_t(Bits(Float(y[k])) & 0x7fffffff);
    most = size > most ? size : most;
  }
  float size = FromBits(uint32_t(most));
  if (size < kTiny) size = kTiny;
  *scale = size * (1 / 127.0f);
  if (uint32_t(most) >= kInfinity) {
    std::memset(codes, 0, K);
    return;
  }
  // Of a sum with it, rounded half to even, the last bits are the integer.
  constexpr float kMagic = 3 << 22;
  const float factor = 127 / size;
  for (int64_t k = 0; k < K; ++k) {
    codes[k] = int8_t(Bits(Float(y[k]) * factor + kMagic) - Bits(kMagic));
  }
}

template <typename T>
QAT_INLINE void Tokens(const Problem& q) {
  for (int64_t m = 0; m < q.M; ++m) {
    const T* x = static_cast<const T*>(q.x) + m * q.K;
    if (q.gain) {
      Norm(x, q);
      Codes(q.y, q.K, q.codes + m * q.K, q.scale + m);
    } else {
      Codes(x, q.K, q.codes + m * q.K, q.scale + m);
    }
  }
}

template <typename T>
void Portable(const Problem& q) {
  Tokens<T>(q);
}

#if QAT_X86

template <typename T>
QAT_AVX2 void Avx2(const Problem& q) {
  Tokens<T>(q);
}

template <typename T>
QAT_AVX512 void Avx512(const Problem& q) {
  Tokens<T>(q);
}

#endif  // QAT_X86

template <typename T>
void Run(const Problem& q, int64_t variant) {
#if QAT_X86
  if (variant == kAvx512Vnni) return Avx512<T>(q);
  if (variant == kAvx2) return Avx2<T>(q);
#endif
  Portable<T>(q);
}

ffi::Error ActQuant(ffi::AnyBuffer x, ffi::Buffer<ffi::F32> gain,
                    ffi::ResultBuffer<ffi::S8> codes,
                    ffi::ResultBuffer<ffi::F32> scale, bool norm, float eps,
                    int64_t variant) {
  const auto shape = x.dimensions();
  if (shape.size() != 2 ||
      int64_t(gain.element_count()) != (norm ? shape[1] : 0)) {
    return ffi::Error::InvalidArgument("x [M, K] and gain [K] do not fit");
  }
  if (!Supported(variant)) {
    return ffi::Error::InvalidArgument("this processor lacks the variant");
  }
  std::vector<float> y(norm ? shape[1] : 0);
  const Problem problem{x.untyped_data(),
                        norm ? gain.typed_data() : nullptr,
                        eps,
                        codes->typed_data(),
                        scale->typed_data(),
                        y.data(),
                        shape[0],
                        shape[1]};
  if (x.element_type() == ffi::F32) {
    Run<float>(problem, variant);
  } else if (x.element_type() == ffi::BF16) {
    Run<uint16_t>(problem, variant);
  } else {
    return ffi::Error::InvalidArgument("x has to be float32 or bfloat16");
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace qat

XLA_FFI_DEFINE_HANDLER_SYMBOL(qat_act_quant, qat::ActQuant,
                              xla::ffi::Ffi::Bind()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::S8>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Attr<bool>("norm")
                                  .Attr<float>("eps")
                                  .Attr<int64_t>("variant"));
