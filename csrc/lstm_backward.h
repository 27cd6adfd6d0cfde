// Part of Lstm: backward, from the last chunk to the first and from the top layer down. On diagonal d, layer n takes
// the chunk at d - (layers - 1 - n) from the end. Two diagonals later its operands are all there (the layer below has
// computed its outputs of those steps again, which are this layer's inputs) and the weight gradients are summed: so
// what a chunk leaves stays for three diagonals.

  long age(int n, long d) const { return d - (layers - 1 - n); }

  void backward_block(Local& l) {
    for (long d = 0; d < chunks + layers - 1 - bottom + 2; ++d) {
      each_task(l, [&](int n, long tile) {
        const long from_end = age(n, d);
        if (from_end >= 0 && from_end < chunks) backward_chunk(l, n, tile, from_end);
      });
      for (int n = bottom; n < layers; ++n) {
        const long from_end = age(n, d) - 2;
        if (wants_weights(n) && from_end >= 0 && from_end < chunks) weight_gradients(l, n, from_end);
      }
      barrier.wait(l.threads);
    }
  }

  long first_step(long from_end) const { return (chunks - 1 - from_end) * chunk; }
  long end_step(long from_end) const { return at_most(steps, first_step(from_end) + chunk); }

  void backward_chunk(Local& l, int n, long tile, long from_end) {
    Layer& at = layer[n];
    const long begin = first_step(from_end), end = end_step(from_end), place = from_end % kRing;
    long dx_rows = 0;
    for (long t = end - 1; t >= begin; --t) {
      const long here = count(tile, active(l, t));
      bool any = false;
      for (long j = 0; j < here; ++j) any |= backward_cell(l, n, t, from_end, rank_of(tile, j), (t - begin) * tile_rows + j);
      at.nonzero[(place * chunk + t - begin) * tiles + tile] = any;
      if (t > 0 || call.grad_h0) {
        for (long j = 0; j < here; ++j) {
          l.from[j] = operand(l, at, place, t - begin, rank_of(tile, j), (t - begin) * tile_rows + j);
          l.to[j] = at.dh + rank_of(tile, j) * unit_row;
        }
        multiply_or_clear(at.own, l, here, any, unit_row);
      }
    }
    if (wants_dx(n)) {
      const long in_row = GK_ROUND_UP(at.width, L);
      for (long t = begin; t < end; ++t) {
        const bool any = at.nonzero[(place * chunk + t - begin) * tiles + tile];
        for (long j = 0; j < count(tile, active(l, t)); ++j) {
          T* to = row(at.dx, from_end & 1, t - begin, rank_of(tile, j), in_row);
          if (any) {
            l.from[dx_rows] = operand(l, at, place, t - begin, rank_of(tile, j), (t - begin) * tile_rows + j);
            l.to[dx_rows++] = to;
          } else {
            __builtin_memset(to, 0, sizeof(T) * in_row);
          }
        }
      }
      P::multiply(at.in, l.from, dx_rows, l.to, kZero, nullptr);
      if (n == 0) store_grad_x(l, tile, from_end);
    }
    if (wants(n, 0) && n == bottom) gather_inputs(l, n, tile, from_end);
    if (begin == 0) end_state(l, n, tile, from_end);
  }

  // Gradients of gates as rows of a product.
  const T* operand(const Local& l, const Layer& at, long place, long step, long rank, long k) const {
    return Product::rounds ? l.operands + k * P::operand_row(gates) : row(at.dgates, place, step, rank, gate_row);
  }
  // Zero times the weights is zero: steps through which no gradient comes, far before the last one, cost no product.
  void multiply_or_clear(const Packed& weights, const Local& l, long rows, bool any, long width) const {
    if (any) return P::multiply(weights, l.from, rows, l.to, kZero, nullptr);
    for (long j = 0; j < rows; ++j) __builtin_memset(l.to[j], 0, sizeof(T) * width);
  }

  // One row of one step; whether any gate has a gradient (NaN is one).
  bool backward_cell(const Local& l, int n, long t, long from_end, long rank, long k) const {
    using I = typename Simd<T>::I;
    const Layer& at = layer[n];
    const long place = from_end % kRing, step = t - first_step(from_end), original = row_of(l, rank);
    const bool top = n == layers - 1, ends = t == length(l, rank) - 1;
    const T* saved = saved_row(n, t, l, rank);
    const T* c_before = t > 0 ? saved_row(n, t - 1, l, rank) + 4 * hidden
                              : state_row(static_cast<const T*>(call.c0), n, l, rank);
    const T* above = !top ? row(layer[n + 1].dx, from_end & 1, step, rank, unit_row)
                     : call.grad_output ? static_cast<const T*>(call.grad_output) + original * call.grad_output_row +
                                              t * call.grad_output_step
                                        : nullptr;
    const T* dh = ends ? state_row(static_cast<const T*>(call.grad_h), n, l, rank) : at.dh + rank * unit_row;
    T* carry = at.dc + rank * unit_row;
    const T* dc = ends ? state_row(static_cast<const T*>(call.grad_c), n, l, rank) : carry;
    T* dgates = row(at.dgates, place, step, rank, gate_row);
    T* values = row(at.values, place, step, rank, unit_row);
    T* operands = Product::rounds ? l.operands + k * P::operand_row(gates) : nullptr;
    const bool drop = drops(n);
    T* masked = drop ? row(at.masked, place, step, rank, unit_row) : nullptr;
    if (drop) dropout_mask(n, t, original, l.mask);
    I any = {};
    for (long u = 0; u < hidden; u += L) {
      const V<T> i = load_at(saved, u, hidden);
      const V<T> f = load_at(saved + hidden, u, hidden);
      const V<T> g = load_at(saved + 2 * hidden, u, hidden);
      const V<T> o = load_at(saved + 3 * hidden, u, hidden);
      const V<T> cell = vtanh(load_at(saved + 4 * hidden, u, hidden));
      const V<T> before = c_before ? load_at(c_before, u, hidden) : V<T>{};
      V<T> d = above ? load_at(above, u, hidden) : V<T>{};
      if (drop) d *= load(l.mask + u);
      if (dh) d += load_at(dh, u, hidden);
      V<T> d_cell = d * o * (T(1) - cell * cell);
      if (dc) d_cell += load_at(dc, u, hidden);
      const V<T> di = d_cell * g * i * (T(1) - i), df = d_cell * before * f * (T(1) - f);
      const V<T> dg = d_cell * i * (T(1) - g * g), d_o = d * cell * o * (T(1) - o);
      store_at(dgates, u, hidden, di);
      store_at(dgates + hidden, u, hidden, df);
      store_at(dgates + 2 * hidden, u, hidden, dg);
      store_at(dgates + 3 * hidden, u, hidden, d_o);
      any |= ((I)(di) | (I)(df) | (I)(dg) | (I)(d_o)) << 1;  // without the sign: -0 is none
      store(carry + u, V<T>(d_cell * f));
      const V<T> value = o * cell;
      store(values + u, value);
      if (drop) store(masked + u, V<T>(value * load(l.mask + u)));
    }
    if (Product::rounds)
      for (long j = 0; j < gates; j += L) P::store_operand(operands, j, load_at(dgates, j, gates));
    T found[L];
    store(found, (V<T>)(any));
    for (int j = 0; j < L; ++j) {
      typename std::conditional<sizeof(T) == 4, uint32_t, uint64_t>::type bits;
      __builtin_memcpy(&bits, found + j, sizeof(T));
      if (bits) return true;
    }
    return false;
  }

  void store_grad_x(const Local& l, long tile, long from_end) const {
    const long begin = first_step(from_end), in_row = GK_ROUND_UP(call.inputs, L);
    for (long t = begin; t < end_step(from_end); ++t)
      for (long rank = tile; rank < l.rows; rank += tiles) {
        T* to = static_cast<T*>(call.grad_x) + row_of(l, rank) * call.grad_x_row + t * call.grad_x_step;
        if (rank < active(l, t))
          __builtin_memcpy(to, row(layer[0].dx, from_end & 1, t - begin, rank, in_row), sizeof(T) * call.inputs);
        else
          __builtin_memset(to, 0, sizeof(T) * call.inputs);
      }
  }

  // The inputs of the lowest layer with gradients: x, or the outputs of a layer whose backward does not run.
  void gather_inputs(const Local& l, int n, long tile, long from_end) const {
    const long begin = first_step(from_end), place = from_end % kRing, in_row = GK_ROUND_UP(call.inputs, L);
    for (long t = begin; t < end_step(from_end); ++t)
      for (long j = 0; j < count(tile, active(l, t)); ++j) {
        const long rank = rank_of(tile, j);
        if (n == 0) {
          const T* x = static_cast<const T*>(call.x) + row_of(l, rank) * call.x_row + t * call.x_step;
          T* to = row(inputs, place, t - begin, rank, in_row);
          for (long u = 0; u < call.inputs; u += L) store(to + u, load_at(x, u, call.inputs));
          continue;
        }
        const T* saved = saved_row(n - 1, t, l, rank);
        T* to = row(layer[n - 1].masked, place, t - begin, rank, unit_row);
        if (drops(n - 1)) dropout_mask(n - 1, t, row_of(l, rank), l.mask);
        for (long u = 0; u < hidden; u += L) {
          const V<T> value = load_at(saved + 3 * hidden, u, hidden) * vtanh(load_at(saved + 4 * hidden, u, hidden));
          store(to + u, drops(n - 1) ? V<T>(value * load(l.mask + u)) : value);
        }
      }
  }

  // The first step's neighbour is the initial state: an operand, and what may take a gradient.
  void end_state(const Local& l, int n, long tile, long from_end) const {
    const Layer& at = layer[n];
    for (long rank = tile; rank < l.rows; rank += tiles) {
      if (const T* h0 = state_row(static_cast<const T*>(call.h0), n, l, rank)) {
        T* to = at.h + rank * unit_row;
        for (long u = 0; u < hidden; u += L) store(to + u, load_at(h0, u, hidden));
      }
      if (T* grad = state_row(static_cast<T*>(call.grad_h0), n, l, rank))
        __builtin_memcpy(grad, at.dh + rank * unit_row, sizeof(T) * hidden);
      if (T* grad = state_row(static_cast<T*>(call.grad_c0), n, l, rank))
        __builtin_memcpy(grad, at.dc + rank * unit_row, sizeof(T) * hidden);
    }
  }

  // --- weights -------------------------------------------------------------------------------------------------------

  // dW_ih += dgates_t x_t^T, dW_hh += dgates_t h_{t-1}^T, db += dgates_t over the steps of a chunk, of a thread's gates.
  void weight_gradients(const Local& l, int n, long from_end) const {
    const Layer& at = layer[n];
    const Slice mine = slice(l);
    if (mine.gates == 0) return;
    const long begin = first_step(from_end), count_steps = end_step(from_end) - begin, place = from_end % kRing;
    const T* in = n == 0 ? inputs : layer[n - 1].masked;
    const long in_row = GK_ROUND_UP(at.width, L);
    const auto live = [&](long s) {
      for (long tile = 0; tile < tiles; ++tile)
        if (at.nonzero[(place * chunk + s) * tiles + tile]) return active(l, begin + s);
      return 0L;
    };
    for (long s = 0; s < count_steps;) {
      // Steps on which all rows of the block run lie one after the other.
      const long first = s;
      long rows = live(s++);
      if (rows == 0) continue;
      // The first step stands alone: the state before it lies in another chunk.
      while (first > 0 && s < count_steps && rows == (s - first) * block && live(s)) rows += live(s++);
      const T* g = at.dgates + (place * chunk + first) * block * gate_row + mine.first;
      const T* x = in + (place * chunk + first) * block * in_row;
      const T* before = first > 0   ? at.values + (place * chunk + first - 1) * block * unit_row
                        : begin > 0 ? at.values + ((from_end + 1) % kRing * chunk + chunk - 1) * block * unit_row
                        : call.h0   ? at.h
                                    : nullptr;
      // In blocks that stay in the cache while all three sums read them.
      for (long r = 0; r < rows; r += P::kDepth) {
        const long depth = at_most(rows - r, P::kDepth);
        const T* block_g = g + r * gate_row;
        if (at.dw_in)
          P::accumulate(block_g, gate_row, mine.gates, x + r * in_row, in_row, int(in_row / L), depth,
                        at.dw_in + mine.first * in_row, in_row, l.room);
        if (at.dw_own && before)
          P::accumulate(block_g, gate_row, mine.gates, before + r * unit_row, unit_row, int(unit_row / L), depth,
                        at.dw_own + mine.first * unit_row, unit_row, l.room);
        for (long j = 0; at.db && j < mine.gates; j += L) {
          V<T> sum = {};
          for (long i = 0; i < depth; ++i) sum += load(block_g + i * gate_row + j);
          store(at.db + mine.first + j, V<T>(load(at.db + mine.first + j) + sum));
        }
      }
    }
  }

  void store_weight_gradients(const Local& l) const {
    const Slice mine = slice(l);
    for (int n = bottom; n < layers; ++n) {
      const Layer& at = layer[n];
      const long in_row = GK_ROUND_UP(at.width, L);
      for (long j = mine.first; j < mine.first + mine.gates; ++j) {
        if (at.dw_in) __builtin_memcpy(grad_param(n, 0) + j * at.width, at.dw_in + j * in_row, sizeof(T) * at.width);
        if (at.dw_own) __builtin_memcpy(grad_param(n, 1) + j * hidden, at.dw_own + j * unit_row, sizeof(T) * hidden);
      }
      for (int which = 2; which < 4; ++which)
        if (wants(n, which))
          __builtin_memcpy(grad_param(n, which) + mine.first, at.db + mine.first, sizeof(T) * mine.gates);
    }
  }
