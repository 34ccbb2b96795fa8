// One new token of each text attends to the tokens before it, which a cache
// holds; the token's own key and value are written into the cache first.
//
//   keys[b, position, k] = key[b, k], and values likewise
//   y[b, n] = sum_s p_s values[b, s, k],  s = 0 ... position, k = n / (N / K)
//   p = softmax_s(query[b, n] . keys[b, s, k] / sqrt(H))
//
// Products, sums and softmax are float32.

#include <algorithm>
#include <cmath>
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

constexpr int64_t kLanes = 16;  // Numbers of a register.

// Queries that share keys, and those keys and values.
template <typename T>
struct Head {
  const float* query;  // [G, padded], zeros after H; divided by sqrt(H).
  const T* keys;       // Row s begins at keys + s * stride.
  const T* values;
  float* scores;  // [G, seen]
  float* y;       // [G, H]
  int64_t G, H, padded, seen, stride;
};

// Scores to weights, and 1 over the sum of these.
inline float Softmax(float* scores, int64_t seen) {
  const float most = *std::max_element(scores, scores + seen);
  float total = 0;
  for (int64_t s = 0; s < seen; ++s) {
    total += scores[s] = std::exp(scores[s] - most);
  }
  return 1 / total;
}

template <typename T>
void Portable(const Head<T>& q) {
  for (int64_t g = 0; g < q.G; ++g) {
    const float* query = q.query + g * q.padded;
    float* scores = q.scores + g * q.seen;
    for (int64_t s = 0; s < q.seen; ++s) {
      float sum = 0;
      const T* key = q.keys + s * q.stride;
      for (int64_t h = 0; h < q.H; ++h) sum += query[h] * Float(key[h]);
      scores[s] = sum;
    }
    const float scale = Softmax(scores, q.seen);
    float* y = q.y + g * q.H;
    std::fill(y, y + q.H, 0.0f);
    for (int64_t s = 0; s < q.seen; ++s) {
      const T* value = q.values + s * q.stride;
      for (int64_t h = 0; h < q.H; ++h) y[h] += scores[s] * Float(value[h]);
    }
    for (int64_t h = 0; h < q.H; ++h) y[h] *= scale;
  }
}

#if QAT_X86

QAT_AVX512 inline __m512 Load(const uint16_t* from, __mmask16 mask) {
  const __m256i bits = _mm256_maskz_loadu_epi16(mask, from);
  return _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

QAT_AVX512 inline __m512 Load(const float* from, __mmask16 mask) {
  return _mm512_maskz_loadu_ps(mask, from);
}

// Of the numbers from h on.
inline __mmask16 Mask(int64_t width, int64_t h) {
  return width - h >= kLanes ? 0xffff : (1 << std::max<int64_t>(width - h, 0)) - 1;
}

template <typename T>
QAT_AVX512 void Avx512(const Head<T>& q) {
  constexpr int kWide = 4;  // Registers of a row of values at a time.
  for (int64_t g = 0; g < q.G; ++g) {
    const float* query = q.query + g * q.padded;
    float* scores = q.scores + g * q.seen;
    for (int64_t s = 0; s < q.seen; ++s) {
      const T* key = q.keys + s * q.stride;
      __m512 sum = _mm512_setzero_ps();
      for (int64_t h = 0; h < q.H; h += kLanes) {
        sum = _mm512_fmadd_ps(Load(key + h, Mask(q.H, h)),
                              _mm512_loadu_ps(query + h), sum);
      }
      scores[s] = _mm512_reduce_add_ps(sum);
    }
    const __m512 scale = _mm512_set1_ps(Softmax(scores, q.seen));
    for (int64_t h = 0; h < q.H; h += kWide * kLanes) {
      __mmask16 mask[kWide];
      __m512 sum[kWide];
      for (int i = 0; i < kWide; ++i) {
        mask[i] = Mask(q.H, h + i * kLanes);
        sum[i] = _mm512_setzero_ps();
      }
      for (int64_t s = 0; s < q.seen; ++s) {
        const T* value = q.values + s * q.stride + h;
        const __m512 weight = _mm512_set1_ps(scores[s]);
#pragma GCC unroll 4
        for (int i = 0; i < kWide; ++i) {
          sum[i] = _mm512_fmadd_ps(weight, Load(value + i * kLanes, mask[i]),
                                   sum[i]);
        }
      }
      for (int i = 0; i < kWide; ++i) {
        _mm512_mask_storeu_ps(q.y + g * q.H + h + i * kLanes, mask[i],
                              _mm512_mul_ps(sum[i], scale));
      }
    }
  }
}

#endif  // QAT_X86

inline bool Same(ffi::Span<const int64_t> a, ffi::Span<const int64_t> b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end());
}

template <ffi::DataType D, typename T>
ffi::Error CachedAttention(ffi::ThreadPool pool, ffi::Buffer<D> query,
                           ffi::Buffer<D> key, ffi::Buffer<D> value,
                           ffi::Buffer<D> old_keys, ffi::Buffer<D> old_values,
                           ffi::Buffer<ffi::S32> position,
                           ffi::ResultBuffer<ffi::F32> y,
                           ffi::ResultBuffer<D> keys,
                           ffi::ResultBuffer<D> values, int64_t variant) {
  const auto q_shape = query.dimensions(), new_shape = key.dimensions();
  const auto shape = keys->dimensions();
  if (q_shape.size() != 3 || new_shape.size() != 3 || shape.size() != 4 ||
      position.dimensions().size() != 1) {
    return ffi::Error::InvalidArgument(
        "want query [B, N, H], key [B, K, H], a cache [B, S, K, H], and "
        "position [B]");
  }
  const int64_t B = shape[0], S = shape[1], K = shape[2], H = shape[3];
  const int64_t N = q_shape[1];
  if (q_shape[0] != B || q_shape[2] != H || new_shape[0] != B ||
      new_shape[1] != K || new_shape[2] != H || N % K || !S ||
      !Same(value.dimensions(), new_shape) ||
      !Same(values->dimensions(), shape) || position.dimensions()[0] != B) {
    return ffi::Error::InvalidArgument("query, key, value and cache do not fit");
  }
  if (!Supported(variant)) {
    return ffi::Error::InvalidArgument("this processor lacks the variant");
  }
  // The cache is one buffer with its result wherever XLA did not copy it.
  T* const keys_out = reinterpret_cast<T*>(keys->untyped_data());
  T* const values_out = reinterpret_cast<T*>(values->untyped_data());
  const int64_t G = N / K, padded = (H + kLanes - 1) / kLanes * kLanes;
  const float divisor = 1 / std::sqrt(float(H));
  const auto place = [&](int64_t b) {
    return std::clamp<int64_t>(position.typed_data()[b], 0, S - 1);
  };
  const auto head = [&](int64_t i) {
    const int64_t b = i / K, k = i % K, at = place(b);
    const int64_t first = (b * S * K + k) * H, mine = first + at * K * H;
    std::memcpy(keys_out + mine,
                reinterpret_cast<const T*>(key.untyped_data()) + i * H,
                H * sizeof(T));
    std::memcpy(values_out + mine,
                reinterpret_cast<const T*>(value.untyped_data()) + i * H,
                H * sizeof(T));
    std::vector<float> room(G * (padded + at + 1));
    const T* from = reinterpret_cast<const T*>(query.untyped_data()) + i * G * H;
    for (int64_t g = 0; g < G; ++g) {
      for (int64_t h = 0; h < H; ++h) {
        room[g * padded + h] = Float(from[g * H + h]) * divisor;
      }
    }
    const Head<T> problem{room.data(),
                          keys_out + first,
                          values_out + first,
                          room.data() + G * padded,
                          y->typed_data() + i * G * H,
                          G,
                          H,
                          padded,
                          at + 1,
                          K * H};
#if QAT_X86
    if (variant == kAvx512Vnni) return Avx512(problem);
#endif
    Portable(problem);
  };
  int64_t work = 0;
  for (int64_t b = 0; b < B; ++b) work += (place(b) + 1) * N * H;
  // Even a thread that is awake takes a while to hear of it.
  if (work < (int64_t{1} << 15)) {
    for (int64_t i = 0; i < B * K; ++i) head(i);
  } else {
    ParallelForAwake(pool, B * K, head);
  }
  return ffi::Error::Success();
}

template <ffi::DataType D>
auto Binding() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .template Arg<ffi::Buffer<D>>()
      .template Arg<ffi::Buffer<D>>()
      .template Arg<ffi::Buffer<D>>()
      .template Arg<ffi::Buffer<D>>()
      .template Arg<ffi::Buffer<D>>()
      .template Arg<ffi::Buffer<ffi::S32>>()
      .template Ret<ffi::Buffer<ffi::F32>>()
      .template Ret<ffi::Buffer<D>>()
      .template Ret<ffi::Buffer<D>>()
      .template Attr<int64_t>("variant");
}

}  // namespace
}  // namespace qat

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    qat_cached_attention_bfloat16,
    (qat::CachedAttention<xla::ffi::BF16, uint16_t>),
    qat::Binding<xla::ffi::BF16>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    qat_cached_attention_float32, (qat::CachedAttention<xla::ffi::F32, float>),
    qat::Binding<xla::ffi::F32>());
