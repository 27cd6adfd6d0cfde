// Python's view of the kernels: addresses and sizes in, nothing of torch. The Python side (backends/native_backend.py)
// has checked dtypes, devices and shapes, and keeps the tensors alive for the call.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "dispatch.h"
#include "parallel.h"

namespace py = pybind11;
using Address = uintptr_t;

void bind_lstm(py::module_& m);  // bindings_lstm.cpp

namespace {

using gk::Call;
using gk::Flow;
using gk::Kernels;
using gk::Plan;
using gk::Wanted;

const void* in(Address a) { return reinterpret_cast<const void*>(a); }
void* out(Address a) { return reinterpret_cast<void*>(a); }

std::vector<const void*> ins(const std::vector<Address>& all) {
  std::vector<const void*> pointers;
  for (Address a : all) pointers.push_back(in(a));
  return pointers;
}
std::vector<void*> outs(const std::vector<Address>& all) {
  std::vector<void*> pointers;
  for (Address a : all) pointers.push_back(out(a));
  return pointers;
}

// Addresses of tensors, or None if one of them is not what the kernels take: of this shape and dtype, dense, on the CPU.
// An address tells a kernel nothing of what lies there, and asking thirty tensors from Python takes as long as a small
// sampler. Tensors are seen through their Python attributes alone.
py::object dense_addresses(const py::sequence& tensors, const py::tuple& shapes, const py::handle& dtype) {
  static PyObject* const shape_name = PyUnicode_InternFromString("shape");
  static PyObject* const dtype_name = PyUnicode_InternFromString("dtype");
  static PyObject* const is_cpu_name = PyUnicode_InternFromString("is_cpu");
  static PyObject* const is_contiguous_name = PyUnicode_InternFromString("is_contiguous");
  static PyObject* const data_ptr_name = PyUnicode_InternFromString("data_ptr");
  const auto got = [](PyObject* found) {
    if (!found) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(found);
  };
  const size_t n = tensors.size();
  if (shapes.size() != n) return py::none();
  py::list addresses(n);
  for (size_t i = 0; i < n; ++i) {
    const py::object tensor = tensors[i];
    const int same = PyObject_RichCompareBool(got(PyObject_GetAttr(tensor.ptr(), shape_name)).ptr(),
                                              PyTuple_GET_ITEM(shapes.ptr(), Py_ssize_t(i)), Py_EQ);
    if (same < 0) throw py::error_already_set();
    if (!same || !got(PyObject_GetAttr(tensor.ptr(), dtype_name)).is(dtype) ||
        got(PyObject_GetAttr(tensor.ptr(), is_cpu_name)).ptr() != Py_True ||
        got(PyObject_CallMethodNoArgs(tensor.ptr(), is_contiguous_name)).ptr() != Py_True)
      return py::none();
    PyList_SET_ITEM(addresses.ptr(), Py_ssize_t(i), got(PyObject_CallMethodNoArgs(tensor.ptr(), data_ptr_name)).release().ptr());
  }
  return std::move(addresses);
}

// A gradient is wanted where its address is not null.
std::vector<char> given(const std::vector<Address>& all) {
  std::vector<char> flags;
  for (Address a : all) flags.push_back(a != 0);
  return flags;
}

bool any(const std::vector<char>& flags) {
  for (char flag : flags)
    if (flag) return true;
  return false;
}

// A program together with the kernels that run it.
struct Program {
  Plan plan;
  const Kernels* kernels;
  gk::Layout layouts[3];  // by gk::Keep
  Program(const std::vector<int64_t>& code, const std::vector<double>& numbers, const std::string& isa)
      : plan(Plan::decode(code, numbers)), kernels(&gk::kernels_named(isa)) {
    for (int keep = 0; keep < 3; ++keep) layouts[keep] = gk::value_layout(plan, gk::Keep(keep));
  }
  // Forward places values for what is saved; a backward that computes them again, for what is wanted.
  const gk::Layout& layout(int save) const {
    return layouts[save == gk::kSaveValues            ? gk::kKeepForParams
                   : save == gk::kSaveValuesForInputs ? gk::kKeepForInputs
                                                      : gk::kKeepNothing];
  }
};

// The inputs that forward, backward and prior_loss share.
struct Inputs {
  std::vector<const void*> rows, tables, params;
  Call call{};
  Inputs(const Program& program, long batch, long samples, long steps, Address z, Address noise, uint64_t seed,
         const std::vector<Address>& row_list, const std::vector<Address>& table_list,
         const std::vector<Address>& param_list, bool bf16, int threads)
      : rows(ins(row_list)), tables(ins(table_list)), params(ins(param_list)) {
    const Plan& plan = program.plan;
    if (int(rows.size()) != plan.n_rows || int(tables.size()) != plan.n_tables || params.size() != plan.params.size())
      throw std::invalid_argument("rows, tables or params do not match the program");
    if (batch < 1 || samples < 1 || steps < 1 || threads < 1)
      throw std::invalid_argument("batch, samples, steps and threads must be at least 1");
    call.plan = &plan;
    call.batch = batch;
    call.samples = samples;
    call.steps = steps;
    call.z = in(z);
    call.noise = in(noise);
    call.seed = seed;
    call.rows = rows.data();
    call.tables = tables.data();
    call.params = params.data();
    call.bf16 = bf16;
    call.threads = threads;
  }
};

void set_alpha(Call& call, Address alpha, long row, long col) {
  call.alpha = in(alpha);
  call.alpha_row = row;
  call.alpha_col = col;
}

void set_coefficients(Call& call, const std::vector<double>& coefficients) {
  if (long(coefficients.size()) != 3 * call.steps) throw std::invalid_argument("coefficients: expected 3 per step");
  call.coefficients = coefficients.data();
}

void forward(const Program& program, bool f64, long batch, long samples, const std::vector<double>& coefficients,
             Address z, Address alpha, long alpha_row, long alpha_col, Address noise, uint64_t seed,
             const std::vector<Address>& rows, const std::vector<Address>& tables, const std::vector<Address>& params,
             bool bf16, int save, int threads, Address z_hat, Address stats, Address saved) {
  Inputs inputs(program, batch, samples, long(coefficients.size()) / 3, z, noise, seed, rows, tables, params, bf16,
                threads);
  Call& call = inputs.call;
  set_alpha(call, alpha, alpha_row, alpha_col);
  set_coefficients(call, coefficients);
  call.save = save;
  call.layout = &program.layout(save);
  call.z_hat = out(z_hat);
  call.stats = out(stats);
  call.saved = out(saved);
  py::gil_scoped_release nogil;
  (f64 ? program.kernels->forward_f64 : program.kernels->forward_f32)(call);
}

void backward(const Program& program, bool f64, long batch, long samples, const std::vector<double>& coefficients,
              Address z, Address alpha, long alpha_row, long alpha_col, Address noise, uint64_t seed,
              const std::vector<Address>& rows, const std::vector<Address>& tables, const std::vector<Address>& params,
              bool bf16, int save, int threads, Address stats, Address saved, Address grad, Address grad_z,
              Address grad_alpha, const std::vector<Address>& grad_rows, const std::vector<Address>& grad_tables,
              const std::vector<Address>& grad_params) {
  Inputs inputs(program, batch, samples, long(coefficients.size()) / 3, z, noise, seed, rows, tables, params, bf16,
                threads);
  Call& call = inputs.call;
  set_alpha(call, alpha, alpha_row, alpha_col);
  set_coefficients(call, coefficients);
  call.save = save;
  call.stats = out(stats);
  call.saved = out(saved);
  call.grad = in(grad);
  call.grad_z = out(grad_z);
  call.grad_alpha = out(grad_alpha);
  const Wanted wanted{grad_z != 0, grad_alpha != 0, given(grad_rows), given(grad_tables), given(grad_params)};
  const Flow flow = gk::analyse(program.plan, wanted, wanted.z || wanted.alpha || call.steps > 1);
  const std::vector<void*> to_rows = outs(grad_rows), to_tables = outs(grad_tables), to_params = outs(grad_params);
  const bool params_wanted = any(wanted.params);
  if (save == gk::kSaveValuesForInputs && params_wanted)
    throw std::invalid_argument("parameter gradients are wanted, but forward kept only what inputs need");
  call.layout = gk::keeps_values(save) ? &program.layout(save)
                                       : &program.layouts[params_wanted ? gk::kKeepForParams : gk::kKeepForInputs];
  const gk::Layout gradients = gk::gradient_layout(program.plan, flow);
  call.gradient_layout = &gradients;
  call.wanted = &wanted;
  call.flow = &flow;
  call.grad_rows = to_rows.data();
  call.grad_tables = to_tables.data();
  call.grad_params = to_params.data();
  py::gil_scoped_release nogil;
  (f64 ? program.kernels->backward_f64 : program.kernels->backward_f32)(call);
}

double prior_loss(const Program& program, bool f64, long batch, Address z, Address noise, uint64_t seed,
                  Address signal, Address sigma, const std::vector<Address>& rows, const std::vector<Address>& tables,
                  const std::vector<Address>& params, int prediction, bool bf16, int threads, Address stats,
                  bool gradients, Address grad_z, const std::vector<Address>& grad_rows,
                  const std::vector<Address>& grad_tables, const std::vector<Address>& grad_params) {
  Inputs inputs(program, batch, 1, 1, z, noise, seed, rows, tables, params, bf16, threads);
  Call& call = inputs.call;
  double loss = 0.0;
  call.prior = true;
  call.prediction = prediction;
  call.signal = in(signal);
  call.sigma = in(sigma);
  call.stats = out(stats);
  call.loss = &loss;
  call.grad_z = out(grad_z);
  const Wanted wanted{grad_z != 0, false, given(grad_rows), given(grad_tables), given(grad_params)};
  const Flow flow = gk::analyse(program.plan, wanted, wanted.z);
  const std::vector<void*> to_rows = outs(grad_rows), to_tables = outs(grad_tables), to_params = outs(grad_params);
  const gk::Keep keep = !gradients ? gk::kKeepNothing : any(wanted.params) ? gk::kKeepForParams : gk::kKeepForInputs;
  const gk::Layout gradient_layout = gk::gradient_layout(program.plan, flow);
  call.layout = &program.layouts[keep];
  call.gradient_layout = &gradient_layout;
  call.wanted = gradients ? &wanted : nullptr;
  call.flow = &flow;
  call.grad_rows = to_rows.data();
  call.grad_tables = to_tables.data();
  call.grad_params = to_params.data();
  {
    py::gil_scoped_release nogil;
    (f64 ? program.kernels->prior_f64 : program.kernels->prior_f32)(call);
  }
  return loss;
}

// As PyTorch's BatchNorm updates them: running = (1 − momentum) running + momentum new, the variance unbiased. A negative
// momentum stands for a cumulative average. A layer may occur twice: each occurrence is a call of its own.
template <class Running, class Stats>
void update_running(const std::vector<Address>& means, const std::vector<Address>& vars,
                    const std::vector<Address>& counters, const Stats* stats, long steps,
                    const std::vector<long>& widths, const std::vector<double>& momenta, long rows) {
  const double unbiased = double(rows) / double(rows - 1);
  for (long k = 0; k < steps; ++k) {
    for (size_t i = 0; i < widths.size(); stats += 2 * widths[i], ++i) {
      Running* mean = static_cast<Running*>(out(means[i]));
      Running* var = static_cast<Running*>(out(vars[i]));
      if (!mean) continue;
      const int64_t seen = ++*static_cast<int64_t*>(out(counters[i]));
      const double m = momenta[i] >= 0.0 ? momenta[i] : 1.0 / double(seen);
      for (long c = 0; c < widths[i]; ++c) {
        mean[c] = Running(m * stats[c] + (1.0 - m) * mean[c]);
        var[c] = Running(m * (stats[widths[i] + c] * unbiased) + (1.0 - m) * var[c]);
      }
    }
  }
}

void update_running_stats(bool running_f64, bool stats_f64, const std::vector<Address>& means,
                          const std::vector<Address>& vars, const std::vector<Address>& counters, Address stats,
                          long steps, const std::vector<long>& widths, const std::vector<double>& momenta, long rows) {
  const size_t layers = widths.size();
  if (means.size() != layers || vars.size() != layers || counters.size() != layers || momenta.size() != layers ||
      rows < 2)
    throw std::invalid_argument("means, variances, counters, widths and momenta do not match, or rows < 2");
  const auto* f32 = static_cast<const float*>(in(stats));
  const auto* f64 = static_cast<const double*>(in(stats));
  if (running_f64)
    stats_f64 ? update_running<double>(means, vars, counters, f64, steps, widths, momenta, rows)
              : update_running<double>(means, vars, counters, f32, steps, widths, momenta, rows);
  else
    stats_f64 ? update_running<float>(means, vars, counters, f64, steps, widths, momenta, rows)
              : update_running<float>(means, vars, counters, f32, steps, widths, momenta, rows);
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "CPU kernels of gdpd_kernels; used through gdpd_kernels.backends.native_backend.";
  // Raised with every change of a signature, of the code of programs, or of what a layout means.
  m.attr("INTERFACE") = 2;
  py::class_<Program>(m, "Program")
      .def(py::init<const std::vector<int64_t>&, const std::vector<double>&, const std::string&>())
      .def_property_readonly("instruction_set", [](const Program& p) { return p.kernels->name; })
      .def_property_readonly("stats_width", [](const Program& p) { return p.plan.stats_width; })
      // Numbers kept for backward: per step and row of whole tiles, rows of the largest tile, and room at the end, since
      // values are read in whole blocks of features.
      .def("saved_shape",
           [](const Program& p, bool f64, int save) {
             const int element = f64 ? 8 : 4, tile = gk::largest_tile(p.kernels->vector_bytes, element);
             const int kept = save == gk::kSaveNothing         ? 0
                              : gk::keeps_values(save) ? p.layout(save).rows[gk::kKept]
                                                       : p.plan.features;
             return std::make_tuple(kept, tile, save == gk::kSaveNothing ? 0 : tile * p.kernels->vector_bytes / element);
           })
      .def("tile_rows", [](const Program& p, bool f64, long rows) {
        return gk::tiling(p.kernels->vector_bytes, f64 ? 8 : 4, rows, p.plan.widest).rows;
      });
  m.def("dense_addresses", &dense_addresses);
  m.def("forward", &forward);
  m.def("backward", &backward);
  m.def("prior_loss", &prior_loss);
  m.def("update_running_stats", &update_running_stats);
  m.def("normals", [](const std::string& isa, uint64_t seed, long rows, long cols, uint32_t step, uint32_t sample,
                      Address to) {
    gk::kernels_named(isa).normals_f32(seed, rows, cols, step, sample, static_cast<float*>(out(to)));
  });
  m.def("instruction_sets", [] {
    std::vector<std::pair<std::string, bool>> sets;
    for (const auto& set : gk::instruction_sets()) sets.emplace_back(set.name, set.usable);
    return sets;
  });
  m.def("use_openmp", [](Address parallel, Address thread, Address threads) {
    gk::use_openmp(out(parallel), out(thread), out(threads));
  });
  m.def("uses_openmp", &gk::uses_openmp);
  bind_lstm(m);
}
