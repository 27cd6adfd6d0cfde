// One LSTM call, and the table of the kernels that run it. Plain data, shared by every instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

namespace gk {

// Tensors are dense, of type T, null where absent. Sequences lie as (row, step) vectors of features at
// `row * ..._row + step * ..._step`, so that either of batch and time may come first.
struct LstmCall {
  long batch, steps, inputs, hidden, layers;
  const void* x;               // [batch, steps, inputs]
  long x_row, x_step;
  const void* const* params;   // of every layer: w_ih [4 hidden, width], w_hh [4 hidden, hidden], b_ih, b_hh or null
  const void *h0, *c0;         // [layers, batch, hidden]
  double dropout;              // between layers
  uint64_t seed;               // of the dropout
  bool bf16;                   // operands of matrix products rounded to bfloat16
  int threads;

  // Rows in descending order of length, so that those still running at a step are the first of them.
  const long* order;           // [batch] row of each rank
  const long* length;          // [batch] steps of each rank, 1 .. steps
  const long* active;          // [steps] ranks that run at a step

  void* output;                // [batch, steps, hidden] of the top layer; zero past a row's length
  long output_row, output_step;
  void *h_n, *c_n;             // [layers, batch, hidden] after each row's last step
  void* const* saved;          // of every layer: [steps, batch (by rank), saved_row], see lstm_saved_row

  // backward
  const void* grad_output;     // as output
  long grad_output_row, grad_output_step;
  const void *grad_h, *grad_c; // of h_n, c_n
  void* grad_x;                // dense [batch, steps, inputs] with the strides of grad_x_row, grad_x_step
  long grad_x_row, grad_x_step;
  void *grad_h0, *grad_c0;
  void* const* grad_params;    // as params; biases share one gradient, which is written wherever it is wanted
};

// Forward keeps of every layer, step and row the gates i, f, g, o after their activations, and the cell state: five
// vectors one after the other, rounded up so that no two rows share a cache line.
inline long lstm_saved_row(long hidden) { return (5 * hidden + 15) / 16 * 16; }

struct LstmKernels {
  void (*forward_f32)(const LstmCall&);
  void (*forward_f64)(const LstmCall&);
  void (*backward_f32)(const LstmCall&);
  void (*backward_f64)(const LstmCall&);
};

}  // namespace gk
