// Fork-join on XLA's own thread pool.
#ifndef JAX_APT_XLA_OPS_TEAM_H_
#define JAX_APT_XLA_OPS_TEAM_H_

#include <algorithm>
#include <atomic>
#include <functional>
#include <memory>
#include <thread>
#include <utility>

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

// The caller takes tasks from a shared counter itself and asks for helpers; it waits for tasks that a
// helper has begun, never for a helper that has not started. So it cannot deadlock on a busy pool, and
// several calls can share one pool.
class Team final : public Parallel {
 public:
  using Schedule = std::function<void(std::function<void()>)>;

  Team(int workers, Schedule schedule) : workers_(std::max(workers, 1)), schedule_(std::move(schedule)) {}

  int workers() const override { return workers_; }

  void Run(int64_t tasks, Task task, void* context) override { Run({0, task}, {tasks, task}, context); }

  void Run(Stage first, Stage then, void* context) override {
    if (workers_ == 1) return Serial().Run(first, then, context);
    auto work = std::make_shared<Work>(first, then, context);
    const int64_t helpers = std::min<int64_t>(workers_ - 1, std::max(first.tasks, then.tasks) - 1);
    for (int worker = 1; worker <= helpers; ++worker) schedule_([work, worker] { work->TakeAll(worker); });
    work->TakeAll(0);
    work->WaitFor(work->tasks);
  }

 private:
  struct Work {
    const Stage first, then;
    const int64_t tasks;
    void* const context;  // valid while a task is left: the caller waits for those
    std::atomic<int64_t> next{0}, done{0};

    Work(Stage first, Stage then, void* context)
        : first(first), then(then), tasks(first.tasks + then.tasks), context(context) {}

    void TakeAll(int worker) {
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
        if (i < first.tasks) {
          first.task(context, i, worker);
        } else {
          WaitFor(first.tasks);  // which threads that run have taken: the counter has passed them
          then.task(context, i - first.tasks, worker);
        }
        done.fetch_add(1, std::memory_order_acq_rel);
      }
    }

    // What is waited for takes microseconds; a thread that gives way may come back much later.
    void WaitFor(int64_t count) const {
      constexpr int kSpins = 4096;
      for (int i = 0; done.load(std::memory_order_acquire) < count; ++i)
        if (i >= kSpins) std::this_thread::yield();
    }
  };

  const int workers_;
  const Schedule schedule_;
};

}  // namespace jax_apt

#endif  // JAX_APT_XLA_OPS_TEAM_H_
