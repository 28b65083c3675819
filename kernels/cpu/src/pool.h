// Loops over whatever thread pool the caller has, without ever waiting for a task that has not started: XLA may call handlers from the
// pool's own threads, where waiting for queued tasks would deadlock.
#pragma once
#include <algorithm>
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

// Several loops one after the other, helped by threads that are called once, when the team is made: a thread that slept comes tens of
// microseconds later, during which what is short is done already, and between two loops it stays awake.
class Team {
 public:
  // No more than `tasks` threads are of use; one: nobody is called.
  Team(const Pool& pool, int64_t tasks) : helpers_(std::max<int64_t>(1, std::min(pool.threads, tasks)) - 1) {
    if (helpers_ == 0) return;
    state_ = std::make_shared<State>();
    for (int64_t i = 0; i < helpers_; ++i) pool.schedule([state = state_] { state->help(); });
  }
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;
  ~Team() {
    if (state_) state_->closed.store(true, std::memory_order_release);
  }

  int64_t threads() const { return helpers_ + 1; }

  template <class F>
  void run(int64_t count, F&& body) {
    if (count <= 1 || !state_ || used_ == kLoops) {
      for (int64_t i = 0; i < count; ++i) body(i);
      return;
    }
    Loop& loop = state_->loops[used_++];
    loop.count = count;
    loop.body = std::forward<F>(body);
    state_->open.store(used_, std::memory_order_release);
    loop.work();
    // What is left is in the hands of running threads; spinning is short, yielding keeps a crowded machine moving.
    for (int spins = 0; loop.done.load(std::memory_order_acquire) < count; ++spins)
      if (spins > kSpins) std::this_thread::yield();
  }

 private:
  static constexpr int kLoops = 4, kSpins = 2000;
  struct Loop {
    std::atomic<int64_t> next{0}, done{0};
    int64_t count = 0;
    std::function<void(int64_t)> body;
    void work() {
      for (int64_t i; (i = next.fetch_add(1)) < count;) {
        body(i);
        done.fetch_add(1, std::memory_order_acq_rel);
      }
    }
  };
  struct State {
    Loop loops[kLoops];
    std::atomic<int> open{0};
    std::atomic<bool> closed{false};
    // A loop that is over when its helper comes costs one look at its counter.
    void help() {
      for (int i = 0; i < kLoops; ++i) {
        for (int spins = 0; open.load(std::memory_order_acquire) <= i; ++spins) {
          if (closed.load(std::memory_order_acquire)) return;
          if (spins > kSpins) std::this_thread::yield();
        }
        loops[i].work();
      }
    }
  };
  int64_t helpers_;
  int used_ = 0;
  std::shared_ptr<State> state_;
};

template <class F>
void parallel_for(const Pool& pool, int64_t count, F&& body) {
  Team(pool, count).run(count, std::forward<F>(body));
}

}  // namespace qfunc
