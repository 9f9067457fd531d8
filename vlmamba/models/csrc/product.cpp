// y = x W^T + bias for many rows x, at the processor's rate. The rows of one of the two matrices
// are the lanes of the registers: for that its order is changed, and the other one is read as it
// lies. It is x, unless W has far fewer rows; a library that always takes W copies every weight
// first.
//
// That matrix is cut into panels of at most 64 rows, the other one into blocks of rows; a thread
// takes the blocks one after the other, each with all of its panels. A sum takes one product after
// another in one accumulator, in the order of the columns: a row has the same result whichever
// rows stand beside it, bit for bit.
#include "blocks.h"

#include <numeric>

namespace vlmamba {

#if defined(__AVX512F__)
namespace {

// Numbers are multiplied in units of four bytes: a float32, or two bfloat16.
using Unit = uint32_t;
constexpr int kWide = kLanes<float>;  // rows in a register's lanes
constexpr int kPanelVecs = 4;         // registers of a panel
constexpr int64_t kPanelRows = kPanelVecs * kWide;
constexpr int64_t kBlockRows = 192;       // with kUnits of each, they stay in the second cache
constexpr int64_t kUnits = 512;           // of a row, multiplied at a time
constexpr int64_t kCacheUnits = 1 << 17;  // of the panels that a thread has at a time, unless one
                                          // has more
constexpr int64_t kLine = 16;             // units in a cache line
constexpr int64_t kAhead = 8 * kLine;     // units that packing fetches before it needs them
template <typename T>
constexpr int64_t kPerUnit = sizeof(Unit) / sizeof(T);

VLMAMBA_INLINE Vec<float> multiply_add(Vec<float> sum, Vec<Unit> a, Unit b, float) {
  return static_cast<Vec<float>>(_mm512_fmadd_ps(
      bits<__m512>(a), bits<__m512>(splat(b)), static_cast<__m512>(sum)));
}
#if defined(__AVX512BF16__)
VLMAMBA_INLINE Vec<float> multiply_add(Vec<float> sum, Vec<Unit> a, Unit b, c10::BFloat16) {
  return static_cast<Vec<float>>(
      _mm512_dpbf16_ps(sum, bits<__m512bh>(a), bits<__m512bh>(splat(b))));
}
#endif

// The units of two bfloat16 that two registers narrow to, lane by lane.
VLMAMBA_INLINE __m512i paired(Vec<float> low, Vec<float> high) {
  const auto wide = [](Half16 x) __attribute__((always_inline)) {
    return __builtin_convertvector(x, Vec<Unit>);
  };
  return bits<__m512i>(wide(narrow(low)) | wide(narrow(high)) << 16);
}

// Rows of in.width numbers.
template <typename T>
struct Matrix {
  const T* data;
  int64_t rows;
};

template <typename T>
struct Product {
  LinearInputs<T> in;
  T* y;
  bool turned = 4 * in.outputs <= in.rows;  // W is in the lanes
  Matrix<T> lanes = turned ? Matrix<T>{in.weight, in.outputs} : Matrix<T>{in.x, in.rows};
  Matrix<T> others = turned ? Matrix<T>{in.x, in.rows} : Matrix<T>{in.weight, in.outputs};
  int64_t units = ceil_div(in.width, kPerUnit<T>);  // of a row
  int64_t vecs = ceil_div(lanes.rows, kWide), panels = ceil_div(vecs, kPanelVecs);

  int64_t first_vec(int64_t panel) const { return panel * vecs / panels; }
  int64_t lanes_of(int64_t vec) const { return std::min<int64_t>(kWide, lanes.rows - vec * kWide); }

  // A panel as (units, kPanelRows); rows that do not exist are zeros.
  void pack(int64_t panel, Unit* to) const {
    for (int64_t vec = first_vec(panel); vec < first_vec(panel + 1); ++vec, to += kWide)
      for (int64_t unit = 0; unit < units; unit += kLine) {
        const int64_t at = unit * kPerUnit<T>, count = std::min(kLine * kPerUnit<T>, in.width - at);
        __m512i r[kWide] = {};
        for (int64_t i = 0; i < lanes_of(vec); ++i) {
          const T* from = lanes.data + (vec * kWide + i) * in.width + at;
          std::memcpy(r + i, from, count * sizeof(T));
          fetch(from + kAhead * kPerUnit<T>);
        }
        transpose(r);
        for (int64_t i = 0; i < std::min(kLine, units - unit); ++i)
          std::memcpy(to + (unit + i) * kPanelRows, r + i, sizeof(r[i]));
      }
  }

  // The last unit of a row: behind an odd width there is half of one.
  Unit last_unit(const T* row) const {
    Unit some = 0;
    const int64_t at = (units - 1) * kPerUnit<T>;
    std::memcpy(&some, row + at, (in.width - at) * sizeof(T));
    return some;
  }

  // sums (kRows, kPanelRows) of kRows rows from `first` on, over the units [begin, end).
  template <int kRows, int kVecs>
  void tile(const Unit* packed, int64_t first, int64_t begin, int64_t end, float* sums) const {
    const T *rows[kRows], *next[kRows];
    for (int j = 0; j < kRows; ++j) {  // rows behind the last one are it again, and not kept
      rows[j] = others.data + std::min(first + j, others.rows - 1) * in.width;
      next[j] = others.data + std::min(first + j + kRows, others.rows - 1) * in.width;
    }
    Vec<float> s[kRows][kVecs] = {};
    if (begin) {
      for (int j = 0; j < kRows; ++j)
        for (int v = 0; v < kVecs; ++v) s[j][v] = load_all(sums + j * kPanelRows + v * kWide);
    }
    const auto add = [&](int64_t unit, const auto& read) __attribute__((always_inline)) {
      Vec<Unit> some[kVecs];
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v)
        some[v] = copy_from<Vec<Unit>>(packed + unit * kPanelRows + v * kWide);
#pragma GCC unroll 12
      for (int j = 0; j < kRows; ++j) {
        const Unit one = read(rows[j], unit);
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) s[j][v] = multiply_add(s[j][v], some[v], one, T{});
      }
    };
    const auto whole = [](const T* row, int64_t unit) __attribute__((always_inline)) {
      return copy_from<Unit>(row + unit * kPerUnit<T>);
    };
    const bool half = end == units && in.width % kPerUnit<T>;
    int64_t unit = begin;
    for (; unit + kLine <= end - half; unit += kLine) {
#pragma GCC unroll 12
      for (int j = 0; j < kRows; ++j) fetch(next[j] + unit * kPerUnit<T>);
#pragma GCC unroll 1
      for (int64_t i = 0; i < kLine; ++i) add(unit + i, whole);
    }
    for (; unit < end - half; ++unit) add(unit, whole);
    if (half) add(unit, [this](const T* row, int64_t) { return last_unit(row); });
#pragma GCC unroll 12
    for (int j = 0; j < kRows; ++j)
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) store_all(sums + j * kPanelRows + v * kWide, s[j][v]);
  }

  // y of a panel and the rows [begin, end).
  template <int kRows, int kVecs>
  void block(const Unit* packed, int64_t panel, int64_t begin, int64_t end, float* sums) const {
    for (int64_t unit = 0; unit < units; unit += kUnits)
      for (int64_t first = begin; first < end; first += kRows)
        tile<kRows, kVecs>(packed, first, unit, std::min(units, unit + kUnits),
                           sums + (first - begin) * kPanelRows);
    const int64_t vec = first_vec(panel);
    if (turned) return write_rows<kVecs>(sums, vec, begin, end);
    for (int v = 0; v < kVecs; ++v)
      for (int64_t first = begin; first < end; first += kWide * kPerUnit<T>)
        write(sums + (first - begin) * kPanelRows + v * kWide, vec + v, first,
              std::min(kWide * kPerUnit<T>, end - first));
  }

  // y of the rows [begin, end) of x, where lanes are outputs, from register `vec` on.
  template <int kVecs>
  void write_rows(const float* sums, int64_t vec, int64_t begin, int64_t end) const {
    Vec<float> bias[kVecs] = {};
    for (int v = 0; v < kVecs && in.bias; ++v)
      bias[v] = load(in.bias + (vec + v) * kWide, static_cast<int>(lanes_of(vec + v)));
    for (int64_t row = begin; row < end; ++row, sums += kPanelRows)
      for (int v = 0; v < kVecs; ++v)
        store(y + row * in.outputs + (vec + v) * kWide, load_all(sums + v * kWide) + bias[v],
              static_cast<int>(lanes_of(vec + v)));
  }

  // y of a register of rows of x and `count` outputs, at most a unit's worth for every lane.
  VLMAMBA_INLINE void write(
      const float* sums, int64_t vec, int64_t first, int64_t count) const {
    const auto biased = [&](int64_t j) __attribute__((always_inline)) {
      const Vec<float> sum = load_all(sums + j * kPanelRows);
      return in.bias && j < count ? sum + static_cast<float>(in.bias[first + j]) : sum;
    };
    __m512i r[kWide];
    for (int i = 0; i < kWide; ++i) {
      if constexpr (sizeof(T) == sizeof(Unit)) {
        r[i] = bits<__m512i>(biased(i));
      } else {
        r[i] = paired(biased(2 * i), biased(2 * i + 1));
      }
    }
    transpose(r);
    for (int64_t i = 0; i < lanes_of(vec); ++i) {
      T* to = y + (vec * kWide + i) * in.outputs + first;
      if (count == kWide * kPerUnit<T>) {
        std::memcpy(to, r + i, sizeof(r[i]));
      } else {
        std::memcpy(to, r + i, count * sizeof(T));
      }
    }
  }

  void run() const {
    const int64_t threads = at::get_num_threads(), size = units * kPanelRows;
    const int64_t most = std::max<int64_t>(1, kCacheUnits / std::max<int64_t>(1, size));
    const int64_t together = std::clamp<int64_t>(panels / threads, 1, most);
    const int64_t groups = ceil_div(panels, together);
    const int64_t parts = threads / std::gcd(threads, groups);  // every thread has as many tasks
    const int64_t step = ceil_div(ceil_div(others.rows, parts), 24) * 24;  // whole tiles
    at::parallel_for(0, groups * parts, 1, [&](int64_t task, int64_t end) {
      thread_local Buffer<float> packed, sums;
      packed.resize(std::max<size_t>(packed.size(), together * size / kWide));
      sums.resize((kBlockRows + kWide * kPerUnit<T>) * kPanelVecs);
      for (int64_t there = -1; task < end; ++task) {
        const int64_t group = task / parts, from = task % parts * step;
        const int64_t first = group * panels / groups, last = (group + 1) * panels / groups;
        Unit* x = reinterpret_cast<Unit*>(packed.data());
        for (int64_t panel = first; panel < last && group != there; ++panel)
          pack(panel, x + (panel - first) * size);
        there = group;
        run(first, last, x, from, std::min(others.rows, from + step),
            reinterpret_cast<float*>(sums.data()));
      }
    });
  }

  // y of the panels [first, last) and the rows [from, to).
  void run(
      int64_t first, int64_t last, const Unit* packed, int64_t from, int64_t to,
      float* sums) const {
    for (; from < to; from += kBlockRows)
      for (int64_t panel = first; panel < last; ++panel)
        run(panel, packed + (panel - first) * units * kPanelRows, from,
            std::min(to, from + kBlockRows), sums);
  }

  void run(int64_t panel, const Unit* packed, int64_t from, int64_t to, float* sums) const {
    switch (first_vec(panel + 1) - first_vec(panel)) {
      case 1:
        return block<12, 1>(packed, panel, from, to, sums);
      case 2:
        return block<12, 2>(packed, panel, from, to, sums);
      case 3:
        return block<8, 3>(packed, panel, from, to, sums);
      default:
        return block<6, 4>(packed, panel, from, to, sums);
    }
  }
};

}  // namespace
#endif

template <typename T>
bool product([[maybe_unused]] const LinearInputs<T>& in, [[maybe_unused]] T* y) {
#if defined(__AVX512BF16__)
  constexpr bool known = true;
#elif defined(__AVX512F__)
  constexpr bool known = std::is_same_v<T, float>;
#endif
#if defined(__AVX512F__)
  if constexpr (known) Product<T>{in, y}.run();
  return known;
#else
  return false;
#endif
}

template bool product<float>(const LinearInputs<float>&, float*);
template bool product<c10::BFloat16>(const LinearInputs<c10::BFloat16>&, c10::BFloat16*);

}  // namespace vlmamba
