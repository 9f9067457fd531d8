// The selective scan over a sequence, forward and backward, and one step of it.
//
// Lanes are channels: one register holds the same state of neighboring channels, so loads are
// contiguous in (B, L, Di), B_t and C_t are broadcasts and no sum runs across lanes. kLanes
// channels form a block; kChunk steps of a block, a tile. A thread walks its blocks chunk by
// chunk, a panel of tiles at a time: it loads the panel, scans each tile in registers while the
// next panel is fetched, and stores the panel. Between chunks the states wait in memory.
//
// The backward pass keeps only the state at the start of every chunk, recomputes a chunk's states
// from it and walks the chunk backwards: extra memory is N / kChunk of one input.
#include "blocks.h"

namespace vlmamba {
namespace {

constexpr int64_t kChunk = 32;
constexpr float kLargestRate = 1e12f;  // exp2_product's limit; such a delta clears the state anyway

Vec<float> limit_rate(Vec<float> dt) { return clamp(dt, -kLargestRate, kLargestRate); }
Vec<double> limit_rate(Vec<double> dt) { return dt; }

// A / ln 2 as vectors, (blocks, N), for exp(dt A) = 2^(dt A / ln 2).
template <typename T>
Buffer<Wide<T>> binary_rates(const ScanInputs<T>& in) {
  using R = Wide<T>;
  const int64_t n = in.states;
  Buffer<R> rates(block_count<R>(in.channels) * n);
  at::parallel_for(0, block_count<R>(in.channels), 16, [&](int64_t block, int64_t end) {
    for (; block < end; ++block) {
      const int64_t channel = block * kLanes<R>;
      const int count = std::min<int64_t>(kLanes<R>, in.channels - channel);
      Vec<R>* to = rates.data() + block * n;
      load_columns<R>(in.A + channel * n, n, count, in.log_A ? R(1) : R(kLog2e), to);
      if (in.log_A)
        for (int64_t i = 0; i < n; ++i) to[i] = -exp(to[i]) * R(kLog2e);
    }
  });
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
  // Bring a step's inputs near; hardware does not foresee strides of Di elements.
  void prefetch(int64_t t) const {
    fetch(u + t * in.u.step_stride);
    fetch(delta + t * in.delta.step_stride);
    if (z) fetch(z + t * in.z.step_stride);
  }
};

// The step sizes, inputs and outputs (before the gate) of a tile.
template <typename R>
struct Tile {
  Vec<R> dt[kChunk], x[kChunk], out[kChunk];
};

// The blocks [first, last) of one row, with their states, (N) vectors each.
template <typename T>
struct Group {
  using R = Wide<T>;
  std::vector<Block<T>> blocks;
  Buffer<R> states;
  int64_t n;

  Group(const ScanInputs<T>& in, int64_t row, int64_t first, int64_t last, const R* from)
      : states((last - first) * in.states), n(in.states) {
    for (int64_t b = first; b < last; ++b) {
      blocks.emplace_back(in, row, b);
      const Block<T>& block = blocks.back();
      if (from) load_columns<R>(from + block.states_at(), n, block.count, R(1), state(b - first));
    }
  }
  int64_t size() const { return blocks.size(); }
  Vec<R>* state(int64_t i) { return states.data() + i * n; }
  // The block whose turn comes one panel after block i's; `t` moves on at the end of a chunk.
  const Block<T>& next(int64_t i, int64_t& t, int64_t chunk) const {
    if (i + kPanel >= size()) t += chunk;
    return blocks[(i + kPanel) % size()];
  }
};

// h <- exp(dt A) h + dt x B and out = C h + D x, step by step from `states`, which are updated;
// they stay in registers where kN says how many there are. `rates` is A / ln 2; meanwhile(s)
// runs at step s.
template <int kN, typename R, typename F>
void scan_tile(
    Tile<R>& tile, int64_t steps, int64_t state_count, const Vec<R>* rates, const R* B, const R* C,
    Vec<R> D, Vec<R>* states, const F& meanwhile) {
  const int64_t n = kN ? kN : state_count;
  Vec<R> registers[kN ? kN : 1];
  Vec<R>* h = kN ? registers : states;
#pragma GCC unroll 16
  for (int i = 0; i < kN; ++i) registers[i] = states[i];
  for (int64_t s = 0; s < steps; ++s, B += n, C += n) {
    meanwhile(s);
    const Vec<R> drive = tile.dt[s] * tile.x[s], dt = limit_rate(tile.dt[s]);
    Vec<R> even = D * tile.x[s], odd{};  // two sums: half the latency of one
#pragma GCC unroll 16
    for (int64_t i = 0; i < n; ++i) {
      h[i] = exp2_product(dt, rates[i]) * h[i] + drive * B[i];
      (i % 2 ? odd : even) += h[i] * C[i];
    }
    tile.out[s] = even + odd;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kN; ++i) states[i] = registers[i];
}

// One panel of the forward pass: `count` blocks from block `at` of the group, steps [begin, end).
template <typename T, int kN>
void forward_panel(
    Group<T>& group, int64_t at, int64_t count, int64_t begin, int64_t end,
    const Buffer<Wide<T>>& rates, T* y, Wide<T>* checkpoints) {
  using R = Wide<T>;
  const int64_t n = group.n;
  Tile<R> tiles[kPanel];
  const Block<T>* blocks = group.blocks.data() + at;
  for (int64_t t = begin; t < end; ++t)
    for (int64_t i = 0; i < count; ++i) {
      const Vec<R> raw = blocks[i].raw_step(t);
      tiles[i].dt[t - begin] = blocks[i].in.softplus ? softplus(raw) : raw;
      tiles[i].x[t - begin] = blocks[i].input(t);
    }
  for (int64_t i = 0; i < count; ++i) {
    const Block<T>& b = blocks[i];
    Vec<R>* h = group.state(at + i);
    if (checkpoints)
      std::memcpy(checkpoints + b.checkpoint_at(begin), h, n * sizeof(Vec<R>));
    int64_t next_t = begin;
    const Block<T>& next = group.next(at + i, next_t, kChunk);
    scan_tile<kN, R>(
        tiles[i], end - begin, n, rates.data() + b.index * n, b.B + begin * n, b.C + begin * n, b.D,
        h, [&](int64_t s) {
          next.prefetch(next_t + s);
          fetch(y + next.at(next_t + s));
        });
  }
  for (int64_t t = begin; t < end; ++t)
    for (int64_t i = 0; i < count; ++i) {
      Vec<R> out = tiles[i].out[t - begin];
      if (blocks[i].z) {
        const Vec<R> z = blocks[i].gate(t);
        out *= z * sigmoid(z);
      }
      store(y + blocks[i].at(t), out, blocks[i].count);
    }
}

template <typename T, int kN>
void forward_group(
    const ScanInputs<T>& in, const Buffer<Wide<T>>& rates, int64_t row, int64_t first,
    int64_t last, T* y, Wide<T>* final_state, Wide<T>* checkpoints) {
  using R = Wide<T>;
  const int64_t length = in.row_length(row);
  Group<T> group(in, row, first, last, in.initial_state);
  for (int64_t t = 0; t < length; t += kChunk)
    for (int64_t at = 0; at < group.size(); at += kPanel)
      forward_panel<T, kN>(
          group, at, std::min(kPanel, group.size() - at), t, std::min(t + kChunk, length), rates, y,
          checkpoints);
  for (int64_t i = 0; i < group.size(); ++i) {
    const Block<T>& b = group.blocks[i];
    store_columns<R>(group.state(i), in.states, b.count, final_state + b.states_at());
    for (int64_t t = length; t < in.length; ++t) std::fill_n(y + b.at(t), b.count, T(0));
  }
}

// The backward pass takes a few states at a time through all steps of a tile, there and back: what
// it holds of them meanwhile, and the gradients of their B and C, stay in the first cache level.
constexpr int kTogether = kVecBytes == 64 ? 4 : 2;  // as many as there are registers for

// Of the states at work, (steps, states): the decays, the states before each step and after the
// last; and the gradients of B and C of all states, which add up over the blocks of a group. State
// i's are those at i * kChunk, or among the kTogether that begin there.
template <typename R>
struct TileMemory {
  Vec<R> states[(kChunk + 1) * kTogether], decays[kChunk * kTogether];
  Buffer<R> grad_B, grad_C;

  explicit TileMemory(int64_t n) : grad_B(kChunk * n), grad_C(kChunk * n) {}
};

// Sums over the steps of one block: gradients of A, (N), of D and of delta_bias.
template <typename R>
struct BlockSums {
  Buffer<R> A;
  Vec<R> D{}, bias{};

  explicit BlockSums(int64_t n) : A(n) {}
};

// A tile of the backward pass. `drive` and `exponent` are the gradients of dt x and of dt A, whose
// exp the decay is; those of delta, u and z take the place of dt, x and gate in the end.
template <typename R>
struct BackwardTile : Tile<R> {
  Vec<R> slope[kChunk], gate[kChunk], grad_y[kChunk];  // slope of the softplus
  Vec<R> drive[kChunk], exponent[kChunk];
};

template <typename T>
void load_backward(
    const Block<T>& b, int64_t t, const ScanGrads<T>& grads, BackwardTile<Wide<T>>& tile,
    int64_t s) {
  using R = Wide<T>;
  const Vec<R> raw = b.raw_step(t);
  tile.slope[s] = splat<R>(1);
  tile.dt[s] = b.in.softplus ? softplus(raw, tile.slope[s]) : raw;
  tile.x[s] = b.input(t);
  tile.grad_y[s] = load(grads.y.at(b.row, t) + b.channel, b.count);
  if (b.z) {  // of the gate's gradient all but `out`, which is not known yet
    const Vec<R> z = b.gate(t), p = sigmoid(z);
    tile.gate[s] = tile.grad_y[s] * p * (1 + z * (1 - p));
    tile.grad_y[s] *= z * p;
  }
  tile.out[s] = b.D * tile.x[s];
  tile.drive[s] = tile.exponent[s] = Vec<R>{};
}

template <typename T>
void store_backward(
    const Block<T>& b, int64_t t, const ScanGrads<T>& grads,
    const BackwardTile<Wide<T>>& tile, int64_t s) {
  store(grads.delta + b.at(t), tile.dt[s], b.count);
  store(grads.u + b.at(t), tile.x[s], b.count);
  if (b.z) store(grads.z + b.at(t), tile.gate[s] * tile.out[s], b.count);
}

// kCount states from i on through a tile again, from `before`, as scan_tile does.
template <int kCount, typename R, typename F>
void replay_states(
    int64_t i, int64_t n, int64_t steps, BackwardTile<R>& tile, const Vec<R>* rates, const R* B,
    const R* C, const R* before, TileMemory<R>& memory, const F& meanwhile) {
  Vec<R> h[kCount];
#pragma GCC unroll 4
  for (int j = 0; j < kCount; ++j)
    memory.states[j] = h[j] = load_all(before + (i + j) * kLanes<R>);
  for (int64_t s = 0; s < steps; ++s) {
    meanwhile(s);
    const Vec<R> drive = tile.dt[s] * tile.x[s], dt = limit_rate(tile.dt[s]);
    Vec<R> out = tile.out[s];
#pragma GCC unroll 4
    for (int j = 0; j < kCount; ++j) {
      const Vec<R> decay = exp2_product(dt, rates[i + j]);
      h[j] = decay * h[j] + drive * B[s * n + i + j];
      out += h[j] * C[s * n + i + j];
      memory.decays[s * kCount + j] = decay;
      memory.states[(s + 1) * kCount + j] = h[j];
    }
    tile.out[s] = out;
  }
}

// Back from the tile's last step to its first. grad_h, (N): the gradient of the state after the
// tile, which becomes that of the state before it; it and grad_A, (N), stay in registers.
template <int kCount, typename R>
void reverse_states(
    int64_t i, int64_t n, int64_t steps, BackwardTile<R>& tile, const Vec<R>* rates, const R* B,
    const R* C, TileMemory<R>& memory, Vec<R>* grad_h, Vec<R>* grad_A) {
  Vec<R> h[kCount], sum_A[kCount], after[kCount];
  Vec<R>*grad_B = memory.grad_B.data() + i * kChunk, *grad_C = memory.grad_C.data() + i * kChunk;
#pragma GCC unroll 4
  for (int j = 0; j < kCount; ++j) {
    h[j] = grad_h[i + j];
    sum_A[j] = grad_A[i + j];
    after[j] = memory.states[steps * kCount + j];
  }
  for (int64_t s = steps - 1; s >= 0; --s) {
    const Vec<R> grad_y = tile.grad_y[s], dt = tile.dt[s], x = tile.dt[s] * tile.x[s];
    Vec<R> drive = tile.drive[s], exponent = tile.exponent[s];
#pragma GCC unroll 4
    for (int j = 0; j < kCount; ++j) {
      const int64_t at = s * kCount + j;
      const Vec<R> g = h[j] + grad_y * C[s * n + i + j];
      grad_C[at] += grad_y * after[j];
      grad_B[at] += g * x;
      drive += g * B[s * n + i + j];
      h[j] = g * memory.decays[at];
      after[j] = memory.states[at];  // the state before this step, after the one before
      const Vec<R> e = h[j] * after[j];
      exponent += e * rates[i + j];
      sum_A[j] += e * dt;
    }
    tile.drive[s] = drive;
    tile.exponent[s] = exponent;
  }
#pragma GCC unroll 4
  for (int j = 0; j < kCount; ++j) {
    grad_h[i + j] = h[j];
    grad_A[i + j] = sum_A[j];
  }
}

// The gradients of a tile whose states have all been there and back, and its part of the sums.
template <typename R>
void finish_tile(BackwardTile<R>& tile, int64_t steps, Vec<R> D, BlockSums<R>& sums) {
  for (int64_t s = steps - 1; s >= 0; --s) {
    const Vec<R> x = tile.x[s], dt = tile.dt[s], grad_y = tile.grad_y[s];
    tile.dt[s] = (tile.exponent[s] * R(kLn2) + tile.drive[s] * x) * tile.slope[s];
    tile.x[s] = grad_y * D + tile.drive[s] * dt;
    sums.bias += tile.dt[s];
    sums.D += grad_y * x;
  }
}

// One panel of the backward pass: `count` blocks from block `at` of the group, steps [begin, end).
template <typename T>
void backward_panel(
    Group<T>& group, int64_t at, int64_t count, int64_t begin, int64_t end,
    const Buffer<Wide<T>>& rates, const ScanGrads<T>& grads, std::vector<BlockSums<Wide<T>>>& sums,
    TileMemory<Wide<T>>& memory) {
  using R = Wide<T>;
  const int64_t n = group.n, steps = end - begin;
  BackwardTile<R> tiles[kPanel];
  const Block<T>* blocks = group.blocks.data() + at;
  for (int64_t t = begin; t < end; ++t)
    for (int64_t k = 0; k < count; ++k) load_backward(blocks[k], t, grads, tiles[k], t - begin);
  const auto there_and_back = [&](auto together, int64_t i, int64_t k) {
    constexpr int kCount = decltype(together)::value;
    const Block<T>& b = blocks[k];
    const Vec<R>* A2 = rates.data() + b.index * n;
    const R *B = b.B + begin * n, *C = b.C + begin * n;
    const R* before = grads.checkpoints + b.checkpoint_at(begin);
    int64_t next_t = begin;
    const Block<T>& next = group.next(at + k, next_t, -kChunk);
    replay_states<kCount, R>(i, n, steps, tiles[k], A2, B, C, before, memory, [&](int64_t s) {
      if (i > 0) return;
      next.prefetch(next_t + s);
      fetch(grads.y.at(next.row, next_t + s) + next.channel);
      for (const T* grad : {grads.u, grads.delta, grads.z}) fetch(grad + next.at(next_t + s));
    });
    reverse_states<kCount, R>(
        i, n, steps, tiles[k], A2, B, C, memory, group.state(at + k), sums[at + k].A.data());
  };
  for (int64_t i = 0; i < n;) {
    const bool all = i + kTogether <= n;
    for (int64_t k = 0; k < count; ++k)
      all ? there_and_back(std::integral_constant<int, kTogether>{}, i, k)
          : there_and_back(std::integral_constant<int, 1>{}, i, k);
    i += all ? kTogether : 1;
  }
  for (int64_t k = 0; k < count; ++k) finish_tile(tiles[k], steps, blocks[k].D, sums[at + k]);
  for (int64_t t = begin; t < end; ++t)
    for (int64_t k = 0; k < count; ++k) store_backward(blocks[k], t, grads, tiles[k], t - begin);
}

// Add the lanes of a chunk's gradients of B or C into (steps, N), and clear them for the next one.
template <typename R>
void drain(Buffer<R>& from, int64_t steps, int64_t n, R* to) {
  for (int64_t i = 0; i < n;) {
    const int together = i + kTogether <= n ? kTogether : 1;
    for (int64_t s = 0; s < steps; ++s)
      for (int j = 0; j < together; ++j)
        to[s * n + i + j] = sum<R>(from[i * kChunk + s * together + j]);
    i += together;
  }
  std::fill(from.begin(), from.end(), Vec<R>{});
}

template <typename T>
void store_sums(
    const Block<T>& b, const Vec<Wide<T>>* grad_h, const BlockSums<Wide<T>>& sums,
    const ScanGrads<T>& grads) {
  using R = Wide<T>;
  const int64_t n = b.in.states, plane = b.row * b.in.channels + b.channel;
  store_columns<R>(sums.A.data(), n, b.count, grads.A + b.states_at());
  store_columns<R>(grad_h, n, b.count, grads.initial_state + b.states_at());
  store(grads.D + plane, sums.D, b.count);
  store(grads.delta_bias + plane, sums.bias, b.count);
  for (int64_t t = b.in.row_length(b.row); t < b.in.length; ++t)
    for (T* grad : {grads.u, grads.delta, grads.z})
      if (grad) std::fill_n(grad + b.at(t), b.count, T(0));
}

template <typename T>
void backward_group(
    const ScanInputs<T>& in, const Buffer<Wide<T>>& rates, int64_t row, int64_t first,
    int64_t last, int64_t index, const ScanGrads<T>& grads) {
  using R = Wide<T>;
  const int64_t n = in.states, length = in.row_length(row);
  Group<T> group(in, row, first, last, grads.final_state);  // its states are their gradients
  std::vector<BlockSums<R>> sums(group.size(), BlockSums<R>(n));
  TileMemory<R> memory(n);
  for (int64_t t = (ceil_div(length, kChunk) - 1) * kChunk; t >= 0; t -= kChunk) {
    const int64_t end = std::min(t + kChunk, length);
    for (int64_t at = 0; at < group.size(); at += kPanel)
      backward_panel<T>(
          group, at, std::min(kPanel, group.size() - at), t, end, rates, grads, sums, memory);
    const int64_t to = ((row * grads.groups + index) * in.length + t) * n;
    drain<R>(memory.grad_B, end - t, n, grads.B + to);
    drain<R>(memory.grad_C, end - t, n, grads.C + to);
  }
  for (int64_t i = 0; i < group.size(); ++i)
    store_sums(group.blocks[i], group.state(i), sums[i], grads);
}

// One step of one channel: lanes are states, which are contiguous here. Returns sum of C h.
template <bool kLog, typename R>
R step_channel(R* h, const R* A, const R* B, const R* C, int64_t n, R dt, R x) {
  const Vec<R> rate = limit_rate(splat<R>(dt)) * R(kLog2e);
  Vec<R> y{};
  for (int64_t i = 0; i < n; i += kLanes<R>) {
    const int count = std::min<int64_t>(kLanes<R>, n - i);
    const Vec<R> given = load(A + i, count), decay = exp2_product(rate, kLog ? -exp(given) : given);
    const Vec<R> after = decay * load(h + i, count) + dt * x * load(B + i, count);
    store(h + i, after, count);
    y += after * load(C + i, count);
  }
  return sum<R>(y);
}

// One step of a block.
template <typename T>
void step_block(const Block<T>& block, T* y, Wide<T>* state) {
  using R = Wide<T>;
  const ScanInputs<T>& in = block.in;
  const int64_t n = in.states;
  const Vec<R> raw = block.raw_step(0), x = block.input(0);
  const Vec<R> dt = in.softplus ? softplus(raw) : raw;
  Vec<R> out = block.D * x;
  for (int lane = 0; lane < block.count; ++lane)
    out[lane] += (in.log_A ? step_channel<true, R> : step_channel<false, R>)(
        state + block.states_at() + lane * n, in.A + (block.channel + lane) * n, block.B, block.C,
        n, dt[lane], x[lane]);
  if (block.z) {
    const Vec<R> z = block.gate(0);
    out *= z * sigmoid(z);
  }
  store(y + block.at(0), out, block.count);
}

}  // namespace

int64_t scan_groups(int64_t batch) { return group_count(batch); }

template <typename T>
int64_t scan_checkpoint_size(const ScanInputs<T>& in) {
  using R = Wide<T>;
  return in.batch * ceil_div(in.length, kChunk) * block_count<R>(in.channels) * in.states *
      kLanes<R>;
}

template <typename T>
void scan_forward(const ScanInputs<T>& in, T* y, Wide<T>* final_state, Wide<T>* checkpoints) {
  const auto rates = binary_rates(in);
  const auto run = in.states == 16 ? forward_group<T, 16> : forward_group<T, 0>;
  const int64_t blocks = block_count<Wide<T>>(in.channels);
  for_groups(in.batch, blocks, [&](int64_t row, int64_t first, int64_t last, int64_t) {
    run(in, rates, row, first, last, y, final_state, checkpoints);
  });
}

template <typename T>
void scan_backward(const ScanInputs<T>& in, const ScanGrads<T>& grads) {
  const auto rates = binary_rates(in);
  const int64_t blocks = block_count<Wide<T>>(in.channels);
  for_groups(in.batch, blocks, [&](int64_t row, int64_t first, int64_t last, int64_t group) {
    backward_group<T>(in, rates, row, first, last, group, grads);
  });
}

template <typename T>
void scan_step_of(const ScanInputs<T>& in, int64_t begin, int64_t end, T* y, Wide<T>* state) {
  for (int64_t row = 0; row < in.batch; ++row)
    for (int64_t channel = begin; channel < end; channel += kLanes<Wide<T>>)
      step_block(Block<T>(in, row, channel / kLanes<Wide<T>>), y, state);
}

template <typename T>
void scan_step(const ScanInputs<T>& in, T* y, Wide<T>* state) {
  const int64_t blocks = block_count<Wide<T>>(in.channels);
  const int64_t grain = ceil_div(1 << 13, in.states * kLanes<Wide<T>>);  // about 10 us of work
  at::parallel_for(0, in.batch * blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task)
      step_block(Block<T>(in, task / blocks, task % blocks), y, state);
  });
}

#define VLMAMBA_INSTANTIATE(T)                                                 \
  template int64_t scan_checkpoint_size<T>(const ScanInputs<T>&);              \
  template void scan_forward<T>(const ScanInputs<T>&, T*, Wide<T>*, Wide<T>*); \
  template void scan_backward<T>(const ScanInputs<T>&, const ScanGrads<T>&);   \
  template void scan_step<T>(const ScanInputs<T>&, T*, Wide<T>*);              \
  template void scan_step_of<T>(const ScanInputs<T>&, int64_t, int64_t, T*, Wide<T>*);
VLMAMBA_INSTANTIATE(float)
VLMAMBA_INSTANTIATE(double)
VLMAMBA_INSTANTIATE(c10::BFloat16)
#undef VLMAMBA_INSTANTIATE

}  // namespace vlmamba
