// Part of Engine: the three products of a linear layer, in the state's precision or on bfloat16 operands.

  // Weights in the order in which the kernels read them, once per call; each thread packs its blocks of every matrix.
  void pack(const Local& l) const {
    for (int p = 0; p < int(plan.params.size()); ++p) {
      const Param& w = plan.params[p];
      if (!w.matrix) continue;
      const T* source = static_cast<const T*>(call.params[p]);
      const RowBlocks<NV> blocks(w.rows);
      const int first = blocks.count * l.thread / l.threads, last = blocks.count * (l.thread + 1) / l.threads;
      for (int b = first; b < last && packed[p]; ++b)
        pack_forward(source + long(blocks.start(b)) * w.cols, w.cols, blocks.start(b), blocks.rows(b), packed[p]);
      if constexpr (std::is_same<T, float>::value) {
        const long half = (w.rows + 1) / 2, from = half * l.thread / l.threads, to = half * (l.thread + 1) / l.threads;
        if (backward && call.bf16) pack_backward(source, w, from, to, const_cast<T*>(plain[p]));
      }
    }
  }

  void pack_forward(const T* w, long cols, int start, int rows, T* to) const {
    if constexpr (std::is_same<T, float>::value) {
      if (call.bf16) {
        pack_forward_bf16(w, cols, start, rows, to);
        return;
      }
    }
    pack_block([=](int i, long l, long n) { return load_up_to(w + i * cols + l, n); }, rows, cols, to + start * cols);
  }

#ifdef GK_BF16
  using LowProduct = Pairs;
  // Pairs along the input.
  static void pack_forward_bf16(const float* w, long cols, int start, int rows, float* to) {
    const long half = (cols + 1) / 2;
    const auto pairs = [=](int i, long l, long n) {
      const float* at = w + i * cols + 2 * l;
      const long left = cols - 2 * l < 2 * n ? cols - 2 * l : 2 * n;
      const V<float> low = load_up_to(at, left < L ? left : L);
      const V<float> high = left > L ? load_up_to(at + L, left - L) : V<float>{};
      return V<float>((__m512)(__m512i)_mm512_cvtne2ps_pbh(__m512(high), __m512(low)));
    };
    pack_block(pairs, rows, half, to + start * half);
  }
  // Pairs along the output, of these pairs of rows.
  static void pack_backward(const float* w, const Param& shape, long from, long to, float* out) {
    const long cols = shape.cols, rows = shape.rows < 2 * to ? shape.rows : 2 * to;
    pair_rows(w + 2 * from * cols, cols, rows - 2 * from, int(cols), out + from * cols, cols);
  }
#else
  // Without bfloat16 products: operands rounded, multiplied as floats. The same results up to the order of sums.
  using LowProduct = Plain<float>;
  static void pack_forward_bf16(const float* w, long cols, int start, int rows, float* to) {
    const auto rounded = [=](int i, long l, long n) { return round_bf16(load_up_to(w + i * cols + l, n)); };
    pack_block(rounded, rows, cols, to + start * cols);
  }
  static void pack_backward(const float* w, const Param& shape, long from, long to, float* out) {
    const long cols = shape.cols, rows = shape.rows < 2 * to ? shape.rows : 2 * to;
    round_bf16(w + 2 * from * cols, (rows - 2 * from) * cols, out + 2 * from * cols);
  }
#endif

  // y = W x + b
  void product_forward(const Local& l, const Op& op, const T* x, T* y) const {
    const Param& w = plan.params[op.param[0]];
    const T* bias = param(op.param[1]);
    const int init = bias ? kBias : kZero;
    if constexpr (std::is_same<T, float>::value) {
      if (call.bf16) {
#ifdef GK_BF16
        pair_rows(x, R, w.cols, R, l.operand, R);
        Gemm<float, Pairs, NV>::run(packed[op.param[0]], 0, true, w.rows, (w.cols + 1) / 2, l.operand, R, y, R, init,
                                    bias);
#else
        round_bf16(x, long(w.cols) * R, l.operand);
        Gemm<T, Product, NV>::run(packed[op.param[0]], 0, true, w.rows, w.cols, l.operand, R, y, R, init, bias);
#endif
        return;
      }
    }
    Gemm<T, Product, NV>::run(packed[op.param[0]], 0, true, w.rows, w.cols, x, R, y, R, init, bias);
  }

  // dx (+)= W^T g
  void product_backward_input(const Local& l, const Op& op, const T* g, T* dx, bool add) const {
    const Param& w = plan.params[op.param[0]];
    const int init = add ? kAdd : kZero;
    if constexpr (std::is_same<T, float>::value) {
      if (call.bf16) {
#ifdef GK_BF16
        pair_rows(g, R, w.rows, R, l.operand, R);
        Gemm<float, Pairs, NV>::run(plain[op.param[0]], w.cols, false, w.cols, (w.rows + 1) / 2, l.operand, R, dx, R,
                                    init, nullptr);
#else
        round_bf16(g, long(w.rows) * R, l.operand);
        Gemm<T, Product, NV>::run(plain[op.param[0]], w.cols, false, w.cols, w.rows, l.operand, R, dx, R, init, nullptr);
#endif
        return;
      }
    }
    Gemm<T, Product, NV>::run(plain[op.param[0]], w.cols, false, w.cols, w.rows, g, R, dx, R, init, nullptr);
  }

  // dW += g x^T over the rows of the tile. Both are turned to [row][width], so that dW has inputs along the lanes.
  void product_backward_weight(const Local& l, const Op& op, const T* x, const T* g, long tile, T* dw) const {
    const Param& w = plan.params[op.param[0]];
    // Whole blocks of features are turned: tiles have room for them, and padding columns end up in padding of dW.
    const long ld = GK_ROUND_UP(w.cols, L), ldt = padded;
    long depth = valid(tile);
    const T* coef = l.gradient;
    if constexpr (std::is_same<T, float>::value) {
      if (call.bf16) {
#ifdef GK_BF16
        depth = (depth + 1) / 2;
        pair_columns(x, w.cols, l.operand);
        transpose_padded(l.operand, R / 2, w.cols, R / 2, l.transposed, ldt);
        pair_columns(g, w.rows, l.operand);
        transpose_padded(l.operand, R / 2, w.rows, R / 2, l.gradient, ldt);
        accumulate_weight<LowProduct>(coef, w, depth, l.transposed, ldt, dw, ld);
#else
        round_bf16(x, long(w.cols) * R, l.operand);
        transpose_padded(l.operand, R, w.cols, R, l.transposed, ldt);
        round_bf16(g, long(w.rows) * R, l.operand);
        transpose_padded(l.operand, R, w.rows, R, l.gradient, ldt);
        accumulate_weight<Product>(coef, w, depth, l.transposed, ldt, dw, ld);
#endif
        return;
      }
    }
    transpose_padded(x, R, w.cols, R, l.transposed, ldt);
    transpose_padded(g, R, w.rows, R, l.gradient, ldt);
    accumulate_weight<Product>(coef, w, depth, l.transposed, ldt, dw, ld);
  }

  template <class P>
  static void accumulate_weight(const T* coef, const Param& w, long depth, const T* x, long ldx, T* dw, long ld) {
    long c = 0;
    for (; c + 4 * L <= ld; c += 4 * L)
      Gemm<T, P, 4>::run(coef, ldx, false, w.rows, depth, x + c, ldx, dw + c, ld, kAdd, nullptr);
    for (; c + 2 * L <= ld; c += 2 * L)
      Gemm<T, P, 2>::run(coef, ldx, false, w.rows, depth, x + c, ldx, dw + c, ld, kAdd, nullptr);
    for (; c < ld; c += L)
      Gemm<T, P, 1>::run(coef, ldx, false, w.rows, depth, x + c, ldx, dw + c, ld, kAdd, nullptr);
  }

#ifdef GK_BF16
  // words[c][r / 2] = (bf16 x[c][r], bf16 x[c][r + 1])
  static void pair_columns(const float* x, int width, float* words) {
    uint16_t* out = reinterpret_cast<uint16_t*>(words);
    for (long i = 0; i < long(width) * R; i += 16)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(x + i)));
  }
#endif
