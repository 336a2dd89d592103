// Runs tasks on XLA's thread pool.

#pragma once

#include <algorithm>
#include <atomic>
#include <memory>
#include <thread>

#include "xla/ffi/api/ffi.h"

namespace drlora {

// Calls task(0) ... task(count - 1), each once, on any threads, and returns when all are done.
//
// The calling thread participates, and waits only for tasks that have begun: it may belong to the
// pool, all of whose threads may be waiting in the same way. Tasks do not throw (without memory
// they end the process, as XLA does).
template <typename Task>
void parallel(xla::ffi::ThreadPool& pool, int64_t count, const Task& task) {
  struct Shared {
    std::atomic<int64_t> next{0}, done{0};
  };
  const auto shared = std::make_shared<Shared>();
  // `task` is only touched while the caller waits for what was begun.
  const auto run = [shared, count, &task] {
    for (int64_t index; (index = shared->next.fetch_add(1)) < count;) {
      task(index);
      shared->done.fetch_add(1, std::memory_order_release);
    }
  };
  const int64_t helpers = std::min<int64_t>(pool.num_threads(), count) - 1;
  for (int64_t helper = 0; helper < helpers; ++helper) {
    auto copy = run;
    pool.Schedule(std::move(copy));
  }
  run();
  for (int spins = 0; shared->done.load(std::memory_order_acquire) < count;) {
    if (++spins > 1000) std::this_thread::yield();
  }
}

}  // namespace drlora
