// A few rows of bfloat16 times a bfloat16 matrix whose columns lie in memory one
// after the other: the output head of a model that writes text.
//
//   y[m, n] = sum_k x[m, k] w[n, k]
//
// Products and sums are float32. Two neighbours of w are the halves of a 32-bit
// word, and each half, at the top of a word, is a float32; the inputs are split
// into even and odd ones once for all columns.

#include <cstdint>
#include <cstring>
#include <vector>

#include "floats.h"
#include "parallel.h"
#include "variants.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace qat {
namespace {

constexpr int64_t kStep = 32;     // Inputs that are multiplied together.
constexpr int64_t kAhead = 2048;  // Numbers that are asked for before their turn.

struct Problem {
  const float* x;  // [M, 2, half]: even inputs and odd ones, and zeros.
  const uint16_t* w;
  float* y;  // [M, N].
  int64_t M, K, N, half;
};

void Portable(const Problem& q, int64_t n0, int64_t n1) {
  constexpr int kSums = 8;
  for (int64_t n = n0; n < n1; ++n) {
    const uint16_t* w = q.w + n * q.K;
    for (int64_t m = 0; m < q.M; ++m) {
      const float* even = q.x + 2 * m * q.half;
      const float* odd = even + q.half;
      float sums[kSums] = {};
      const int64_t pairs = q.K / 2;
      for (int64_t i = 0; i < pairs; ++i) {
        sums[i % kSums] += Float(w[2 * i]) * even[i];
        sums[i % kSums] += Float(w[2 * i + 1]) * odd[i];
      }
      if (q.K % 2) sums[0] += Float(w[q.K - 1]) * even[pairs];
      float total = 0;
      for (float sum : sums) total += sum;
      q.y[m * q.N + n] = total;
    }
  }
}

#if QAT_X86

template <int R>
QAT_AVX512 void Rows(const Problem& q, int64_t m, int64_t n) {
  const uint16_t* w = q.w + n * q.K;
  const float* x = q.x + 2 * m * q.half;
  const __m512i high = _mm512_set1_epi32(int32_t(0xffff0000u));
  __m512 sum[R][2];
  for (int r = 0; r < R; ++r) sum[r][0] = sum[r][1] = _mm512_setzero_ps();
  for (int64_t k = 0; k < q.K; k += kStep) {
    const int64_t left = q.K - k;
    const __m512i v =
        left >= kStep
            ? _mm512_loadu_si512(w + k)
            : _mm512_maskz_loadu_epi16(~uint32_t{0} >> (kStep - left), w + k);
    _mm_prefetch((const char*)(w + k + kAhead), _MM_HINT_T0);
    const __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(v, 16));
    const __m512 odd = _mm512_castsi512_ps(_mm512_and_si512(v, high));
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const float* mine = x + 2 * r * q.half + k / 2;
      sum[r][0] = _mm512_fmadd_ps(even, _mm512_loadu_ps(mine), sum[r][0]);
      sum[r][1] =
          _mm512_fmadd_ps(odd, _mm512_loadu_ps(mine + q.half), sum[r][1]);
    }
  }
  for (int r = 0; r < R; ++r) {
    q.y[(m + r) * q.N + n] =
        _mm512_reduce_add_ps(_mm512_add_ps(sum[r][0], sum[r][1]));
  }
}

QAT_AVX512 void Avx512(const Problem& q, int64_t n0, int64_t n1) {
  for (int64_t n = n0; n < n1; ++n) {
    int64_t m = 0;
    for (; m + 4 <= q.M; m += 4) Rows<4>(q, m, n);
    for (; m + 2 <= q.M; m += 2) Rows<2>(q, m, n);
    if (m < q.M) Rows<1>(q, m, n);
  }
}

#endif  // QAT_X86

ffi::Error Bfloat16Matmul(ffi::ThreadPool pool, ffi::Buffer<ffi::BF16> x,
                          ffi::Buffer<ffi::BF16> w,
                          ffi::ResultBuffer<ffi::F32> y, int64_t variant) {
  const auto x_shape = x.dimensions(), w_shape = w.dimensions();
  if (x_shape.size() != 2 || w_shape.size() != 2 || x_shape[1] != w_shape[1]) {
    return ffi::Error::InvalidArgument("x [M, K] and w [N, K] do not fit");
  }
  if (!Supported(variant)) {
    return ffi::Error::InvalidArgument("this processor lacks the variant");
  }
  const int64_t M = x_shape[0], K = x_shape[1], N = w_shape[0];
  const int64_t half = (K + kStep - 1) / kStep * (kStep / 2);
  const auto* in = reinterpret_cast<const uint16_t*>(x.untyped_data());
  std::vector<float> split(M * 2 * half);
  for (int64_t m = 0; m < M; ++m) {
    for (int64_t k = 0; k < K; ++k) {
      split[(2 * m + k % 2) * half + k / 2] = Float(in[m * K + k]);
    }
  }
  const Problem problem{split.data(),
                        reinterpret_cast<const uint16_t*>(w.untyped_data()),
                        y->typed_data(),
                        M,
                        K,
                        N,
                        half};
  const int64_t chunks =
      std::min<int64_t>(N, 8 * std::max<int64_t>(pool.num_threads(), 1));
  ParallelForAwake(pool, chunks, [&](int64_t i) {
    const int64_t n0 = N * i / chunks, n1 = N * (i + 1) / chunks;
#if QAT_X86
    if (variant == kAvx512Vnni) return Avx512(problem, n0, n1);
#endif
    Portable(problem, n0, n1);
  });
  return ffi::Error::Success();
}

// Rows by number; NaN for a number that there is not.
ffi::Error Bfloat16Rows(ffi::Buffer<ffi::BF16> table,
                        ffi::Buffer<ffi::S32> number,
                        ffi::ResultBuffer<ffi::BF16> y) {
  const auto shape = table.dimensions();
  if (shape.size() != 2 || number.dimensions().size() != 1) {
    return ffi::Error::InvalidArgument("want a table [N, K] and numbers [M]");
  }
  const int64_t N = shape[0], K = shape[1];
  const auto* from = reinterpret_cast<const uint16_t*>(table.untyped_data());
  auto* to = reinterpret_cast<uint16_t*>(y->untyped_data());
  for (int64_t m = 0; m < number.dimensions()[0]; ++m, to += K) {
    const int64_t n = number.typed_data()[m];
    if (n >= 0 && n < N) {
      std::memcpy(to, from + n * K, K * sizeof(*to));
    } else {
      std::memset(to, 0xff, K * sizeof(*to));
    }
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace qat

XLA_FFI_DEFINE_HANDLER_SYMBOL(qat_bfloat16_matmul, qat::Bfloat16Matmul,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::BF16>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::BF16>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Attr<int64_t>("variant"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(qat_bfloat16_rows, qat::Bfloat16Rows,
                              xla::ffi::Ffi::Bind()
                                  .Arg<xla::ffi::Buffer<xla::ffi::BF16>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::BF16>>());
