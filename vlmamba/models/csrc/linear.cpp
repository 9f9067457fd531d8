// y = x W^T + bias for a few rows x: what decoding does with every weight, once a token. Such a
// product is bound by reading W, so each thread streams its share of W's rows once, kRows of them
// side by side, against all rows of x, which stay in the cache, kInputs of them at a time.
//
// The sums of a row of x are the same whichever rows stand beside it, bit for bit.
#include "blocks.h"

namespace vlmamba {
namespace {

constexpr int64_t kRows = 4;
constexpr int64_t kInputs = kVecBytes == 64 ? 2 : 1;  // two need more than 16 registers
constexpr int64_t kGrain = 1 << 14;  // weights worth a thread of their own: about 5 us

// How weights of one kind are read and multiplied. W is read two steps at a time, which are its
// halves 0 and 1; `count` is how many columns of a step exist. x has been padded with zeros.

// W and x of one type, widened where it is narrow.
template <typename T>
struct Plain {
  using R = Wide<T>;
  using Input = R;
  using Weight = T;
  using Register = Vec<R>;
  static constexpr int64_t kStep = kLanes<R>;
  static constexpr bool kScaled = false;
  static int64_t row_size(int64_t width) { return width; }
  VLMAMBA_INLINE static Register input(const Input* x) { return load_all(x); }
  VLMAMBA_INLINE static Register weight(const Weight* w, int64_t i, int half, int64_t count) {
    return load(w + i + half * kStep, count);
  }
  VLMAMBA_INLINE static void add(Vec<R>& sum, Register x, Register w) { sum += x * w; }
};

#if defined(__AVX512BF16__)
// bfloat16 by the processor's own dot product: pairs of products, added in float32.
struct BFloat16Dot {
  using R = float;
  using Input = c10::BFloat16;
  using Weight = c10::BFloat16;
  using Register = __m512bh;
  static constexpr int64_t kStep = 32;
  static constexpr bool kScaled = false;
  static int64_t row_size(int64_t width) { return width; }
  VLMAMBA_INLINE static Register input(const Input* x) { return copy_from<Register>(x); }
  VLMAMBA_INLINE static Register weight(const Weight* w, int64_t i, int half, int64_t count) {
    if (count == kStep) return copy_from<Register>(w + i + half * kStep);
    return bits<Register>(_mm512_maskz_loadu_epi16((1u << count) - 1, w + i + half * kStep));
  }
  VLMAMBA_INLINE static void add(Vec<float>& sum, Register x, Register w) {
    sum = static_cast<Vec<float>>(_mm512_dpbf16_ps(sum, x, w));
  }
};
using OfBFloat16 = BFloat16Dot;
#else
using OfBFloat16 = Plain<c10::BFloat16>;
#endif

// Whole numbers of one byte, times a scale for every group of columns.
struct Int8 {
  using R = float;
  using Input = float;
  using Weight = int8_t;
  using Register = Vec<float>;
  using Bytes = typename VecOf<int8_t, kVecBytes / 4>::type;
  static constexpr int64_t kStep = kLanes<float>;
  static constexpr bool kScaled = true;
  static int64_t row_size(int64_t width) { return width; }
  VLMAMBA_INLINE static Register input(const Input* x) { return load_all(x); }
  VLMAMBA_INLINE static Register weight(const Weight* w, int64_t i, int half, int64_t count) {
    w += i + half * kStep;
    if (count == kStep) return widened(copy_from<Bytes>(w));
    int8_t some[kStep] = {};
    std::copy_n(w, count, some);
    return widened(copy_from<Bytes>(some));
  }
  VLMAMBA_INLINE static Register widened(Bytes x) {
#if defined(__AVX512F__)
    return static_cast<Register>(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bits<__m128i>(x))));
#else
    return __builtin_convertvector(__builtin_convertvector(x, Vec<int32_t>), Register);
#endif
  }
  VLMAMBA_INLINE static void add(Vec<float>& sum, Register x, Register w) { sum += x * w; }
};

// Whole numbers -8..7 plus 8, two a byte: of 32 columns, those of the first 16 are the low ones.
struct Int4 {
  using R = float;
  using Input = float;
  using Weight = uint8_t;
  using Register = Vec<float>;
  using Bytes = typename VecOf<uint8_t, kVecBytes / 4>::type;
  static constexpr int64_t kStep = kLanes<float>;
  static constexpr int64_t kBlock = 32;
  static constexpr bool kScaled = true;
  static int64_t row_size(int64_t width) { return ceil_div(width, kBlock) * kBlock / 2; }
  VLMAMBA_INLINE static Register input(const Input* x) { return load_all(x); }
  VLMAMBA_INLINE static Register weight(const Weight* w, int64_t i, int half, int64_t) {
#if defined(__AVX512F__)  // a pair of steps is a block
    const Bytes both = copy_from<Bytes>(w + i / 2);
    const auto wide = bits<Vec<int32_t>>(_mm512_cvtepu8_epi32(bits<__m128i>(both)));
    const Vec<int32_t> four = half ? wide >> 4 : wide & 15;
    return static_cast<Register>(_mm512_cvtepi32_ps(bits<__m512i>(four - 8)));
#else
    const int64_t column = i + half * kStep, within = column % kBlock;
    const int64_t at = column / kBlock * (kBlock / 2) + within % (kBlock / 2);
    const auto wide = __builtin_convertvector(copy_from<Bytes>(w + at), Vec<int32_t>);
    const Vec<int32_t> four = within < kBlock / 2 ? wide & 15 : wide >> 4;
    return __builtin_convertvector(four - 8, Register);
#endif
  }
  VLMAMBA_INLINE static void add(Vec<float>& sum, Register x, Register w) { sum += x * w; }
};

// The products of kW rows of W with kX rows of x, over the columns [begin, end).
template <typename F, int kW, int kX>
struct Block {
  using R = typename F::R;
  Vec<R> sums[kX][kW][2] = {};

  VLMAMBA_INLINE void step(
      const typename F::Input* x, int64_t x_stride, const typename F::Weight* W, int64_t w_stride,
      int64_t i, int half, int64_t count) {
    typename F::Register inputs[kX];
#pragma GCC unroll 4
    for (int r = 0; r < kX; ++r) inputs[r] = F::input(x + r * x_stride + i + half * F::kStep);
#pragma GCC unroll 4
    for (int j = 0; j < kW; ++j) {
      const auto* w = W + j * w_stride;
      const typename F::Register weight = F::weight(w, i, half, count);
#pragma GCC unroll 4
      for (int r = 0; r < kX; ++r) F::add(sums[r][j][half], inputs[r], weight);
    }
  }

  VLMAMBA_INLINE void run(
      const typename F::Input* x, int64_t x_stride, const typename F::Weight* W, int64_t w_stride,
      int64_t begin, int64_t end) {
    int64_t i = begin;
    for (; i + 2 * F::kStep <= end; i += 2 * F::kStep) {
#pragma GCC unroll 4
      for (int j = 0; j < kW; ++j)  // of the rows that come next: hardware stops at pages
        for (int64_t line = 0; line < 2 * F::row_size(32) * F::kStep / 32; line += 64 / sizeof(*W))
          fetch(W + (j + kW) * w_stride + F::row_size(32) * i / 32 + line);
      for (int half = 0; half < 2; ++half) step(x, x_stride, W, w_stride, i, half, F::kStep);
    }
    for (int half = 0; i < end; ++half, i += F::kStep)
      step(x, x_stride, W, w_stride, i - half * F::kStep, half,
           std::min<int64_t>(F::kStep, end - i));
  }
};

template <typename F>
struct Product {
  using R = typename F::R;
  const typename F::Weight* W;
  const float* scales;  // (outputs, groups)
  int64_t width, group, row_size;
  const typename F::Input* x;
  int64_t x_stride;

  // sums[r * kRows + j] = <row r of x, row first + j of W>
  template <int kW, int kX>
  void dot(int64_t row, int64_t first, R* to) const {
    const auto* some = x + row * x_stride;
    const auto* w = W + first * row_size;
    if constexpr (F::kScaled) {
      const int64_t groups = ceil_div(width, group);
      Vec<R> total[kX][kW] = {};
      for (int64_t g = 0; g < groups; ++g) {
        Block<F, kW, kX> block;
        block.run(some, x_stride, w, row_size, g * group, std::min(width, (g + 1) * group));
        for (int r = 0; r < kX; ++r)
          for (int j = 0; j < kW; ++j)
            total[r][j] += (block.sums[r][j][0] + block.sums[r][j][1]) *
                scales[(first + j) * groups + g];
      }
      for (int r = 0; r < kX; ++r)
        for (int j = 0; j < kW; ++j) to[r * kRows + j] = sum<R>(total[r][j]);
    } else {
      Block<F, kW, kX> block;
      block.run(some, x_stride, w, row_size, 0, width);
      for (int r = 0; r < kX; ++r)
        for (int j = 0; j < kW; ++j)
          to[r * kRows + j] = sum<R>(block.sums[r][j][0] + block.sums[r][j][1]);
    }
  }

  template <int kX>
  void dots(int64_t row, int64_t first, int64_t count, R* to) const {
    if (count == kRows) return dot<kRows, kX>(row, first, to);
    for (int64_t j = 0; j < count; ++j) dot<1, kX>(row, first + j, to + j);
  }
};

// x in the type that the products take, each row with zeros up to whole pairs of steps.
template <typename F, typename T>
std::vector<typename F::Input> padded(const T* x, int64_t rows, int64_t width, int64_t stride) {
  std::vector<typename F::Input> to(rows * stride);
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t i = 0; i < width; ++i)
      to[row * stride + i] = static_cast<typename F::Input>(x[row * width + i]);
  return to;
}

// What a product is computed of, with x as it is needed.
template <typename F, typename T>
struct Multiply {
  using R = typename F::R;
  int64_t rows, width, outputs;
  const T* bias;
  int64_t stride = ceil_div(width, 2 * F::kStep) * 2 * F::kStep;
  std::vector<typename F::Input> inputs;
  Product<F> product;

  Multiply(
      int64_t rows, int64_t width, int64_t outputs, const T* x, const typename F::Weight* W,
      const float* scales, int64_t group, const T* bias)
      : rows(rows),
        width(width),
        outputs(outputs),
        bias(bias),
        inputs(padded<F>(x, rows, width, stride)),
        product{W, scales, width, group, F::row_size(width), inputs.data(), stride} {}

  // The outputs [begin, end) of every row.
  void run(int64_t begin, int64_t end, T* y) const {
    for (int64_t first = begin; first < end; first += kRows) {
      const int64_t count = std::min(kRows, end - first);
      for (int64_t row = 0; row < rows; row += kInputs) {
        const int64_t here = std::min(kInputs, rows - row);
        R sums[kInputs * kRows];
        if (here == kInputs) {
          product.template dots<kInputs>(row, first, count, sums);
        } else {
          product.template dots<1>(row, first, count, sums);
        }
        for (int64_t r = 0; r < here; ++r)
          for (int64_t j = 0; j < count; ++j) {
            const R shift = bias ? static_cast<R>(bias[first + j]) : R(0);
            y[(row + r) * outputs + first + j] = static_cast<T>(sums[r * kRows + j] + shift);
          }
      }
    }
  }

  void run(T* y) const {
    const int64_t tasks = ceil_div(outputs, kRows);
    const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, kRows * width));
    at::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
      run(begin * kRows, std::min(end * kRows, outputs), y);
    });
  }
};

template <typename T>
struct Format {
  using type = Plain<T>;
};
template <>
struct Format<c10::BFloat16> {
  using type = OfBFloat16;
};

// f(the product's Multiply)
template <typename T, typename F>
void with_product(const LinearInputs<T>& in, const F& f) {
  f(Multiply<typename Format<T>::type, T>(
      in.rows, in.width, in.outputs, in.x, in.weight, nullptr, in.width, in.bias));
}

template <typename T, typename F>
void with_product(const QuantizedInputs<T>& in, const F& f) {
  const auto run = [&](auto format) {
    using Q = decltype(format);
    f(Multiply<Q, T>(
        in.rows, in.width, in.outputs, in.x, static_cast<const typename Q::Weight*>(in.weight),
        in.scales, in.group, in.bias));
  };
  in.bits == 8 ? run(Int8{}) : run(Int4{});
}

}  // namespace

template <typename T>
void linear(const LinearInputs<T>& in, T* y) {
  with_product(in, [&](const auto& product) { product.run(y); });
}

template <typename T>
void quantized_linear(const QuantizedInputs<T>& in, T* y) {
  with_product(in, [&](const auto& product) { product.run(y); });
}

template <typename T>
void project(const Weights<T>& weights, int64_t rows, const T* x, const Ranges& ranges, T* y) {
  const auto run = [&](const auto& product) {
    for (const auto& [begin, end] : ranges) product.run(begin, end, y);
  };
  if (weights.scales) {
    with_product(
        QuantizedInputs<T>{rows, weights.width, weights.outputs, weights.group, weights.bits, x,
                           weights.numbers, weights.scales, nullptr},
        run);
  } else {
    with_product(
        LinearInputs<T>{rows, weights.width, weights.outputs, x,
                        static_cast<const T*>(weights.numbers), nullptr},
        run);
  }
}

template void linear<float>(const LinearInputs<float>&, float*);
template void linear<double>(const LinearInputs<double>&, double*);
template void linear<c10::BFloat16>(const LinearInputs<c10::BFloat16>&, c10::BFloat16*);
template void project<float>(
    const Weights<float>&, int64_t, const float*, const Ranges&, float*);
template void project<c10::BFloat16>(
    const Weights<c10::BFloat16>&, int64_t, const c10::BFloat16*, const Ranges&, c10::BFloat16*);
template void quantized_linear<float>(const QuantizedInputs<float>&, float*);
template void quantized_linear<c10::BFloat16>(
    const QuantizedInputs<c10::BFloat16>&, c10::BFloat16*);

}  // namespace vlmamba
