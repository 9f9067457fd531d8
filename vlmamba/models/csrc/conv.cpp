// The depthwise causal convolution with its activation: forward, backward and one step.
//
// y_t = silu(bias + sum_k weight_k x_{t-K+1+k}), where x_{-K+1..-1} is the initial state. Lanes are
// channels, as in scan.cpp. The backward pass recomputes the sum under the activation.
#include "blocks.h"

namespace vlmamba {
namespace {

constexpr int64_t kChunk = 64;  // steps of a block at a time: its page stays near

template <typename T>
struct Block {
  using R = Wide<T>;
  const ConvInputs<T>& in;
  int64_t row, channel;
  int count;  // channels in this block: all lanes but in the last block
  Vec<R> weight[kMaxTaps], bias{};

  Block(const ConvInputs<T>& inputs, int64_t row, int64_t index)
      : in(inputs),
        row(row),
        channel(index * kLanes<R>),
        count(std::min<int64_t>(kLanes<R>, in.channels - channel)) {
    load_columns<R>(in.weight + channel * in.taps, in.taps, count, R(1), weight);
    if (in.bias) bias = load(in.bias + channel, count);
  }

  int64_t at(int64_t t) const { return (row * in.length + t) * in.channels + channel; }
  // Where row k of this block is in a (B, K-1, Di) state.
  int64_t state_at(int64_t k) const {
    return (row * (in.taps - 1) + k) * in.channels + channel;
  }

  Vec<R> input(int64_t t) const {
    if (t >= 0) return load(in.x.at(row, t) + channel, count);
    if (!in.initial_state) return Vec<R>{};
    return load(in.initial_state + state_at(in.taps - 1 + t), count);
  }

  template <int kK>
  Vec<R> before_activation(int64_t t) const {
    const int64_t taps = kK ? kK : in.taps;
    Vec<R> total = bias;
    for (int64_t k = 0; k < taps; ++k) total += weight[k] * input(t - taps + 1 + k);
    return total;
  }

  Vec<R> activated(Vec<R> total) const { return in.silu ? total * sigmoid(total) : total; }
};

// Steps [begin, end) of a block; its last inputs stay in registers where kK says how many.
template <typename T, int kK>
void forward_steps(const Block<T>& b, int64_t begin, int64_t end, T* y) {
  Vec<Wide<T>> last[kK ? kK : 1];
#pragma GCC unroll 16
  for (int k = 1; k < kK; ++k) last[k] = b.input(begin - kK + k);
  for (int64_t t = begin; t < end; ++t) {
    Vec<Wide<T>> total;
    if constexpr (kK == 0) {
      total = b.template before_activation<0>(t);
    } else {
      total = b.bias;
#pragma GCC unroll 16
      for (int k = 0; k + 1 < kK; ++k) {
        last[k] = last[k + 1];
        total += b.weight[k] * last[k];
      }
      last[kK - 1] = b.input(t);
      total += b.weight[kK - 1] * last[kK - 1];
    }
    fetch(b.in.x.at(b.row, t) + b.channel + kLanes<Wide<T>>);  // for the next block
    store(y + b.at(t), b.activated(total), b.count);
  }
}

template <typename T, int kK>
void forward_group(
    const ConvInputs<T>& in, int64_t row, int64_t first, int64_t last, T* y, T* final_state) {
  const int64_t length = in.row_length(row);
  std::vector<Block<T>> blocks;
  for (int64_t b = first; b < last; ++b) blocks.emplace_back(in, row, b);
  for (int64_t begin = 0; begin < in.length; begin += kChunk)
    for (const Block<T>& b : blocks) {
      const int64_t end = std::min(begin + kChunk, in.length);
      forward_steps<T, kK>(b, begin, std::min(end, length), y);
      for (int64_t t = std::max(begin, length); t < end; ++t)
        store(y + b.at(t), Vec<Wide<T>>{}, b.count);
    }
  for (const Block<T>& b : blocks)
    for (int64_t k = 0; k + 1 < in.taps; ++k)
      store(final_state + b.state_at(k), b.input(length - in.taps + 1 + k), b.count);
}

// Sums of one block that the backward pass carries from its last step to its first.
template <typename R>
struct BlockGrads {
  Vec<R> later[kMaxTaps] = {};  // gradient before the activation at t+1, t+2, ...
  Vec<R> weight[kMaxTaps] = {}, bias{};
};

// Gradient of the input at step t (the initial state where t < 0); `later` holds that of the sums
// at t, t+1, ... and moves on by one step.
template <typename T, int kK>
Vec<Wide<T>> input_grad(
    const Block<T>& b, int64_t t, const ConvGrads<T>& grads, BlockGrads<Wide<T>>& sums) {
  const int64_t taps = kK ? kK : b.in.taps;
  Vec<Wide<T>> total{};
  for (int64_t k = 0; k < taps; ++k) total += b.weight[k] * sums.later[taps - 1 - k];
  for (int64_t k = taps - 1; k > 0; --k) sums.later[k] = sums.later[k - 1];
  const int64_t from_end = t - b.in.row_length(b.row) + taps - 1;
  if (from_end >= 0) total += load(grads.final_state + b.state_at(from_end), b.count);
  return total;
}

// Steps [begin, end) of a block, from the last to the first. inputs: those that step t reads, of
// which all but the first are there when it begins.
template <typename T, int kK>
void backward_steps(
    const Block<T>& b, int64_t begin, int64_t end, const ConvGrads<T>& grads,
    BlockGrads<Wide<T>>& sums) {
  const int64_t taps = kK ? kK : b.in.taps;
  Vec<Wide<T>> inputs[kK ? kK : kMaxTaps];
  for (int64_t k = 1; k < taps; ++k) inputs[k - 1] = b.input(end - taps + k);
  for (int64_t t = end - 1; t >= begin; --t) {
    for (int64_t k = taps - 1; k > 0; --k) inputs[k] = inputs[k - 1];
    inputs[0] = b.input(t - taps + 1);
    Vec<Wide<T>> g = load(grads.y.at(b.row, t) + b.channel, b.count);
    if (b.in.silu) {
      Vec<Wide<T>> x = b.bias;
      for (int64_t k = 0; k < taps; ++k) x += b.weight[k] * inputs[k];
      const Vec<Wide<T>> p = sigmoid(x);
      g *= p * (1 + x * (1 - p));
    }
    sums.bias += g;
    sums.later[0] = g;
    for (int64_t k = 0; k < taps; ++k) sums.weight[k] += g * inputs[k];
    store(grads.x + b.at(t), input_grad<T, kK>(b, t, grads, sums), b.count);
  }
}

template <typename T, int kK>
void store_grads(const Block<T>& b, const ConvGrads<T>& grads, BlockGrads<Wide<T>>& sums) {
  using R = Wide<T>;
  const int64_t plane = b.row * b.in.channels + b.channel;
  store_columns<R>(sums.weight, b.in.taps, b.count, grads.weight + plane * b.in.taps);
  store(grads.bias + plane, sums.bias, b.count);
  for (int64_t t = -1; t > -b.in.taps; --t) {
    sums.later[0] = Vec<R>{};
    store(grads.initial_state + b.state_at(b.in.taps - 1 + t),
          input_grad<T, kK>(b, t, grads, sums), b.count);
  }
  for (int64_t t = b.in.row_length(b.row); t < b.in.length; ++t)
    store(grads.x + b.at(t), Vec<R>{}, b.count);
}

template <typename T, int kK>
void backward_group(
    const ConvInputs<T>& in, int64_t row, int64_t first, int64_t last, const ConvGrads<T>& grads) {
  const int64_t length = in.row_length(row);
  std::vector<Block<T>> blocks;
  std::vector<BlockGrads<Wide<T>>> sums(last - first);
  for (int64_t b = first; b < last; ++b) blocks.emplace_back(in, row, b);
  for (int64_t begin = (ceil_div(length, kChunk) - 1) * kChunk; begin >= 0; begin -= kChunk)
    for (size_t b = 0; b < blocks.size(); ++b) {
      BlockGrads<Wide<T>> own = sums[b];  // in registers
      backward_steps<T, kK>(blocks[b], begin, std::min(begin + kChunk, length), grads, own);
      sums[b] = own;
    }
  for (size_t b = 0; b < blocks.size(); ++b) store_grads<T, kK>(blocks[b], grads, sums[b]);
}

}  // namespace

template <typename T>
void conv_forward(const ConvInputs<T>& in, T* y, T* final_state) {
  const auto run = in.taps == 4 ? forward_group<T, 4> : forward_group<T, 0>;
  const int64_t blocks = block_count<Wide<T>>(in.channels);
  for_groups(in.batch, blocks, [&](int64_t row, int64_t first, int64_t last, int64_t) {
    run(in, row, first, last, y, final_state);
  });
}

template <typename T>
void conv_backward(const ConvInputs<T>& in, const ConvGrads<T>& grads) {
  const auto run = in.taps == 4 ? backward_group<T, 4> : backward_group<T, 0>;
  const int64_t blocks = block_count<Wide<T>>(in.channels);
  for_groups(in.batch, blocks, [&](int64_t row, int64_t first, int64_t last, int64_t) {
    run(in, row, first, last, grads);
  });
}

template <typename T>
void conv_step_of(const ConvInputs<T>& in, int64_t begin, int64_t end, T* y, T* state) {
  for (int64_t row = 0; row < in.batch; ++row)
    for (int64_t channel = begin; channel < end; channel += kLanes<Wide<T>>) {
      const Block<T> b(in, row, channel / kLanes<Wide<T>>);
      store(y + b.at(0), b.activated(b.template before_activation<0>(0)), b.count);
      for (int64_t k = 0; k + 1 < in.taps; ++k)
        store(state + b.state_at(k), b.input(k + 2 - in.taps), b.count);
    }
}

template <typename T>
void conv_step(const ConvInputs<T>& in, T* y, T* state) {
  conv_step_of(in, 0, in.channels, y, state);
}

#define VLMAMBA_INSTANTIATE(T)                                               \
  template void conv_forward<T>(const ConvInputs<T>&, T*, T*);               \
  template void conv_backward<T>(const ConvInputs<T>&, const ConvGrads<T>&); \
  template void conv_step_of<T>(const ConvInputs<T>&, int64_t, int64_t, T*, T*); \
  template void conv_step<T>(const ConvInputs<T>&, T*, T*);
VLMAMBA_INSTANTIATE(float)
VLMAMBA_INSTANTIATE(double)
VLMAMBA_INSTANTIATE(c10::BFloat16)
#undef VLMAMBA_INSTANTIATE

}  // namespace vlmamba
