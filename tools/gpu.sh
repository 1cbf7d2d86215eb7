#!/usr/bin/env bash
# make gpu: verify, test, benchmark and profile on a CUDA machine, in stages with a time limit each, results as they come.
#   tools/gpu.sh PYTHON [install|verify|test|ceilings|ops|samplers|models|profile|all]
# PYTHON has a CUDA torch, setuptools and pip; no package registry is needed: the checkout is installed without its
# dependencies into a folder of its own. An extension that was brought along (genengine/_C.abi.so with CUDA kernels) is
# used as it is, else it is compiled, else left out (Triton runs without it).
#
# Everything goes to $OUT (default out/gpu): NAME.log of every part, results/, profiles/, verdicts/, and state.txt, a line
# per part that has ended. Run again after an interruption, it repeats no part that succeeded at this commit, so a hang
# costs one part and one limit. At the end $OUT/gpu.tar.gz holds all of it.
# Settings: FORCE=1 repeats everything; BUDGET= seconds of timing per row; COMPILE= modes of torch.compile; OPS_LIMIT=
# seconds per op; DEVICE=cpu for a rehearsal.
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=$(command -v "${1:?usage: tools/gpu.sh PYTHON [STAGE]}") || { echo "no such Python: $1" >&2; exit 2; }
python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python")
stage=${2:-all}
stages="install verify test ceilings ops samplers models profile"
[[ " $stages all " == *" $stage "* ]] || { echo "gpu: STAGE must be one of: $stages all; got $stage" >&2; exit 2; }
mkdir -p "${OUT:-$root/out/gpu}" && out=$(cd "${OUT:-$root/out/gpu}" && pwd)
work=${TMPDIR:-/tmp}/genengine-gpu
export GENENGINE_COMMIT=${GENENGINE_COMMIT:-$(git -C "$root" rev-parse --short=12 HEAD 2>/dev/null || echo unknown)}
export root python out work PYTHONPATH=$work/site
export MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=4294967296
unset TRITON_INTERPRET
budget=${BUDGET:-0.3} device=${DEVICE:-cuda}
status=0

part() { # name, seconds, command...: one part of a stage, unless it has succeeded at this commit
  local name=$1 limit=$2
  shift 2
  if [ -z "${FORCE:-}" ] && grep -qsx "$name $GENENGINE_COMMIT 0" "$out/state.txt"; then
    echo "== $name: done before (FORCE=1 repeats it)"
    return
  fi
  echo "== $name (at most ${limit} s)"
  mkdir -p "$work"
  (cd "$work" && timeout --kill-after=10 "$limit" "$@") 2>&1 | tee "$out/$name.log"
  local code=${PIPESTATUS[0]}
  [ "$code" -ne 124 ] || echo "== $name: stopped after ${limit} s; what it had written is kept"
  echo "$name $GENENGINE_COMMIT $code" >>"$out/state.txt"
  [ "$code" -eq 0 ] || status=1
}

wanted() { [ "$stage" = all ] || [ "$stage" = "$1" ]; }

genengine() { "$python" -m genengine "$@"; }

install() {
  rm -rf "$work/site" "$work/src" && mkdir -p "$work/src"
  tar cf - -C "$root" --exclude ./.git --exclude ./build --exclude ./out --exclude ./.venv . | tar xf - -C "$work/src"
  local flags="--quiet --no-deps --no-build-isolation --no-index --target $work/site"
  if "$python" "$root/tools/has_cuda_kernels.py" "$root/genengine/_C.abi.so"; then
    echo "using the extension that was brought along"
    GENENGINE_NO_EXT=1 "$python" -m pip install $flags "$work/src" &&
      cp "$root/genengine/_C.abi.so" "$work/site/genengine/" && rm -f "$work/site/genengine/_build.json"
  else
    MAX_JOBS=$(nproc) GENENGINE_CUDA=${GENENGINE_CUDA:-AUTO} "$python" -m pip install $flags "$work/src"
  fi || lay_out
  (cd "$work" && "$python" -m genengine env)
}

lay_out() { # where pip or setuptools are missing or too old: the package as a wheel would lay it out
  echo "pip could not install the checkout: laying it out by hand"
  rm -rf "$work/site" && mkdir -p "$work/site"
  cp -r "$root/genengine" "$work/site/genengine"
  cp -r "$root/kernels" "$root/benchmarks" "$work/site/genengine/"
}
export -f install lay_out

bench() { # suite, seconds for each op or model of it: a hang loses one of them
  for group in $(cd "$work" && genengine bench "$1" --list --device "$device" | awk '/^[^ ]/ {print $1}'); do
    part "bench-$group" "$2" "$python" -m genengine bench "$group" --device "$device" --budget "$budget" \
      --compile "${COMPILE:-default}" --save "$out/results"
  done
}

profile() {
  mkdir -p "$out/profiles"
  for target in adaln gated_adaln attention qk_norm_rope group_norm_silu sampler_step flow.step flow.sample ddpm.step; do
    part "profile-$target" 90 "$python" -m genengine profile "$target" --device "$device" \
      --html "$out/profiles/$target.html" --trace "$out/profiles/$target.json"
  done
}

if [ ! -d "$work/site/genengine" ]; then
  FORCE=1 part install 480 bash -c install
elif wanted install; then
  part install 480 bash -c install
fi
wanted verify && part verify 300 "$python" -m genengine verify --device "$device"
wanted test && part test 480 "$python" -m pytest -q -m "gpu or triton" -c "$root/pyproject.toml" --rootdir "$root" "$root/tests"
wanted ceilings && part ceilings 60 "$python" -m genengine bench ceilings --device "$device" --save "$out/results"
wanted ops && bench ops "${OPS_LIMIT:-120}"
wanted samplers && bench samplers 120
wanted models && bench models 180
wanted profile && profile
cp -rT "${GENENGINE_CACHE:-$HOME/.cache/genengine}" "$out/verdicts" 2>/dev/null
(cd "$work" && genengine report "$out"/results/*/*.json --html "$out/report.html") || echo "gpu: no report"
tar czf "$work/gpu.tar.gz" -C "$out" --exclude gpu.tar.gz . && mv "$work/gpu.tar.gz" "$out/" && echo "archive: $out/gpu.tar.gz"
exit $status
