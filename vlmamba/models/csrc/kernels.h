// What the kernels take: plain pointers, so that they compile without PyTorch's headers.
// Sizes: batch B, length L, channels Di, states N per channel, taps K. Absent inputs are null.
#pragma once

#include <c10/util/BFloat16.h>

#include <cstdint>
#include <initializer_list>
#include <utility>

namespace vlmamba {

// The type that parameters, states and sums over T have.
template <typename T>
struct WideOf {
  using type = float;
};
template <>
struct WideOf<double> {
  using type = double;
};
template <typename T>
using Wide = typename WideOf<T>::type;

// A (B, L, Di) array whose channels are contiguous; a half of a projection needs no copy.
template <typename T>
struct Rows {
  T* data;
  int64_t row_stride, step_stride;

  T* at(int64_t row, int64_t t) const { return data + row * row_stride + t * step_stride; }
};

template <typename T>
struct ScanInputs {
  using R = Wide<T>;
  int64_t batch, length, channels, states;
  Rows<const T> u, delta, z;
  const R* A;                    // (Di, N), or log(-A)
  const R *B, *C;                // (B, L, N)
  const R *D, *delta_bias;       // (Di)
  const R* initial_state;        // (B, Di, N)
  const int64_t* lengths;        // (B)
  bool softplus;
  bool log_A = false;

  int64_t row_length(int64_t row) const { return lengths ? lengths[row] : length; }
};

template <typename T>
struct ScanGrads {
  using R = Wide<T>;
  Rows<const T> y;               // given, as is final_state (B, Di, N)
  const R *final_state, *checkpoints;
  T *u, *delta, *z;              // (B, L, Di)
  R *A, *initial_state;          // (B, Di, N): the sum over B is left to the caller
  R *D, *delta_bias;             // (B, Di), likewise
  R *B, *C;                      // (B, groups, L, N), zeros on entry: likewise the sum over groups
  int64_t groups;
};

// Groups that scan_backward cuts a row's channels into at most, and elements of the checkpoints.
int64_t scan_groups(int64_t batch);
template <typename T>
int64_t scan_checkpoint_size(const ScanInputs<T>& in);

// y (B, L, Di) and final_state (B, Di, N) are written; so are the checkpoints unless null.
template <typename T>
void scan_forward(const ScanInputs<T>& in, T* y, Wide<T>* final_state, Wide<T>* checkpoints);
template <typename T>
void scan_backward(const ScanInputs<T>& in, const ScanGrads<T>& grads);
// One step (length 1): `state` (B, Di, N) is read and written. `scan_step_of`: of the channels
// [begin, end), on this thread; begin is a multiple of a register's lanes.
template <typename T>
void scan_step(const ScanInputs<T>& in, T* y, Wide<T>* state);
template <typename T>
void scan_step_of(const ScanInputs<T>& in, int64_t begin, int64_t end, T* y, Wide<T>* state);

// Mamba-2's scan: H heads of P channels (`width`), G groups of heads that share B and C.
template <typename T>
struct SsdInputs {
  using R = Wide<T>;
  int64_t batch, length, heads, width, groups, states;
  Rows<const T> x, dt, B, C;     // (B, L, H P), (B, L, H), (B, L, G N)
  const R *A, *D, *dt_bias;      // (H)
  const R* initial_state;        // (B, H, P, N)
  const int64_t* lengths;        // (B)

  int64_t row_length(int64_t row) const { return lengths ? lengths[row] : length; }
  // Where a head's step is in a (B, L, H, P) array.
  int64_t at(int64_t row, int64_t t, int64_t head) const {
    return ((row * length + t) * heads + head) * width;
  }
};

template <typename T>
struct SsdGrads {
  using R = Wide<T>;
  Rows<const T> y;               // given, as is final_state (B, H, P, N)
  const R *final_state, *checkpoints;
  T *x, *dt;                     // (B, L, H, P), (B, L, H), zeros on entry
  R *B, *C;                      // (parts, B, L, G, N), likewise; the sum over parts is the caller's
  R *A, *D, *dt_bias;            // (B, H): the sum over B is left to the caller
  R* initial_state;              // (B, H, P, N)
};

// Parts that the heads of a group are cut into, and elements of the checkpoints.
int64_t ssd_parts(int64_t batch, int64_t heads, int64_t groups);
template <typename T>
int64_t ssd_checkpoint_size(const SsdInputs<T>& in);

// y (B, L, H, P) and final_state (B, H, P, N) are written; so are the checkpoints unless null.
template <typename T>
void ssd_forward(const SsdInputs<T>& in, T* y, Wide<T>* final_state, Wide<T>* checkpoints);
template <typename T>
void ssd_backward(const SsdInputs<T>& in, const SsdGrads<T>& grads);

template <typename T>
struct ConvInputs {
  using R = Wide<T>;
  int64_t batch, length, channels, taps;
  Rows<const T> x;
  const R *weight, *bias;        // (Di, K), (Di)
  const T* initial_state;        // (B, K-1, Di)
  const int64_t* lengths;        // (B)
  bool silu;

  int64_t row_length(int64_t row) const { return lengths ? lengths[row] : length; }
};

template <typename T>
struct ConvGrads {
  using R = Wide<T>;
  Rows<const T> y;               // given, as is final_state (B, K-1, Di)
  const T* final_state;
  T *x, *initial_state;          // (B, L, Di), (B, K-1, Di)
  R *weight, *bias;              // (B, Di, K), (B, Di): the sum over B is left to the caller
};

// y (B, L, Di) and final_state (B, K-1, Di) are written.
template <typename T>
void conv_forward(const ConvInputs<T>& in, T* y, T* final_state);
template <typename T>
void conv_backward(const ConvInputs<T>& in, const ConvGrads<T>& grads);
// One step (length 1): `state` (B, K-1, Di) is read and written. `conv_step_of`: as `scan_step_of`.
template <typename T>
void conv_step(const ConvInputs<T>& in, T* y, T* state);
template <typename T>
void conv_step_of(const ConvInputs<T>& in, int64_t begin, int64_t end, T* y, T* state);

constexpr int64_t kMaxTaps = 16;

template <typename T>
struct LinearInputs {
  int64_t rows, width, outputs;
  const T *x, *weight, *bias;    // (rows, width), (outputs, width), (outputs)
};

// y (rows, outputs) is written. `linear` is made for a few rows; `product` for many, and does
// nothing but say so (false) where the instruction set is not one that it is made for.
template <typename T>
void linear(const LinearInputs<T>& in, T* y);
template <typename T>
bool product(const LinearInputs<T>& in, T* y);

// RMSNorm where bias is null, else LayerNorm; y (rows, width) is written.
template <typename X, typename T>
struct NormInputs {
  int64_t rows, width;
  float epsilon;
  const X* x;                    // (rows, width)
  const T *weight, *bias;        // (width)
};

template <typename X, typename T>
void norm_rows(const NormInputs<X, T>& in, T* y);

// sum = x + y, of `count` numbers.
void add_narrow(int64_t count, const float* x, const c10::BFloat16* y, float* sum);

// Weights of whole numbers, each worth the scale of its row's group of columns. `group` is a
// multiple of 32, or the width. Of 8 bits: int8 (outputs, width); of 4: see Int4 in linear.cpp.
template <typename T>
struct QuantizedInputs {
  int64_t rows, width, outputs, group;
  int bits;
  const T* x;                    // (rows, width)
  const void* weight;
  const float* scales;           // (outputs, groups)
  const T* bias;                 // (outputs)
};

template <typename T>
void quantized_linear(const QuantizedInputs<T>& in, T* y);

// A projection without bias: plain weights (scales null), or as in QuantizedInputs.
template <typename T>
struct Weights {
  int64_t width, outputs, group;
  int bits;
  const void* numbers;
  const float* scales;
};

// Of its outputs those in the ranges, on this thread.
using Ranges = std::initializer_list<std::pair<int64_t, int64_t>>;
template <typename T>
void project(const Weights<T>& weights, int64_t rows, const T* x, const Ranges& ranges, T* y);

// A Mamba layer for single tokens; the norm is RMSNorm where norm_bias is null, else LayerNorm.
template <typename X, typename T>
struct LayerStep {
  int64_t batch, width, channels, states, taps, rank;
  float epsilon;
  const T *norm_weight, *norm_bias;        // (width)
  Weights<T> in_proj, x_proj, dt_proj, out_proj;
  const T *conv_weight, *conv_bias;        // (Di, K), (Di)
  const T *log_A, *D, *dt_bias;            // (Di, N), (Di), (Di)
};

// y (B, width) = x + layer(norm(x)); conv_state (B, K-1, Di) and state (B, Di, N) are written.
template <typename X, typename T>
void layer_step(const LayerStep<X, T>& in, const X* x, X* y, T* conv_state, float* state);

}  // namespace vlmamba
