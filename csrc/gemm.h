// The one matrix-product kernel, and the three products of a linear layer made of it.
//
//   y[i][n] (+)= sum_l coef[l * sl + i] * x[l][n]          i < MR rows, n < NV vectors
//
// Activations are kept feature-major: a tile is [width][R] with R batch rows along the vector lanes. So a linear layer
// y = W x takes scalars from W and vectors from x, no width is ever padded, and norms and activations are plain loops.
// MR · NV accumulators stay in registers; each x vector serves MR of them and each coefficient NV.

// How a product is formed: plain floats, or pairs of bfloat16 in 32-bit words, summed in float.
template <class T>
struct Plain {
  static GK_INLINE V<T> multiply_add(V<T> acc, V<T> x, T coef) { return acc + x * coef; }
};

#ifdef GK_BF16
struct Pairs {
  static GK_INLINE V<float> multiply_add(V<float> acc, V<float> x, float coef) {
    return V<float>(_mm512_dpbf16_ps(__m512(acc), (__m512bh)(x), (__m512bh)_mm512_set1_ps(coef)));
  }
};
#endif

enum Init : int { kZero, kBias, kAdd };

template <class T, class Product, int MR, int NV>
__attribute__((noinline)) void gemm_kernel(const T* coef, long sl, long depth, const T* x, long ldx, T* y, long ldy,
                                           int init, const T* bias) {
  constexpr int L = kLanes<T>;
  V<T> acc[MR][NV];
#pragma GCC unroll 32
  for (int i = 0; i < MR; ++i) {
    const V<T> start = init == kBias ? splat<T>(bias[i]) : V<T>{};
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) acc[i][v] = start;
  }
  if (init == kAdd) {
#pragma GCC unroll 32
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) __builtin_prefetch(y + i * ldy + v * L, 1);
  }
  for (long l = 0; l < depth; ++l) {
    V<T> xv[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) xv[v] = load(x + v * L);
#pragma GCC unroll 32
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) acc[i][v] = Product::multiply_add(acc[i][v], xv[v], coef[i]);
    coef += sl;
    x += ldx;
  }
  // What is there already joins at the end: many small terms added to a large one would each be rounded against it.
  if (init == kAdd) {
#pragma GCC unroll 32
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) acc[i][v] += load(y + i * ldy + v * L);
  }
#pragma GCC unroll 32
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) store(y + i * ldy + v * L, acc[i][v]);
}

// Rows per kernel call: as many accumulators as the register file holds beside x and the coefficient.
template <int NV>
constexpr int kMaxRows = GK_ACCUMULATORS / NV;

// The rows of a product, in blocks that differ by at most one row, so that none is left with too few accumulators to
// hide the latency of the multiply-add.
template <int NV>
struct RowBlocks {
  int count, base, longer;
  explicit RowBlocks(int m) : count((m + kMaxRows<NV> - 1) / kMaxRows<NV>), base(m / count), longer(m % count) {}
  int rows(int b) const { return base + (b < longer); }
  int start(int b) const { return b * base + (b < longer ? b : longer); }
};

template <class T, class Product, int NV>
struct Gemm {
  using Kernel = void (*)(const T*, long, long, const T*, long, T*, long, int, const T*);

  template <int... I>
  static GK_INLINE Kernel pick(int rows, std::integer_sequence<int, I...>) {
    static constexpr Kernel table[] = {gemm_kernel<T, Product, I + 1, NV>...};
    return table[rows - 1];
  }
  static GK_INLINE Kernel kernel(int rows) { return pick(rows, std::make_integer_sequence<int, kMaxRows<NV>>{}); }

  // All of y [m][NV vectors]. packed: block b starts at coef + start · depth with sl = its rows; else unit stride.
  static void run(const T* coef, long sl, bool packed, int m, long depth, const T* x, long ldx, T* y, long ldy,
                  int init, const T* bias) {
    const RowBlocks<NV> blocks(m);
    for (int b = 0; b < blocks.count; ++b) {
      const int start = blocks.start(b), rows = blocks.rows(b);
      const T* c = packed ? coef + start * depth : coef + start;
      kernel(rows)(c, packed ? rows : sl, depth, x, ldx, y + start * ldy, ldy, init, bias ? bias + start : nullptr);
    }
  }
};

// packed[l][i] = element l of row i, for the rows of one block: its coefficients in the order in which they are used.
// part(i, l, n) is n elements of row i from the l-th on, n lanes at most. Whole vectors are stored in the order of l,
// each covered by the next where it is longer than the block has rows; none beyond the block.
template <class T, class Part>
void pack_block(Part part, int rows, long depth, T* packed) {
  constexpr int L = kLanes<T>;
  const T* const end = packed + rows * depth;
  for (long l = 0; l < depth; l += L) {
    const long n = depth - l < L ? depth - l : L;
    for (int first = 0; first < rows; first += L) {
      const int here = rows - first < L ? rows - first : L;
      V<T> v[L];
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) v[i] = part(first + (i < here ? i : here - 1), l, n);
      transpose_registers<T>(v);
      T* to = packed + l * rows + first;
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i, to += rows) {
        if (i >= n) continue;
        if (here == L || (rows <= L && to + L <= end))
          store(to, v[i]);
        else
          store_first(to, v[i], here);
      }
    }
  }
}

// n elements from p on, n lanes at most; the other lanes are zero.
template <class T>
GK_INLINE V<T> load_up_to(const T* p, long n) {
  return n == kLanes<T> ? load(p) : load_first(p, n);
}

#define GK_ROUND_UP(n, to) (((n) + (to) - 1) / (to) * (to))

// --- bfloat16 ------------------------------------------------------------------------------------------------------

// Round to bfloat16, to nearest even, kept as float.
GK_INLINE V<float> round_bf16(V<float> x) {
  using I = Simd<float>::I;
  const I bits = (I)(x);
  I rounded = (bits + 0x7fff + ((bits >> 16) & 1)) & int32_t(0xffff0000);
  rounded = x == x ? rounded : bits;  // NaN stays NaN
  return (V<float>)(rounded);
}

inline void round_bf16(const float* x, long n, float* out) {
  constexpr int L = kLanes<float>;
  long i = 0;
  for (; i + L <= n; i += L) store(out + i, round_bf16(load(x + i)));
  for (; i < n; ++i) {
    const V<float> one = round_bf16(splat<float>(x[i]));
    out[i] = one[0];
  }
}

#ifdef GK_BF16
// (bf16 low, bf16 high) in 32-bit words, the first in the low half. The instruction rounds to nearest even and takes
// subnormals for zero, as the products do.
GK_INLINE V<float> pair_up(V<float> low, V<float> high) {
  alignas(64) static constexpr uint16_t kInterleave[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                           8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(__m512(high), __m512(low));
  return V<float>((__m512)_mm512_permutexvar_epi16(_mm512_load_si512(kInterleave), both));
}

// words[l/2][n] = (bf16 x[l][n], bf16 x[l + 1][n])
inline void pair_rows(const float* x, long ld, long depth, int n, float* words, long ld_words) {
  for (long l = 0; l < depth; l += 2)
    for (int i = 0; i < n; i += kLanes<float>) {
      const long part = n - i < kLanes<float> ? n - i : kLanes<float>;
      const V<float> low = load_up_to(x + l * ld + i, part);
      const V<float> high = l + 1 < depth ? load_up_to(x + (l + 1) * ld + i, part) : V<float>{};
      const V<float> both = pair_up(low, high);
      float* to = words + l / 2 * ld_words + i;
      if (part == kLanes<float>)
        store(to, both);
      else
        store_first(to, both, part);
    }
}
#endif
