// int8 activations times weights of 1, 2, 4 or 8 bits, for few rows of
// activations, and several matrices of weights that are multiplied by one x.
//
// The weights are planar, as in packing.py, with K last and blocks of 64 bytes:
// [N, blocks * 64], where P = 8 / bits planes of 64 inputs share a block;
//
//   bits [bits * p, bits * (p + 1)) of byte r of block b
//     are the index of k = b * 64 * P + p * 64 + r
//
// so that 64 neighbouring inputs are one AND (and a shift) away from 64 bytes.
// A weight is step * index + low, and the product therefore
// step * S + low * (sum of the row of x), where S is the product of indices.
// Of 8 bits a byte is the code itself, and its index is code + 128: the byte
// with its highest bit flipped.

#include <cstdint>
#include <cstring>
#include <vector>

#include "parallel.h"
#include "variants.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace qat {
namespace {

constexpr int64_t kBlock = 64;    // Bytes.
constexpr int64_t kAhead = 8192;  // Bytes that are asked for before their turn.

struct Problem {
  const int8_t* x;  // [M, blocks * 64 * P], zeros after the last input.
  const uint8_t* w;
  int32_t* y;               // [M, N].
  const int32_t* offset_M;  // low * sum of the row.
  int64_t M, N, blocks;
  int32_t step;
};

// What is flipped in a byte of codes to make it one of indices.
template <int Bits>
constexpr int kFlip = Bits == 8 ? 0x80 : 0;

// Sums of indices of 8 bits may pass 2^31 where those of codes do not, and come
// back here.
inline int32_t Product(const Problem& q, int32_t sum, int64_t m) {
  return int32_t(uint32_t(q.step) * uint32_t(sum) + uint32_t(q.offset_M[m]));
}

template <int Bits>
void Portable(const Problem& q, int64_t n0, int64_t n1) {
  constexpr int P = 8 / Bits;
  constexpr int kMask = (1 << Bits) - 1;
  for (int64_t m = 0; m < q.M; ++m) {
    for (int64_t n = n0; n < n1; ++n) {
      const int8_t* x = q.x + m * q.blocks * kBlock * P;
      const uint8_t* w = q.w + n * q.blocks * kBlock;
      uint32_t sum = 0;
      for (int64_t b = 0; b < q.blocks; ++b, w += kBlock) {
        for (int p = 0; p < P; ++p, x += kBlock) {
          for (int r = 0; r < kBlock; ++r) {
            const int index = ((w[r] ^ kFlip<Bits>) >> (Bits * p)) & kMask;
            sum += uint32_t(index * x[r]);
          }
        }
      }
      q.y[m * q.N + n] = Product(q, int32_t(sum), m);
    }
  }
}

#if QAT_X86

QAT_AVX2 inline int32_t Sum(__m256i v) {
  __m128i s =
      _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}

QAT_AVX512 inline int32_t Sum(__m512i v) {
  return Sum(_mm256_add_epi32(_mm512_castsi512_si256(v),
                              _mm512_extracti64x4_epi64(v, 1)));
}

template <int Bits>
QAT_AVX2 void Avx2(const Problem& q, int64_t n0, int64_t n1) {
  constexpr int P = 8 / Bits;
  const __m256i mask = _mm256_set1_epi8((1 << Bits) - 1);
  const __m256i ones = _mm256_set1_epi16(1);
  for (int64_t n = n0; n < n1; ++n) {
    for (int64_t m = 0; m < q.M; ++m) {
      const int8_t* x = q.x + m * q.blocks * kBlock * P;
      const uint8_t* w = q.w + n * q.blocks * kBlock;
      __m256i sum = _mm256_setzero_si256();
      for (int64_t b = 0; b < q.blocks; ++b, w += kBlock, x += kBlock * P) {
        // A 16-bit lane collects 4 P products of at most 128 (2^Bits - 1):
        // at most 15,360, for four bits. Of eight bits not one pair fits.
        __m256i sum16 = _mm256_setzero_si256();
        for (int half = 0; half < kBlock; half += 32) {
          if constexpr (Bits == 8) {
            for (int i = half; i < half + 32; i += 16) {
              const __m128i v = _mm_xor_si128(
                  _mm_loadu_si128((const __m128i*)(w + i)),
                  _mm_set1_epi8((char)kFlip<Bits>));
              const __m128i xs = _mm_loadu_si128((const __m128i*)(x + i));
              sum = _mm256_add_epi32(
                  sum, _mm256_madd_epi16(_mm256_cvtepu8_epi16(v),
                                         _mm256_cvtepi8_epi16(xs)));
            }
            continue;
          }
          const __m256i v = _mm256_loadu_si256((const __m256i*)(w + half));
#pragma GCC unroll 8
          for (int p = 0; p < P; ++p) {
            const __m256i u =
                _mm256_and_si256(_mm256_srli_epi16(v, Bits * p), mask);
            const __m256i xs =
                _mm256_loadu_si256((const __m256i*)(x + p * kBlock + half));
            sum16 = _mm256_add_epi16(sum16, _mm256_maddubs_epi16(u, xs));
          }
        }
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(sum16, ones));
      }
      q.y[m * q.N + n] = Product(q, Sum(sum), m);
    }
  }
}

// Into the second cache: in the first, weights would drive out x.
QAT_AVX512 inline void Prefetch(const uint8_t* w) {
  _mm_prefetch((const char*)(w + kAhead), _MM_HINT_T1);
}

// One row of x and C columns. Indices stay where the AND leaves them, at
// index << (Bits * p), with a sum for each plane that is shifted back once.
template <int Bits, int C>
QAT_AVX512 void OneRow(const Problem& q, int64_t m, int64_t n) {
  constexpr int P = 8 / Bits;
  const int64_t stride = q.blocks * kBlock;
  const int8_t* x = q.x + m * stride * P;
  const uint8_t* w = q.w + n * stride;
  const __m512i flip = _mm512_set1_epi8((char)kFlip<Bits>);
  __m512i mask[P], sum[C][P];
#pragma GCC unroll 8
  for (int p = 0; p < P; ++p) {
    mask[p] = _mm512_set1_epi8((char)(((1 << Bits) - 1) << (Bits * p)));
    asm("" : "+v"(mask[p]));  // Else it is read from memory in every turn.
#pragma GCC unroll 2
    for (int c = 0; c < C; ++c) sum[c][p] = _mm512_setzero_si512();
  }
  for (int64_t b = 0; b < q.blocks; ++b, w += kBlock, x += kBlock * P) {
    __m512i v[C];
#pragma GCC unroll 2
    for (int c = 0; c < C; ++c) {
      v[c] = _mm512_loadu_si512(w + c * stride);
      if (Bits == 8) v[c] = _mm512_xor_si512(v[c], flip);
      Prefetch(w + c * stride);
    }
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) {
      const __m512i xs = _mm512_loadu_si512(x + p * kBlock);
#pragma GCC unroll 2
      for (int c = 0; c < C; ++c) {
        Accumulate(sum[c][p], _mm512_and_si512(v[c], mask[p]), xs);
      }
    }
  }
#pragma GCC unroll 2
  for (int c = 0; c < C; ++c) {
    __m512i total = sum[c][0];
#pragma GCC unroll 8
    for (int p = 1; p < P; ++p) {
      total = _mm512_add_epi32(total, _mm512_srai_epi32(sum[c][p], Bits * p));
    }
    q.y[m * q.N + n + c] = Product(q, Sum(total), m);
  }
}

// R rows of x and C columns: indices are shifted down once for all rows.
template <int Bits, int R, int C>
QAT_AVX512 void Rows(const Problem& q, int64_t m, int64_t n) {
  constexpr int P = 8 / Bits;
  const int64_t x_stride = q.blocks * kBlock * P;
  const int64_t stride = q.blocks * kBlock;
  const int8_t* x = q.x + m * x_stride;
  const uint8_t* w = q.w + n * stride;
  const __m512i mask = _mm512_set1_epi8((char)((1 << Bits) - 1));
  const __m512i flip = _mm512_set1_epi8((char)kFlip<Bits>);
  __m512i sum[C][R];
  for (int c = 0; c < C; ++c) {
    for (int r = 0; r < R; ++r) sum[c][r] = _mm512_setzero_si512();
  }
  for (int64_t b = 0; b < q.blocks; ++b, w += kBlock, x += kBlock * P) {
    __m512i v[C];
#pragma GCC unroll 2
    for (int c = 0; c < C; ++c) {
      v[c] = _mm512_loadu_si512(w + c * stride);
      if (Bits == 8) v[c] = _mm512_xor_si512(v[c], flip);
      Prefetch(w + c * stride);
    }
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) {
      __m512i u[C];
#pragma GCC unroll 2
      for (int c = 0; c < C; ++c) {
        u[c] = _mm512_and_si512(_mm512_srli_epi16(v[c], Bits * p), mask);
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const __m512i xs = _mm512_loadu_si512(x + r * x_stride + p * kBlock);
#pragma GCC unroll 2
        for (int c = 0; c < C; ++c) {
          Accumulate(sum[c][r], u[c], xs);
        }
      }
    }
  }
  for (int c = 0; c < C; ++c) {
    for (int r = 0; r < R; ++r) {
      q.y[(m + r) * q.N + n + c] = Product(q, Sum(sum[c][r]), m + r);
    }
  }
}

template <int Bits, int C>
QAT_AVX512 void Columns(const Problem& q, int64_t n) {
  int64_t m = 0;
  for (; m + 4 <= q.M; m += 4) Rows<Bits, 4, C>(q, m, n);
  for (; m + 2 <= q.M; m += 2) Rows<Bits, 2, C>(q, m, n);
  if (m < q.M) OneRow<Bits, C>(q, m, n);
}

template <int Bits>
QAT_AVX512 void Avx512(const Problem& q, int64_t n0, int64_t n1) {
  int64_t n = n0;
  for (; n + 2 <= n1; n += 2) Columns<Bits, 2>(q, n);
  if (n < n1) Columns<Bits, 1>(q, n);
}

#endif  // QAT_X86

template <int Bits>
void Multiply(const Problem& q, int64_t variant, int64_t n0, int64_t n1) {
#if QAT_X86
  if (variant == kAvx512Vnni) return Avx512<Bits>(q, n0, n1);
  if (variant == kAvx2) return Avx2<Bits>(q, n0, n1);
#endif
  Portable<Bits>(q, n0, n1);
}

// One y for each w, in one loop over the columns of all.
template <int Bits>
ffi::Error PackedMatmul(ffi::ThreadPool pool, ffi::Buffer<ffi::S8> x,
                        ffi::RemainingArgs ws, ffi::RemainingRets ys,
                        int64_t step, int64_t low, int64_t variant) {
  constexpr int P = 8 / Bits;
  const auto x_shape = x.dimensions();
  if (x_shape.size() != 2) {
    return ffi::Error::InvalidArgument("x and w have to be matrices");
  }
  if (ws.size() != ys.size()) {
    return ffi::Error::InvalidArgument("every w gives one y");
  }
  if (!Supported(variant)) {
    return ffi::Error::InvalidArgument("this processor lacks the variant");
  }
  const int64_t M = x_shape[0], K = x_shape[1];
  const int64_t inputs = kBlock * P, blocks = (K + inputs - 1) / inputs;
  const int8_t* rows = x.typed_data();
  std::vector<int8_t> padded;
  if (blocks * inputs != K) {
    padded.resize(M * blocks * inputs);
    for (int64_t m = 0; m < M; ++m) {
      std::memcpy(&padded[m * blocks * inputs], rows + m * K, K);
    }
    rows = padded.data();
  }
  std::vector<int32_t> offset_M(M);
  for (int64_t m = 0; m < M; ++m) {
    int32_t sum = 0;
    for (int64_t k = 0; k < K; ++k) sum += x.typed_data()[m * K + k];
    offset_M[m] = int32_t(low) * sum;
  }
  std::vector<Problem> problems;
  problems.reserve(ws.size());
  int64_t total = 0;  // Columns.
  for (size_t i = 0; i < ws.size(); ++i) {
    const auto w = ws.get<ffi::Buffer<ffi::S8>>(i);
    if (!w.has_value()) return w.error();
    auto y = ys.get<ffi::Buffer<ffi::S32>>(i);
    if (!y.has_value()) return y.error();
    const auto w_shape = w->dimensions(), y_shape = (*y)->dimensions();
    if (w_shape.size() != 2) {
      return ffi::Error::InvalidArgument("x and w have to be matrices");
    }
    if (w_shape[1] != blocks * kBlock) {
      return ffi::Error::InvalidArgument("w is not packed for the width of x");
    }
    const int64_t N = w_shape[0];
    if (y_shape.size() != 2 || y_shape[0] != M || y_shape[1] != N) {
      return ffi::Error::InvalidArgument("y has not the rows of x and w");
    }
    problems.push_back({rows, reinterpret_cast<const uint8_t*>(w->typed_data()),
                        (*y)->typed_data(), offset_M.data(), M, N, blocks,
                        int32_t(step)});
    total += N;
  }
  // Even a thread that is awake takes a while to hear of it.
  const bool small = M * total * K < (int64_t{1} << 19);
  const int64_t chunks =
      small ? 1 : std::min<int64_t>(8 * pool.num_threads(), (total + 1) / 2);
  const int64_t size = (total / 2 / chunks + 1) * 2;  // Columns go in pairs.
  ParallelForAwake(pool, chunks, [&](int64_t i) {
    int64_t begin = i * size, end = begin + size;
    for (const Problem& q : problems) {
      const int64_t n0 = std::max<int64_t>(begin, 0), n1 = std::min(end, q.N);
      if (n0 < n1) Multiply<Bits>(q, variant, n0, n1);
      begin -= q.N;  // As counted from the first column of the next.
      end -= q.N;
    }
  });
  return ffi::Error::Success();
}

auto Binding() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Arg<ffi::Buffer<ffi::S8>>()
      .RemainingArgs()
      .RemainingRets()
      .Attr<int64_t>("step")
      .Attr<int64_t>("low")
      .Attr<int64_t>("variant");
}

}  // namespace
}  // namespace qat

XLA_FFI_DEFINE_HANDLER_SYMBOL(qat_packed_matmul_1, qat::PackedMatmul<1>,
                              qat::Binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(qat_packed_matmul_2, qat::PackedMatmul<2>,
                              qat::Binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(qat_packed_matmul_4, qat::PackedMatmul<4>,
                              qat::Binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(qat_packed_matmul_8, qat::PackedMatmul<8>,
                              qat::Binding());

extern "C" int32_t qat_supported(int32_t variant) {
  return qat::Supported(variant);
}
