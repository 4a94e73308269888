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
};

// The caller takes tasks from a shared counter itself and asks for helpers; it waits for tasks that a
// helper has begun, never for a helper that has not started. So it cannot deadlock on a busy pool, and
// several calls can share one pool.
class Team final : public Parallel {
 public:
  using Schedule = std::function<void(std::function<void()>)>;

  Team(int workers, Schedule schedule) : workers_(std::max(workers, 1)), schedule_(std::move(schedule)) {}

  int workers() const override { return workers_; }

  void Run(int64_t tasks, Task task, void* context) override {
    auto work = std::make_shared<Work>(tasks, task, context);
    const int64_t helpers = std::min<int64_t>(workers_ - 1, tasks - 1);
    for (int worker = 1; worker <= helpers; ++worker) schedule_([work, worker] { work->TakeAll(worker); });
    work->TakeAll(0);
    while (work->done.load(std::memory_order_acquire) < tasks) std::this_thread::yield();
  }

 private:
  struct Work {
    const int64_t tasks;
    const Task task;
    void* const context;  // valid while a task is left: the caller waits for those
    std::atomic<int64_t> next{0}, done{0};

    Work(int64_t tasks, Task task, void* context) : tasks(tasks), task(task), context(context) {}

    void TakeAll(int worker) {
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
        task(context, i, worker);
        done.fetch_add(1, std::memory_order_acq_rel);
      }
    }
  };

  const int workers_;
  const Schedule schedule_;
};

}  // namespace jax_apt

#endif  // JAX_APT_XLA_OPS_TEAM_H_
