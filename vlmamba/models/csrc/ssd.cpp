// Mamba-2's scan over a sequence, forward and backward ("state-space duality").
//
// A task is a row and some heads of one group. It takes chunk after chunk: within one the outputs
// are a masked product, as attention's, and between chunks only a head's state passes, which lies
// as (N, P) here. With q and s steps of a chunk, V = dt x, e_q the decay from its start through
// step q, t_s that from behind step s to its end, and M_qs that from s to q (0 for s > q):
//
//     S = C B^T    W = S o M    Y = W V + e C h + D x    h <- e_Q h + B^T (t V)
//
// The backward pass keeps the state before every chunk and makes the rest again. Rows of matrices
// are whole registers; lanes without a column hold zeros.
#include "blocks.h"

namespace vlmamba {
namespace {

constexpr int64_t kChunk = 64;  // twice as many double the work inside, half as many that between
constexpr int64_t kTileRows = 4;
constexpr int64_t kTileVecs = kVecBytes == 64 ? 4 : 2;

template <typename R>
struct Matrix {
  int64_t vecs;  // of a row
  Buffer<R> data;

  Matrix(int64_t rows, int64_t columns) : vecs(block_count<R>(columns)), data(rows * vecs) {}
  Vec<R>* row(int64_t i) { return data.data() + i * vecs; }
  const Vec<R>* row(int64_t i) const { return data.data() + i * vecs; }
  R* numbers(int64_t i) { return reinterpret_cast<R*>(row(i)); }
  void clear() { std::fill(data.begin(), data.end(), Vec<R>{}); }
};

// The left factor of a product: its element (i, k), so that a matrix may be taken turned.
template <typename R>
struct Left {
  const R* data;
  int64_t row, column;
};

template <typename R>
Left<R> as_is(const Matrix<R>& m) {
  return {reinterpret_cast<const R*>(m.row(0)), m.vecs * kLanes<R>, 1};
}

template <typename R>
Left<R> turned(const Matrix<R>& m) {
  return {reinterpret_cast<const R*>(m.row(0)), 1, m.vecs * kLanes<R>};
}

// What of a product a tile of rows needs: the k that it sums over, and its registers.
struct Extent {
  int64_t begin, end, vecs;
};

template <int kRows, int kVecs, typename R>
void add_tile(
    const Left<R>& a, int64_t i, const Matrix<R>& b, int64_t v, Matrix<R>& c, int64_t begin,
    int64_t end) {
  Vec<R> sums[kRows][kVecs];
#pragma GCC unroll 4
  for (int j = 0; j < kRows; ++j)
#pragma GCC unroll 4
    for (int w = 0; w < kVecs; ++w) sums[j][w] = c.row(i + j)[v + w];
  const R* from = a.data + i * a.row;
#pragma GCC unroll 1
  for (int64_t k = begin; k < end; ++k) {
    const Vec<R>* right = b.row(k) + v;
#pragma GCC unroll 4
    for (int j = 0; j < kRows; ++j)
#pragma GCC unroll 4
      for (int w = 0; w < kVecs; ++w)
        sums[j][w] += splat(from[j * a.row + k * a.column]) * right[w];
  }
#pragma GCC unroll 4
  for (int j = 0; j < kRows; ++j)
#pragma GCC unroll 4
    for (int w = 0; w < kVecs; ++w) c.row(i + j)[v + w] = sums[j][w];
}

// c += a b, of `rows` rows; extent(first, last) of the rows [first, last).
template <typename R, typename F>
void add_product(
    const Left<R>& a, const Matrix<R>& b, Matrix<R>& c, int64_t rows, const F& extent) {
  const auto of_rows = [&](auto count, int64_t i) {
    constexpr int kRows = decltype(count)::value;
    const Extent e = extent(i, i + kRows);
    int64_t v = 0;
    for (; v + kTileVecs <= e.vecs; v += kTileVecs)
      add_tile<kRows, kTileVecs>(a, i, b, v, c, e.begin, e.end);
    for (; v < e.vecs; ++v) add_tile<kRows, 1>(a, i, b, v, c, e.begin, e.end);
  };
  int64_t i = 0;
  for (; i + kTileRows <= rows; i += kTileRows)
    of_rows(std::integral_constant<int, kTileRows>{}, i);
  for (; i < rows; ++i) of_rows(std::integral_constant<int, 1>{}, i);
}

// The same with every column and a sum over [0, depth).
template <typename R>
void add_product(const Left<R>& a, const Matrix<R>& b, Matrix<R>& c, int64_t rows, int64_t depth) {
  add_product(a, b, c, rows, [&](int64_t, int64_t) { return Extent{0, depth, c.vecs}; });
}

// to = from^T for `rows` rows of `columns`; lanes behind the last row are zeros.
template <typename R>
void turn(const Matrix<R>& from, int64_t rows, int64_t columns, Matrix<R>& to) {
  constexpr int64_t lanes = kLanes<R>;
  for (int64_t i = 0; i < rows; i += lanes)
    for (int64_t j = 0; j < columns; j += lanes) {
      const int64_t count = std::min(lanes, rows - i), height = std::min(lanes, columns - j);
      Vec<R> r[lanes] = {};
      for (int64_t k = 0; k < count; ++k) r[k] = from.row(i + k)[j / lanes];
      transpose<R>(r);
      for (int64_t k = 0; k < height; ++k) to.row(j + k)[i / lanes] = r[k];
    }
}

template <typename R>
R dot(const Vec<R>* a, const Vec<R>* b, int64_t vecs) {
  Vec<R> s{};
  for (int64_t v = 0; v < vecs; ++v) s += a[v] * b[v];
  return sum<R>(s);
}

// Below this a decay is 0: its products would be denormal, and slow.
constexpr float kNothing = 1e-30f;

// Where the real steps of a row are cut.
struct Chunk {
  int64_t row, begin, steps;
};

// What the heads of a group share in one chunk.
template <typename T>
struct Group {
  using R = Wide<T>;
  const SsdInputs<T>& in;
  int64_t index;
  Chunk chunk{};
  Matrix<R> B, C, B_turned, scores;

  Group(const SsdInputs<T>& in, int64_t index)
      : in(in),
        index(index),
        B(kChunk, in.states),
        C(kChunk, in.states),
        B_turned(in.states, kChunk),
        scores(kChunk, kChunk) {}

  void load_chunk(const Chunk& at) {
    chunk = at;
    const int64_t n = in.states;
    for (int64_t s = 0; s < at.steps; ++s) {
      load_row(in.B.at(at.row, at.begin + s) + index * n, n, B.row(s));
      load_row(in.C.at(at.row, at.begin + s) + index * n, n, C.row(s));
    }
    turn(B, at.steps, n, B_turned);
    scores.clear();
    add_product(as_is(C), B_turned, scores, at.steps, [&](int64_t, int64_t last) {
      return Extent{0, n, block_count<R>(last)};
    });
  }

  static void load_row(const T* from, int64_t count, Vec<R>* to) {
    for (int64_t i = 0; i < count; i += kLanes<R>)
      *to++ = load(from + i, static_cast<int>(std::min<int64_t>(kLanes<R>, count - i)));
  }
};

// One head in one chunk.
template <typename T>
struct Head {
  using R = Wide<T>;
  const SsdInputs<T>& in;
  int64_t index = 0;
  Chunk chunk{};
  Matrix<R> x, values, decays, weights;  // (Q, P), (Q, P), (Q, Q), (Q, Q)
  Matrix<R> steps, slopes, rates;        // dt, its slope, exp(dt A): a row of (Q)
  R since_start[kChunk], to_end[kChunk];

  explicit Head(const SsdInputs<T>& in)
      : in(in),
        x(kChunk, in.width),
        values(kChunk, in.width),
        decays(kChunk, kChunk),
        weights(kChunk, kChunk),
        steps(1, kChunk),
        slopes(1, kChunk),
        rates(1, kChunk) {}

  R step(int64_t s) const { return reinterpret_cast<const R*>(steps.row(0))[s]; }
  R slope(int64_t s) const { return reinterpret_cast<const R*>(slopes.row(0))[s]; }
  R whole() const { return since_start[chunk.steps - 1]; }  // decay of the chunk

  void load_chunk(const Group<T>& group, int64_t head) {
    index = head;
    chunk = group.chunk;
    R* dt = steps.numbers(0);
    for (int64_t s = 0; s < kChunk; ++s)
      dt[s] = s < chunk.steps ? R(in.dt.at(chunk.row, chunk.begin + s)[head]) + in.dt_bias[head] : 0;
    for (int64_t v = 0; v < steps.vecs; ++v) {
      steps.row(0)[v] = softplus(steps.row(0)[v], slopes.row(0)[v]);
      rates.row(0)[v] = exp(steps.row(0)[v] * in.A[head]);
    }
    for (int64_t s = 0; s < chunk.steps; ++s) {
      Group<T>::load_row(
          in.x.at(chunk.row, chunk.begin + s) + head * in.width, in.width, x.row(s));
      for (int64_t v = 0; v < x.vecs; ++v) values.row(s)[v] = x.row(s)[v] * step(s);
    }
    decay(group.scores);
  }

  // Row by row: that of step q is the one before it times step q's decay, so that small decays
  // behind large ones keep their digits.
  void decay(const Matrix<R>& scores) {
    const Vec<R> none{};
    R since = 1;
    for (int64_t q = 0; q < chunk.steps; ++q) {
      const R rate = rates.numbers(0)[q];
      since *= rate;
      if (since < kNothing) since = 0;
      since_start[q] = since;
      for (int64_t v = 0; v < decays.vecs; ++v) {
        const Vec<R> m = q ? decays.row(q - 1)[v] * rate : none;
        decays.row(q)[v] = m > splat<R>(kNothing) ? m : none;
      }
      decays.numbers(q)[q] = 1;
      for (int64_t v = 0; v < decays.vecs; ++v)
        weights.row(q)[v] = scores.row(q)[v] * decays.row(q)[v];
    }
    std::copy_n(decays.numbers(chunk.steps - 1), chunk.steps, to_end);
  }
};

// The states of some heads, (N, P) each, from and to arrays (B, H, P, N).
template <typename T>
struct States {
  using R = Wide<T>;
  const SsdInputs<T>& in;
  int64_t first;
  std::vector<Matrix<R>> heads;

  States(const SsdInputs<T>& in, int64_t row, int64_t first, int64_t last, const R* from)
      : in(in), first(first), heads(last - first, Matrix<R>(in.states, in.width)) {
    for (int64_t h = first; from && h < last; ++h)
      for (int64_t p = 0; p < in.width; ++p)
        for (int64_t n = 0; n < in.states; ++n) of(h).numbers(n)[p] = from[at(row, h, p) + n];
  }
  Matrix<R>& of(int64_t head) { return heads[head - first]; }
  int64_t at(int64_t row, int64_t head, int64_t p) const {
    return ((row * in.heads + head) * in.width + p) * in.states;
  }
  void store(int64_t row, R* to) {
    for (int64_t h = first; h < first + static_cast<int64_t>(heads.size()); ++h)
      for (int64_t p = 0; p < in.width; ++p)
        for (int64_t n = 0; n < in.states; ++n) to[at(row, h, p) + n] = of(h).numbers(n)[p];
  }
};

template <typename T>
int64_t checkpoint_at(const SsdInputs<T>& in, const Chunk& chunk, int64_t head) {
  const int64_t chunks = ceil_div(in.length, kChunk);
  const int64_t number = (chunk.row * chunks + chunk.begin / kChunk) * in.heads + head;
  return number * in.states * block_count<Wide<T>>(in.width) * kLanes<Wide<T>>;
}

template <typename T>
void store_row(const Vec<Wide<T>>* from, int64_t count, T* to) {
  for (int64_t i = 0; i < count; i += kLanes<Wide<T>>)
    store(to + i, *from++, static_cast<int>(std::min<int64_t>(kLanes<Wide<T>>, count - i)));
}

template <typename T>
void forward_heads(
    const SsdInputs<T>& in, int64_t row, int64_t group_index, int64_t first, int64_t last, T* y,
    Wide<T>* final_state, Wide<T>* checkpoints) {
  using R = Wide<T>;
  const int64_t length = in.row_length(row);
  Group<T> group(in, group_index);
  Head<T> head(in);
  States<T> states(in, row, first, last, in.initial_state);
  Matrix<R> out(kChunk, in.width);
  for (int64_t t = 0; t < length; t += kChunk) {
    const int64_t steps = std::min(kChunk, length - t);
    group.load_chunk({row, t, steps});
    for (int64_t h = first; h < last; ++h) {
      Matrix<R>& state = states.of(h);
      if (checkpoints)
        std::memcpy(checkpoints + checkpoint_at(in, group.chunk, h), state.row(0),
                    state.data.size() * sizeof(Vec<R>));
      head.load_chunk(group, h);
      out.clear();
      add_product(as_is(group.C), state, out, steps, in.states);
      for (int64_t q = 0; q < steps; ++q)
        for (int64_t v = 0; v < out.vecs; ++v)
          out.row(q)[v] = out.row(q)[v] * head.since_start[q] + head.x.row(q)[v] * in.D[h];
      add_product(as_is(head.weights), head.values, out, steps, [&](int64_t, int64_t end) {
        return Extent{0, end, out.vecs};
      });
      for (int64_t q = 0; q < steps; ++q)
        store_row<T>(out.row(q), in.width, y + in.at(row, t + q, h));
      for (Vec<R>& v : state.data) v *= head.whole();
      for (int64_t s = 0; s < steps; ++s)
        for (int64_t v = 0; v < out.vecs; ++v) head.values.row(s)[v] *= head.to_end[s];
      add_product(turned(group.B), head.values, state, in.states, steps);
    }
  }
  states.store(row, final_state);
  for (int64_t t = length; t < in.length; ++t)
    std::fill_n(y + in.at(row, t, first), (last - first) * in.width, T(0));
}

// What a head's backward pass holds of one chunk.
template <typename T>
struct BackwardHead : Head<T> {
  using R = Wide<T>;
  Matrix<R> state;                                   // before the chunk
  Matrix<R> grad_y, grad_values, grad_weights, read; // (Q, P), (Q, P), (Q, Q), (Q, N)
  Matrix<R> values_turned, state_turned, grad_state_turned;
  Matrix<R> below;                                   // of grad_weights o weights: a row of (Q)
  R grad_decay[kChunk];                              // of dt A, the logarithm of a step's decay
  R A = 0, D = 0, dt_bias = 0;                       // sums over the chunk

  explicit BackwardHead(const SsdInputs<T>& in)
      : Head<T>(in),
        state(in.states, in.width),
        grad_y(kChunk, in.width),
        grad_values(kChunk, in.width),
        grad_weights(kChunk, kChunk),
        read(kChunk, in.states),
        values_turned(in.width, kChunk),
        state_turned(in.width, in.states),
        grad_state_turned(in.width, in.states),
        below(1, kChunk) {}

  void load_backward(const Group<T>& group, int64_t head, const SsdGrads<T>& grads) {
    this->load_chunk(group, head);
    const auto& in = this->in;
    const Chunk& chunk = this->chunk;
    std::memcpy(state.row(0), grads.checkpoints + checkpoint_at(in, chunk, head),
                state.data.size() * sizeof(Vec<R>));
    for (int64_t q = 0; q < chunk.steps; ++q)
      Group<T>::load_row(
          grads.y.at(chunk.row, chunk.begin + q) + head * in.width, in.width, grad_y.row(q));
  }

  // grad_state (N, P) is that of the state behind the chunk; it becomes that of the one before.
  // grad_B, grad_C (Q, N) and grad_scores (Q, Q) add up over the heads of the group.
  void run(
      const Group<T>& group, Matrix<R>& grad_state, Matrix<R>& grad_B, Matrix<R>& grad_C,
      Matrix<R>& grad_scores) {
    const int64_t steps = this->chunk.steps, n = this->in.states, width = this->in.width;
    auto& values = this->values;
    turn(values, steps, width, values_turned);
    turn(state, n, width, state_turned);
    turn(grad_state, n, width, grad_state_turned);

    // what a step adds to the state behind the chunk
    R later[kChunk];
    grad_values.clear();
    add_product(as_is(group.B), grad_state, grad_values, steps, n);
    for (int64_t s = 0; s < steps; ++s) {
      const R share = this->to_end[s];
      later[s] = share * dot<R>(values.row(s), grad_values.row(s), values.vecs);
      for (int64_t v = 0; v < values.vecs; ++v) {
        grad_values.row(s)[v] *= share;
        values.row(s)[v] *= share;
      }
    }
    add_product(as_is(values), grad_state_turned, grad_B, steps, width);

    // outputs within the chunk
    add_product(turned(this->weights), grad_y, grad_values, steps, [&](int64_t first, int64_t) {
      return Extent{first, steps, grad_values.vecs};
    });
    grad_weights.clear();
    add_product(as_is(grad_y), values_turned, grad_weights, steps, [&](int64_t, int64_t last) {
      return Extent{0, width, block_count<R>(last)};
    });

    // what the state before the chunk adds to the outputs
    R earlier[kChunk];
    read.clear();
    add_product(as_is(grad_y), state_turned, read, steps, width);
    for (int64_t q = 0; q < steps; ++q) {
      const R share = this->since_start[q];
      earlier[q] = share * dot<R>(read.row(q), group.C.row(q), read.vecs);
      for (int64_t v = 0; v < read.vecs; ++v) grad_C.row(q)[v] += read.row(q)[v] * share;
    }
    differentiate_decays(grad_scores, earlier, later, dot<R>(
        state.row(0), grad_state.row(0), static_cast<int64_t>(state.data.size())));

    finish_steps();
    for (Vec<R>& v : grad_state.data) v *= this->whole();
    for (int64_t q = 0; q < steps; ++q)
      for (int64_t v = 0; v < grad_y.vecs; ++v) grad_y.row(q)[v] *= this->since_start[q];
    add_product(turned(group.C), grad_y, grad_state, n, steps);
  }

  // A step's decay is in all that crosses it: the weights of a later output and an earlier input,
  // the later reads of the first state, what earlier inputs add to the last state, and their product.
  void differentiate_decays(Matrix<R>& grad_scores, const R* earlier, const R* later, R across) {
    const int64_t steps = this->chunk.steps;
    below.clear();
    across *= this->whole();
    R reads = 0;
    for (int64_t q = steps - 1; q >= 0; --q) {
      Vec<R>* sums = below.row(0);
      for (int64_t v = 0; v < block_count<R>(q + 1); ++v) {
        const Vec<R> g = grad_weights.row(q)[v];
        grad_scores.row(q)[v] += g * this->decays.row(q)[v];
        sums[v] += g * this->weights.row(q)[v];
      }
      below.numbers(0)[q] = 0;  // only inputs before step q cross it
      reads += earlier[q];
      Vec<R> crossing{};
      for (int64_t v = 0; v < block_count<R>(q + 1); ++v) crossing += sums[v];
      grad_decay[q] = sum<R>(crossing) + reads + across;
    }
    R added = 0;
    for (int64_t q = 0; q < steps; added += later[q++]) grad_decay[q] += added;
  }

  // Of grad_values the gradients of x, in its place, and of dt, in that of grad_decay.
  void finish_steps() {
    const auto& in = this->in;
    A = dt_bias = D = 0;
    const R rate = in.A[this->index], skip = in.D[this->index];
    for (int64_t s = 0; s < this->chunk.steps; ++s) {
      Vec<R> from_x{}, from_skip{};
      for (int64_t v = 0; v < grad_y.vecs; ++v) {
        const Vec<R> x = this->x.row(s)[v], g = grad_values.row(s)[v], y = grad_y.row(s)[v];
        from_x += g * x;
        from_skip += y * x;
        grad_values.row(s)[v] = g * this->step(s) + y * skip;
      }
      A += grad_decay[s] * this->step(s);
      D += sum<R>(from_skip);
      grad_decay[s] = (grad_decay[s] * rate + sum<R>(from_x)) * this->slope(s);
      dt_bias += grad_decay[s];
    }
  }
};

template <typename T>
void backward_heads(
    const SsdInputs<T>& in, int64_t row, int64_t group_index, int64_t first, int64_t last,
    int64_t part, const SsdGrads<T>& grads) {
  using R = Wide<T>;
  const int64_t length = in.row_length(row), n = in.states;
  Group<T> group(in, group_index);
  BackwardHead<T> head(in);
  States<T> grad_states(in, row, first, last, grads.final_state);
  Matrix<R> grad_B(kChunk, n), grad_C(kChunk, n), grad_scores(kChunk, kChunk);
  const auto shared_at = [&](int64_t t) {
    return ((part * in.batch + row) * in.length + t) * in.groups * n + group_index * n;
  };
  for (int64_t h = first; h < last; ++h)
    for (R* sums : {grads.A, grads.D, grads.dt_bias}) sums[row * in.heads + h] = 0;
  for (int64_t t = (ceil_div(length, kChunk) - 1) * kChunk; t >= 0; t -= kChunk) {
    const int64_t steps = std::min(kChunk, length - t);
    group.load_chunk({row, t, steps});
    for (Matrix<R>* m : {&grad_B, &grad_C, &grad_scores}) m->clear();
    for (int64_t h = first; h < last; ++h) {
      head.load_backward(group, h, grads);
      head.run(group, grad_states.of(h), grad_B, grad_C, grad_scores);
      grads.A[row * in.heads + h] += head.A;
      grads.D[row * in.heads + h] += head.D;
      grads.dt_bias[row * in.heads + h] += head.dt_bias;
      for (int64_t s = 0; s < steps; ++s) {
        store_row<T>(head.grad_values.row(s), in.width, grads.x + in.at(row, t + s, h));
        grads.dt[(row * in.length + t + s) * in.heads + h] = static_cast<T>(head.grad_decay[s]);
      }
    }
    add_product(as_is(grad_scores), group.B, grad_C, steps, [&](int64_t, int64_t end) {
      return Extent{0, end, grad_C.vecs};
    });
    add_product(turned(grad_scores), group.C, grad_B, steps, [&](int64_t begin, int64_t) {
      return Extent{begin, steps, grad_B.vecs};
    });
    for (int64_t s = 0; s < steps; ++s) {
      store_row<R>(grad_B.row(s), n, grads.B + shared_at(t + s));
      store_row<R>(grad_C.row(s), n, grads.C + shared_at(t + s));
    }
  }
  grad_states.store(row, grads.initial_state);
}

// f(row, group, first head, last head, part) for every part of a group's heads.
template <typename T, typename F>
void for_heads(const SsdInputs<T>& in, const F& f) {
  const int64_t parts = ssd_parts(in.batch, in.heads, in.groups), each = in.heads / in.groups;
  at::parallel_for(0, in.batch * in.groups * parts, 1, [&](int64_t task, int64_t end) {
    for (; task < end; ++task) {
      const int64_t row = task / (in.groups * parts), group = task / parts % in.groups;
      const Share share{task % parts, parts};
      f(row, group, group * each + share.begin(each), group * each + share.end(each), share.number);
    }
  });
}

}  // namespace

int64_t ssd_parts(int64_t batch, int64_t heads, int64_t groups) {
  const int64_t wanted = ceil_div(at::get_num_threads(), std::max<int64_t>(1, batch * groups));
  return std::min(heads / groups, wanted);
}

template <typename T>
int64_t ssd_checkpoint_size(const SsdInputs<T>& in) {
  return checkpoint_at(in, {in.batch, 0, 0}, 0);
}

template <typename T>
void ssd_forward(const SsdInputs<T>& in, T* y, Wide<T>* final_state, Wide<T>* checkpoints) {
  for_heads(in, [&](int64_t row, int64_t group, int64_t first, int64_t last, int64_t) {
    forward_heads(in, row, group, first, last, y, final_state, checkpoints);
  });
}

template <typename T>
void ssd_backward(const SsdInputs<T>& in, const SsdGrads<T>& grads) {
  for_heads(in, [&](int64_t row, int64_t group, int64_t first, int64_t last, int64_t part) {
    backward_heads(in, row, group, first, last, part, grads);
  });
}

#define VLMAMBA_INSTANTIATE(T)                                                \
  template int64_t ssd_checkpoint_size<T>(const SsdInputs<T>&);               \
  template void ssd_forward<T>(const SsdInputs<T>&, T*, Wide<T>*, Wide<T>*);  \
  template void ssd_backward<T>(const SsdInputs<T>&, const SsdGrads<T>&);
VLMAMBA_INSTANTIATE(float)
VLMAMBA_INSTANTIATE(double)
VLMAMBA_INSTANTIATE(c10::BFloat16)
#undef VLMAMBA_INSTANTIATE

}  // namespace vlmamba
