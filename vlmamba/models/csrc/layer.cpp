// One token through a whole Mamba layer: norm, projections, convolution, scan, gate and residual.
// Between the products there is so little to compute that a call for each of them takes longer.
#include "blocks.h"

namespace vlmamba {
namespace {

constexpr int64_t kWork = 1 << 16;  // weights worth a thread of their own

// Parameters are used in the wide type. Of narrow ones the rows [begin, end) of n numbers are
// widened, which is little work; the result is where row 0 is or would be.
template <typename T>
const float* widened(
    const T* from, int64_t n, int64_t begin, int64_t end, std::vector<float>& to) {
  if constexpr (std::is_same_v<T, float>) {
    return from;
  } else {
    if (!from) return nullptr;
    to.resize(end * n);
    for (int64_t i = begin * n; i < end * n; ++i) to[i] = static_cast<float>(from[i]);
    return to.data();
  }
}

}  // namespace

template <typename X, typename T>
void layer_step(const LayerStep<X, T>& in, const X* x, X* y, T* conv_state, float* state) {
  const int64_t B = in.batch, D = in.width, Di = in.channels, N = in.states, R = in.rank;
  const int64_t cols = R + 2 * N;
  std::vector<T> xz(B * 2 * Di), u(B * Di), mixed(B * cols), delta(B * Di), gated(B * Di);
  std::vector<T> out(B * D);
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), 1 + 3 * D * Di / kWork);
  in_shares(threads, [&](const Share& share) {  // each has channels of its own
    constexpr int64_t lanes = kLanes<float>;
    const int64_t blocks = ceil_div(Di, lanes);
    const int64_t from = share.begin(blocks) * lanes;
    const int64_t to = std::min(Di, share.end(blocks) * lanes);
    std::vector<float> taps, conv_bias, log_A, skip, bias, b(B * N), c(B * N);
    std::vector<T> normed(B * D), dt(B * R);
    norm_rows<X, T>({B, D, in.epsilon, x, in.norm_weight, in.norm_bias}, normed.data());
    project(in.in_proj, B, normed.data(), {{from, to}, {Di + from, Di + to}}, xz.data());
    conv_step_of<T>(
        {B, 1, Di, in.taps, {xz.data(), 2 * Di, 2 * Di},
         widened(in.conv_weight, in.taps, from, to, taps),
         widened(in.conv_bias, 1, from, to, conv_bias), conv_state, nullptr, true},
        from, to, u.data(), conv_state);
    wait_for_all();
    project(in.x_proj, B, u.data(), {{share.begin(cols), share.end(cols)}}, mixed.data());
    wait_for_all();
    for (int64_t row = 0; row < B; ++row) {
      const T* numbers = mixed.data() + row * cols;
      std::copy_n(numbers, R, dt.data() + row * R);
      for (int64_t n = 0; n < N; ++n) {
        b[row * N + n] = static_cast<float>(numbers[R + n]);
        c[row * N + n] = static_cast<float>(numbers[R + N + n]);
      }
    }
    project(in.dt_proj, B, dt.data(), {{from, to}}, delta.data());
    scan_step_of<T>(
        {B, 1, Di, N, {u.data(), Di, Di}, {delta.data(), Di, Di}, {xz.data() + Di, 2 * Di, 2 * Di},
         widened(in.log_A, N, from, to, log_A), b.data(), c.data(),
         widened(in.D, 1, from, to, skip), widened(in.dt_bias, 1, from, to, bias), nullptr,
         nullptr, true, true},
        from, to, gated.data(), state);
    wait_for_all();
    const int64_t first = share.begin(D), last = share.end(D);
    project(in.out_proj, B, gated.data(), {{first, last}}, out.data());
    for (int64_t row = 0; row < B; ++row)
      for (int64_t i = row * D + first; i < row * D + last; ++i)
        y[i] = static_cast<X>(static_cast<float>(x[i]) + static_cast<float>(out[i]));
  });
}

#define VLMAMBA_INSTANTIATE(X, T) \
  template void layer_step<X, T>(const LayerStep<X, T>&, const X*, X*, T*, float*);
VLMAMBA_INSTANTIATE(float, float)
VLMAMBA_INSTANTIATE(float, c10::BFloat16)
VLMAMBA_INSTANTIATE(c10::BFloat16, c10::BFloat16)
#undef VLMAMBA_INSTANTIATE

}  // namespace vlmamba
