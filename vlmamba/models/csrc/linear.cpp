// y = x W^T + bias for a few rows x: what decoding does with every weight, once a token. Such a
// product is bound by reading W, so each thread streams its share of W's rows once, kRows of them
// side by side, against all rows of x, which stay in the cache.
#include "blocks.h"

namespace vlmamba {
namespace {

constexpr int64_t kRows = 4;
constexpr int64_t kGrain = 1 << 14;  // weights worth a thread of their own: about 5 us

// y[j] = <x, W row j> for `count` rows of W, side by side, and one row x.
template <typename T, int kCount>
void dot_rows(const T* x, const T* W, int64_t width, Wide<T>* y) {
  using R = Wide<T>;
  constexpr int lanes = kLanes<R>;
  Vec<R> sums[kCount][2] = {};
  int64_t i = 0;
  for (; i + 2 * lanes <= width; i += 2 * lanes)
    for (int half = 0; half < 2; ++half) {
      const Vec<R> some = load_all(x + i + half * lanes);
#pragma GCC unroll 4
      for (int j = 0; j < kCount; ++j) {
        const T* w = W + j * width + i + half * lanes;
        sums[j][half] += some * load_all(w);
        fetch(w + kCount * width);  // of the rows that come next: hardware stops at pages
      }
    }
  for (; i < width; i += lanes) {
    const int count = std::min<int64_t>(lanes, width - i);
    const Vec<R> some = load(x + i, count);
    for (int j = 0; j < kCount; ++j) sums[j][0] += some * load(W + j * width + i, count);
  }
  for (int j = 0; j < kCount; ++j) y[j] = sum<R>(sums[j][0] + sums[j][1]);
}

}  // namespace

template <typename T>
void linear(const LinearInputs<T>& in, T* y) {
  using R = Wide<T>;
  const int64_t tasks = ceil_div(in.outputs, kRows);
  const int64_t grain = std::max<int64_t>(1, kGrain / (kRows * in.width));
  at::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin * kRows; first < std::min(end * kRows, in.outputs); first += kRows) {
      const int64_t count = std::min(kRows, in.outputs - first);
      const T* W = in.weight + first * in.width;
      for (int64_t row = 0; row < in.rows; ++row) {
        const T* x = in.x + row * in.width;
        R sums[kRows];
        if (count == kRows) {
          dot_rows<T, kRows>(x, W, in.width, sums);
        } else {
          for (int64_t j = 0; j < count; ++j) dot_rows<T, 1>(x, W + j * in.width, in.width, sums + j);
        }
        for (int64_t j = 0; j < count; ++j) {
          const R bias = in.bias ? static_cast<R>(in.bias[first + j]) : R(0);
          y[row * in.outputs + first + j] = static_cast<T>(sums[j] + bias);
        }
      }
    }
  });
}

template void linear<float>(const LinearInputs<float>&, float*);
template void linear<double>(const LinearInputs<double>&, double*);
template void linear<c10::BFloat16>(const LinearInputs<c10::BFloat16>&, c10::BFloat16*);

}  // namespace vlmamba
