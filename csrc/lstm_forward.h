// Part of Lstm: forward.

  void forward_block(Local& l) {
    for (long d = 0; d < chunks + layers - 1; ++d) {
      each_task(l, [&](int n, long tile) {
        if (d >= n && d - n < chunks) forward_chunk(l, n, tile, d - n);
      });
      meet(l);
    }
  }

  void forward_chunk(Local& l, int n, long tile, long which) const {
    const Layer& at = layer[n];
    const long begin = which * chunk, end = at_most(steps, begin + chunk);
    if (which == 0) start_state(l, n, tile);
    for (long t = begin; t < end;) {
      // The input's share of the gates, of several steps where they have few rows.
      long last = t, rows = 0;
      do rows += count(tile, active(l, last++));
      while (last < end && rows + count(tile, active(l, last)) <= kRowsAtOnce);
      long k = 0;
      for (long s = t; s < last; ++s)
        for (long j = 0; j < count(tile, active(l, s)); ++j, ++k) {
          l.from[k] = input_operand(l, n, which, s, rank_of(tile, j), k);
          l.to[k] = l.scratch + k * gate_row;
        }
      P::multiply(at.in, l.from, k, l.to, kBias, at.bias);
      // The state's share, and the cells.
      k = 0;
      for (; t < last; ++t) {
        const long here = count(tile, active(l, t));
        if (t > 0 || call.h0) {
          for (long j = 0; j < here; ++j) l.from[j] = at.h + rank_of(tile, j) * P::operand_row(hidden);
          P::multiply(at.own, l.from, here, l.to + k, kAdd, nullptr);
        }
        for (long j = 0; j < here; ++j) forward_cell(l, n, which, t, rank_of(tile, j), l.to[k + j]);
        k += here;
        if (n == layers - 1 && call.output)
          for (long j = here; j < count(tile, l.rows); ++j)
            __builtin_memset(output_row(l, t, rank_of(tile, j)), 0, sizeof(T) * hidden);
      }
    }
  }

  T* output_row(const Local& l, long t, long rank) const {
    return static_cast<T*>(call.output) + row_of(l, rank) * call.output_row + t * call.output_step;
  }

  void start_state(const Local& l, int n, long tile) const {
    for (long rank = tile; rank < l.rows; rank += tiles) {
      const T* h0 = state_row(static_cast<const T*>(call.h0), n, l, rank);
      const T* c0 = state_row(static_cast<const T*>(call.c0), n, l, rank);
      for (long u = 0; u < hidden; u += L) {
        P::store_operand(layer[n].h + rank * P::operand_row(hidden), u, h0 ? load_at(h0, u, hidden) : V<T>{});
        store(layer[n].c + rank * unit_row + u, c0 ? load_at(c0, u, hidden) : V<T>{});
      }
    }
  }

  const T* input_operand(const Local& l, int n, long which, long t, long rank, long k) const {
    if (n > 0) return row(layer[n - 1].handed, which & 1, t - which * chunk, rank, P::operand_row(hidden));
    const T* x = static_cast<const T*>(call.x) + row_of(l, rank) * call.x_row + t * call.x_step;
    if (!Product::rounds) return x;
    T* operand = l.operands + k * P::operand_row(call.inputs);
    for (long u = 0; u < call.inputs; u += L) P::store_operand(operand, u, load_at(x, u, call.inputs));
    return operand;
  }

  // One row of one step: activations, state, and whatever of them is wanted.
  void forward_cell(const Local& l, int n, long which, long t, long rank, const T* gate) const {
    const Layer& at = layer[n];
    const bool top = n == layers - 1, ends = t == length(l, rank) - 1;
    T* c = at.c + rank * unit_row;
    T* h = at.h + rank * P::operand_row(hidden);
    T* handed = top ? nullptr : row(at.handed, which & 1, t - which * chunk, rank, P::operand_row(hidden));
    T* saved = call.saved ? const_cast<T*>(saved_row(n, t, l, rank)) : nullptr;
    T* output = top && call.output ? output_row(l, t, rank) : nullptr;
    T* h_n = ends ? state_row(static_cast<T*>(call.h_n), n, l, rank) : nullptr;
    T* c_n = ends ? state_row(static_cast<T*>(call.c_n), n, l, rank) : nullptr;
    const bool drop = drops(n);
    if (drop) dropout_mask(n, t, row_of(l, rank), l.mask);
    each_vector([&](auto whole, long at_gate, long stride, long u, long n_units) {
      const T* p = gate + at_gate;
      const V<T> i = vsigmoid(get(whole, p, n_units));
      const V<T> f = vsigmoid(get(whole, p + stride, n_units));
      const V<T> g = vtanh(get(whole, p + 2 * stride, n_units));
      const V<T> o = vsigmoid(get(whole, p + 3 * stride, n_units));
      const V<T> cell = f * load(c + u) + i * g;
      const V<T> value = o * vtanh(cell);
      store(c + u, cell);
      P::store_operand(h, u, value);
      if (handed) P::store_operand(handed, u, drop ? value * load(l.mask + u) : value);
      if (saved) {
        put(whole, saved + at_gate, n_units, i);
        put(whole, saved + at_gate + stride, n_units, f);
        put(whole, saved + at_gate + 2 * stride, n_units, g);
        put(whole, saved + at_gate + 3 * stride, n_units, o);
        put(whole, saved + gates + u, n_units, cell);
      }
      if (output) put(whole, output + u, n_units, value);
      if (h_n) {
        put(whole, h_n + u, n_units, value);
        put(whole, c_n + u, n_units, cell);
      }
    });
  }
