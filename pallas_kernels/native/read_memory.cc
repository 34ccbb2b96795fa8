// Reads a buffer once on all threads: what memory gives to a product that does
// nothing but read its weights.

#include <cstdint>
#include <vector>

#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace qat {
namespace {

ffi::Error ReadMemory(ffi::ThreadPool pool, ffi::Buffer<ffi::S32> x,
                      ffi::ResultBuffer<ffi::S32> y) {
  const auto n = int64_t(x.element_count());
  const int64_t chunks = 8 * std::max<int64_t>(pool.num_threads(), 1);
  const auto* words = reinterpret_cast<const uint32_t*>(x.typed_data());
  std::vector<uint32_t> sums(chunks);
  ParallelForAwake(pool, chunks, [&](int64_t i) {
    uint32_t sum = 0;
    const int64_t end = n * (i + 1) / chunks;
    for (int64_t k = n * i / chunks; k < end; ++k) sum += words[k];
    sums[i] = sum;
  });
  uint32_t total = 0;
  for (uint32_t sum : sums) total += sum;
  y->typed_data()[0] = int32_t(total);
  return ffi::Error::Success();
}

}  // namespace
}  // namespace qat

XLA_FFI_DEFINE_HANDLER_SYMBOL(qat_read_memory, qat::ReadMemory,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::S32>>());
