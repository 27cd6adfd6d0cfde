// The executor: the noise-fused start, K times (denoiser, DDIM update), and the way back.
//
// Row-wise programs: a thread takes its tiles one after the other through all steps and layers while they stay in cache.
// Programs with training-mode BatchNorm: all tiles go through a layer range together, and meet at each BatchNorm.
// Both are the same loops over (tile, range of operations); only their order differs.
//
// Sums over rows are formed tile by tile in a fixed order and per group of tiles, and both depend on the number of rows
// alone: results are the same for every thread count.

template <class T, int NV>
struct Engine {
  static constexpr int L = kLanes<T>, R = NV * L;
  using Product = Plain<T>;
  using Tile = BatchNormTile<T, NV>;

  const Call& call;
  const Plan& plan;
  const Tiling t;
  const long rows;       // samples × batch
  const bool coupled;    // BatchNorm in training mode: tiles need each other
  const bool backward;
  Barrier barrier;

  // What a thread holds.
  struct Local {
    int thread, threads;
    T *operand, *transposed, *gradient, *noise, *start;  // one tile each
    T *mean, *scale, *offset, *slope;                    // one number per feature, padded
    T *batch_mean, *batch_scale;                         // the same, of the training-mode BatchNorm at hand
    T* mask;                                             // [R] 1 for valid rows of the tile at hand, else 0
    int parity;                                          // which half of `partial` the next BatchNorm uses
  };

  // Sections of the workspace.
  T* memory = nullptr;
  T** packed;        // per parameter: weights in the order of the forward product
  const T** plain;   // per parameter: weights for the backward product
  T* slots;          // [slot]: kept values (unless saved), scratch, outer, and the same of gradients
  long slot_size, at_scratch, at_outer, at_gradient[3];
  T* partial;        // [2][tiles][2][padded]: BatchNorm sums per tile
  T* locals;
  long local_size;
  T* groups;         // [group]: sums of parameter gradients and of table gradients
  long group_size;
  long* at_param;    // within a group, -1: not wanted
  long* at_table;
  double* loss;      // [tiles]
  int padded;        // widest, rounded up to whole vectors

  Engine(const Call& c, bool with_backward)
      : call(c),
        plan(*c.plan),
        t(tiling(GK_VECTOR_BYTES, sizeof(T), c.samples * c.batch, c.plan->widest)),
        rows(c.samples * c.batch),
        coupled(!c.plan->batch_norms.empty()),
        backward(with_backward) {}

  // --- memory ----------------------------------------------------------------------------------------------------

  // Hands out sections of the workspace; a first pass with null memory counts the bytes.
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

  bool wants_param(int p) const { return backward && call.wanted->params[p]; }
  bool tables_per_row() const { return call.prior; }
  bool saves_values() const { return keeps_values(call.save) && !call.prior; }
  int max_threads() const { return call.threads < t.groups ? call.threads : int(t.groups); }

  size_t lay_out(char* base) {
    Cursor cursor{base};
    const int n_params = int(plan.params.size());
    padded = GK_ROUND_UP(plan.widest, L);
    packed = cursor.template take<T*>(n_params);
    plain = cursor.template take<const T*>(n_params);
    at_param = cursor.template take<long>(n_params);
    at_table = cursor.template take<long>(plan.n_tables);
    const bool runs_forward = !backward || !saves_values();
    for (int p = 0; p < n_params; ++p) {
      const Param& param = plan.params[p];
      T* forward_copy = param.matrix && runs_forward ? cursor.template take<T>(param.size() + param.rows) : nullptr;
      T* backward_copy = param.matrix && backward && call.bf16 ? cursor.template take<T>(param.size() + param.cols) : nullptr;
      if (!base) continue;
      packed[p] = forward_copy;
      plain[p] = backward_copy ? backward_copy : static_cast<const T*>(call.params[p]);
    }
    // slots
    const Layout& layout = *call.layout;
    at_scratch = saves_values() ? 0 : long(layout.rows[kKept]) * R;
    at_outer = at_scratch + long(layout.rows[kScratch]) * R;
    long end = at_outer + long(layout.rows[kOuter]) * R;
    for (int area = 0; area < 3; ++area) {
      at_gradient[area] = end;
      if (backward) end += long(call.gradient_layout->rows[area]) * R;
    }
    slot_size = GK_ROUND_UP(end, 16L);
    slots = cursor.template take<T>(slot_size * (coupled ? t.tiles : max_threads()));
    partial = cursor.template take<T>(coupled ? 4 * t.tiles * padded : 0);
    // threads
    const long tile = GK_ROUND_UP(long(padded) * R, 16L);
    local_size = 3 * tile + 2 * GK_ROUND_UP(long(plan.features) * R, 16L) + 6L * padded + 64;
    locals = cursor.template take<T>(local_size * max_threads());
    // groups
    long size = 0;
    for (int p = 0; p < n_params; ++p) {
      const Param& param = plan.params[p];
      if (base) at_param[p] = wants_param(p) ? size : -1;
      if (wants_param(p)) size += param.matrix ? long(param.rows) * GK_ROUND_UP(param.cols, L) : long(param.rows) * L;
    }
    for (int i = 0; i < plan.n_tables; ++i) {
      const bool wanted = backward && !tables_per_row() && call.wanted->tables[i];
      if (base) at_table[i] = wanted ? size : -1;
      if (wanted) size += call.steps * plan.width[1 + plan.n_rows + i];
    }
    group_size = GK_ROUND_UP(size, 16L);
    groups = cursor.template take<T>(group_size * t.groups);
    loss = cursor.template take<double>(call.prior ? t.tiles : 0);
    cursor.template take<T>(L * R);  // whole blocks of features are read past the last value of the last section
    return cursor.at;
  }

  Local local(int thread, int threads) {
    Local l;
    T* at = locals + thread * local_size;
    const long tile = GK_ROUND_UP(long(padded) * R, 16L), state = GK_ROUND_UP(long(plan.features) * R, 16L);
    l.thread = thread;
    l.threads = threads;
    l.operand = at;
    l.transposed = (at += tile);
    l.gradient = (at += tile);
    l.noise = (at += tile);
    l.start = (at += state);
    l.mean = (at += state);
    l.scale = (at += padded);
    l.offset = (at += padded);
    l.slope = (at += padded);
    l.batch_mean = (at += padded);
    l.batch_scale = (at += padded);
    l.mask = (at += padded);
    l.parity = 0;
    __builtin_memset(l.transposed, 0, tile * sizeof(T));
    return l;
  }

  T* slot(const Local& l, long tile) const { return slots + slot_size * (coupled ? tile : l.thread); }
  T* saved_state(long k, long tile) const {
    return static_cast<T*>(call.saved) + (k * t.tiles + tile) * plan.features * R;
  }
  // A value, or its gradient, of the tile at hand.
  struct View {
    T* area[3];
    const Layout* layout;
    GK_INLINE T* operator[](int value) const {
      return area[layout->place.data()[value]] + long(layout->at.data()[value]) * R;
    }
    GK_INLINE T* norm(int op) const { return area[kKept] + long(layout->norm.data()[op]) * R; }
  };
  View values(const Local& l, long tile, long k) const {
    T* own = slot(l, tile);
    T* kept = saves_values() ? static_cast<T*>(call.saved) + (k * t.tiles + tile) * call.layout->rows[kKept] * R : own;
    return {{kept, own + at_scratch, own + at_outer}, call.layout};
  }
  View gradients(const Local& l, long tile) const {
    T* own = slot(l, tile);
    return {{own + at_gradient[0], own + at_gradient[1], own + at_gradient[2]}, call.gradient_layout};
  }

  int valid(long tile) const { return tile == t.tiles - 1 ? int(rows - tile * R) : R; }
  long group_begin(long g) const { return g * t.tiles / t.groups; }
  long first_group(const Local& l, int thread) const { return thread * t.groups / l.threads; }
  const T* param(int p) const { return p < 0 ? nullptr : static_cast<const T*>(call.params[p]); }

  template <class F>
  void each_tile(const Local& l, F f) const {
    for (long g = first_group(l, l.thread); g < first_group(l, l.thread + 1); ++g)
      for (long tile = group_begin(g); tile < group_begin(g + 1); ++tile) f(tile, g);
  }

  void set_mask(Local& l, long tile) const {
    const int n = valid(tile);
    for (int i = 0; i < R; ++i) l.mask[i] = i < n ? T(1) : T(0);
  }

  // --- tiles in and out ------------------------------------------------------------------------------------------

  // out[width][R] from a tensor [batch, width] that all samples share; padding rows are zero.
  void load_shared(const void* tensor, int width, long tile, T* out) const {
    const int n = valid(tile);
    if (n < R) __builtin_memset(out, 0, sizeof(T) * width * R);
    for (long at = 0; at < n;) {
      const long row = (tile * R + at) % call.batch;
      const long run = call.batch - row < n - at ? call.batch - row : n - at;
      transpose(static_cast<const T*>(tensor) + row * width, width, run, width, out + at, R);
      at += run;
    }
  }
  // The same from a tensor [rows, width].
  void load_rows(const void* tensor, int width, long tile, T* out) const {
    const int n = valid(tile);
    if (n < R) __builtin_memset(out, 0, sizeof(T) * width * R);
    transpose(static_cast<const T*>(tensor) + tile * R * width, width, n, width, out, R);
  }
  void store_rows(const T* in, int width, long tile, void* tensor) const {
    transpose(in, R, width, valid(tile), static_cast<T*>(tensor) + tile * R * width, width);
  }

  void draw(long tile, uint32_t step, T* out) const {
    const int n = valid(tile);
    if (n < R) __builtin_memset(out, 0, sizeof(T) * plan.features * R);
    for (long at = 0; at < n;) {
      const long row = tile * R + at, sample = row / call.batch, first = row % call.batch;
      const long run = call.batch - first < n - at ? call.batch - first : n - at;
      philox_normals<T>(call.seed, first, int(run), plan.features, step, uint32_t(sample), out + at, R);
      at += run;
    }
  }
  void start_noise(long tile, T* out) const {
    if (call.noise)
      load_rows(call.noise, plan.features, tile, out);
    else
      draw(tile, 0, out);
  }

  // alpha of every element of a tile, [features][R].
  void load_alpha(long tile, T* out) const {
    const T* alpha = static_cast<const T*>(call.alpha);
    const int n = valid(tile);
    for (int i = 0; i < R; ++i) {
      const long row = i < n ? (tile * R + i) % call.batch : 0;
      if (call.alpha_col == 0) {
        out[i] = alpha[row * call.alpha_row];
      } else {
        for (int c = 0; c < plan.features; ++c) out[long(c) * R + i] = alpha[row * call.alpha_row + c * call.alpha_col];
      }
    }
    if (call.alpha_col == 0)
      for (int c = 1; c < plan.features; ++c) __builtin_memcpy(out + long(c) * R, out, sizeof(T) * R);
  }

  // z = alpha z_short + (1 − alpha) eps; in prior_loss z_t = signal z_long + sigma eps.
  void start(Local& l, long tile, T* z) const {
    const long n = long(plan.features) * R;
    load_shared(call.z, plan.features, tile, z);
    if (call.prior) {
      start_noise(tile, l.noise);
      for (int i = 0; i < R; ++i) l.operand[i] = l.operand[R + i] = T(0);
      for (int i = 0; i < valid(tile); ++i) {
        l.operand[i] = static_cast<const T*>(call.signal)[tile * R + i];
        l.operand[R + i] = static_cast<const T*>(call.sigma)[tile * R + i];
      }
      for (long i = 0; i < n; i += L) {
        const V<T> signal = load(l.operand + i % R), sigma = load(l.operand + R + i % R);
        store(z + i, V<T>(signal * load(z + i) + sigma * load(l.noise + i)));
      }
    } else if (call.alpha) {
      start_noise(tile, l.noise);
      load_alpha(tile, l.start);
      for (long i = 0; i < n; i += L) {
        const V<T> alpha = load(l.start + i);
        store(z + i, V<T>(alpha * load(z + i) + (T(1) - alpha) * load(l.noise + i)));
      }
    }
  }

  void load_outer(const Local& l, long tile) const {
    const View value = values(l, tile, 0);
    for (int i = 0; i < plan.n_rows; ++i) load_shared(call.rows[i], plan.width[1 + i], tile, value[1 + i]);
    if (!tables_per_row()) return;
    for (int i = 0; i < plan.n_tables; ++i) {
      const int id = 1 + plan.n_rows + i;
      load_rows(call.tables[i], plan.width[id], tile, value[id]);
    }
  }
  void load_tables(const Local& l, long tile, long k) const {
    if (tables_per_row()) return;
    const View value = values(l, tile, k);
    for (int i = 0; i < plan.n_tables; ++i) {
      const int id = 1 + plan.n_rows + i, width = plan.width[id];
      const T* row = static_cast<const T*>(call.tables[i]) + k * width;
      T* out = value[id];
      for (int c = 0; c < width; ++c)
        for (int v = 0; v < NV; ++v) store(out + c * R + v * L, splat<T>(row[c]));
    }
  }

#include "engine_products.h"
#include "engine_forward.h"
#include "engine_backward.h"
};
