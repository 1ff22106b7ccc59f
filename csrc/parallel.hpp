// A parallel loop that shares the process's OpenMP threads instead of bringing a second pool.
#pragma once
#include <cstdint>

namespace sl {

// Calls fn(context, i) for every i in [0, n_items), on up to n_threads threads, in any order.
// fn must not throw. Returns when all calls have returned.
void parallel_for(int64_t n_items, int n_threads, void (*fn)(void*, int64_t), void* context);

template <typename F>
void parallel_for(int64_t n_items, int n_threads, F&& body) {
  using Body = F;
  parallel_for(
      n_items, n_threads, [](void* context, int64_t i) { (*static_cast<Body*>(context))(i); },
      &body);
}

}  // namespace sl
