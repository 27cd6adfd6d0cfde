// Matrix products of the LSTM: rows of operands anywhere in memory times packed weights.
//
//   to[i][n] = (start) + sum_l rows[i][l] * w[l][n]          i < rows of a block, n < NV vectors of a panel
//
// Outputs (gates, or units) lie along the vector lanes, so one row fills them as well as many: an LSTM's batch is
// small. Rows are pointers: those that still run, of several steps at once where a step alone has few.

// How operands are stored and multiplied: as they are, or as bfloat16.
template <class T>
struct FullProduct : Plain<T> {
  static constexpr bool rounds = false, pairs = false;
};
#ifdef GK_BF16
struct LowProduct : Pairs {
  static constexpr bool rounds = true, pairs = true;
};
#else
// Without bfloat16 products: operands rounded, multiplied as floats. The same results up to the order of sums.
struct LowProduct : Plain<float> {
  static constexpr bool rounds = true, pairs = false;
};
#endif

// Panels of up to three vectors: three weights and eight rows fill the registers of AVX-512 with 24 sums.
constexpr int kPanel = 3;
constexpr int kBlockRows = GK_ACCUMULATORS / kPanel;

template <class T, class Product>
struct Products {
  static constexpr int L = kLanes<T>;

  // Numbers of type T that an operand of n features takes: two bfloat16 fill one.
  static constexpr long words(long n) { return Product::pairs ? (n + 1) / 2 : n; }
  static constexpr long operand_row(long n) { return GK_ROUND_UP(n, L) / (Product::pairs ? 2 : 1); }

  // One vector of features, at feature `at` of an operand's row.
  static GK_INLINE void store_operand(T* row, long at, V<T> v) {
    if constexpr (!Product::rounds) {
      store(row + at, v);
    } else {
#ifdef GK_BF16
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(reinterpret_cast<uint16_t*>(row) + at),
                          (__m256i)_mm512_cvtneps_pbh(__m512(v)));
#else
      store(row + at, round_bf16(v));
#endif
    }
  }

  // Weights packed for `vectors` vectors of outputs: panel after panel, each [depth][its vectors].
  struct Packed {
    T* w = nullptr;
    long depth = 0;
    int vectors = 0;
    Packed() = default;
    Packed(long width, long outputs) : depth(words(width)), vectors(int((outputs + L - 1) / L)) {}
    long size() const { return depth * vectors * L; }
    int panels() const { return (vectors + kPanel - 1) / kPanel; }
    int first(int p) const {  // vector; panels differ by at most one
      const int base = vectors / panels(), longer = vectors % panels();
      return p * base + (p < longer ? p : longer);
    }
    int width(int p) const { return first(p + 1) - first(p); }
    T* panel(int p) const { return w + depth * first(p) * L; }
  };

  // Packs panel p of weights: w [outputs][width] (turned), or w [width][outputs] (as it lies). `room` holds
  // width × kPanel vectors.
  static void pack_panel(const Packed& to, int p, const T* w, long width, long outputs, bool turned, T* room) {
    const long ld = long(to.width(p)) * L, at = long(to.first(p)) * L;
    const long columns = outputs - at < ld ? outputs - at : ld;
    T* panel = Product::pairs ? room : to.panel(p);
    if (columns < ld) __builtin_memset(panel, 0, sizeof(T) * width * ld);
    if (turned) {
      transpose(w + at * width, width, columns, width, panel, ld);
    } else {
      for (long l = 0; l < width; ++l) __builtin_memcpy(panel + l * ld, w + l * outputs + at, sizeof(T) * columns);
    }
    if constexpr (Product::pairs) pair_rows(panel, ld, width, int(ld), to.panel(p), ld);
    if constexpr (Product::rounds && !Product::pairs) round_bf16(panel, width * ld, panel);
  }

  using Rows = const T* const*;
  using To = T* const*;

  template <int MR, int NV>
  static __attribute__((noinline)) void kernel(Rows rows, long depth, const T* w, To to, long at, int init,
                                               const T* bias) {
    V<T> acc[MR][NV];
    const T* a[MR];
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) {
      a[i] = rows[i];
#pragma GCC unroll 3
      for (int v = 0; v < NV; ++v) acc[i][v] = init == kBias ? load(bias + at + v * L) : V<T>{};
    }
    for (long l = 0; l < depth; ++l) {
      V<T> wv[NV];
#pragma GCC unroll 3
      for (int v = 0; v < NV; ++v) wv[v] = load(w + v * L);
#pragma GCC unroll 8
      for (int i = 0; i < MR; ++i)
#pragma GCC unroll 3
        for (int v = 0; v < NV; ++v) acc[i][v] = Product::multiply_add(acc[i][v], wv[v], a[i][l]);
      w += NV * L;
    }
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 3
      for (int v = 0; v < NV; ++v) {
        T* y = to[i] + at + v * L;
        store(y, init == kAdd ? V<T>(acc[i][v] + load(y)) : acc[i][v]);
      }
  }

  using Kernel = void (*)(Rows, long, const T*, To, long, int, const T*);
  template <int NV, int... I>
  static GK_INLINE Kernel pick(int rows, std::integer_sequence<int, I...>) {
    static constexpr Kernel table[] = {kernel<I + 1, NV>...};
    return table[rows - 1];
  }

  template <int NV>
  static void run_panel(const Packed& weights, int p, Rows rows, long n, To to, int init, const T* bias) {
    const long blocks = (n + kBlockRows - 1) / kBlockRows, base = n / blocks, longer = n % blocks;
    for (long b = 0, start = 0; b < blocks; ++b) {
      const long block = base + (b < longer);
      pick<NV>(int(block), std::make_integer_sequence<int, kBlockRows>{})(
          rows + start, weights.depth, weights.panel(p), to + start, long(weights.first(p)) * L, init, bias);
      start += block;
    }
  }

  // to[i] = start + rows[i] · weights for n rows. Start: nothing, the bias (as wide as the packed outputs), or what is
  // there. Writes whole vectors of outputs.
  static void multiply(const Packed& weights, Rows rows, long n, To to, int init, const T* bias) {
    if (n == 0) return;
    for (int p = 0; p < weights.panels(); ++p) {
      const int width = weights.width(p);
      if (width == 3) run_panel<3>(weights, p, rows, n, to, init, bias);
      if (width == 2) run_panel<2>(weights, p, rows, n, to, init, bias);
      if (width == 1) run_panel<1>(weights, p, rows, n, to, init, bias);
    }
  }

  // dw[j][k] += sum over l of g[l][j] x[l][k]: the gradient of weights from up to kDepth rows of gate gradients and
  // operands, for `gates` gates. x and dw are read and written in whole vectors of k. `room` holds kDepth × (gates and
  // vectors of k).
  static constexpr long kDepth = 128;  // a panel of x for so many rows stays in the first-level cache
  static void accumulate(const T* g, long ldg, int gates, const T* x, long ldx, int vectors, long depth, T* dw,
                         long lddw, T* room) {
    if constexpr (Product::rounds) {
      const long to_ldg = GK_ROUND_UP(gates, L), to_ldx = long(vectors) * L;
      T *to_g = room, *to_x = room + kDepth * to_ldg;
      if constexpr (Product::pairs) {
        pair_rows(g, ldg, depth, int(to_ldg), to_g, to_ldg);
        pair_rows(x, ldx, depth, int(to_ldx), to_x, to_ldx);
        depth = (depth + 1) / 2;
      } else {
        for (long l = 0; l < depth; ++l) {
          round_bf16(g + l * ldg, gates, to_g + l * to_ldg);
          round_bf16(x + l * ldx, to_ldx, to_x + l * to_ldx);
        }
      }
      g = to_g, ldg = to_ldg;
      x = to_x, ldx = to_ldx;
    }
    for (int v = 0; v < vectors;) {
      const int left = vectors - v, width = left > 4 || left == 3 ? 3 : left > 1 ? 2 : 1;
      if (width == 3) Gemm<T, Product, 3>::run(g, ldg, false, gates, depth, x, ldx, dw, lddw, kAdd, nullptr);
      if (width == 2) Gemm<T, Product, 2>::run(g, ldg, false, gates, depth, x, ldx, dw, lddw, kAdd, nullptr);
      if (width == 1) Gemm<T, Product, 1>::run(g, ldg, false, gates, depth, x, ldx, dw, lddw, kAdd, nullptr);
      x += width * L;
      dw += width * L;
      v += width;
    }
  }
};
