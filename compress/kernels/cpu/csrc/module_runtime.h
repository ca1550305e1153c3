#pragma once
#include <nanobind/nanobind.h>

namespace compress {
void bind_runtime(nanobind::module_& m);
void bind_linears(nanobind::module_& m);  // what bind_runtime begins with
void bind_sampling(nanobind::module_& m);
}
