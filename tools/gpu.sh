#!/usr/bin/env bash
# make gpu: build, verify, test and benchmark on a CUDA machine, in stages with a time limit each, results as they come.
#   tools/gpu.sh PYTHON [build|verify|test|bench|all]
# Needs no package registry: PYTHON has a CUDA torch. An extension that was brought along (genengine/_C.abi.so with CUDA
# kernels) is used as it is; otherwise it is built with nvcc, or left out (Triton runs without it).
set -uo pipefail
cd "$(dirname "$0")/.."
python=${1:?usage: tools/gpu.sh PYTHON [STAGE]}
stage=${2:-all}
out=${OUT:-out/gpu}
mkdir -p "$out"
status=0

run() { # name, seconds, command...
  local name=$1 limit=$2
  shift 2
  if [ "$stage" != all ] && [ "$stage" != "$name" ]; then return; fi
  echo "== $name (at most ${limit} s)"
  timeout --kill-after=10 "$limit" "$@" 2>&1 | tee "$out/$name.log"
  local code=${PIPESTATUS[0]}
  echo "$name $code" >>"$out/stages.txt"
  [ "$code" -eq 0 ] || status=1
}

install_checkout() {
  local build=AUTO
  if [ -f genengine/_C.abi.so ] && GENENGINE_PROBE=1 "$python" tools/has_cuda_kernels.py; then build=KEEP; fi
  if [ "$build" = KEEP ]; then cp genengine/_C.abi.so "$out/_C.keep"; fi
  GENENGINE_NO_EXT=$([ "$build" = KEEP ] && echo 1 || echo 0) \
    "$python" -m pip install -q --no-deps --no-build-isolation --no-index -e . || return 1
  if [ "$build" = KEEP ]; then mv "$out/_C.keep" genengine/_C.abi.so; fi
  "$python" -m genengine env
}
export -f install_checkout
export python out

run build 480 bash -c install_checkout
run verify 300 "$python" -m genengine verify --device cuda
run test 480 "$python" -m pytest -q -m gpu tests
run bench 480 "$python" -m genengine bench all --device cuda --budget 1 --save "$out/results"
(cd "$out" && tar czf gpu.tar.gz --exclude gpu.tar.gz .) && echo "archive: $out/gpu.tar.gz"
exit $status
