#!/usr/bin/env bash
# make gpu: build, verify, test and benchmark on a CUDA machine, in stages with a time limit each, results as they come.
#   tools/gpu.sh PYTHON [build|verify|test|bench|all]
# Needs neither pip nor a package registry: PYTHON has a CUDA torch, the package is laid out in $OUT/site as a wheel would
# lay it out. An extension that was brought along (genengine/_C.abi.so with CUDA kernels) is used as it is; otherwise it is
# built with cmake and nvcc, or left out (Triton runs without it).
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=$(command -v "${1:?usage: tools/gpu.sh PYTHON [STAGE]}") || exit 2
python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python")
stage=${2:-all}
mkdir -p "${OUT:-$root/out/gpu}" && out=$(cd "${OUT:-$root/out/gpu}" && pwd)
work=${TMPDIR:-/tmp}/genengine-gpu
export root python out work PYTHONPATH=$work/site
export GENENGINE_COMMIT=${GENENGINE_COMMIT:-$(git -C "$root" rev-parse --short=12 HEAD 2>/dev/null)}
unset TRITON_INTERPRET
status=0

run() { # name, seconds, command...
  local name=$1 limit=$2
  shift 2
  if [ "$stage" != all ] && [ "$stage" != "$name" ]; then return; fi
  echo "== $name (at most ${limit} s)"
  (cd "$work" && timeout --kill-after=10 "$limit" "$@") 2>&1 | tee "$out/$name.log"
  local code=${PIPESTATUS[0]}
  echo "$name $code" >>"$out/stages.txt"
  [ "$code" -eq 0 ] || status=1
}

lay_out() {
  rm -rf "$work/site" && mkdir -p "$work/site"
  cp -r "$root/genengine" "$work/site/genengine"
  cp -r "$root/kernels" "$root/benchmarks" "$work/site/genengine/"
}

build() {
  if "$python" "$root/tools/has_cuda_kernels.py" "$root/genengine/_C.abi.so"; then
    echo "using the extension that was brought along"
  else
    local torch
    torch=$("$python" -c 'import importlib.util as u, pathlib; print(pathlib.Path(u.find_spec("torch").origin).parent)')
    cmake -S "$root" -B "$work/build" -DCMAKE_BUILD_TYPE=Release -DTORCH_DIR="$torch" -DGENENGINE_CUDA=ON \
      -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$work/site/genengine" && cmake --build "$work/build" -j "$(nproc)" ||
      echo "no extension: going on with Triton alone"
  fi
  "$python" -m genengine env
}
export -f build

mkdir -p "$work"
[ -d "$work/site" ] && [ "$stage" != all ] && [ "$stage" != build ] || lay_out
run build 480 bash -c build
run verify 300 "$python" -m genengine verify --device cuda
run test 480 "$python" -m pytest -q -m "gpu or triton" -c "$root/pyproject.toml" --rootdir "$root" "$root/tests"
run bench 480 "$python" -m genengine bench all --device cuda --budget 1 --save "$out/results"
cp -rT "${GENENGINE_CACHE:-$HOME/.cache/genengine}" "$out/verdicts" 2>/dev/null
tar czf "$work/gpu.tar.gz" -C "$out" --exclude gpu.tar.gz . && mv "$work/gpu.tar.gz" "$out/" && echo "archive: $out/gpu.tar.gz"
exit $status
