// What stands between two layers, from one type to another in one pass: RMSNorm and LayerNorm of
// rows, with sums in float32, and the residual sum.
#include "blocks.h"

namespace vlmamba {
namespace {

constexpr int64_t kGrain = 1 << 13;  // numbers that are worth a thread

// f(vector of the row, its place, its lanes) for all of a row.
template <typename T, typename F>
VLMAMBA_INLINE void along(const T* row, int64_t width, const F& f) {
  for (int64_t i = 0; i < width; i += kLanes<float>) {
    const int count = std::min<int64_t>(kLanes<float>, width - i);
    f(load(row + i, count), i, count);
  }
}

}  // namespace

template <typename X, typename T>
void norm_rows(const NormInputs<X, T>& in, T* y) {
  const int64_t width = in.width;
  at::parallel_for(0, in.rows, ceil_div(kGrain, width), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const X* x = in.x + row * width;
      Vec<float> total{}, squares{};
      float mean = 0;
      if (in.bias) {
        along(x, width, [&](Vec<float> v, int64_t, int) { total += v; });
        mean = sum<float>(total) / width;
      }
      along(x, width, [&](Vec<float> v, int64_t, int count) {
        const Vec<float> off = v - mean;
        squares += off * off;
        if (in.bias && count < kLanes<float>)  // lanes without a number are 0 - mean
          for (int lane = count; lane < kLanes<float>; ++lane) squares[lane] -= mean * mean;
      });
      const float factor = 1 / std::sqrt(sum<float>(squares) / width + in.epsilon);
      along(x, width, [&](Vec<float> v, int64_t i, int count) {
        Vec<float> out = (v - mean) * factor * load(in.weight + i, count);
        if (in.bias) out += load(in.bias + i, count);
        store(y + row * width + i, out, count);
      });
    }
  });
}

void add_narrow(int64_t count, const float* x, const c10::BFloat16* y, float* sum) {
  at::parallel_for(0, count, kGrain, [&](int64_t begin, int64_t end) {
    along(x + begin, end - begin, [&](Vec<float> v, int64_t i, int lanes) {
      store(sum + begin + i, v + load(y + begin + i, lanes), lanes);
    });
  });
}

#define VLMAMBA_INSTANTIATE(X, T) template void norm_rows<X, T>(const NormInputs<X, T>&, T*);
VLMAMBA_INSTANTIATE(float, float)
VLMAMBA_INSTANTIATE(float, c10::BFloat16)
VLMAMBA_INSTANTIATE(c10::BFloat16, c10::BFloat16)
#undef VLMAMBA_INSTANTIATE

}  // namespace vlmamba
