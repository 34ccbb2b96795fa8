// int8 times int8, with scales of rows and columns, for training.
//
//   y = (x @ w) * scale_N * scale_M
//
// The sums are exact integers; the rest is two roundings in the order in which
// XLA does them, so that both give the same floats.
//
// VPDPBUSD multiplies unsigned by signed bytes: w goes in as w + 128, and
// 128 * (sum of the row of x) is taken off at the end.

#include <cstdint>
#include <cstring>
#include <vector>

#include "parallel.h"
#include "variants.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace qat {
namespace {

constexpr int64_t kPanel = 64;  // Columns of w that are multiplied together.
constexpr int64_t kRows = 6;    // With 4 vectors of columns, 24 registers.

struct Problem {
  const int8_t* x;  // [M, K4], zeros after the last input.
  const int8_t* w;  // [K, N].
  const float* scale_M;
  const float* scale_N;
  float* y;  // [M, N].
  int64_t M, K, K4, N;
  bool row_scales, column_scales;  // Else one number.
};

#if QAT_X86

// Columns [n, n + 64) of w as [K4 / 4][64][4] of unsigned bytes.
QAT_AVX512 void PackPanel(const Problem& q, int64_t n, uint8_t* panel) {
  const int64_t columns = std::min(kPanel, q.N - n);
  const __mmask64 real = ~uint64_t{0} >> (kPanel - columns);
  const __m512i flip = _mm512_set1_epi8((char)0x80);
  alignas(64) int8_t rows[4][kPanel];
  for (int64_t k = 0; k < q.K4; k += 4, panel += 4 * kPanel) {
    for (int i = 0; i < 4; ++i) {
      const __m512i row =
          k + i < q.K
              ? _mm512_maskz_loadu_epi8(real, q.w + (k + i) * q.N + n)
              : _mm512_setzero_si512();
      _mm512_store_si512(rows[i], _mm512_xor_si512(row, flip));
    }
    for (int c = 0; c < kPanel; c += 16) {
      __m128i r[4];
      for (int i = 0; i < 4; ++i) {
        r[i] = _mm_load_si128((const __m128i*)(rows[i] + c));
      }
      const __m128i low[2] = {_mm_unpacklo_epi8(r[0], r[1]),
                              _mm_unpacklo_epi8(r[2], r[3])};
      const __m128i high[2] = {_mm_unpackhi_epi8(r[0], r[1]),
                               _mm_unpackhi_epi8(r[2], r[3])};
      __m128i* out = (__m128i*)(panel + 4 * c);
      _mm_store_si128(out, _mm_unpacklo_epi16(low[0], low[1]));
      _mm_store_si128(out + 1, _mm_unpackhi_epi16(low[0], low[1]));
      _mm_store_si128(out + 2, _mm_unpacklo_epi16(high[0], high[1]));
      _mm_store_si128(out + 3, _mm_unpackhi_epi16(high[0], high[1]));
    }
  }
}

// R rows of x times V vectors of 16 columns of a panel.
template <int R, int V>
QAT_AVX512 void Tile(const Problem& q, const uint8_t* panel,
                     const int32_t* offset_M, int64_t m, int64_t n) {
  __m512i sum[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      sum[r][v] = _mm512_set1_epi32(offset_M[m + r]);
    }
  }
  const int8_t* x = q.x + m * q.K4;
  for (int64_t k = 0; k < q.K4; k += 4, panel += 4 * kPanel) {
    __m512i w[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) w[v] = _mm512_load_si512(panel + 64 * v);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      int32_t four;
      std::memcpy(&four, x + r * q.K4 + k, 4);
      const __m512i xs = _mm512_set1_epi32(four);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        Accumulate(sum[r][v], w[v], xs);
      }
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    const int64_t left = q.N - n - 16 * v;
    if (left <= 0) break;
    const __mmask16 real = left >= 16 ? 0xffff : (1 << left) - 1;
    const __m512 columns =
        q.column_scales ? _mm512_maskz_loadu_ps(real, q.scale_N + n + 16 * v)
                        : _mm512_set1_ps(q.scale_N[0]);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const __m512 row = _mm512_set1_ps(q.scale_M[q.row_scales ? m + r : 0]);
      const __m512 y =
          _mm512_mul_ps(_mm512_cvtepi32_ps(sum[r][v]), columns);
      _mm512_mask_storeu_ps(q.y + (m + r) * q.N + n + 16 * v, real,
                            _mm512_mul_ps(y, row));
    }
  }
}

template <int V>
QAT_AVX512 void Panel(const Problem& q, const uint8_t* panel,
                      const int32_t* offset_M, int64_t m0, int64_t m1,
                      int64_t n) {
  int64_t m = m0;
  for (; m + kRows <= m1; m += kRows) {
    Tile<kRows, V>(q, panel, offset_M, m, n);
  }
  for (; m + 2 <= m1; m += 2) Tile<2, V>(q, panel, offset_M, m, n);
  if (m < m1) Tile<1, V>(q, panel, offset_M, m, n);
}

// Rows [m0, m1) and columns [n, n + 64).
void Block(const Problem& q, const int32_t* offset_M, int64_t m0, int64_t m1,
           int64_t n) {
  thread_local std::vector<uint8_t> memory;
  memory.resize(q.K4 * kPanel + 64);
  auto* panel = reinterpret_cast<uint8_t*>(
      (reinterpret_cast<uintptr_t>(memory.data()) + 63) & ~uintptr_t{63});
  PackPanel(q, n, panel);
  if (q.N - n > 32) return Panel<4>(q, panel, offset_M, m0, m1, n);
  if (q.N - n > 16) return Panel<2>(q, panel, offset_M, m0, m1, n);
  Panel<1>(q, panel, offset_M, m0, m1, n);
}

QAT_AVX512 void Offsets(const int8_t* x, int64_t K, int64_t rows,
                        int32_t* offset_M) {
  for (int64_t m = 0; m < rows; ++m) {
    int32_t sum = 0;
    for (int64_t k = 0; k < K; ++k) sum += x[m * K + k];
    offset_M[m] = -128 * sum;
  }
}

#endif  // QAT_X86

// Groups of rows, each times the matrix that expert_G names.
ffi::Error Int8Matmul(ffi::ThreadPool pool, ffi::Buffer<ffi::S8> x,
                      ffi::Buffer<ffi::S8> w, ffi::Buffer<ffi::S32> expert_G,
                      ffi::Buffer<ffi::F32> scale_M,
                      ffi::Buffer<ffi::F32> scale_N,
                      ffi::ResultBuffer<ffi::F32> y) {
  const auto x_shape = x.dimensions(), w_shape = w.dimensions();
  if (x_shape.size() != 3 || w_shape.size() != 3 || x_shape[2] != w_shape[1]) {
    return ffi::Error::InvalidArgument("x [G, M, K], w [E, K, N] do not fit");
  }
  const int64_t G = x_shape[0], M = x_shape[1], K = x_shape[2];
  const int64_t E = w_shape[0], N = w_shape[2];
  const auto rows = int64_t(scale_M.element_count());
  const auto columns = int64_t(scale_N.element_count());
  if (int64_t(expert_G.element_count()) != G ||
      (rows != 1 && rows != G * M) || (columns != E && columns != E * N)) {
    return ffi::Error::InvalidArgument(
        "want a matrix a group; one scale or one a row; and for each matrix"
        " one scale or one a column");
  }
  for (int64_t g = 0; g < G; ++g) {
    const int32_t e = expert_G.typed_data()[g];
    if (e < 0 || e >= E) {
      return ffi::Error::InvalidArgument("there is no such matrix");
    }
  }
#if QAT_X86
  if (Supported(kAvx512Vnni)) {
    const int64_t K4 = (K + 3) / 4 * 4;
    const int8_t* codes = x.typed_data();
    std::vector<int8_t> padded;
    if (K4 != K) {
      padded.resize(G * M * K4);
      for (int64_t m = 0; m < G * M; ++m) {
        std::memcpy(&padded[m * K4], codes + m * K, K);
      }
      codes = padded.data();
    }
    std::vector<int32_t> offset_M(G * M);
    Offsets(codes, K4, G * M, offset_M.data());
    // A panel is packed once for all rows that a thread multiplies by it; rows
    // are only split where there are more threads than panels.
    const int64_t panels = (N + kPanel - 1) / kPanel;
    const int64_t parts = std::clamp<int64_t>(
        2 * pool.num_threads() / std::max<int64_t>(G * panels, 1), 1,
        (M + 95) / 96 + (M == 0));
    const int64_t size = (M + parts - 1) / parts;
    ParallelFor(pool, G * panels * parts, [&](int64_t i) {
      const int64_t g = i / (panels * parts), e = expert_G.typed_data()[g];
      const Problem problem{codes + g * M * K4,
                            w.typed_data() + e * K * N,
                            scale_M.typed_data() + (rows != 1 ? g * M : 0),
                            scale_N.typed_data() + e * (columns / E),
                            y->typed_data() + g * M * N,
                            M,
                            K,
                            K4,
                            N,
                            rows != 1,
                            columns != E};
      const int64_t m0 = std::min(M, i % parts * size);
      Block(problem, offset_M.data() + g * M, m0, std::min(M, m0 + size),
            i / parts % panels * kPanel);
    });
    return ffi::Error::Success();
  }
#endif
  return ffi::Error(ffi::ErrorCode::kUnimplemented,
                    "this processor lacks AVX512-VNNI");
}

}  // namespace
}  // namespace qat

XLA_FFI_DEFINE_HANDLER_SYMBOL(qat_int8_matmul, qat::Int8Matmul,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S8>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S8>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>());
