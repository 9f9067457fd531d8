// How the kernels cut their work: lanes are channels, a register's worth of neighbouring channels is
// a block, and a task takes a group of a row's blocks over all its steps.
#pragma once

#include "vec.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

namespace vlmamba {

template <typename R>
using Buffer = std::vector<Vec<R>>;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <typename R>
int64_t block_count(int64_t channels) {
  return ceil_div(channels, kLanes<R>);
}

// Enough groups that threads finish together, few enough that a group's steps share pages.
template <typename R>
int64_t group_count(int64_t batch, int64_t channels) {
  constexpr int64_t tasks_per_thread = 4;
  const int64_t wanted = ceil_div(tasks_per_thread * at::get_num_threads(), batch);
  return std::min(block_count<R>(channels), wanted);
}

// f(row, first block, end block, group) for every row and group, over the threads.
template <typename R, typename F>
void for_groups(int64_t batch, int64_t channels, const F& f) {
  const int64_t blocks = block_count<R>(channels), groups = group_count<R>(batch, channels);
  at::parallel_for(0, batch * groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t group = task % groups;
      f(task / groups, group * blocks / groups, (group + 1) * blocks / groups, group);
    }
  });
}

// `count` rows of n numbers <-> n vectors, one lane a row. Lanes without a row read 0.
template <typename R>
void load_columns(const R* from, int64_t n, int count, R scale, Vec<R>* to) {
  for (int64_t i = 0; i < n; ++i) {
    to[i] = Vec<R>{};
    for (int lane = 0; lane < count; ++lane) to[i][lane] = from[lane * n + i] * scale;
  }
}

template <typename R>
void store_columns(const Vec<R>* from, int64_t n, int count, R* to) {
  for (int64_t i = 0; i < n; ++i)
    for (int lane = 0; lane < count; ++lane) to[lane * n + i] = from[i][lane];
}

}  // namespace vlmamba
