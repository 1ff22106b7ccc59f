// torch brings an OpenMP runtime whose workers spin for a while after each region. A pool of our
// own beside it would fight those for the cores, and linking a second libgomp would be a second
// pool. So the one that is loaded is looked up by name: GOMP_parallel is part of libgomp's (and
// LLVM libomp's) stable interface. Where none is loaded the loop runs serially.
#include "parallel.hpp"

#include <dlfcn.h>

#include <atomic>

namespace sl {
namespace {

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

struct Loop {
  std::atomic<int64_t> next{0};
  int64_t n_items;
  void (*fn)(void*, int64_t);
  void* context;
};

void run(void* data) {
  Loop& loop = *static_cast<Loop*>(data);
  for (int64_t i; (i = loop.next.fetch_add(1, std::memory_order_relaxed)) < loop.n_items;) {
    loop.fn(loop.context, i);
  }
}

}  // namespace

void parallel_for(int64_t n_items, int n_threads, void (*fn)(void*, int64_t), void* context) {
  static const auto gomp_parallel =
      reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  Loop loop;
  loop.n_items = n_items;
  loop.fn = fn;
  loop.context = context;
  const int64_t n = n_items < n_threads ? n_items : n_threads;
  if (gomp_parallel == nullptr || n <= 1) {
    run(&loop);
  } else {
    gomp_parallel(run, &loop, static_cast<unsigned>(n), 0);
  }
}

}  // namespace sl
