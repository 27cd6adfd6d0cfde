// Philox4x32-10 (Salmon et al., 2011) on a vector of rows; the same words as gdpd_kernels/philox.py.
// Key: the seed. Counter: (column / 4, row, step, sample). The four words serve columns 4g .. 4g + 3.

typedef uint32_t Words __attribute__((vector_size(GK_VECTOR_BYTES)));
typedef uint64_t Wide __attribute__((vector_size(GK_VECTOR_BYTES)));
constexpr int kWords = GK_VECTOR_BYTES / 4;

// High and low words of a · m: the products of even and odd lanes are formed as 64-bit numbers.
GK_INLINE void multiply_wide(Words a, uint32_t m, Words& high, Words& low) {
  const Wide wide = (Wide)(a);
  const Wide even = (wide & 0xffffffffull) * uint64_t(m);
  const Wide odd = (wide >> 32) * uint64_t(m);
  const Wide h = (even >> 32) | (odd & 0xffffffff00000000ull);
  high = (Words)(h);
  low = a * m;
}

GK_INLINE void philox(uint64_t seed, Words c[4]) {
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    Words h0, l0, h1, l1;
    multiply_wide(c[0], 0xD2511F53u, h0, l0);
    multiply_wide(c[2], 0xCD9E8D57u, h1, l1);
    c[0] = h1 ^ c[1] ^ k0;
    c[1] = l1;
    c[2] = h0 ^ c[3] ^ k1;
    c[3] = l0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

// Box and Muller's pair from two vectors of words, u = (2 (w >> 9) + 1) 2^-24 in (0, 1).
template <class T>
GK_INLINE void box_muller(V<T> u0, V<T> u1, V<T>& first, V<T>& second) {
  const V<T> radius = vsqrt<T>(T(-2) * vlog(u0));
  V<T> cosine, sine;
  vcossin_turns(u1, cosine, sine);
  first = radius * cosine;
  second = radius * sine;
}

// Standard normals for rows row .. row + n - 1: out[column][i], i < n; lane i of the counter is row i.
template <class T>
void philox_normals(uint64_t seed, uint64_t row, int n, int cols, uint32_t step, uint32_t sample, T* out, long ld) {
  constexpr int L = kLanes<T>;
  for (int i0 = 0; i0 < n; i0 += kWords) {
    for (int g = 0; 4 * g < cols; ++g) {
      Words c[4];
      for (int i = 0; i < kWords; ++i) {
        c[0][i] = uint32_t(g);
        c[1][i] = uint32_t(row + i0 + i);
        c[2][i] = step;
        c[3][i] = sample;
      }
      philox(seed, c);
      for (int part = 0; part < kWords / L; ++part) {
        V<T> u[4], normal[4];
        for (int w = 0; w < 4; ++w)
          for (int i = 0; i < L; ++i) u[w][i] = T(int32_t(2 * (c[w][part * L + i] >> 9) + 1)) * T(1.0 / 16777216);
        box_muller<T>(u[0], u[1], normal[0], normal[1]);
        box_muller<T>(u[2], u[3], normal[2], normal[3]);
        const int i = i0 + part * L;
        for (int w = 0; w < 4 && 4 * g + w < cols; ++w) {
          if (i + L <= n)
            store(out + (4 * g + w) * ld + i, normal[w]);
          else
            for (int j = 0; i + j < n; ++j) out[(4 * g + w) * ld + i + j] = normal[w][j];
        }
      }
    }
  }
}
