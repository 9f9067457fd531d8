// The selective scan over a sequence, forward and backward, and one step of it.
//
// Lanes are channels: one register holds the same state of neighbouring channels, so loads are
// contiguous in (B, L, Di), B_t and C_t are broadcasts and no sum runs across lanes. kLanes
// channels form a block; kChunk steps of a block, a tile. A task walks a group of blocks chunk by
// chunk, so that a page of the inputs serves all its blocks; states wait in memory between tiles.
//
// The backward pass keeps only the state at the start of every chunk, recomputes a chunk's states
// from it and walks the chunk backwards: extra memory is N / kChunk of one input, plus N rows.
#include "blocks.h"

namespace vlmamba {
namespace {

constexpr int64_t kChunk = 32;
constexpr float kLargestRate = 1e12f;  // exp2_product's limit; such a delta clears the state anyway

Vec<float> limit_rate(Vec<float> dt) { return clamp(dt, -kLargestRate, kLargestRate); }
Vec<double> limit_rate(Vec<double> dt) { return dt; }

// A / ln 2 as vectors, (blocks, N), for exp(dt A) = 2^(dt A / ln 2).
template <typename R>
Buffer<R> binary_rates(const R* A, int64_t channels, int64_t n) {
  Buffer<R> rates(block_count<R>(channels) * n);
  for (int64_t block = 0; block < block_count<R>(channels); ++block) {
    const int64_t channel = block * kLanes<R>;
    const int count = std::min<int64_t>(kLanes<R>, channels - channel);
    load_columns<R>(A + channel * n, n, count, R(kLog2e), rates.data() + block * n);
  }
  return rates;
}

// The inputs of one block in one batch row.
template <typename T>
struct Block {
  using R = Wide<T>;
  const ScanInputs<T>& in;
  int64_t row, index, channel;
  int count;  // channels in this block: all lanes but in the last block
  const T *u, *delta, *z;
  const R *B, *C;
  Vec<R> D{}, bias{};

  Block(const ScanInputs<T>& inputs, int64_t row, int64_t index)
      : in(inputs),
        row(row),
        index(index),
        channel(index * kLanes<R>),
        count(std::min<int64_t>(kLanes<R>, in.channels - channel)),
        u(in.u.at(row, 0) + channel),
        delta(in.delta.at(row, 0) + channel),
        z(in.z.data ? in.z.at(row, 0) + channel : nullptr),
        B(in.B + row * in.length * in.states),
        C(in.C + row * in.length * in.states) {
    if (in.D) D = load(in.D + channel, count);
    if (in.delta_bias) bias = load(in.delta_bias + channel, count);
  }

  Vec<R> input(int64_t t) const { return load(u + t * in.u.step_stride, count); }
  Vec<R> gate(int64_t t) const { return load(z + t * in.z.step_stride, count); }
  Vec<R> raw_step(int64_t t) const { return load(delta + t * in.delta.step_stride, count) + bias; }

  // Where this block's states are in a (B, Di, N) array, and its step t in a (B, L, Di) array.
  int64_t states_at() const { return (row * in.channels + channel) * in.states; }
  int64_t at(int64_t t) const { return (row * in.length + t) * in.channels + channel; }
  // Where its state at the start of step t's chunk is in the checkpoints.
  int64_t checkpoint_at(int64_t t) const {
    const int64_t chunk = row * ceil_div(in.length, kChunk) + t / kChunk;
    return (chunk * block_count<R>(in.channels) + index) * in.states * kLanes<R>;
  }
  // The next block's inputs: hardware does not foresee strides of Di elements.
  void prefetch(int64_t t) const {
    __builtin_prefetch(u + t * in.u.step_stride + kLanes<R>);
    __builtin_prefetch(delta + t * in.delta.step_stride + kLanes<R>);
    if (z) __builtin_prefetch(z + t * in.z.step_stride + kLanes<R>);
  }
};

// The step sizes, inputs and outputs (before the gate) of a tile, as vectors.
template <typename R>
struct Tile {
  Vec<R> dt[kChunk], x[kChunk], out[kChunk];
};

template <typename T>
void load_tile(const Block<T>& block, int64_t begin, int64_t end, Tile<Wide<T>>& tile) {
  for (int64_t t = begin, s = 0; t < end; ++t, ++s) {
    block.prefetch(t);
    const Vec<Wide<T>> raw = block.raw_step(t);
    tile.dt[s] = block.in.softplus ? softplus(raw) : raw;
    tile.x[s] = block.input(t);
  }
}

// h <- exp(dt A) h + dt x B and out = C h + D x, step by step from the states in `states`, which are
// updated. With kKeep, the decays exp(dt A) and the new states of each step are written as well.
// The states stay in registers where kN says how many there are; `rates` is A / ln 2.
template <int kN, bool kKeep, typename R>
void scan_tile(
    Tile<R>& tile, int64_t steps, int64_t states_n, const Vec<R>* rates, const R* B, const R* C,
    Vec<R> D, Vec<R>* states, Vec<R>* decays = nullptr, Vec<R>* kept = nullptr) {
  const int64_t n = kN ? kN : states_n;
  Vec<R> registers[kN ? kN : 1];
  Vec<R>* h = kN ? registers : states;
#pragma GCC unroll 16
  for (int i = 0; i < kN; ++i) registers[i] = states[i];
  for (int64_t s = 0; s < steps; ++s, B += n, C += n) {
    const Vec<R> drive = tile.dt[s] * tile.x[s], dt = limit_rate(tile.dt[s]);
    Vec<R> even = D * tile.x[s], odd{};  // two sums: half the latency of one
#pragma GCC unroll 16
    for (int64_t i = 0; i < n; ++i) {
      const Vec<R> decay = exp2_product(dt, rates[i]);
      h[i] = decay * h[i] + drive * B[i];
      (i % 2 ? odd : even) += h[i] * C[i];
      if (kKeep) {
        decays[s * n + i] = decay;
        kept[s * n + i] = h[i];
      }
    }
    tile.out[s] = even + odd;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kN; ++i) states[i] = registers[i];
}

template <typename T>
void store_tile(const Block<T>& block, int64_t begin, int64_t end, Tile<Wide<T>>& tile, T* y) {
  for (int64_t t = begin, s = 0; t < end; ++t, ++s) {
    Vec<Wide<T>> out = tile.out[s];
    if (block.z) {
      const Vec<Wide<T>> z = block.gate(t);
      out *= z * sigmoid(z);
    }
    store(y + block.at(t), out, block.count);
  }
}

// The blocks [first, last) of one row, from its first step to its last.
template <typename T, int kN>
void forward_group(
    const ScanInputs<T>& in, const Buffer<Wide<T>>& rates, int64_t row, int64_t first,
    int64_t last, T* y, Wide<T>* final_state, Wide<T>* checkpoints) {
  using R = Wide<T>;
  const int64_t n = in.states, length = in.row_length(row);
  std::vector<Block<T>> blocks;
  for (int64_t b = first; b < last; ++b) blocks.emplace_back(in, row, b);
  Buffer<R> states(blocks.size() * n);
  Tile<R> tile;
  const auto states_of = [&](const Block<T>& b) { return states.data() + (b.index - first) * n; };

  if (in.initial_state)
    for (const Block<T>& b : blocks)
      load_columns<R>(in.initial_state + b.states_at(), n, b.count, R(1), states_of(b));
  for (int64_t t = 0; t < length; t += kChunk) {
    const int64_t end = std::min(t + kChunk, length);
    for (const Block<T>& b : blocks) {
      if (checkpoints)
        std::memcpy(checkpoints + b.checkpoint_at(t), states_of(b), n * sizeof(Vec<R>));
      load_tile(b, t, end, tile);
      scan_tile<kN, false, R>(
          tile, end - t, n, rates.data() + b.index * n, b.B + t * n, b.C + t * n, b.D,
          states_of(b));
      store_tile(b, t, end, tile, y);
    }
  }
  for (const Block<T>& b : blocks) {
    store_columns<R>(states_of(b), n, b.count, final_state + b.states_at());
    for (int64_t t = length; t < in.length; ++t) std::fill_n(y + b.at(t), b.count, T(0));
  }
}

// What the backward pass keeps of a tile's steps, (steps, N), and the gradients of B and C there,
// which add up over the blocks of a group.
template <typename R>
struct TileMemory {
  Buffer<R> states, decays, grad_B, grad_C;  // states[0] is the state before the tile

  explicit TileMemory(int64_t n)
      : states((kChunk + 1) * n), decays(kChunk * n), grad_B(kChunk * n), grad_C(kChunk * n) {}
};

// What it carries from tile to tile for one block: gradients of the states, (N), and of parameters.
template <typename R>
struct BlockGrads {
  Buffer<R> state, A;
  Vec<R> D{}, bias{};

  explicit BlockGrads(int64_t n) : state(n), A(n) {}
};

template <typename T, int kN>
void backward_tile(
    const Block<T>& block, const Vec<Wide<T>>* rates, int64_t begin, int64_t end,
    const ScanGrads<T>& grads, BlockGrads<Wide<T>>& sums, TileMemory<Wide<T>>& memory) {
  using R = Wide<T>;
  const int64_t n = kN ? kN : block.in.states;
  Tile<R> tile;
  load_tile(block, begin, end, tile);
  Buffer<R> running(memory.states.begin(), memory.states.begin() + n);
  scan_tile<kN, true, R>(
      tile, end - begin, n, rates, block.B + begin * n, block.C + begin * n, block.D,
      running.data(), memory.decays.data(), memory.states.data() + n);
  Vec<R>* grad_h = sums.state.data();
  Vec<R>* grad_A = sums.A.data();
  for (int64_t t = end - 1, s = end - begin - 1; t >= begin; --t, --s) {
    Vec<R> grad_y = load(grads.y.at(block.row, t) + block.channel, block.count);
    if (block.z) {
      const Vec<R> z = block.gate(t), p = sigmoid(z);
      const Vec<R> grad_z = grad_y * tile.out[s] * p * (1 + z * (1 - p));
      store(grads.z + block.at(t), grad_z, block.count);
      grad_y *= z * p;
    }
    const Vec<R> x = tile.x[s], dt = tile.dt[s], drive = dt * x;
    const R *B = block.B + t * n, *C = block.C + t * n;
    const Vec<R>* before = memory.states.data() + s * n;
    const Vec<R>* after = before + n;
    const Vec<R>* decays = memory.decays.data() + s * n;
    Vec<R>* grad_B = memory.grad_B.data() + s * n;
    Vec<R>* grad_C = memory.grad_C.data() + s * n;
    Vec<R> grad_drive{}, grad_exponent{};
#pragma GCC unroll 4
    for (int64_t i = 0; i < n; ++i) {
      const Vec<R> g = grad_h[i] + grad_y * C[i];
      grad_C[i] += grad_y * after[i];
      grad_B[i] += g * drive;
      grad_drive += g * B[i];
      grad_h[i] = g * decays[i];
      const Vec<R> e = grad_h[i] * before[i];  // gradient of dt A, whose exp the decay is
      grad_exponent += e * rates[i];
      grad_A[i] += e * dt;
    }
    Vec<R> grad_dt = grad_exponent * R(kLn2) + grad_drive * x;
    if (block.in.softplus) grad_dt *= sigmoid(block.raw_step(t));
    store(grads.delta + block.at(t), grad_dt, block.count);
    store(grads.u + block.at(t), grad_y * block.D + grad_drive * dt, block.count);
    sums.bias += grad_dt;
    sums.D += grad_y * x;
  }
}

// Add the lanes of a chunk's gradients of B and C and clear them for the next chunk.
template <typename R>
void drain(Buffer<R>& from, int64_t count, R* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = sum<R>(from[i]);
  std::fill(from.begin(), from.end(), Vec<R>{});
}

template <typename T>
void store_grads(const Block<T>& b, const BlockGrads<Wide<T>>& sums, const ScanGrads<T>& grads) {
  using R = Wide<T>;
  const int64_t n = b.in.states, plane = b.row * b.in.channels + b.channel;
  store_columns<R>(sums.A.data(), n, b.count, grads.A + b.states_at());
  store_columns<R>(sums.state.data(), n, b.count, grads.initial_state + b.states_at());
  store(grads.D + plane, sums.D, b.count);
  store(grads.delta_bias + plane, sums.bias, b.count);
  for (int64_t t = b.in.row_length(b.row); t < b.in.length; ++t)
    for (T* grad : {grads.u, grads.delta, grads.z})
      if (grad) std::fill_n(grad + b.at(t), b.count, T(0));
}

template <typename T, int kN>
void backward_group(
    const ScanInputs<T>& in, const Buffer<Wide<T>>& rates, int64_t row, int64_t first,
    int64_t last, int64_t group, int64_t groups, const ScanGrads<T>& grads) {
  using R = Wide<T>;
  const int64_t n = in.states, length = in.row_length(row);
  TileMemory<R> memory(n);
  std::vector<Block<T>> blocks;
  std::vector<BlockGrads<R>> sums(last - first, BlockGrads<R>(n));
  for (int64_t b = first; b < last; ++b) {
    blocks.emplace_back(in, row, b);
    load_columns<R>(
        grads.final_state + blocks.back().states_at(), n, blocks.back().count, R(1),
        sums[b - first].state.data());
  }
  for (int64_t t = (length - 1) / kChunk * kChunk; t >= 0; t -= kChunk) {
    const int64_t end = std::min(t + kChunk, length);
    for (const Block<T>& b : blocks) {
      std::memcpy(
          memory.states.data(), grads.checkpoints + b.checkpoint_at(t), n * sizeof(Vec<R>));
      backward_tile<T, kN>(
          b, rates.data() + b.index * n, t, end, grads, sums[b.index - first], memory);
    }
    const int64_t at = ((row * groups + group) * in.length + t) * n;
    drain<R>(memory.grad_B, (end - t) * n, grads.B + at);
    drain<R>(memory.grad_C, (end - t) * n, grads.C + at);
  }
  for (const Block<T>& b : blocks) store_grads(b, sums[b.index - first], grads);
}

// One step of one channel: lanes are states, which are contiguous here. Returns sum of C h.
template <typename R>
R step_channel(R* h, const R* A, const R* B, const R* C, int64_t n, R dt, R x) {
  const Vec<R> rate = limit_rate(splat<R>(dt)) * R(kLog2e);
  Vec<R> y{};
  for (int64_t i = 0; i < n; i += kLanes<R>) {
    const int count = std::min<int64_t>(kLanes<R>, n - i);
    const Vec<R> decay = exp2_product(rate, load(A + i, count));
    const Vec<R> after = decay * load(h + i, count) + dt * x * load(B + i, count);
    store(h + i, after, count);
    y += after * load(C + i, count);
  }
  return sum<R>(y);
}

}  // namespace

template <typename T>
int64_t scan_groups(int64_t batch, int64_t channels) {
  return group_count<Wide<T>>(batch, channels);
}

template <typename T>
int64_t scan_checkpoint_size(const ScanInputs<T>& in) {
  using R = Wide<T>;
  return in.batch * ceil_div(in.length, kChunk) * block_count<R>(in.channels) * in.states *
      kLanes<R>;
}

template <typename T>
void scan_forward(const ScanInputs<T>& in, T* y, Wide<T>* final_state, Wide<T>* checkpoints) {
  const auto rates = binary_rates<Wide<T>>(in.A, in.channels, in.states);
  const auto group = in.states == 16 ? forward_group<T, 16> : forward_group<T, 0>;
  for_groups<Wide<T>>(in.batch, in.channels, [&](int64_t row, int64_t first, int64_t last, int64_t) {
    group(in, rates, row, first, last, y, final_state, checkpoints);
  });
}

template <typename T>
void scan_backward(const ScanInputs<T>& in, const ScanGrads<T>& grads) {
  const auto rates = binary_rates<Wide<T>>(in.A, in.channels, in.states);
  const auto run = in.states == 16 ? backward_group<T, 16> : backward_group<T, 0>;
  const int64_t groups = scan_groups<T>(in.batch, in.channels);
  for_groups<Wide<T>>(in.batch, in.channels, [&](int64_t row, int64_t first, int64_t last, int64_t group) {
    run(in, rates, row, first, last, group, groups, grads);
  });
}

template <typename T>
void scan_step(const ScanInputs<T>& in, T* y, Wide<T>* state) {
  using R = Wide<T>;
  const int64_t n = in.states, blocks = block_count<R>(in.channels);
  const int64_t grain = ceil_div(1 << 13, n * kLanes<R>);  // about 10 us of work for a thread
  at::parallel_for(0, in.batch * blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const Block<T> block(in, task / blocks, task % blocks);
      const Vec<R> raw = block.raw_step(0), x = block.input(0);
      const Vec<R> dt = in.softplus ? softplus(raw) : raw;
      Vec<R> out = block.D * x;
      for (int lane = 0; lane < block.count; ++lane)
        out[lane] += step_channel<R>(
            state + block.states_at() + lane * n, in.A + (block.channel + lane) * n, block.B,
            block.C, n, dt[lane], x[lane]);
      if (block.z) {
        const Vec<R> z = block.gate(0);
        out *= z * sigmoid(z);
      }
      store(y + block.at(0), out, block.count);
    }
  });
}

#define VLMAMBA_INSTANTIATE(T)                                                 \
  template int64_t scan_groups<T>(int64_t, int64_t);                           \
  template int64_t scan_checkpoint_size<T>(const ScanInputs<T>&);              \
  template void scan_forward<T>(const ScanInputs<T>&, T*, Wide<T>*, Wide<T>*); \
  template void scan_backward<T>(const ScanInputs<T>&, const ScanGrads<T>&);   \
  template void scan_step<T>(const ScanInputs<T>&, T*, Wide<T>*);
VLMAMBA_INSTANTIATE(float)
VLMAMBA_INSTANTIATE(double)
VLMAMBA_INSTANTIATE(c10::BFloat16)
#undef VLMAMBA_INSTANTIATE

}  // namespace vlmamba
