// The storage dtypes that kernels take; they compute in float32.
#pragma once

namespace genengine {

enum class Type : int { f32, f16, bf16 };

}  // namespace genengine
