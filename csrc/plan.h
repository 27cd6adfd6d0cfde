// Plan: a DenoiserProgram decoded for the CPU kernels, and the arguments of one call.
// Plain data, shared by every instruction set; nothing here may be inlined into code of a particular one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace gk {

// Sizes and strides are long throughout: where that has 32 bits (Windows, 32-bit systems), addresses would be wrong.
static_assert(sizeof(long) == 8 && sizeof(void*) == 8, "the kernels need 64-bit long; without them, Python runs");

// The order is that of `_KINDS` in backends/native_backend.py.
enum class Kind : int {
  Linear,
  BatchNorm,
  BatchNormEval,
  LayerNorm,
  RmsNorm,
  Relu,
  LeakyRelu,
  Silu,
  Gelu,
  GeluTanh,
  Tanh,
  Sigmoid,
  Elu,
  Softplus,
  Add,
  Mul,
  Affine,
  Slice,
  Concat,
};

// A value is z (id 0), then rows, then tables, then the result of each operation, in order.
struct Op {
  Kind kind;
  int out;                // value id
  int width;              // of the result
  std::vector<int> in;    // value ids
  int param[4];           // weight, bias, mean, var: parameter index, or -1
  double attr[2];         // eps | slope | alpha | scale, shift | start, stop
  int stats = -1;         // BatchNorm: offset in the row of batch statistics
};

struct Param {
  int rows, cols;         // [rows, cols]; a vector is [rows, 1]
  bool matrix;
  long size() const { return long(rows) * cols; }
};

struct Plan {
  int features;
  int n_rows, n_tables;
  std::vector<int> width;   // of every value
  std::vector<Param> params;
  std::vector<Op> ops;
  std::vector<int> batch_norms;        // positions in ops
  int output;                          // value id
  int stats_width;
  int widest;

  int outer_values() const { return n_rows + n_tables; }  // ids 1 .. outer_values()

  // code: see native_backend.py. Throws std::invalid_argument on anything it does not know.
  static Plan decode(const std::vector<int64_t>& code, const std::vector<double>& numbers);
};

// Which gradients are asked for.
struct Wanted {
  bool z = false, alpha = false;
  std::vector<char> rows, tables, params;
};

// Which values backward will read: those stay where forward put them, the rest share scratch rows.
enum Keep : int { kKeepNothing = 0, kKeepForInputs = 1, kKeepForParams = 2 };

// Where a tile's values are: rows of one of three areas.
enum Place : int { kKept = 0, kScratch = 1, kOuter = 2 };
struct Layout {
  std::vector<int> place;  // of every value
  std::vector<int> at;     // row within the area
  std::vector<int> norm;   // of every operation: row in kKept of the two rows of statistics a row norm keeps, or -1
  int rows[3];             // of each area
};

// How gradients flow through a program for what is wanted of it.
struct Flow {
  std::vector<char> need;              // of every value: it has a gradient
  std::vector<char> live;              // of every operation: its backward runs
  std::vector<std::vector<char>> add;  // of every operand: its gradient is added to, not overwritten
};
Flow analyse(const Plan& plan, const Wanted& wanted, bool need_z);

Layout value_layout(const Plan& plan, Keep keep);
// z and the rows and tables have places of their own, the results share rows as their gradients come and go.
Layout gradient_layout(const Plan& plan, const Flow& flow);

// What forward keeps for backward: the values (all that parameter gradients need, or less), or the state of each step.
enum Save : int { kSaveNothing = 0, kSaveValues = 1, kSaveStates = 2, kSaveValuesForInputs = 3 };
inline bool keeps_values(int save) { return save == kSaveValues || save == kSaveValuesForInputs; }
enum Prediction : int { kEps = 0, kX0 = 1, kV = 2 };

// One call. Tensors are dense and row-major, all of the state's type T; null where absent.
struct Call {
  const Plan* plan;
  long batch, samples, steps;     // rows = samples * batch
  const double* coefficients;     // [steps][3]
  const void* z;                  // [batch, features]
  const void* alpha;              // element (i, f) at alpha[i * alpha_row + f * alpha_col]
  long alpha_row, alpha_col;
  const void* noise;              // [samples, batch, features]
  uint64_t seed;
  const void* const* rows;        // each [batch, width]
  const void* const* tables;      // each [steps, width]; in prior_loss [batch, width]
  const void* const* params;
  bool bf16;                      // operands of matrix products rounded to bfloat16
  int save;
  const Layout* layout;           // of values
  int threads;

  void* z_hat;                    // [samples * batch, features]
  void* stats;                    // [steps, stats_width]
  void* saved;

  // backward
  const Wanted* wanted;
  const Flow* flow;
  const Layout* gradient_layout;
  const void* grad;               // [samples * batch, features]
  void* grad_z;                   // [samples * batch, features]; summed over samples by the caller
  void* grad_alpha;               // the same; [samples * batch, 1], summed over features, where alpha_col is 0
  void* const* grad_rows;         // each [samples * batch, width]
  void* const* grad_tables;       // each as its table
  void* const* grad_params;

  // prior_loss
  bool prior = false;
  int prediction = kEps;
  const void* signal;             // [batch]
  const void* sigma;              // [batch]
  double* loss;
};

// Rows per tile for a call of so many rows: a function of the call alone, never of the thread count.
struct Tiling {
  int vectors;  // SIMD vectors per tile
  int rows;     // rows per tile
  long tiles;
  long groups;  // groups of tiles: the unit that a thread owns and that accumulates parameter gradients
};

struct LstmKernels;

struct Kernels {
  const char* name;
  int vector_bytes;
  bool bf16;  // has bfloat16 products
  void (*forward_f32)(const Call&);
  void (*forward_f64)(const Call&);
  void (*backward_f32)(const Call&);
  void (*backward_f64)(const Call&);
  void (*prior_f32)(const Call&);
  void (*prior_f64)(const Call&);
  // test hooks
  void (*normals_f32)(uint64_t seed, long rows, long cols, uint32_t step, uint32_t sample, float* out);
  const LstmKernels* lstm;  // lstm.h
};

// Aligned scratch memory that one call uses; kept for the next call up to a limit.
void* acquire_workspace(size_t bytes);
void release_workspace(void* memory);

Tiling tiling(int vector_bytes, int element_bytes, long rows, int widest);

// Rows of the largest tile. What is saved has room for whole tiles of that size, so that its size is a simple function
// of the number of rows.
int largest_tile(int vector_bytes, int element_bytes);

const Kernels* kernels_baseline();
const Kernels* kernels_avx2();
const Kernels* kernels_avx512();
const Kernels* kernels_avx512_bf16();

}  // namespace gk
