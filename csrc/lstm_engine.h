// The executor of an LSTM (Hochreiter and Schmidhuber, 1997; gates as in torch.nn.LSTM):
//
//   (i, f, g, o) = (σ, σ, tanh, σ)(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)
//   c_t = f c_{t-1} + i g,   h_t = o tanh(c_t)
//
// Time is cut into chunks. On the diagonal d of (layer, chunk), layer n works on chunk d - n: the tasks of a diagonal
// depend on earlier diagonals only. A task is a layer, a chunk and a tile of rows; rows are split over threads where the
// batch is large, layers where it is small.
//
// A row's numbers do not depend on the rows beside it. Weight gradients are summed by groups of rows, and the groups'
// sums added in turn; how many groups there are depends on sizes alone. So results are the same for every thread count,
// and threads that have whole groups need nothing of each other: they do not meet before the groups are added.
//
// Inside, gates lie in blocks of kUnits units, whatever the instruction set: i, f, g, o of units 0 .. 15, then of 16 ..
// 31, and so on. So a unit's gates are neighbours, in whole vectors without padding.

template <class T, class Product>
struct Lstm {
  static constexpr int L = kLanes<T>;
  using P = Products<T, Product>;
  using Packed = typename P::Packed;

  static constexpr long kUnits = 16;
  // Rows of a product at least, where several steps may go into one: weights are then read once for all of them.
  static constexpr long kRowsAtOnce = 32;
  static constexpr long kBlock = 256;     // rows that go through all steps together: bounds the memory of a call
  static constexpr long kGroups = 4;      // of rows, in a block
  static constexpr long kGroupRows = 32;  // at least, beyond two groups
  static constexpr size_t kSumBytes = size_t(16) << 20;  // of all groups' sums
  static constexpr long kChunkRows = P::kDepth;          // rows of a group × steps of a chunk: they stay in the cache

  const LstmCall& call;
  const bool backward;
  const long batch, steps, hidden, layers;
  const long gates, gate_row, unit_row;  // 4 hidden; rows of gates and of units in whole vectors
  const long block;    // rows at most in a block
  const long groups, group_rows;
  const long chunk;    // steps of a chunk
  const long chunks, tiles, tile_rows;
  const bool separable;  // into threads that have whole groups
  int bottom;          // backward: the lowest layer that has work
  Barrier barrier;

  // What a thread holds.
  struct Local {
    int thread, threads;
    bool alone;           // it needs nothing of the other threads
    long base, rows;      // the block at hand: its first rank, and its ranks
    long* offset;         // backward: rows of a group in the steps of the chunk before
    const T** from;       // rows of a product
    T** to;
    T *scratch, *operands, *mask, *room;
  };

  struct Layer {
    long width;           // of its input
    Packed in, own;       // forward: W_ih, W_hh; backward: own alone, [W_hh W_ih]
    T *bias, *c;          // forward: sum of both biases; the cells' state [block]
    T* h;                 // forward: state [block] as operand
    T* handed;            // forward: operands for the layer above, [2][chunk][block]
    T* back;              // backward: [2][chunk][block] gradients of h_{t-1} and of the input, one after the other
    long back_row;
    T* dc;                // [block] handed to the step before
    T *dw, *db;           // [groups] of [input and h_{t-1}][gates], of [gates]
    long sum_row;         // input and h_{t-1} in whole vectors
    unsigned char* live;  // [2][chunk][tiles], see live()
    unsigned char* asleep;  // [tiles]: no gradient comes from later steps
  };
  Layer* layer = nullptr;
  // Backward: gradients of gates, and what they are multiplied with for those of weights, of the rows of a group in a
  // chunk one after the other. A thread that is alone has one of each, else every layer and group has.
  T *dgates = nullptr, *inputs = nullptr;
  long inputs_size = 0;
  char* locals = nullptr;
  size_t local_size = 0;

  static long at_most(long a, long b) { return a < b ? a : b; }
  static long at_least(long a, long b) { return a > b ? a : b; }
  static long parts(long n, long size) { return (n + size - 1) / size; }

  static long block_rows(long batch) { return parts(batch, parts(batch, kBlock)); }
  // From sizes alone: sums are formed group by group and chunk by chunk.
  static long group_count(const LstmCall& c, long rows) {
    const long by_rows = rows < 16 ? 1 : at_least(2, at_most(kGroups, rows / kGroupRows));
    const size_t sums = sizeof(T) * 4 * c.hidden * (c.inputs + c.hidden * (2 * c.layers - 1));
    return at_least(1, at_most(by_rows, long(kSumBytes / sums)));
  }
  // Long chunks for few rows, but enough of them that layers overlap.
  static long chunk_steps(long rows, long steps) {
    return at_least(1, at_most(parts(kChunkRows, rows), parts(steps, 8)));
  }
  // As many tiles in every group, and one for every thread if there are rows for it.
  static long tile_count(long rows, long groups, long threads) {
    return groups * parts(at_least(groups, at_most(threads, parts(rows, 4))), groups);
  }

  Lstm(const LstmCall& c, bool with_backward)
      : call(c),
        backward(with_backward),
        batch(c.batch),
        steps(c.steps),
        hidden(c.hidden),
        layers(c.layers),
        gates(4 * c.hidden),
        gate_row(GK_ROUND_UP(gates, L)),
        unit_row(GK_ROUND_UP(c.hidden, L)),
        block(block_rows(c.batch)),
        groups(group_count(c, block)),
        group_rows(parts(block, groups)),
        chunk(chunk_steps(group_rows, c.steps)),
        chunks(parts(c.steps, chunk)),
        tiles(tile_count(block, groups, c.threads)),
        tile_rows(parts(block, tiles)),
        separable(tiles == groups && groups % c.threads == 0) {
    bottom = int(layers) - 1;
    if (backward)
      for (int n = int(layers) - 1; n >= 0; --n)
        if (wants_weights(n) || (n == 0 && call.grad_x) || call.grad_h0 || call.grad_c0) bottom = n;
  }

  // --- gates -------------------------------------------------------------------------------------------------------

  // f(at, original, count) for gates first .. last - 1 in runs that are neighbours in torch's order too.
  template <class F>
  void each_run(long first, long last, F f) const {
    for (long at = first; at < last;) {
      const long block_at = at / (4 * kUnits), units = at_most(kUnits, hidden - block_at * kUnits);
      const long in = at - block_at * 4 * kUnits, gate = in / units, unit = in % units;
      const long count = at_most(units - unit, last - at);
      f(at, gate * hidden + block_at * kUnits + unit, count);
      at += count;
    }
  }

  // f(whole, gate, stride, unit, n) for vectors of n units, all lanes where `whole`: their first gates lie at gate,
  // gate + stride, ...; the units at unit.
  template <class F>
  GK_INLINE void each_vector(F f) const {
    const long full = hidden / kUnits, left = hidden % kUnits;
    for (long b = 0; b < full; ++b)
      for (long u = 0; u < kUnits; u += L) f(std::true_type{}, 4 * kUnits * b + u, kUnits, kUnits * b + u, long(L));
    for (long u = 0; u < left; u += L)
      f(std::false_type{}, 4 * kUnits * full + u, left, kUnits * full + u, at_most(L, left - u));
  }
  template <class Whole>
  static GK_INLINE V<T> get(Whole, const T* p, long n) {
    if constexpr (Whole::value) return load(p);
    return load_first(p, n);
  }
  template <class Whole>
  static GK_INLINE void put(Whole, T* p, long n, V<T> v) {
    if constexpr (Whole::value) return store(p, v);
    store_first(p, v, n);
  }

  // --- memory ------------------------------------------------------------------------------------------------------

  struct Cursor {
    char* base;
    size_t at = 0;
    template <class S>
    S* take(size_t n) {
      at = GK_ROUND_UP(at, size_t(64));
      S* section = base ? reinterpret_cast<S*>(base + at) : nullptr;
      at += n * sizeof(S);
      return section;
    }
  };

  const T* param(int n, int which) const { return static_cast<const T*>(call.params[4 * n + which]); }
  T* grad_param(int n, int which) const { return static_cast<T*>(call.grad_params[4 * n + which]); }
  bool wants(int n, int which) const { return backward && grad_param(n, which); }
  bool wants_weights(int n) const { return wants(n, 0) || wants(n, 1) || wants(n, 2) || wants(n, 3); }
  bool wants_dx(int n) const { return n > bottom || (n == 0 && call.grad_x); }
  bool drops(int n) const { return call.dropout > 0.0 && n < layers - 1; }
  long width(int n) const { return n == 0 ? call.inputs : hidden; }

  size_t lay_out(char* base) {
    Cursor cursor{base};
    layer = cursor.template take<Layer>(layers);
    const size_t rows = size_t(chunk) * block;
    Layer unused;
    for (int n = 0; n < layers; ++n) {
      Layer& at = base ? layer[n] : unused;
      at = Layer{};
      at.width = width(n);
      if (!backward) {
        at.in = Packed(at.width, gates);
        at.own = Packed(hidden, gates);
        at.in.w = cursor.template take<T>(at.in.size());
        at.own.w = cursor.template take<T>(at.own.size());
        at.bias = cursor.template take<T>(gate_row);
        at.h = cursor.template take<T>(block * P::operand_row(hidden));
        at.c = cursor.template take<T>(block * unit_row);
        at.handed = cursor.template take<T>(n < layers - 1 ? 2 * rows * P::operand_row(hidden) : 0);
        continue;
      }
      if (n < bottom) continue;
      const long outputs = hidden + (wants_dx(n) ? at.width : 0);
      at.own = Packed(gates, outputs);
      at.own.w = cursor.template take<T>(at.own.size());
      at.back_row = GK_ROUND_UP(outputs, L);
      at.back = cursor.template take<T>(2 * rows * at.back_row);
      at.dc = cursor.template take<T>(block * unit_row);
      at.live = cursor.template take<unsigned char>(2 * chunk * tiles);
      at.asleep = cursor.template take<unsigned char>(tiles);
      at.sum_row = GK_ROUND_UP(at.width + hidden, L);
      inputs_size = at_least(inputs_size, chunk * group_rows * at.sum_row + L);
      if (wants(n, 0) || wants(n, 1)) at.dw = cursor.template take<T>(groups * (at.width + hidden) * gate_row);
      if (wants(n, 2) || wants(n, 3)) at.db = cursor.template take<T>(groups * gate_row);
    }
    if (backward) {
      // A team may turn out smaller than asked for, and then is not alone.
      const long shares = at_least(call.threads, layers * groups);
      dgates = cursor.template take<T>(shares * chunk * group_rows * gate_row);
      inputs = cursor.template take<T>(shares * inputs_size);
    }
    locals = base ? base + GK_ROUND_UP(cursor.at, size_t(64)) : nullptr;
    Local nobody;
    local_size = GK_ROUND_UP(lay_out_local(nullptr, nobody), size_t(64));
    return GK_ROUND_UP(cursor.at, size_t(64)) + local_size * call.threads;
  }

  size_t lay_out_local(char* base, Local& l) const {
    Cursor cursor{base};
    const long at_once = backward ? tile_rows : tile_rows + kRowsAtOnce;
    const long widest = at_least(hidden, call.inputs);
    l.offset = cursor.template take<long>(backward ? chunk + 1 : 0);
    l.from = cursor.template take<const T*>(at_once);
    l.to = cursor.template take<T*>(at_once);
    l.scratch = cursor.template take<T>(backward ? 0 : at_once * gate_row);
    l.operands = cursor.template take<T>(!Product::rounds ? 0 : at_once * P::operand_row(backward ? gates : call.inputs));
    l.mask = cursor.template take<T>(GK_ROUND_UP(unit_row, 4 * kWords));
    const long packing = Product::pairs ? (backward ? gates : widest) * kPanel * L : 0;
    const long summing = Product::rounds && backward ? P::kDepth * (gate_row + GK_ROUND_UP(widest + hidden, L)) : 0;
    l.room = cursor.template take<T>(at_least(packing, summing));
    return cursor.at;
  }

  // Rows of [..][chunk][block].
  T* row(T* section, long place, long step, long rank, long size) const {
    return section + ((place * chunk + step) * block + rank) * size;
  }
  const T* saved_row(int n, long t, const Local& l, long rank) const {
    return static_cast<const T*>(call.saved[n]) + (t * batch + l.base + rank) * lstm_saved_row(hidden);
  }

  // --- rows and threads ----------------------------------------------------------------------------------------------

  long row_of(const Local& l, long rank) const { return call.order[l.base + rank]; }
  long length(const Local& l, long rank) const { return call.length[l.base + rank]; }
  long active(const Local& l, long t) const { return at_least(0, at_most(call.active[t] - l.base, l.rows)); }
  // Ranks tile, tile + tiles, ... below the active ones: every tile has its share of long rows. So have groups: tile is
  // in group tile % groups.
  long rank_of(long tile, long j) const { return tile + j * tiles; }
  static long share(long first, long stride, long ranks) {
    return ranks > first ? (ranks - first + stride - 1) / stride : 0;
  }
  long count(long tile, long ranks) const { return share(tile, tiles, ranks); }
  // The n-th row of a tensor [layers, batch, hidden].
  template <class S>
  S* state_row(S* tensor, int n, const Local& l, long rank) const {
    return tensor ? tensor + (n * batch + row_of(l, rank)) * hidden : nullptr;
  }

  template <class F>
  void each_task(const Local& l, F f) const {
    for (int n = backward ? bottom : 0; n < layers; ++n)
      for (long tile = 0; tile < tiles; ++tile)
        if ((n * tiles + tile) % l.threads == l.thread) f(n, tile);
  }
  void meet(const Local& l) {
    if (!l.alone) barrier.wait(l.threads);
  }

  void run(int thread, int threads) {
    Local l;
    lay_out_local(locals + thread * local_size, l);
    l.thread = thread;
    l.threads = threads;
    l.alone = separable && threads == call.threads;
    prepare(l);
    barrier.wait(threads);
    for (l.base = 0; l.base < batch; l.base += block) {
      l.rows = at_most(block, batch - l.base);
      if (backward)
        backward_block(l);
      else
        forward_block(l);
    }
    if (!backward) return;
    barrier.wait(threads);
    store_weight_gradients(l);
  }

  // Packs weights and clears sums; threads share the work.
  void prepare(const Local& l) {
    int job = 0;
    const auto mine = [&] { return job++ % l.threads == l.thread; };
    for (int n = backward ? bottom : 0; n < layers; ++n) {
      Layer& at = layer[n];
      for (int p = 0; p < at.own.panels(); ++p)
        if (mine()) backward ? pack_back(l, n, p) : pack_gates(l, at.own, p, param(n, 1), hidden);
      if (!backward) {
        for (int p = 0; p < at.in.panels(); ++p)
          if (mine()) pack_gates(l, at.in, p, param(n, 0), at.width);
        if (!mine()) continue;
        __builtin_memset(at.bias, 0, sizeof(T) * gate_row);
        if (!param(n, 2)) continue;
        each_run(0, gates, [&](long j, long original, long count) {
          for (long i = 0; i < count; ++i) at.bias[j + i] = param(n, 2)[original + i] + param(n, 3)[original + i];
        });
        continue;
      }
      const long sums = (at.width + hidden) * gate_row;
      for (long g = 0; g < groups; ++g) {
        // By the thread that will add to them, where one has whole groups.
        if (g % l.threads != l.thread) continue;
        if (at.dw) __builtin_memset(at.dw + g * sums, 0, sizeof(T) * sums);
        if (at.db) __builtin_memset(at.db + g * gate_row, 0, sizeof(T) * gate_row);
      }
    }
  }

  // Weights w [gates, width] for products with rows of width numbers, that give gates.
  void pack_gates(const Local& l, const Packed& to, int p, const T* w, long inner) const {
    const long columns = long(to.width(p)) * L, first = long(to.first(p)) * L, end = at_most(first + columns, gates);
    T* panel = P::panel_floats(to, p, l.room);
    if (end - first < columns) __builtin_memset(panel, 0, sizeof(T) * inner * columns);
    each_run(first, end, [&](long j, long original, long run) {
      transpose(w + original * inner, inner, run, inner, panel + j - first, columns);
    });
    P::finish_panel(to, p, panel, inner);
  }

  // [W_hh W_ih] for products with rows of gates, that give gradients of h_{t-1} and of the input.
  void pack_back(const Local& l, int n, int p) const {
    const Layer& at = layer[n];
    const Packed& to = at.own;
    const long columns = long(to.width(p)) * L, first = long(to.first(p)) * L;
    T* panel = P::panel_floats(to, p, l.room);
    const auto copy = [&](T* row, const T* w, long outputs, long start) {  // columns start .. of the whole
      const long from = at_least(first, start), end = at_most(first + columns, start + outputs);
      if (from < end) __builtin_memcpy(row + from - first, w + from - start, sizeof(T) * (end - from));
    };
    each_run(0, gates, [&](long j, long original, long run) {
      for (long i = 0; i < run; ++i) {
        T* row = panel + (j + i) * columns;
        __builtin_memset(row, 0, sizeof(T) * columns);
        copy(row, param(n, 1) + (original + i) * hidden, hidden, 0);
        if (wants_dx(n)) copy(row, param(n, 0) + (original + i) * at.width, at.width, hidden);
      }
    });
    P::finish_panel(to, p, panel, gates);
  }

  // 1 / (1 - p) where a unit is kept, 0 where it is dropped, from the words of Philox at (unit, row, step, layer).
  void dropout_mask(int n, long t, long original, T* mask) const {
    const bool all = call.dropout >= 1.0;
    const uint32_t threshold = all ? 0 : uint32_t(call.dropout * 4294967296.0);
    const T keep = all ? T(0) : T(1.0 / (1.0 - call.dropout));
    for (long g = 0; 4 * g < hidden; g += kWords) {
      Words c[4];
      for (int i = 0; i < kWords; ++i) {
        c[0][i] = uint32_t(g + i);
        c[1][i] = uint32_t(original);
        c[2][i] = uint32_t(t);
        c[3][i] = uint32_t(n);
      }
      philox(call.seed, c);
      for (int i = 0; i < kWords; ++i)
        for (int w = 0; w < 4; ++w) mask[4 * (g + i) + w] = c[w][i] >= threshold ? keep : T(0);
    }
  }

  // A vector of features at u of n, the lanes past the end zero or untouched.
  static GK_INLINE V<T> load_at(const T* p, long u, long n) {
    return u + L <= n ? load(p + u) : load_first(p + u, n - u);
  }
  static GK_INLINE void store_at(T* p, long u, long n, V<T> v) {
    u + L <= n ? store(p + u, v) : store_first(p + u, v, n - u);
  }

#include "lstm_forward.h"
#include "lstm_backward.h"
#include "lstm_weights.h"
};
