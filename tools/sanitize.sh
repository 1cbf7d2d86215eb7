#!/usr/bin/env bash
# make sanitize: the CPU kernels built with AddressSanitizer and UndefinedBehaviorSanitizer, under the tests of every op.
#   tools/sanitize.sh PYTHON [pytest arguments]
# The package is laid out in build/sanitize/site as a wheel would lay it out, so that the ordinary build stays as it is.
# Triton's interpreter runs no code of ours that a sanitizer could watch: its tests are left out.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=${1:?usage: tools/sanitize.sh PYTHON [pytest arguments]}
python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python")
shift
build=$root/build/sanitize
site=$build/site

rm -rf "$site" && mkdir -p "$site"
cp -r "$root/genengine" "$site/genengine"
cp -r "$root/kernels" "$root/benchmarks" "$site/genengine/"
rm -f "$site/genengine/_C.abi.so"
PATH=$(dirname "$python"):$PATH
torch=$("$python" -c 'import importlib.util as u, pathlib; print(pathlib.Path(u.find_spec("torch").origin).parent)')
cmake -S "$root" -B "$build" -DCMAKE_BUILD_TYPE=RelWithDebInfo -DTORCH_DIR="$torch" -DGENENGINE_CUDA=OFF \
  -DGENENGINE_SANITIZE=address,undefined -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$site/genengine"
cmake --build "$build" -j "${MAX_JOBS:-2}"

compiler=$(sed -n 's/^CMAKE_CXX_COMPILER:.*=//p' "$build/CMakeCache.txt")
runtime=$("$compiler" -print-file-name=libasan.so):$("$compiler" -print-file-name=libubsan.so)
cd "$build"
# leaks: the interpreter's and torch's own would drown ours; poisoned memory is what is looked for
ASAN_OPTIONS=detect_leaks=0:halt_on_error=1:abort_on_error=1 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
  LD_PRELOAD=$runtime PYTHONPATH=$site "$python" -m pytest -q -m "not triton and not gpu" -n "${MAX_JOBS:-2}" \
  -c "$root/pyproject.toml" --rootdir "$root" -p no:cacheprovider "$@" "$root/tests/ops"
