#pragma once
#include <nanobind/nanobind.h>

namespace compress {
void bind_runtime(nanobind::module_& m);
}
