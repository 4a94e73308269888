// Fork-join on XLA's own thread pool.
#ifndef JAX_APT_XLA_OPS_TEAM_H_
#define JAX_APT_XLA_OPS_TEAM_H_

#include <atomic>
#include <functional>
#include <memory>
#include <thread>

#include "gemm.h"

namespace jax_apt {

// The caller takes tasks from a shared counter itself and asks for helpers; it waits for tasks that a
// helper has begun, never for a helper that has not started. So it cannot deadlock on a busy pool, and
// several calls can share one pool.
class Team final : public Parallel {
 public:
  using Schedule = std::function<void(std::function<void()>)>;

  Team(int workers, Schedule schedule) : workers_(workers), schedule_(std::move(schedule)) {}

  int workers() const override { return workers_; }

  void Run(int64_t tasks, Task task, void* context) override {
    auto work = std::make_shared<Work>(Work{tasks, task, context});
    const int64_t helpers = std::min<int64_t>(workers_ - 1, tasks - 1);
    for (int worker = 1; worker <= helpers; ++worker)
      schedule_([work, worker] { work->TakeAll(worker); });
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
    Work(Work&& other) : Work(other.tasks, other.task, other.context) {}

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
