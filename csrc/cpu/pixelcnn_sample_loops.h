// The loops of pixelcnn_sample. No torch, no STL.
#pragma once
#include "cpu/isa.h"
#include "genengine/pixelcnn_sample.h"
#include "genengine/types.h"

namespace genengine {

// What a group of images goes through for the rows of the call. pairs: bfloat16 by AVX512-BF16's own product.
GENENGINE_LOOP(void, pixelcnn_sample, (const PixelCNNCall& call, int64_t group, Type type, bool pairs))

// Bytes of a value that products read.
constexpr int input_size(Type type, bool pairs) { return type == Type::bf16 && pairs ? 2 : 4; }

}  // namespace genengine
