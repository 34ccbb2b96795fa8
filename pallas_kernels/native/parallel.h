// Loops over XLA's own threads.

#ifndef PALLAS_KERNELS_NATIVE_PARALLEL_H_
#define PALLAS_KERNELS_NATIVE_PARALLEL_H_

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>

#include "xla/ffi/api/ffi.h"

namespace qat {

// A loop that several threads take turns at. A thread that comes late finds no
// turn left, and `body` is only used in a turn.
struct Loop {
  std::atomic<int64_t> next{0}, done{0};
  int64_t n;
  const void* body;
  void (*call)(const void* body, int64_t i);

  void Work() {
    for (int64_t i; (i = next.fetch_add(1)) < n;) {
      call(body, i);
      done.fetch_add(1, std::memory_order_release);
    }
  }
};

template <typename F>
std::shared_ptr<Loop> MakeLoop(int64_t n, const F& f) {
  auto loop = std::make_shared<Loop>();
  loop->n = n;
  loop->body = &f;
  loop->call = [](const void* body, int64_t i) {
    (*static_cast<const F*>(body))(i);
  };
  return loop;
}

// Works at a loop, and waits for the turns that others are at.
//
// No thread waits for a task that has not begun: handlers run on threads of the
// same pool, and several that wait for tasks of each other would wait for ever.
inline void Finish(Loop& loop) {
  loop.Work();
  while (loop.done.load(std::memory_order_acquire) < loop.n) {
    std::this_thread::yield();
  }
}

// Calls f(i) for every i in [0, n), on this thread and on those of the pool.
template <typename F>
void ParallelFor(xla::ffi::ThreadPool& pool, int64_t n, const F& f) {
  const auto loop = MakeLoop(n, f);
  const int64_t helpers = std::min(pool.num_threads(), n) - 1;
  for (int64_t t = 0; t < helpers; ++t) {
    pool.Schedule([loop] { loop->Work(); });
  }
  Finish(*loop);
}

// Where helpers that stay for a while find the newest loop.
struct Desk {
  std::mutex mutex;
  std::shared_ptr<Loop> newest;          // Under the mutex.
  std::atomic<uint64_t> number{0};       // Of the newest.
  std::atomic<int64_t> helpers{0};

  static Desk& Get() {
    static Desk* const desk = new Desk;  // Threads may outlive static objects.
    return *desk;
  }

  void Put(std::shared_ptr<Loop> loop) {
    const std::lock_guard<std::mutex> lock(mutex);
    newest = std::move(loop);
    number.fetch_add(1, std::memory_order_release);
  }

  std::shared_ptr<Loop> Newest() {
    const std::lock_guard<std::mutex> lock(mutex);
    return newest;
  }

  // Works at loops as they come, until none has come for a while.
  void Help() {
    using Clock = std::chrono::steady_clock;
    constexpr auto kPatience = std::chrono::microseconds(100);
    uint64_t seen = 0;
    auto last = Clock::now();
    while (Clock::now() - last < kPatience) {
      const uint64_t now = number.load(std::memory_order_acquire);
      if (now == seen) continue;
      seen = now;
      if (const auto loop = Newest()) loop->Work();
      last = Clock::now();
    }
    helpers.fetch_sub(1);
  }
};

// `ParallelFor` for handlers that are called again and again, as in writing a
// text: helpers stay awake between two calls. To wake a thread up takes longer
// than the products of one token.
template <typename F>
void ParallelForAwake(xla::ffi::ThreadPool& pool, int64_t n, const F& f) {
  Desk& desk = Desk::Get();
  const auto loop = MakeLoop(n, f);
  desk.Put(loop);
  const int64_t wanted = std::min(pool.num_threads(), n) - 1;
  for (int64_t here = desk.helpers.load(); here < wanted;) {
    if (!desk.helpers.compare_exchange_weak(here, here + 1)) continue;
    pool.Schedule([&desk] { desk.Help(); });
    ++here;
  }
  Finish(*loop);
}

}  // namespace qat

#endif  // PALLAS_KERNELS_NATIVE_PARALLEL_H_
