// Arrays as Python passes them, checked before a kernel sees their memory. A wrong dtype or device is a TypeError,
// a wrong shape or value a ValueError; each names the argument.
#pragma once
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <initializer_list>
#include <string>

namespace compress {
namespace nb = nanobind;

using Input = nb::ndarray<nb::ro>;
using Output = nb::ndarray<>;

constexpr nb::dlpack::dtype kFloat32{uint8_t(nb::dlpack::dtype_code::Float), 32, 1};
constexpr nb::dlpack::dtype kFloat16{uint8_t(nb::dlpack::dtype_code::Float), 16, 1};
constexpr nb::dlpack::dtype kBfloat16{uint8_t(nb::dlpack::dtype_code::Bfloat), 16, 1};
constexpr nb::dlpack::dtype kUint16{uint8_t(nb::dlpack::dtype_code::UInt), 16, 1};
constexpr nb::dlpack::dtype kInt32{uint8_t(nb::dlpack::dtype_code::Int), 32, 1};
constexpr nb::dlpack::dtype kUint8{uint8_t(nb::dlpack::dtype_code::UInt), 8, 1};
constexpr nb::dlpack::dtype kInt8{uint8_t(nb::dlpack::dtype_code::Int), 8, 1};

[[noreturn]] inline void bad_type(const char* name, const std::string& rule) {
    throw nb::type_error((std::string(name) + " must be " + rule).c_str());
}
[[noreturn]] inline void bad_value(const char* name, const std::string& rule) {
    throw nb::value_error((std::string(name) + " must be " + rule).c_str());
}

// The memory of a contiguous CPU array of exactly this shape.
template <typename Array>
void* memory_of(const Array& array, const char* name, std::initializer_list<int64_t> shape) {
    if (array.device_type() != nb::device::cpu::value) bad_type(name, "on the CPU");
    std::string wanted, found;
    bool same = array.ndim() == shape.size();
    for (size_t i = 0; i < array.ndim(); ++i) found += (i ? ", " : "") + std::to_string(array.shape(i));
    size_t i = 0;
    for (int64_t extent : shape) {
        same = same && int64_t(array.shape(i)) == extent;
        wanted += (i++ ? ", " : "") + std::to_string(extent);
    }
    if (!same) bad_value(name, "of shape (" + wanted + "), not (" + found + ")");
    int64_t stride = 1;
    for (size_t d = array.ndim(); d-- > 0;) {
        if (array.shape(d) > 1 && array.stride(d) != stride) bad_value(name, "contiguous");
        stride *= int64_t(array.shape(d));
    }
    return const_cast<void*>(static_cast<const void*>(array.data()));
}

template <typename T> struct Expected;
template <> struct Expected<float> { static constexpr auto dtype = kFloat32; static constexpr auto name = "float32"; };
template <> struct Expected<int32_t> { static constexpr auto dtype = kInt32; static constexpr auto name = "int32"; };
template <> struct Expected<uint8_t> { static constexpr auto dtype = kUint8; static constexpr auto name = "uint8"; };
template <> struct Expected<int8_t> { static constexpr auto dtype = kInt8; static constexpr auto name = "int8"; };

template <typename T>
const T* input(const Input& array, const char* name, std::initializer_list<int64_t> shape) {
    if (array.dtype() != Expected<T>::dtype) bad_type(name, Expected<T>::name);
    return static_cast<const T*>(memory_of(array, name, shape));
}

template <typename T>
T* output(const Output& array, const char* name, std::initializer_list<int64_t> shape) {
    if (array.dtype() != Expected<T>::dtype) bad_type(name, Expected<T>::name);
    return static_cast<T*>(memory_of(array, name, shape));
}

// The two extents of a matrix, neither zero.
template <typename Array>
std::pair<int64_t, int64_t> extents(const Array& array, const char* name) {
    if (array.ndim() != 2 || array.shape(0) == 0 || array.shape(1) == 0) bad_value(name, "a matrix with no empty side");
    return {int64_t(array.shape(0)), int64_t(array.shape(1))};
}

inline int positive(const char* name, int value) {
    if (value < 1) bad_value(name, "at least 1, not " + std::to_string(value));
    return value;
}

// Whether the array is bfloat16; else it is float32.
inline bool is_bfloat16(const Input& array, const char* name) {
    if (array.dtype() == kBfloat16) return true;
    if (array.dtype() != kFloat32) bad_type(name, "float32 or bfloat16");
    return false;
}

}  // namespace compress
