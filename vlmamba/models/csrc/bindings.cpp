// The Python module: tensors in, tensors out. `scan_backends/cpu.py` has made parameters and states
// contiguous in the wide dtype and rows contiguous in channels; shapes are checked before that.
#include "kernels.h"

#include <ATen/ATen.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <tuple>
#include <vector>

namespace vlmamba {
namespace {

using at::Tensor;
using Maybe = std::optional<Tensor>;

template <typename T>
const T* data(const Tensor& x) {
  TORCH_CHECK(x.is_cpu() && x.is_contiguous(), "expected a contiguous CPU tensor");
  return x.const_data_ptr<T>();
}

template <typename T>
const T* data(const Maybe& x) {
  return x ? data<T>(*x) : nullptr;
}

// x is (B, L, Di), or (B, Di) for a single step.
template <typename T>
Rows<const T> rows(const Tensor& x) {
  TORCH_CHECK(x.is_cpu() && (x.stride(-1) == 1 || x.size(-1) == 1), "expected contiguous channels");
  return {x.const_data_ptr<T>(), x.stride(0), x.stride(-2)};
}

template <typename T>
Rows<const T> rows(const Maybe& x) {
  return x ? rows<T>(*x) : Rows<const T>{nullptr, 0, 0};
}

template <typename F>
auto with_dtype(const Tensor& x, const F& f) {
  switch (x.scalar_type()) {
    case at::kFloat:
      return f(float{});
    case at::kDouble:
      return f(double{});
    case at::kBFloat16:
      return f(c10::BFloat16{});
    default:
      TORCH_CHECK_TYPE(false, "expected float32, float64 or bfloat16, got ", x.scalar_type());
  }
}

template <typename T>
at::ScalarType wide_type() {
  return c10::CppTypeToScalarType<Wide<T>>::value;
}

// The arguments that every scan function has.
struct Scan {
  Tensor u, delta, A, B, C;
  Maybe D, z, delta_bias, initial_state, lengths;
  bool softplus;
  bool log_A = false;  // A is log(-A)

  int64_t batch() const { return u.size(0); }
  int64_t length() const { return u.dim() == 3 ? u.size(1) : 1; }
  int64_t channels() const { return u.size(-1); }
  int64_t states() const { return A.size(1); }

  template <typename T>
  ScanInputs<T> inputs() const {
    using R = Wide<T>;
    return {batch(),      length(),        channels(),           states(),
            rows<T>(u),   rows<T>(delta),  rows<T>(z),           data<R>(A),
            data<R>(B),   data<R>(C),      data<R>(D),           data<R>(delta_bias),
            data<R>(initial_state),        data<int64_t>(lengths), softplus, log_A};
  }
};

std::tuple<Tensor, Tensor, Tensor> forward(const Scan& scan, bool keep_checkpoints) {
  return with_dtype(scan.u, [&](auto zero) {
    using T = decltype(zero);
    using R = Wide<T>;
    const ScanInputs<T> in = scan.inputs<T>();
    const auto wide = scan.u.options().dtype(wide_type<T>());
    Tensor y = at::empty(scan.u.sizes(), scan.u.options());
    Tensor final_state = at::empty({in.batch, in.channels, in.states}, wide);
    Tensor checkpoints = at::empty({keep_checkpoints ? scan_checkpoint_size(in) : 0}, wide);
    scan_forward<T>(
        in, y.data_ptr<T>(), final_state.data_ptr<R>(),
        keep_checkpoints ? checkpoints.data_ptr<R>() : nullptr);
    return std::make_tuple(y, final_state, checkpoints);
  });
}

// Gradients of u, delta, A, B, C, D, z, delta_bias, initial_state.
std::vector<Tensor> backward(
    const Scan& scan, const Tensor& grad_y, const Tensor& grad_final, const Tensor& checkpoints) {
  return with_dtype(scan.u, [&](auto zero) {
    using T = decltype(zero);
    using R = Wide<T>;
    const ScanInputs<T> in = scan.inputs<T>();
    const auto wide = scan.u.options().dtype(wide_type<T>());
    const int64_t groups = scan_groups(in.batch);
    Tensor u = at::empty(scan.u.sizes(), scan.u.options()), delta = at::empty_like(u);
    Tensor z = scan.z ? at::empty_like(u) : at::empty({0}, u.options());
    Tensor A = at::empty({in.batch, in.channels, in.states}, wide), state = at::empty_like(A);
    Tensor D = at::empty({in.batch, in.channels}, wide), bias = at::empty_like(D);
    Tensor B = at::zeros({in.batch, groups, in.length, in.states}, wide), C = at::zeros_like(B);
    scan_backward<T>(
        in, {rows<T>(grad_y), data<R>(grad_final), data<R>(checkpoints), u.data_ptr<T>(),
             delta.data_ptr<T>(), scan.z ? z.data_ptr<T>() : nullptr, A.data_ptr<R>(),
             state.data_ptr<R>(), D.data_ptr<R>(), bias.data_ptr<R>(), B.data_ptr<R>(),
             C.data_ptr<R>(), groups});
    return std::vector<Tensor>{
        u, delta, A.sum(0), B.sum(1), C.sum(1), D.sum(0), z, bias.sum(0), state};
  });
}

// The scan of a Mamba layer from its projections, without gradients: mixed (B, L, R + 2N) ends with
// B and C.
std::tuple<Tensor, Tensor> forward_projected(
    const Tensor& u, const Tensor& delta, const Tensor& mixed, const Tensor& z,
    const Tensor& log_A, const Tensor& D, const Tensor& delta_bias, const Maybe& initial_state,
    const Maybe& lengths) {
  const int64_t n = log_A.size(1), rank = mixed.size(-1) - 2 * n;
  const auto wide = [](const Tensor& x) { return x.to(at::kFloat).contiguous(); };
  const auto [y, state, none] = forward(
      Scan{u, delta, wide(log_A), wide(mixed.narrow(-1, rank, n)),
           wide(mixed.narrow(-1, rank + n, n)), wide(D), z, wide(delta_bias), initial_state,
           lengths, true, true},
      false);
  return {y, state};
}

Tensor step(const Scan& scan, Tensor& state) {
  return with_dtype(scan.u, [&](auto zero) {
    using T = decltype(zero);
    data<Wide<T>>(state);  // checks it
    Tensor y = at::empty(scan.u.sizes(), scan.u.options());
    scan_step<T>(scan.inputs<T>(), y.data_ptr<T>(), state.data_ptr<Wide<T>>());
    return y;
  });
}

// The arguments that both functions of Mamba-2's scan have; x (B, L, H P), B and C (B, L, G N).
struct Ssd {
  Tensor x, dt, A, B, C, D, dt_bias;
  Maybe initial_state, lengths;
  int64_t groups;

  template <typename T>
  SsdInputs<T> inputs() const {
    using R = Wide<T>;
    const int64_t heads = A.size(0);
    return {x.size(0), x.size(1), heads, x.size(2) / heads, groups, B.size(2) / groups,
            rows<T>(x), rows<T>(dt), rows<T>(B), rows<T>(C),
            data<R>(A), data<R>(D), data<R>(dt_bias),
            data<R>(initial_state), data<int64_t>(lengths)};
  }
};

std::tuple<Tensor, Tensor, Tensor> ssd(const Ssd& scan, bool keep_checkpoints) {
  return with_dtype(scan.x, [&](auto zero) {
    using T = decltype(zero);
    using R = Wide<T>;
    const SsdInputs<T> in = scan.inputs<T>();
    const auto wide = scan.x.options().dtype(wide_type<T>());
    Tensor y = at::empty(scan.x.sizes(), scan.x.options());
    Tensor final_state = at::empty({in.batch, in.heads, in.width, in.states}, wide);
    Tensor checkpoints = at::empty({keep_checkpoints ? ssd_checkpoint_size(in) : 0}, wide);
    ssd_forward<T>(
        in, y.data_ptr<T>(), final_state.data_ptr<R>(),
        keep_checkpoints ? checkpoints.data_ptr<R>() : nullptr);
    return std::make_tuple(y, final_state, checkpoints);
  });
}

// Gradients of x, dt, A, B, C, D, dt_bias, initial_state.
std::vector<Tensor> ssd_gradients(
    const Ssd& scan, const Tensor& grad_y, const Tensor& grad_final, const Tensor& checkpoints) {
  return with_dtype(scan.x, [&](auto zero) {
    using T = decltype(zero);
    using R = Wide<T>;
    const SsdInputs<T> in = scan.inputs<T>();
    const auto wide = scan.x.options().dtype(wide_type<T>());
    const int64_t parts = ssd_parts(in.batch, in.heads, in.groups);
    Tensor x = at::zeros(scan.x.sizes(), scan.x.options());
    Tensor dt = at::zeros(scan.dt.sizes(), scan.x.options());
    Tensor B = at::zeros({parts, in.batch, in.length, in.groups * in.states}, wide);
    Tensor C = at::zeros_like(B), A = at::empty({in.batch, in.heads}, wide);
    Tensor D = at::empty_like(A), bias = at::empty_like(A);
    Tensor state = at::empty({in.batch, in.heads, in.width, in.states}, wide);
    ssd_backward<T>(
        in, {rows<T>(grad_y), data<R>(grad_final), data<R>(checkpoints), x.data_ptr<T>(),
             dt.data_ptr<T>(), B.data_ptr<R>(), C.data_ptr<R>(), A.data_ptr<R>(), D.data_ptr<R>(),
             bias.data_ptr<R>(), state.data_ptr<R>()});
    return std::vector<Tensor>{
        x, dt, A.sum(0), B.sum(0).to(x.dtype()), C.sum(0).to(x.dtype()), D.sum(0), bias.sum(0),
        state};
  });
}

template <typename T>
ConvInputs<T> conv_inputs(
    const Tensor& x, const Tensor& weight, const Maybe& bias, const Maybe& initial_state,
    const Maybe& lengths, bool silu) {
  TORCH_CHECK_VALUE(
      weight.size(1) <= kMaxTaps, "expected at most ", kMaxTaps, " taps, got ", weight.size(1));
  return {x.size(0),   x.dim() == 3 ? x.size(1) : 1, x.size(-1),
          weight.size(1), rows<T>(x),                data<Wide<T>>(weight),
          data<Wide<T>>(bias), data<T>(initial_state), data<int64_t>(lengths), silu};
}

std::tuple<Tensor, Tensor> convolve(
    const Tensor& x, const Tensor& weight, const Maybe& bias, const Maybe& initial_state,
    const Maybe& lengths, bool silu) {
  return with_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const ConvInputs<T> in = conv_inputs<T>(x, weight, bias, initial_state, lengths, silu);
    Tensor y = at::empty(x.sizes(), x.options());
    Tensor final_state = at::empty({in.batch, in.taps - 1, in.channels}, x.options());
    conv_forward<T>(in, y.data_ptr<T>(), final_state.data_ptr<T>());
    return std::make_tuple(y, final_state);
  });
}

// Gradients of x, weight, bias, initial_state.
std::vector<Tensor> convolve_backward(
    const Tensor& x, const Tensor& weight, const Maybe& bias, const Maybe& initial_state,
    const Maybe& lengths, bool silu, const Tensor& grad_y, const Tensor& grad_final) {
  return with_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    using R = Wide<T>;
    const ConvInputs<T> in = conv_inputs<T>(x, weight, bias, initial_state, lengths, silu);
    const auto wide = x.options().dtype(wide_type<T>());
    Tensor grad_x = at::empty(x.sizes(), x.options());
    Tensor state = at::empty({in.batch, in.taps - 1, in.channels}, x.options());
    Tensor grad_weight = at::empty({in.batch, in.channels, in.taps}, wide);
    Tensor grad_bias = at::empty({in.batch, in.channels}, wide);
    conv_backward<T>(
        in, {rows<T>(grad_y), data<T>(grad_final), grad_x.data_ptr<T>(), state.data_ptr<T>(),
             grad_weight.data_ptr<R>(), grad_bias.data_ptr<R>()});
    return std::vector<Tensor>{grad_x, grad_weight.sum(0), grad_bias.sum(0), state};
  });
}

Tensor convolve_step(
    Tensor& state, const Tensor& x, const Tensor& weight, const Maybe& bias, bool silu) {
  return with_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    Tensor y = at::empty(x.sizes(), x.options());
    conv_step<T>(
        conv_inputs<T>(x, weight, bias, state, std::nullopt, silu), y.data_ptr<T>(),
        state.data_ptr<T>());
    return y;
  });
}

// x (..., width), weight (outputs, width), bias (outputs) -> (..., outputs).
Tensor few_rows_linear(const Tensor& x, const Tensor& weight, const Maybe& bias) {
  TORCH_CHECK_VALUE(x.size(-1) == weight.size(1), "x and weight differ in width");
  return with_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    auto sizes = x.sizes().vec();
    sizes.back() = weight.size(0);
    Tensor y = at::empty(sizes, x.options());
    const int64_t rows = weight.size(1) ? x.numel() / weight.size(1) : 0;
    linear<T>(
        {rows, weight.size(1), weight.size(0), data<T>(x), data<T>(weight), data<T>(bias)},
        y.data_ptr<T>());
    return y;
  });
}

// The same for many rows, of float32 or bfloat16; None where the instruction set is too old.
Maybe many_rows_product(const Tensor& x, const Tensor& weight, const Maybe& bias) {
  TORCH_CHECK_VALUE(x.size(-1) == weight.size(1), "x and weight differ in width");
  const auto run = [&](auto zero) -> Maybe {
    using T = decltype(zero);
    auto sizes = x.sizes().vec();
    sizes.back() = weight.size(0);
    Tensor y = at::empty(sizes, x.options());
    const LinearInputs<T> in = {
        weight.size(1) ? x.numel() / weight.size(1) : 0, weight.size(1), weight.size(0),
        data<T>(x), data<T>(weight), data<T>(bias)};
    return product<T>(in, y.data_ptr<T>()) ? Maybe(y) : std::nullopt;
  };
  return x.scalar_type() == at::kBFloat16 ? run(c10::BFloat16{}) : run(float{});
}

// weight (outputs, width) int8, or (outputs, bytes) uint8 of 4 bits; scales (outputs, groups).
Tensor few_rows_quantized(
    const Tensor& x, const Tensor& weight, const Tensor& scales, int64_t group, const Maybe& bias) {
  const bool bytes = weight.scalar_type() == at::kChar;
  const int64_t width = x.size(-1), outputs = weight.size(0);
  const int64_t row_size = bytes ? width : (width + 31) / 32 * 16;
  TORCH_CHECK_VALUE(weight.size(1) == row_size, "x and weight differ in width");
  TORCH_CHECK_VALUE(
      group > 0 && (group % 32 == 0 || group == width) && scales.size(0) == outputs &&
          scales.size(1) == (width + group - 1) / group,
      "the scales do not fit the weight");
  auto sizes = x.sizes().vec();
  sizes.back() = outputs;
  Tensor y = at::empty(sizes, x.options());
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    quantized_linear<T>(
        {width ? x.numel() / width : 0, width, outputs, group, bytes ? 8 : 4, data<T>(x),
         bytes ? static_cast<const void*>(data<int8_t>(weight)) : data<uint8_t>(weight),
         data<float>(scales), data<T>(bias)},
        y.data_ptr<T>());
  };
  x.scalar_type() == at::kBFloat16 ? run(c10::BFloat16{}) : run(float{});
  return y;
}

// RMSNorm, or LayerNorm where there is a bias, of x (..., width), in the weight's dtype.
Tensor norm(const Tensor& x, const Tensor& weight, const Maybe& bias, double epsilon) {
  const auto run = [&](auto of_x, auto of_weight) {
    using X = decltype(of_x);
    using T = decltype(of_weight);
    const int64_t width = x.size(-1);
    Tensor y = at::empty(x.sizes(), weight.options());
    norm_rows<X, T>(
        {width ? x.numel() / width : 0, width, static_cast<float>(epsilon), data<X>(x),
         data<T>(weight), data<T>(bias)},
        y.data_ptr<T>());
    return y;
  };
  if (weight.scalar_type() == at::kFloat) return run(float{}, float{});
  if (x.scalar_type() == at::kFloat) return run(float{}, c10::BFloat16{});
  return run(c10::BFloat16{}, c10::BFloat16{});
}

// x + y in float32, of float32 and bfloat16: PyTorch widens a copy of y first.
Tensor add_wide(const Tensor& x, const Tensor& y) {
  TORCH_CHECK_VALUE(x.sizes() == y.sizes(), "x and y differ in shape");
  Tensor sum = at::empty(x.sizes(), x.options());
  add_narrow(x.numel(), data<float>(x), data<c10::BFloat16>(y), sum.data_ptr<float>());
  return sum;
}

// (weight, scales or None, columns of a group)
using Projection = std::tuple<Tensor, Maybe, int64_t>;

template <typename T>
Weights<T> weights(const Projection& from, int64_t width, int64_t outputs) {
  const auto& [weight, scales, group] = from;
  TORCH_CHECK(weight.is_cpu() && weight.is_contiguous(), "expected contiguous CPU weights");
  TORCH_CHECK_VALUE(weight.size(0) == outputs, "a projection does not fit the layer");
  if (!scales) {
    TORCH_CHECK_VALUE(weight.size(1) == width, "a projection does not fit the layer");
    return {width, outputs, width, 0, data<T>(weight), nullptr};
  }
  const bool bytes = weight.scalar_type() == at::kChar;
  return {width, outputs, group, bytes ? 8 : 4, weight.const_data_ptr(), data<float>(*scales)};
}

// x (B, width) -> x + layer(norm(x)), the states updated in place; None of tensors that this is not
// made for: parameters of several types, or that do not lie in one piece.
Maybe mamba_step(
    const Tensor& x, Tensor& conv_state, Tensor& state, const Tensor& norm_weight,
    const Maybe& norm_bias, double epsilon, const Projection& in_proj, const Tensor& conv_weight,
    const Maybe& conv_bias, const Projection& x_proj, const Projection& dt_proj,
    const Tensor& dt_bias, const Tensor& log_A, const Tensor& D, const Projection& out_proj) {
  const int64_t width = x.size(1), channels = log_A.size(0), states = log_A.size(1);
  const int64_t rank = std::get<0>(dt_proj).size(1);
  const auto dtype = norm_weight.scalar_type();
  const auto fits = [&](const Tensor& t) { return t.scalar_type() == dtype && t.is_contiguous(); };
  const auto may = [&](const Maybe& t) { return !t || fits(*t); };
  const auto whole = [&](const Projection& p) { return std::get<1>(p) || fits(std::get<0>(p)); };
  if ((dtype != at::kFloat && dtype != at::kBFloat16) ||
      (x.scalar_type() != at::kFloat && x.scalar_type() != dtype) ||
      state.scalar_type() != at::kFloat || !state.is_contiguous() ||
      !(fits(norm_weight) && may(norm_bias) && fits(conv_state) && fits(conv_weight) &&
        may(conv_bias) && fits(dt_bias) && fits(log_A) && fits(D)) ||
      conv_weight.size(-1) > kMaxTaps ||
      !(whole(in_proj) && whole(x_proj) && whole(dt_proj) && whole(out_proj)))
    return std::nullopt;
  const auto run = [&](auto of_x, auto of_weights) {
    using X = decltype(of_x);
    using T = decltype(of_weights);
    Tensor y = at::empty(x.sizes(), x.options());
    data<T>(conv_state);  // checks them
    data<float>(state);
    layer_step<X, T>(
        {x.size(0), width, channels, states, conv_weight.size(-1), rank,
         static_cast<float>(epsilon), data<T>(norm_weight), data<T>(norm_bias),
         weights<T>(in_proj, width, 2 * channels),
         weights<T>(x_proj, channels, rank + 2 * states), weights<T>(dt_proj, rank, channels),
         weights<T>(out_proj, channels, width), data<T>(conv_weight), data<T>(conv_bias),
         data<T>(log_A), data<T>(D), data<T>(dt_bias)},
        data<X>(x), y.data_ptr<X>(), conv_state.data_ptr<T>(), state.data_ptr<float>());
    return y;
  };
  if (dtype == at::kFloat) return run(float{}, float{});
  if (x.scalar_type() == at::kFloat) return run(float{}, c10::BFloat16{});
  return run(c10::BFloat16{}, c10::BFloat16{});
}

}  // namespace
}  // namespace vlmamba

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  namespace v = vlmamba;
  using v::Maybe;
  using v::Scan;
  using at::Tensor;
  using NoGil = pybind11::call_guard<pybind11::gil_scoped_release>;
  m.def(
      "scan",
      [](const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
         const Maybe& D, const Maybe& z, const Maybe& delta_bias, const Maybe& initial_state,
         const Maybe& lengths, bool softplus, bool keep_checkpoints) {
        return v::forward(
            Scan{u, delta, A, B, C, D, z, delta_bias, initial_state, lengths, softplus},
            keep_checkpoints);
      },
      NoGil());
  m.def(
      "scan_backward",
      [](const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
         const Maybe& D, const Maybe& z, const Maybe& delta_bias, const Maybe& lengths,
         bool softplus, const Tensor& grad_y, const Tensor& grad_final,
         const Tensor& checkpoints) {
        return v::backward(
            Scan{u, delta, A, B, C, D, z, delta_bias, std::nullopt, lengths, softplus}, grad_y,
            grad_final, checkpoints);
      },
      NoGil());
  m.def(
      "scan_step",
      [](Tensor& state, const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B,
         const Tensor& C, const Maybe& D, const Maybe& z, const Maybe& delta_bias, bool softplus) {
        return v::step(
            Scan{u, delta, A, B, C, D, z, delta_bias, std::nullopt, std::nullopt, softplus},
            state);
      },
      NoGil());
  m.def("scan_projected", &v::forward_projected, NoGil());
  m.def(
      "ssd",
      [](const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B, const Tensor& C,
         const Tensor& D, const Tensor& dt_bias, const Maybe& initial_state, const Maybe& lengths,
         int64_t groups, bool keep_checkpoints) {
        return v::ssd(
            v::Ssd{x, dt, A, B, C, D, dt_bias, initial_state, lengths, groups}, keep_checkpoints);
      },
      NoGil());
  m.def(
      "ssd_backward",
      [](const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B, const Tensor& C,
         const Tensor& D, const Tensor& dt_bias, const Maybe& lengths, int64_t groups,
         const Tensor& grad_y, const Tensor& grad_final, const Tensor& checkpoints) {
        return v::ssd_gradients(
            v::Ssd{x, dt, A, B, C, D, dt_bias, std::nullopt, lengths, groups}, grad_y, grad_final,
            checkpoints);
      },
      NoGil());
  m.def("norm", &v::norm, NoGil());
  m.def("add", &v::add_wide, NoGil());
  m.def("conv", &v::convolve, NoGil());
  m.def("conv_backward", &v::convolve_backward, NoGil());
  m.def("conv_step", &v::convolve_step, NoGil());
  m.def("linear", &v::few_rows_linear, NoGil());
  m.def("product", &v::many_rows_product, NoGil());
  m.def("mamba_step", &v::mamba_step, NoGil());
  m.def("quantized_linear", &v::few_rows_quantized, NoGil());
}
