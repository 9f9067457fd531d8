// How the kernels cut their work: lanes are channels, a register's worth of neighboring channels
// is a block, and a thread takes a range of blocks, row by row, each over all its steps.
#pragma once

#include "vec.h"

#include <ATen/Parallel.h>
#include <omp.h>

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

// Blocks that are read and written together: few pages are open at once, and lines come in runs.
constexpr int64_t kPanel = 256 / kVecBytes;

// Threads share the blocks of all rows evenly. Those of one row that fall to one thread are a
// group; a row has at most this many. Asked outside of parallel regions, inside of which there are
// fewer threads.
inline int64_t group_count(int64_t batch) {
  return ceil_div(at::get_num_threads(), std::max<int64_t>(batch, 1)) + 1;
}

// f(row, first block, end block, group) for every group.
template <typename F>
void for_groups(int64_t batch, int64_t blocks, const F& f) {
  const int64_t all = batch * blocks, tasks = std::min<int64_t>(all, at::get_num_threads());
  at::parallel_for(0, tasks, 1, [&](int64_t task, int64_t end_task) {
    for (; task < end_task; ++task) {
      const int64_t begin = task * all / tasks, end = (task + 1) * all / tasks;
      for (int64_t row = begin / blocks; row * blocks < end; ++row) {
        const int64_t start = row * blocks;
        const int64_t first_task = ceil_div((start + 1) * tasks, all) - 1;  // that of block `start`
        f(row, std::max(begin - start, int64_t{0}), std::min(end - start, blocks),
          task - first_task);
      }
    }
  });
}

// One of the shares that threads take of a work that has several steps.
struct Share {
  int64_t number, of;

  // [begin, end) of `count` things.
  int64_t begin(int64_t count) const { return number * count / of; }
  int64_t end(int64_t count) const { return (number + 1) * count / of; }
};

// f(share) on `threads` threads at once, which may wait for each other by `wait_for_all`: they are
// started once, where a parallel loop for every step would start them each time.
template <typename F>
void in_shares(int64_t threads, const F& f) {
#pragma omp parallel num_threads(static_cast<int>(threads)) if (threads > 1)
  f(Share{omp_get_thread_num(), omp_get_num_threads()});
}

inline void wait_for_all() {
#pragma omp barrier
}

#if defined(__AVX512F__)
// Where 16 rows of n numbers begin.
inline __m512i column_offsets(int64_t n) {
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return _mm512_mullo_epi32(lanes, _mm512_set1_epi32(static_cast<int>(n)));
}

// Rows <-> columns of 16 x 16 numbers of four bytes.
VLMAMBA_INLINE void transpose(__m512i* r) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512i a = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
    const __m512i b = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
    const __m512i c = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
    const __m512i d = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
    t[i] = _mm512_shuffle_i32x4(a, b, 0x88);
    t[4 + i] = _mm512_shuffle_i32x4(c, d, 0x88);
    t[8 + i] = _mm512_shuffle_i32x4(a, b, 0xdd);
    t[12 + i] = _mm512_shuffle_i32x4(c, d, 0xdd);
  }
  std::copy_n(t, 16, r);
}
#endif

// Rows <-> columns of as many vectors as one has lanes.
template <typename R>
VLMAMBA_INLINE void transpose(Vec<R>* r) {
#if defined(__AVX512F__)
  if constexpr (sizeof(R) == 4) return transpose(reinterpret_cast<__m512i*>(r));
#endif
  for (int i = 0; i < kLanes<R>; ++i)
    for (int j = 0; j < i; ++j) {
      const R x = r[i][j];
      r[i][j] = r[j][i];
      r[j][i] = x;
    }
}

// `count` rows of n numbers <-> n vectors, one lane a row. Lanes without a row read 0.
template <typename R>
void load_columns(const R* from, int64_t n, int count, R scale, Vec<R>* to) {
#if defined(__AVX512F__)
  if constexpr (sizeof(R) == 4) {
    if (count == kLanes<R>) {
      const __m512i rows = column_offsets(n);
      for (int64_t i = 0; i < n; ++i)
        to[i] = static_cast<Vec<R>>(_mm512_i32gather_ps(rows, from + i, 4)) * scale;
      return;
    }
  }
#endif
  for (int64_t i = 0; i < n; ++i) {
    to[i] = Vec<R>{};
    for (int lane = 0; lane < count; ++lane) to[i][lane] = from[lane * n + i] * scale;
  }
}

template <typename R>
void store_columns(const Vec<R>* from, int64_t n, int count, R* to) {
#if defined(__AVX512F__)
  if constexpr (sizeof(R) == 4) {
    if (count == kLanes<R>) {
      const __m512i rows = column_offsets(n);
      for (int64_t i = 0; i < n; ++i) _mm512_i32scatter_ps(to + i, rows, from[i], 4);
      return;
    }
  }
#endif
  for (int64_t i = 0; i < n; ++i)
    for (int lane = 0; lane < count; ++lane) to[lane * n + i] = from[i][lane];
}

}  // namespace vlmamba
