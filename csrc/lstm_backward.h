// Part of Lstm: backward, from the last chunk to the first and from the top layer down. On diagonal d, layer n takes
// the chunk at d - (layers - 1 - n) from the end.

  long age(int n, long d) const { return d - (layers - 1 - n); }
  bool at_work(int n, long d) const { return age(n, d) >= 0 && age(n, d) < chunks; }
  long first_step(long from_end) const { return (chunks - 1 - from_end) * chunk; }
  long end_step(long from_end) const { return at_most(steps, first_step(from_end) + chunk); }

  void backward_block(Local& l) {
    for (long d = 0; d < chunks + layers - 1 - bottom; ++d) {
      each_task(l, [&](int n, long tile) {
        if (!at_work(n, d)) return;
        backward_chunk(l, n, tile, age(n, d));
        // While the gradients of gates are in this core's cache.
        if (l.alone) weight_gradients(l, n, tile, age(n, d));
      });
      if (l.alone) continue;
      meet(l);
      for (int n = bottom; n < layers; ++n)
        for (long group = 0; group < groups && at_work(n, d); ++group) weight_gradients(l, n, group, age(n, d));
      meet(l);
    }
  }

  // Rows of a group in a chunk, in the order in which weight gradients are summed: step by step, by rank.
  T* dgates_of(const Local& l, int n, long group) const {
    return dgates + (l.alone ? l.thread : n * groups + group) * chunk * group_rows * gate_row;
  }
  T* inputs_of(const Local& l, int n, long group) const {
    return inputs + (l.alone ? l.thread : n * groups + group) * inputs_size;
  }
  void set_offsets(const Local& l, long group, long from_end) const {
    const long begin = first_step(from_end), end = end_step(from_end);
    l.offset[0] = 0;
    for (long t = begin; t < end; ++t)
      l.offset[t - begin + 1] = l.offset[t - begin] + share(group, groups, active(l, t));
  }
  long place_of(const Local& l, long step, long rank) const { return l.offset[step] + rank / groups; }

  // Whether a gate of that step and tile has a gradient.
  unsigned char* live(int n, long from_end, long step, long tile) const {
    return layer[n].live + ((from_end & 1) * chunk + step) * tiles + tile;
  }

  void backward_chunk(Local& l, int n, long tile, long from_end) {
    Layer& at = layer[n];
    const long begin = first_step(from_end), end = end_step(from_end), group = tile % groups;
    set_offsets(l, group, from_end);
    if (sleeps(l, n, tile, from_end)) {
      for (long t = begin; t < end; ++t) {
        *live(n, from_end, t - begin, tile) = 0;
        for (long j = 0; j < count(tile, active(l, t)); ++j)
          __builtin_memset(row(at.back, from_end & 1, t - begin, rank_of(tile, j), at.back_row), 0,
                           sizeof(T) * at.back_row);
      }
    } else {
      bool carries = false;
      for (long t = end - 1; t >= begin; --t) {
        const long here = count(tile, active(l, t));
        bool any = false;
        carries = false;
        for (long j = 0; j < here; ++j) {
          if (j + 2 < here) prefetch(saved_row(n, t, l, rank_of(tile, j + 2)), lstm_saved_row(hidden));
          const Found found = backward_cell(l, n, t, from_end, rank_of(tile, j), j);
          any |= found.gates;
          carries |= found.carry;
        }
        *live(n, from_end, t - begin, tile) = any;
        if (t == 0 && !wants_dx(n) && !call.grad_h0) continue;
        for (long j = 0; j < here; ++j) {
          l.from[j] = Product::rounds
                          ? l.operands + j * P::operand_row(gates)
                          : dgates_of(l, n, group) + place_of(l, t - begin, rank_of(tile, j)) * gate_row;
          l.to[j] = row(at.back, from_end & 1, t - begin, rank_of(tile, j), at.back_row);
        }
        if (any) {
          P::multiply(at.own, l.from, here, l.to, kZero, nullptr);
        } else {
          // Zero times the weights is zero: steps through which no gradient comes cost no product.
          for (long j = 0; j < here; ++j) __builtin_memset(l.to[j], 0, sizeof(T) * at.back_row);
        }
      }
      at.asleep[tile] = !*live(n, from_end, 0, tile) && !carries;
      if (wants(n, 0) || wants(n, 1)) gather_inputs(l, n, tile, from_end);
    }
    if (n == 0 && call.grad_x) store_grad_x(l, tile, from_end);
    if (begin == 0) end_state(l, n, tile, from_end);
  }

  // Whether a chunk has nothing to do: no gradient comes from later steps, from above, or from rows that end in it.
  // A gradient halves with each step or so: far before the last output there is none.
  bool sleeps(const Local& l, int n, long tile, long from_end) const {
    const Layer& at = layer[n];
    const long begin = first_step(from_end), end = end_step(from_end);
    if (from_end == 0 || !at.asleep[tile] || active(l, begin) != active(l, end)) return false;
    if (n == layers - 1) return !call.grad_output;
    for (long s = 0; s < end - begin; ++s)
      if (*live(n + 1, from_end, s, tile)) return false;
    return true;
  }

  static void prefetch(const T* from, long numbers) {
    for (long i = 0; i < numbers; i += 64 / long(sizeof(T))) __builtin_prefetch(from + i);
  }

  struct Found {
    bool gates, carry;  // something is not zero (NaN is not)
  };

  // One row of one step, the j-th of its tile.
  Found backward_cell(const Local& l, int n, long t, long from_end, long rank, long j) const {
    using I = typename Simd<T>::I;
    const Layer& at = layer[n];
    const long begin = first_step(from_end), step = t - begin, original = row_of(l, rank), group = rank % groups;
    const bool top = n == layers - 1, ends = t == length(l, rank) - 1;
    const T* saved = saved_row(n, t, l, rank);
    const T* c_before = t > 0 ? saved_row(n, t - 1, l, rank) + gates
                              : state_row(static_cast<const T*>(call.c0), n, l, rank);
    const T* above = !top ? row(layer[n + 1].back, from_end & 1, step, rank, layer[n + 1].back_row) + hidden
                     : call.grad_output ? static_cast<const T*>(call.grad_output) + original * call.grad_output_row +
                                              t * call.grad_output_step
                                        : nullptr;
    const bool last = t + 1 == end_step(from_end);  // of the chunk: the step after it lies in the one before
    const T* dh = ends ? state_row(static_cast<const T*>(call.grad_h), n, l, rank)
                       : row(at.back, (from_end + last) & 1, last ? 0 : step + 1, rank, at.back_row);
    T* carry = at.dc + rank * unit_row;
    const T* dc = ends ? state_row(static_cast<const T*>(call.grad_c), n, l, rank) : carry;
    T* to = dgates_of(l, n, group) + place_of(l, step, rank) * gate_row;
    // h_t is an operand of the next step's weight gradients.
    T* h = !last && rank < active(l, t + 1)
               ? inputs_of(l, n, group) + place_of(l, step + 1, rank) * at.sum_row + at.width
               : nullptr;
    const bool drop = drops(n);
    if (drop) dropout_mask(n, t, original, l.mask);
    I any = {}, carries = {};
    each_vector([&](auto whole, long at_gate, long stride, long u, long n_units) {
      const T* p = saved + at_gate;
      const V<T> i = get(whole, p, n_units), f = get(whole, p + stride, n_units);
      const V<T> g = get(whole, p + 2 * stride, n_units), o = get(whole, p + 3 * stride, n_units);
      const V<T> cell = vtanh(get(whole, saved + gates + u, n_units));
      const V<T> before = c_before ? get(whole, c_before + u, n_units) : V<T>{};
      V<T> d = above ? get(whole, above + u, n_units) : V<T>{};
      if (drop) d *= load(l.mask + u);
      if (dh) d += get(whole, dh + u, n_units);
      V<T> d_cell = d * o * (T(1) - cell * cell);
      if (dc) d_cell += get(whole, dc + u, n_units);
      const V<T> di = d_cell * g * i * (T(1) - i), df = d_cell * before * f * (T(1) - f);
      const V<T> dg = d_cell * i * (T(1) - g * g), d_o = d * cell * o * (T(1) - o);
      put(whole, to + at_gate, n_units, di);
      put(whole, to + at_gate + stride, n_units, df);
      put(whole, to + at_gate + 2 * stride, n_units, dg);
      put(whole, to + at_gate + 3 * stride, n_units, d_o);
      const V<T> carried = d_cell * f;
      store(carry + u, carried);
      any |= (I)(di) | (I)(df) | (I)(dg) | (I)(d_o);
      carries |= (I)(carried);
      if (h) put(whole, h + u, n_units, V<T>(o * cell));
    });
    if (Product::rounds)
      for (long k = 0; k < gates; k += L)
        P::store_operand(l.operands + j * P::operand_row(gates), k, load_at(to, k, gates));
    return {not_zero(any), not_zero(carries)};
  }

  // Whether any lane holds more than a sign: -0 is zero.
  static bool not_zero(typename Simd<T>::I bits) {
    T found[L];
    store(found, (V<T>)(bits << 1));
    for (int j = 0; j < L; ++j) {
      typename std::conditional<sizeof(T) == 4, uint32_t, uint64_t>::type lane;
      __builtin_memcpy(&lane, found + j, sizeof(T));
      if (lane) return true;
    }
    return false;
  }

  void store_grad_x(const Local& l, long tile, long from_end) const {
    const long begin = first_step(from_end);
    for (long t = begin; t < end_step(from_end); ++t)
      for (long rank = tile; rank < l.rows; rank += tiles) {
        T* to = static_cast<T*>(call.grad_x) + row_of(l, rank) * call.grad_x_row + t * call.grad_x_step;
        if (rank < active(l, t))
          __builtin_memcpy(to, row(layer[0].back, from_end & 1, t - begin, rank, layer[0].back_row) + hidden,
                           sizeof(T) * call.inputs);
        else
          __builtin_memset(to, 0, sizeof(T) * call.inputs);
      }
  }

  // The gradients of the initial state are what is handed to the step before the first.
  void end_state(const Local& l, int n, long tile, long from_end) const {
    const Layer& at = layer[n];
    for (long rank = tile; rank < l.rows; rank += tiles) {
      if (T* grad = state_row(static_cast<T*>(call.grad_h0), n, l, rank))
        __builtin_memcpy(grad, row(at.back, from_end & 1, 0, rank, at.back_row), sizeof(T) * hidden);
      if (T* grad = state_row(static_cast<T*>(call.grad_c0), n, l, rank))
        __builtin_memcpy(grad, at.dc + rank * unit_row, sizeof(T) * hidden);
    }
  }
