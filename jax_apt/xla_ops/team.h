// Fork-join on XLA's own thread pool.
#ifndef JAX_APT_XLA_OPS_TEAM_H_
#define JAX_APT_XLA_OPS_TEAM_H_

#include <algorithm>
#include <atomic>
#include <functional>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "product.h"

namespace jax_apt {

// The caller alone.
class Serial final : public Parallel {
 public:
  int workers() const override { return 1; }
  void Run(int64_t tasks, Task task, void* context) override {
    for (int64_t i = 0; i < tasks; ++i) task(context, i, 0);
  }
  void Run(Stage first, Stage then, void* context) override {
    Run(first.tasks, first.task, context);
    Run(then.tasks, then.task, context);
  }
};

// Every worker has its own range of the tasks and then takes what is left of the others' ranges: in one call
// after the other a thread works on the same part of the data, which so stays in its cache. The caller is a
// worker itself and waits for tasks that a helper has begun, never for a helper that has not started. So it
// cannot deadlock on a busy pool, and several calls can share one pool.
class Team final : public Parallel {
 public:
  using Schedule = std::function<void(std::function<void()>)>;

  Team(int workers, Schedule schedule) : workers_(std::max(workers, 1)), schedule_(std::move(schedule)) {}

  int workers() const override { return workers_; }

  void Run(int64_t tasks, Task task, void* context) override { Run({0, task}, {tasks, task}, context); }

  void Run(Stage first, Stage then, void* context) override {
    const auto most = static_cast<int>(std::min<int64_t>(workers_, std::max(first.tasks, then.tasks)));
    if (most <= 1) return Serial().Run(first, then, context);
    auto work = std::make_shared<Work>(first, then, context, most);
    for (int worker = 1; worker < most; ++worker) schedule_([work, worker] { work->TakeAll(worker); });
    work->TakeAll(0);
  }

 private:
  class Tasks {
   public:
    Tasks(const Stage& stage, int workers) : stage_(stage), ranges_(workers) {
      for (int w = 0; w < workers; ++w) {
        ranges_[w].next = stage.tasks * w / workers;
        ranges_[w].end = stage.tasks * (w + 1) / workers;
      }
    }

    // Returns when every task has been taken, by threads that run, and all are done.
    void TakeAll(int worker, void* context) {
      const auto workers = static_cast<int>(ranges_.size());
      for (int i = 0; i < workers; ++i) {
        Range& range = ranges_[(worker + i) % workers];
        for (int64_t t; (t = range.next.fetch_add(1, std::memory_order_relaxed)) < range.end;) {
          stage_.task(context, t, worker);
          done_.fetch_add(1, std::memory_order_acq_rel);
        }
      }
      Wait();
    }

   private:
    struct alignas(64) Range {
      std::atomic<int64_t> next;
      int64_t end;
    };

    const Stage stage_;
    std::vector<Range> ranges_;
    alignas(64) std::atomic<int64_t> done_{0};

    // What is waited for takes microseconds; a thread that gives way may come back much later.
    void Wait() const {
      constexpr int kSpins = 4096;
      for (int i = 0; done_.load(std::memory_order_acquire) < stage_.tasks; ++i)
        if (i >= kSpins) std::this_thread::yield();
    }
  };

  struct Work {
    Tasks first, then;
    void* const context;  // valid while a task is left: the caller waits for those

    Work(const Stage& first, const Stage& then, void* context, int workers)
        : first(first, workers), then(then, workers), context(context) {}

    void TakeAll(int worker) {
      first.TakeAll(worker, context);
      then.TakeAll(worker, context);
    }
  };

  const int workers_;
  const Schedule schedule_;
};

}  // namespace jax_apt

#endif  // JAX_APT_XLA_OPS_TEAM_H_
