// Loops over XLA's own threads.

#ifndef PALLAS_KERNELS_NATIVE_PARALLEL_H_
#define PALLAS_KERNELS_NATIVE_PARALLEL_H_

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

#include "xla/ffi/api/ffi.h"

namespace qat {

// Calls f(i) for every i in [0, n), on this thread and on those of the pool.
//
// This thread never waits for a task that has not begun: handlers run on
// threads of the same pool, and several that wait for tasks of each other
// would wait for ever. A task that begins late finds no i left and ends.
template <typename F>
void ParallelFor(xla::ffi::ThreadPool& pool, int64_t n, const F& f) {
  struct Shared {
    std::atomic<int64_t> next{0};
    std::atomic<int64_t> done{0};
  };
  auto shared = std::make_shared<Shared>();
  const F* body = &f;  // Only used for an i < n, that is, before `done` is n.
  auto work = [shared, body, n] {
    for (int64_t i; (i = shared->next.fetch_add(1)) < n;) {
      (*body)(i);
      shared->done.fetch_add(1, std::memory_order_release);
    }
  };
  const int64_t helpers = std::min(pool.num_threads(), n) - 1;
  for (int64_t t = 0; t < helpers; ++t) pool.Schedule([work] { work(); });
  work();
  while (shared->done.load(std::memory_order_acquire) < n) {
    std::this_thread::yield();
  }
}

}  // namespace qat

#endif  // PALLAS_KERNELS_NATIVE_PARALLEL_H_
