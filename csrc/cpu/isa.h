// Which build of the loops runs: each is compiled for baseline, AVX2, AVX-512 and AVX-512 with its bfloat16 conversions
// (csrc/cpu/isa), in a namespace of that name.
#pragma once

// GENENGINE_LOOP(void, name, (args)): declares the builds of one loop.
#if defined(__x86_64__)
#define GENENGINE_LOOP(ret, name, args) \
  namespace baseline { ret name args; } \
  namespace avx2 { ret name args; }     \
  namespace avx512 { ret name args; }   \
  namespace avx512bf16 { ret name args; }
#define GENENGINE_PICK(name)                                                                 \
  (::genengine::pick(&::genengine::baseline::name, &::genengine::avx2::name, &::genengine::avx512::name, \
                     &::genengine::avx512bf16::name))
#else
#define GENENGINE_LOOP(ret, name, args) \
  namespace baseline { ret name args; }
#define GENENGINE_PICK(name) (&::genengine::baseline::name)
#endif

namespace genengine {

enum class Isa : int { baseline = 0, avx2 = 1, avx512 = 2, avx512bf16 = 3 };

// The instruction set in use: the best the CPU has, or GENENGINE_ISA=baseline|avx2|avx512|avx512bf16 if the CPU has it.
Isa current_isa();

// Whether AVX512-BF16's product of pairs is worth its use: AMD's takes as long as a fused multiply-add does, Intel's twice as
// long or more, which is no faster than float32. Also where GENENGINE_ISA or `cpu_isa` asks for that instruction set.
bool pairs_are_fast();

template <class F>
F pick(F baseline, F avx2, F avx512, F avx512bf16) {
  switch (current_isa()) {
    case Isa::avx512bf16: return avx512bf16;
    case Isa::avx512: return avx512;
    case Isa::avx2: return avx2;
    default: return baseline;
  }
}

}  // namespace genengine
