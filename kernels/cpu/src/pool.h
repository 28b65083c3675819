// parallel_for over whatever thread pool the caller has, without ever waiting for a task that has not started: XLA may call
// handlers from the pool's own threads, where waiting for queued tasks would deadlock.
#pragma once
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <thread>

namespace qfunc {

struct Pool {
  int64_t threads = 1;
  std::function<void(std::function<void()>)> schedule;
};

template <class F>
void parallel_for(const Pool& pool, int64_t count, F&& body) {
  if (count <= 1 || pool.threads <= 1) {
    for (int64_t i = 0; i < count; ++i) body(i);
    return;
  }
  struct State {
    std::atomic<int64_t> next{0}, done{0};
    int64_t count;
    std::function<void(int64_t)> body;
    void work() {
      for (int64_t i; (i = next.fetch_add(1)) < count;) {
        body(i);
        done.fetch_add(1, std::memory_order_acq_rel);
      }
    }
  };
  auto state = std::make_shared<State>();
  state->count = count;
  state->body = std::forward<F>(body);
  const int64_t helpers = (pool.threads < count ? pool.threads : count) - 1;
  for (int64_t i = 0; i < helpers; ++i) pool.schedule([state] { state->work(); });
  state->work();
  // What is left is in the hands of running threads; spinning is short, yielding keeps a crowded machine moving.
  for (int spins = 0; state->done.load(std::memory_order_acquire) < count; ++spins)
    if (spins > 2000) std::this_thread::yield();
}

}  // namespace qfunc
