// The executor of an LSTM (Hochreiter and Schmidhuber, 1997; gates as in torch.nn.LSTM):
//
//   (i, f, g, o) = (σ, σ, tanh, σ)(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)
//   c_t = f c_{t-1} + i g,   h_t = o tanh(c_t)
//
// Time is cut into chunks. On the diagonal d of (layer, chunk), layer n works on chunk d - n: the tasks of a diagonal
// depend on earlier diagonals only, so threads meet once per diagonal. A task is a layer, a chunk and a tile of rows;
// rows are split over threads where the batch is large, layers where it is small.
//
// A row's numbers do not depend on the rows beside it, and weight gradients are split by gates, each summed over all
// rows in an order that depends on sizes alone: results are the same for every thread count.

template <class T, class Product>
struct Lstm {
  static constexpr int L = kLanes<T>;
  using P = Products<T, Product>;
  using Packed = typename P::Packed;

  // Rows of a product at least, where several steps may go into one: weights are then read once for all of them.
  static constexpr long kRowsAtOnce = 32;
  static constexpr long kBlock = 512;     // rows that go through all steps together: bounds the memory of a call
  static constexpr long kChunkRows = 256; // rows × steps of a chunk: what a chunk leaves for its successors stays cached
  static constexpr long kTileRows = 64;
  static constexpr int kRing = 3;         // diagonals over which backward's chunks stay: see backward_thread

  const LstmCall& call;
  const bool backward;
  const long batch, steps, hidden, layers;
  const long block;    // rows at most in a block
  const long chunk;    // steps of a chunk
  const long chunks, tiles, tile_rows;
  const long gates, gate_row, unit_row;  // 4 hidden; rows of gates and of units in whole vectors
  int bottom;          // backward: the lowest layer that has work
  Barrier barrier;

  // What a thread holds.
  struct Local {
    int thread, threads;
    long base, rows;      // the block at hand: its first rank, and its ranks
    const T** from;       // rows of a product
    T** to;
    T *scratch, *operands, *mask, *room;
  };

  struct Layer {
    long width;           // of its input
    Packed in, own;       // W_ih, W_hh
    T *bias, *c;          // forward: sum of both biases; the cells' state [block]
    T* h;                 // forward: state [block] as operand; backward: h0
    T* handed;            // forward: operands for the layer above, [2][chunk][block]
    T *dgates, *values;   // backward: [kRing][chunk][block] gradients of gates; h_t
    T* masked;            // h_t with dropout, where that is another
    T* dx;                // [2][chunk][block] gradient of the input
    T *dh, *dc;           // [block] gradients handed to the step before
    T *dw_in, *dw_own, *db;
    unsigned char* nonzero;  // [kRing][chunk][tiles]: a gate of that step and tile has a gradient
  };
  Layer* layer = nullptr;
  T* inputs = nullptr;    // backward: [kRing][chunk][block] of x
  char* locals = nullptr;
  size_t local_size = 0;

  static long at_most(long a, long b) { return a < b ? a : b; }
  static long at_least(long a, long b) { return a > b ? a : b; }
  static long parts(long n, long size) { return (n + size - 1) / size; }

  static long block_rows(long batch) { return parts(batch, parts(batch, kBlock)); }
  // Long chunks for few rows, but enough of them that layers overlap. From sizes alone: sums are formed chunk by chunk.
  static long chunk_steps(long rows, long steps) {
    return at_least(1, at_most(parts(kChunkRows, rows), parts(steps, 8)));
  }
  static long tile_count(long rows, long threads) {
    const long least = parts(rows, kTileRows);
    if (least >= threads) return at_most(parts(least, threads) * threads, rows);
    return at_least(least, at_most(threads, parts(rows, 4)));
  }

  Lstm(const LstmCall& c, bool with_backward)
      : call(c),
        backward(with_backward),
        batch(c.batch),
        steps(c.steps),
        hidden(c.hidden),
        layers(c.layers),
        block(block_rows(c.batch)),
        chunk(chunk_steps(block, c.steps)),
        chunks(parts(c.steps, chunk)),
        tiles(tile_count(block, c.threads)),
        tile_rows(parts(block, tiles)),
        gates(4 * c.hidden),
        gate_row(GK_ROUND_UP(gates, L)),
        unit_row(GK_ROUND_UP(c.hidden, L)) {
    bottom = int(layers) - 1;
    if (backward)
      for (int n = int(layers) - 1; n >= 0; --n)
        if (wants_weights(n) || (n == 0 && call.grad_x) || call.grad_h0 || call.grad_c0) bottom = n;
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
      const long in_row = GK_ROUND_UP(at.width, L);
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
      // The layer below the bottom has no gradients of its own, but its outputs are an operand.
      if (n >= bottom - 1) {
        at.values = cursor.template take<T>(kRing * rows * unit_row);
        at.masked = drops(n) ? cursor.template take<T>(kRing * rows * unit_row) : at.values;
      }
      if (n < bottom) continue;
      at.own = Packed(gates, hidden);
      at.own.w = cursor.template take<T>(at.own.size());
      if (wants_dx(n)) {
        at.in = Packed(gates, at.width);
        at.in.w = cursor.template take<T>(at.in.size());
        at.dx = cursor.template take<T>(2 * rows * in_row);
      }
      at.dgates = cursor.template take<T>(kRing * rows * gate_row);
      at.dh = cursor.template take<T>(block * unit_row);
      at.h = cursor.template take<T>(call.h0 ? block * unit_row : 0);
      at.dc = cursor.template take<T>(block * unit_row);
      at.nonzero = cursor.template take<unsigned char>(kRing * chunk * tiles);
      if (wants(n, 0)) at.dw_in = cursor.template take<T>(gates * in_row);
      if (wants(n, 1)) at.dw_own = cursor.template take<T>(gates * unit_row);
      if (wants(n, 2) || wants(n, 3)) at.db = cursor.template take<T>(gate_row);
    }
    if (backward && bottom == 0) inputs = cursor.template take<T>(kRing * rows * GK_ROUND_UP(call.inputs, L));
    locals = base ? base + GK_ROUND_UP(cursor.at, size_t(64)) : nullptr;
    Local nobody;
    local_size = GK_ROUND_UP(lay_out_local(nullptr, nobody), size_t(64));
    return GK_ROUND_UP(cursor.at, size_t(64)) + local_size * call.threads;
  }

  size_t lay_out_local(char* base, Local& l) const {
    Cursor cursor{base};
    const long at_once = backward ? tile_rows * chunk : tile_rows + kRowsAtOnce;
    const long widest = at_least(hidden, call.inputs);
    l.from = cursor.template take<const T*>(at_once);
    l.to = cursor.template take<T*>(at_once);
    l.scratch = cursor.template take<T>(backward ? 0 : at_once * gate_row);
    l.operands = cursor.template take<T>(!Product::rounds ? 0 : at_once * P::operand_row(backward ? gates : call.inputs));
    l.mask = cursor.template take<T>(GK_ROUND_UP(unit_row, 4 * kWords));
    const long depth = backward ? gates : widest;
    const long packing = Product::pairs ? depth * kPanel * L : 0;
    const long summing = Product::rounds && backward ? P::kDepth * (gate_row + GK_ROUND_UP(widest, L)) : 0;
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
  // Ranks tile, tile + tiles, ... below the active ones: every tile has its share of long rows.
  long rank_of(long tile, long j) const { return tile + j * tiles; }
  long count(long tile, long ranks) const { return ranks > tile ? (ranks - tile + tiles - 1) / tiles : 0; }
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

  void run(int thread, int threads) {
    Local l;
    lay_out_local(locals + thread * local_size, l);
    l.thread = thread;
    l.threads = threads;
    prepare(l);
    barrier.wait(threads);
    for (l.base = 0; l.base < batch; l.base += block) {
      l.rows = at_most(block, batch - l.base);
      if (backward)
        backward_block(l);
      else
        forward_block(l);
    }
    if (backward) store_weight_gradients(l);
  }

  // Packs weights and clears sums; threads share the work.
  void prepare(const Local& l) {
    int job = 0;
    for (int n = backward ? bottom : 0; n < layers; ++n) {
      Layer& at = layer[n];
      const long outputs = backward ? at.width : gates, own_outputs = backward ? hidden : gates;
      for (int p = 0; at.in.w && p < at.in.panels(); ++p)
        if (job++ % l.threads == l.thread)
          P::pack_panel(at.in, p, param(n, 0), backward ? gates : at.width, outputs, !backward, l.room);
      for (int p = 0; p < at.own.panels(); ++p)
        if (job++ % l.threads == l.thread)
          P::pack_panel(at.own, p, param(n, 1), backward ? gates : hidden, own_outputs, !backward, l.room);
      if (!backward && job++ % l.threads == l.thread) {
        __builtin_memset(at.bias, 0, sizeof(T) * gate_row);
        for (long j = 0; param(n, 2) && j < gates; ++j) at.bias[j] = param(n, 2)[j] + param(n, 3)[j];
      }
      if (!backward) continue;
      const Slice s = slice(l);
      const long in_row = GK_ROUND_UP(at.width, L);
      if (at.dw_in) __builtin_memset(at.dw_in + s.first * in_row, 0, sizeof(T) * s.gates * in_row);
      if (at.dw_own) __builtin_memset(at.dw_own + s.first * unit_row, 0, sizeof(T) * s.gates * unit_row);
      if (at.db) __builtin_memset(at.db + s.first, 0, sizeof(T) * s.gates);
    }
  }

  // A thread's share of the gates, in cache lines.
  struct Slice {
    long first;
    int gates;
  };
  Slice slice(const Local& l) const {
    const long lines = parts(gates, 16);
    const long first = at_most(gates, lines * l.thread / l.threads * 16);
    return {first, int(at_most(gates, lines * (l.thread + 1) / l.threads * 16) - first)};
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
};
