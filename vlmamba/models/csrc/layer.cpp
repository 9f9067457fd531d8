// One token through a whole Mamba layer: norm, projections, convolution, scan, gate and residual.
// Between the products there is so little to compute that a call for each of them takes longer.
#include "blocks.h"

namespace vlmamba {
namespace {

// Parameters are used in the wide type; narrow ones are widened here, which is little work.
template <typename T>
const float* widened(const T* from, int64_t n, std::vector<float>& to) {
  if constexpr (std::is_same_v<T, float>) {
    return from;
  } else {
    if (!from) return nullptr;
    to.resize(n);
    for (int64_t i = 0; i < n; ++i) to[i] = static_cast<float>(from[i]);
    return to.data();
  }
}

template <typename T>
void project(const Weights<T>& weights, int64_t rows, const T* x, T* y) {
  if (weights.scales) {
    quantized_linear<T>(
        {rows, weights.width, weights.outputs, weights.group, weights.bits, x, weights.numbers,
         weights.scales, nullptr},
        y);
  } else {
    linear<T>(
        {rows, weights.width, weights.outputs, x, static_cast<const T*>(weights.numbers), nullptr},
        y);
  }
}

}  // namespace

template <typename X, typename T>
void layer_step(const LayerStep<X, T>& in, const X* x, X* y, T* conv_state, float* state) {
  const int64_t B = in.batch, Di = in.channels, N = in.states, R = in.rank, cols = R + 2 * N;
  std::vector<T> normed(B * in.width), xz(B * 2 * Di), u(B * Di), mixed(B * cols), dt(B * R);
  std::vector<T> delta(B * Di), gated(B * Di), out(B * in.width);
  std::vector<float> b(B * N), c(B * N), log_A, taps, conv_bias, D, bias;
  norm_rows<X, T>({B, in.width, in.epsilon, x, in.norm_weight, in.norm_bias}, normed.data());
  project(in.in_proj, B, normed.data(), xz.data());
  conv_step<T>(
      {B, 1, Di, in.taps, {xz.data(), 2 * Di, 2 * Di}, widened(in.conv_weight, Di * in.taps, taps),
       widened(in.conv_bias, Di, conv_bias), conv_state, nullptr, true},
      u.data(), conv_state);
  project(in.x_proj, B, u.data(), mixed.data());
  for (int64_t row = 0; row < B; ++row) {
    const T* from = mixed.data() + row * cols;
    std::copy_n(from, R, dt.data() + row * R);
    for (int64_t n = 0; n < N; ++n) {
      b[row * N + n] = static_cast<float>(from[R + n]);
      c[row * N + n] = static_cast<float>(from[R + N + n]);
    }
  }
  project(in.dt_proj, B, dt.data(), delta.data());
  scan_step<T>(
      {B, 1, Di, N, {u.data(), Di, Di}, {delta.data(), Di, Di}, {xz.data() + Di, 2 * Di, 2 * Di},
       widened(in.log_A, Di * N, log_A), b.data(), c.data(), widened(in.D, Di, D),
       widened(in.dt_bias, Di, bias), nullptr, nullptr, true, true},
      gated.data(), state);
  project(in.out_proj, B, gated.data(), out.data());
  for (int64_t i = 0; i < B * in.width; ++i)
    y[i] = static_cast<X>(static_cast<float>(x[i]) + static_cast<float>(out[i]));
}

#define VLMAMBA_INSTANTIATE(X, T) \
  template void layer_step<X, T>(const LayerStep<X, T>&, const X*, X*, T*, float*);
VLMAMBA_INSTANTIATE(float, float)
VLMAMBA_INSTANTIATE(float, c10::BFloat16)
VLMAMBA_INSTANTIATE(c10::BFloat16, c10::BFloat16)
#undef VLMAMBA_INSTANTIATE

}  // namespace vlmamba
