// What every binding needs to reject bad tensors with an error for the reader: the argument's name,
// what came and what is wanted. All checks stand before the first allocation or write.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "common/dtype.h"
#include "params/strided.h"

namespace gemma2 {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Throws std::invalid_argument (Python: ValueError) with the parts streamed into one text.
template <typename... Parts>
void check(bool ok, const Parts&... parts) {
  if (ok) [[likely]]
    return;
  std::ostringstream text;
  ((text << parts), ...);
  throw std::invalid_argument(text.str());
}

inline const char* dtype_name(ScalarType t) {
  switch (t) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Bool:
      return "bool";
    default:
      return torch::headeronly::toString(t);
  }
}

// A shape to compare and to stream into a text: written out only if an error is.
struct [[gnu::visibility("hidden")]] Shape {
  const Tensor& tensor;

  bool operator==(const Shape& other) const {
    const auto a = tensor.sizes(), b = other.tensor.sizes();
    bool same = a.size() == b.size();
    for (size_t i = 0; same && i < a.size(); ++i) same = a[i] == b[i];
    return same;
  }
};
inline Shape shape_of(const Tensor& t) { return {t}; }
inline std::ostream& operator<<(std::ostream& text, const Shape& shape) {
  text << "[";
  for (int64_t i = 0; i < shape.tensor.dim(); ++i) text << (i ? ", " : "") << shape.tensor.size(i);
  return text << "]";
}

// float32, bfloat16 or float16, or an error.
inline DType float_dtype(const char* op, const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::f16;
    default:
      check(false, op, ": ", name, " is ", dtype_name(t.scalar_type()),
            ": float32, bfloat16 or float16 is wanted");
  }
  return DType::f32;
}

inline void check_dtype(const char* op, const char* name, const Tensor& t, ScalarType wanted) {
  check(t.scalar_type() == wanted, op, ": ", name, " is ", dtype_name(t.scalar_type()), ": ",
        dtype_name(wanted), " is wanted");
}
inline void check_same_dtype(const char* op, const char* a_name, const Tensor& a,
                             const char* b_name, const Tensor& b) {
  check(a.scalar_type() == b.scalar_type(), op, ": ", a_name, " is ", dtype_name(a.scalar_type()),
        " and ", b_name, " is ", dtype_name(b.scalar_type()), ": they must be the same");
}
inline void check_dim(const char* op, const char* name, const Tensor& t, int64_t dim,
                      const char* layout) {
  check(t.dim() == dim, op, ": ", name, " has shape ", shape_of(t), ": ", layout, " is wanted");
}
inline std::string device_name(const Tensor& t) {
  if (t.is_cpu()) return "the CPU";
  if (t.is_cuda()) return "CUDA device " + std::to_string(t.get_device_index());
  return "a device of another kind";
}
// The first argument's device, and then the same for all others.
inline void check_device(const char* op, const char* name, const Tensor& t) {
  if (t.is_cpu() || t.is_cuda()) [[likely]]
    return;
  check(false, op, ": ", name, " is on ", device_name(t), ": the CPU or a CUDA device is wanted");
}
inline void check_device(const char* op, const char* name, const Tensor& t, const char* first_name,
                         const Tensor& first) {
  if (t.is_cpu() && first.is_cpu()) [[likely]]
    return;
  if (t.is_cuda() && first.is_cuda() && t.get_device_index() == first.get_device_index()) return;
  check(false, op, ": ", name, " is on ", device_name(t), ", ", first_name, " is on ",
        device_name(first), ": they must be on the same device");
}
inline void check_dense_last(const char* op, const char* name, const Tensor& t) {
  check(t.dim() == 0 || t.size(t.dim() - 1) <= 1 || t.stride(t.dim() - 1) == 1, op, ": ", name,
        " has stride ", t.dim() ? t.stride(t.dim() - 1) : 0,
        " in its last dimension: 1 is wanted (call .contiguous())");
}
inline void check_contiguous(const char* op, const char* name, const Tensor& t) {
  check(t.is_contiguous(), op, ": ", name, " must be contiguous");
}

inline Strides3 strides3(const Tensor& t) { return {t.stride(0), t.stride(1), t.stride(2)}; }

// A number that the kernels take as float32, finite there too.
inline bool is_finite_float(double x) { return std::isfinite(static_cast<float>(x)); }
// The same, and above 0 there.
inline bool is_positive_float(double x) { return is_finite_float(x) && static_cast<float>(x) > 0; }

// Positions and lengths are added and subtracted, which must not overflow. Only on the CPU: on
// CUDA, to look at them here, the host would have to wait; there they read and write no wrong
// memory.
constexpr int64_t kFarthest = int64_t{1} << 62;
inline void check_positions(const char* op, const char* name, const Tensor& dense) {
  if (!dense.is_cpu()) return;
  const int64_t* values = static_cast<const int64_t*>(dense.const_data_ptr());
  for (int64_t i = 0, n = dense.numel(); i < n; ++i)
    check(values[i] >= -kFarthest && values[i] <= kFarthest, op, ": ", name, " holds ", values[i],
          ": numbers from -2^62 to 2^62 are wanted");
}

// The bytes from a tensor's first element to its last.
struct Extent {
  uintptr_t begin, end;
};
inline Extent extent_of(const Tensor& t, int64_t element_size) {
  const auto sizes = t.sizes(), strides = t.strides();
  const uintptr_t begin = reinterpret_cast<uintptr_t>(t.const_data_ptr());
  int64_t last = 0;
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (sizes[i] == 0) return {begin, begin};
    if (sizes[i] > 1) last += (sizes[i] - 1) * strides[i];
  }
  return {begin, begin + (last + 1) * element_size};
}
inline int64_t element_size(const Tensor& t) {
  return t.scalar_type() == ScalarType::Float ? 4 : 2;
}

// What an operator writes to must be apart from what it reads meanwhile. Both are of a float dtype.
inline void check_apart(const char* op, const char* out_name, const Tensor& out, const char* name,
                        const Tensor& t) {
  const Extent a = extent_of(out, element_size(out)), b = extent_of(t, element_size(t));
  check(a.end <= b.begin || b.end <= a.begin || a.begin == a.end || b.begin == b.end, op, ": ",
        name, " and ", out_name, ", which is written to, share memory: pass a copy (", name,
        ".clone())");
}

// torch's own text would be lost on the way here (stable ABI), so this says what could not be had.
inline Tensor new_result(const char* op, const Tensor& like,
                         torch::headeronly::IntHeaderOnlyArrayRef shape, ScalarType dtype) {
  try {
    return torch::stable::new_empty(like, shape, dtype);
  } catch (const std::exception&) {
    std::ostringstream text;
    for (size_t i = 0; i < shape.size(); ++i) text << (i ? ", " : "") << shape[i];
    throw std::runtime_error(std::string(op) + ": torch cannot allocate the result, [" +
                             text.str() + "] of " + dtype_name(dtype) + ": out of memory?");
  }
}
// The tensor itself where it is dense, else a copy.
inline Tensor dense_of(const char* op, const char* name, const Tensor& t) {
  if (t.is_contiguous()) return t;
  try {
    return torch::stable::contiguous(t);
  } catch (const std::exception&) {
    std::ostringstream text;
    text << op << ": " << name << " of shape " << shape_of(t)
         << " is not contiguous, and torch cannot allocate a copy: out of memory?";
    throw std::runtime_error(text.str());
  }
}

// Rows of a tensor whose leading dimensions fold into one stride: [.., n] -> [rows, n].
struct Rows {
  int64_t rows, stride;
  Tensor tensor;  // keeps a copy alive where one was needed
};
inline Rows as_rows(const char* op, const char* name, const Tensor& t) {
  const int64_t n = t.size(t.dim() - 1);
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < t.dim(); ++i)
    check(!__builtin_mul_overflow(rows, t.size(i), &rows), op, ": ", name, " has shape ",
          shape_of(t), ": fewer than 2^63 rows are wanted");
  if (t.is_contiguous()) return {rows, n, t};
  if (t.dim() == 2 && t.stride(1) == 1) return {rows, t.stride(0), t};
  return {rows, n, dense_of(op, name, t)};
}

}  // namespace gemma2
