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

  // Where panel p is to be written in floats, row after row of as many as its vectors have; then what makes it operands,
  // if they are others. `room` holds depth × kPanel vectors.
  static T* panel_floats(const Packed& to, int p, T* room) { return Product::pairs ? room : to.panel(p); }
  static void finish_panel(const Packed& to, int p, T* panel, long width) {
    const long ld = long(to.width(p)) * L;
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

  // dw[k][j] += sum over l of x[l][k] g[l][j]: the gradient of weights, turned, from up to kDepth rows of operands and
  // gate gradients. Gates lie along the lanes, which they fill at any multiple of four units. g and dw are read and
  // written in whole vectors of j. `room` holds kDepth × (whole vectors of k and of j).
  static constexpr long kDepth = 128;  // a panel of g for so many rows stays in the first-level cache
  static void accumulate(const T* x, long ldx, long width, const T* g, long ldg, int vectors, long depth, T* dw,
                         long lddw, T* room) {
    if constexpr (Product::rounds) {
      const long to_ldx = GK_ROUND_UP(width, L), to_ldg = long(vectors) * L;
      T *to_x = room, *to_g = room + kDepth * to_ldx;
      if constexpr (Product::pairs) {
        pair_rows(x, ldx, depth, int(to_ldx), to_x, to_ldx);
        pair_rows(g, ldg, depth, int(to_ldg), to_g, to_ldg);
        depth = (depth + 1) / 2;
      } else {
        for (long l = 0; l < depth; ++l) {
          round_bf16(x + l * ldx, width, to_x + l * to_ldx);
          round_bf16(g + l * ldg, to_ldg, to_g + l * to_ldg);
        }
      }
      x = to_x, ldx = to_ldx;
      g = to_g, ldg = to_ldg;
    }
    for (int v = 0; v < vectors;) {
      const int left = vectors - v, panel = left > 4 || left == 3 ? 3 : left > 1 ? 2 : 1;
      if (panel == 3) Gemm<T, Product, 3>::run(x, ldx, false, int(width), depth, g, ldg, dw, lddw, kAdd, nullptr);
      if (panel == 2) Gemm<T, Product, 2>::run(x, ldx, false, int(width), depth, g, ldg, dw, lddw, kAdd, nullptr);
      if (panel == 1) Gemm<T, Product, 1>::run(x, ldx, false, int(width), depth, g, ldg, dw, lddw, kAdd, nullptr);
      g += panel * L;
      dw += panel * L;
      v += panel;
    }
  }
};
