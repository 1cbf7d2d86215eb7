#!/usr/bin/env bash
# make gpu: verify, test, benchmark and profile on a CUDA machine, in stages with a time limit each, results as they come.
#   tools/gpu.sh PYTHON [install|verify|test|ceilings|goals|ops|samplers|models|sanitize|profile|all]
# PYTHON has a CUDA torch, setuptools and pip; no package registry is needed: the checkout is installed without its
# dependencies into a folder of its own. An extension that was brought along (genengine/_C.abi.so with CUDA kernels) is
# used as it is, else it is compiled, else left out (Triton runs without it).
#
# Everything goes to $OUT (default out/gpu): NAME.log of every part, results/, profiles/, verdicts/, and state.txt, a line
# as a part starts and one as it ends. Run again after an interruption, it repeats no part that succeeded with this very
# source (commit and edits), and benchmarks go on at the row where they stopped, so a hang costs one part and one limit.
# At the end $OUT/gpu.tar.gz holds all of it.
# Settings: FORCE=1 repeats everything; BUDGET= seconds of timing per row; COMPILE= modes of torch.compile; OPS_LIMIT=
# seconds per op; SANITIZE_LIMIT= seconds per tool of compute-sanitizer; DEVICE=cpu for a rehearsal.
# Then, with results/ committed: tools/fill_fastest.py has the choice of kernels follow them, tools/gpu_goals.py makes
# benchmarks/GPU_GOALS.md.
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=$(command -v "${1:?usage: tools/gpu.sh PYTHON [STAGE]}") || { echo "no such Python: $1" >&2; exit 2; }
python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python")
stage=${2:-all}
stages="install verify test ceilings goals ops samplers models sanitize profile"
[[ " $stages all " == *" $stage "* ]] || { echo "gpu: STAGE must be one of: $stages all; got $stage" >&2; exit 2; }
mkdir -p "${OUT:-$root/out/gpu}" && out=$(cd "${OUT:-$root/out/gpu}" && pwd)
work=${TMPDIR:-/tmp}/genengine-gpu

in_git() { [ "$(git -C "$root" rev-parse --show-toplevel 2>/dev/null)" = "$(cd "$root" && pwd -P)" ]; }

edits() { # what was changed since the commit: nothing at all if nothing was
  git -C "$root" diff HEAD --binary --no-ext-diff --no-textconv
  (cd "$root" && git ls-files --others --exclude-standard -z | xargs -0 -r sha256sum --)
}

files() { # without git: everything that could be installed
  (cd "$root" && find . \( -name ".?*" -o -name build -o -name out -o -name runs -o -name __pycache__ -o -name "*.egg-info" \
    -o -name "*.abi.so" -o -name _build.json \) -prune -o -type f -print0 | sort -z | xargs -0 -r sha256sum --)
}

source_stamp() { # sets GENENGINE_COMMIT, GENENGINE_DIRTY and stamp, which tells these from any other files
  local changes
  if in_git; then
    export GENENGINE_COMMIT=${GENENGINE_COMMIT:-$(git -C "$root" rev-parse --short=12 HEAD)}
    changes=$(edits | sha256sum)
    [ "$changes" = "$(sha256sum </dev/null)" ] || GENENGINE_DIRTY=1
  else
    export GENENGINE_COMMIT=${GENENGINE_COMMIT:-unknown}
    changes=$(files | sha256sum)
  fi
  export GENENGINE_DIRTY=${GENENGINE_DIRTY:-0}
  stamp=$GENENGINE_COMMIT-$({ echo "$changes"; cat "$root/genengine/_C.abi.so" 2>/dev/null; } | sha256sum | cut -c1-12)
}

source_stamp
export root python out work stamp PYTHONPATH=$work/site
export MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=4294967296
unset TRITON_INTERPRET
budget=${BUDGET:-0.3} device=${DEVICE:-cuda}
status=0

part() { # name, seconds, command...: one part of a stage, unless it has succeeded with this source
  local name=$1 limit=$2
  shift 2
  if [ -z "${FORCE:-}" ] && grep -qsx "$name $stamp 0" "$out/state.txt"; then
    echo "== $name: done before (FORCE=1 repeats it)"
    return
  fi
  echo "== $name (at most ${limit} s)"
  mkdir -p "$work"
  echo "$name $stamp started" >>"$out/state.txt"
  (cd "$work" && timeout --kill-after=10 "$limit" "$@") 2>&1 | tee "$out/$name.log"
  ended "$name" "${PIPESTATUS[0]}" "$limit"
}

ended() { # name, exit status, seconds: one line of the state
  case $2 in
    124) echo "== $1: stopped after $3 s; what it had written is kept" ;;
    137) echo "== $1: killed, for memory or as it did not stop after $3 s; what it had written is kept" ;;
  esac
  echo "$1 $stamp $2" >>"$out/state.txt"
  [ "$2" -eq 0 ] || status=1
}

stopped_here() { # name: this part was last started with this very source, so that what it left can be used
  [ -z "${FORCE:-}" ] && [ "$(grep -s "^$1 " "$out/state.txt" | tail -n 1 | cut -d ' ' -f 2)" = "$stamp" ]
}

wanted() { [ "$stage" = all ] || [ "$stage" = "$1" ]; }

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
  fi || lay_out || return
  echo "$stamp" >"$work/site/stamp.txt"
  (cd "$work" && "$python" -m genengine env)
}

lay_out() { # where pip or setuptools are missing or too old: the package as a wheel would lay it out
  echo "pip could not install the checkout: laying it out by hand"
  rm -rf "$work/site" && mkdir -p "$work/site" && cp -r "$root/genengine" "$work/site/genengine" &&
    cp -r "$root/kernels" "$root/benchmarks" "$work/site/genengine/"
}
export -f install lay_out

bench() { # suite, seconds for each op or model of it: a hang loses one of them
  local groups code group resume
  groups=$(cd "$work" && timeout --kill-after=10 120 "$python" -m genengine bench "$1" --list --device "$device" \
    2>"$out/list-$1.log")
  code=$?
  groups=$(awk '/^[^ ]/ {print $1}' <<<"$groups")
  if [ "$code" -ne 0 ] || [ -z "$groups" ]; then
    echo "== list-$1: exit status $code, names: ${groups:-none}" | tee -a "$out/list-$1.log"
    ended "list-$1" "$((code ? code : 1))" 120
    return
  fi
  for group in $groups; do
    resume=
    ! stopped_here "bench-$group" || resume=--resume
    part "bench-$group" "$2" "$python" -m genengine bench "$group" --device "$device" --budget "$budget" \
      --compile "${COMPILE:-default}" --save "$out/results" --strict $resume
  done
}

profile() {
  mkdir -p "$out/profiles"
  for target in adaln gated_adaln attention qk_norm_rope group_norm_silu sampler_step flow.step flow.sample ddpm.step; do
    part "profile-$target" 90 "$python" -m genengine profile "$target" --device "$device" \
      --html "$out/profiles/$target.html" --trace "$out/profiles/$target.json"
  done
}

verify() { # kernels with barriers of their own alone and last: one that hangs, or takes the GPU down, costs itself alone
  local name alone="pixelcnn_sample attention" skip=()
  for name in $alone; do skip+=(--skip "$name"); done
  part verify 300 "$python" -m genengine verify "${skip[@]}" --device "$device"
  for name in $alone; do part "verify-$name" 120 "$python" -m genengine verify "$name" --device "$device"; done
}

tests() { # Hopper's attention in a process of its own, for the same reason
  local hopper="$root/tests/gpu/test_hopper_attention.py"
  local run=("$python" -m pytest -q -m "gpu or triton" -c "$root/pyproject.toml" --rootdir "$root")
  part test 480 "${run[@]}" --ignore "$hopper" "$root/tests"
  part test-hopper 240 "${run[@]}" "$hopper"
}

goals() { # the rows of benchmarks/GPU_GOALS.md alone, in one short stage
  local name text words resume
  while IFS=$'\t' read -r name text; do
    eval "words=($text)" # labels are quoted
    resume=
    ! stopped_here "goals-$name" || resume=--resume
    part "goals-$name" "${OPS_LIMIT:-400}" "$python" -m "${words[@]}" --device "$device" --budget "$budget" \
      --compile "${COMPILE:-default}" --save "$out/results" --strict $resume
  done < <("$python" "$root/tools/gpu_goals.py" --commands)
}

sanitize() { # the case set of every kernel, under each tool; each tensor an allocation: its bounds are then seen
  local tool
  command -v compute-sanitizer >/dev/null || { echo "== sanitize: there is no compute-sanitizer"; return; }
  for tool in memcheck racecheck initcheck; do
    part "sanitize-$tool" "${SANITIZE_LIMIT:-300}" env GENENGINE_CACHE="$work/sanitize-cache" \
      PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 9 --target-processes all \
      "$python" -m genengine verify --device "$device"
  done
}

installed() { [ "$(cat "$work/site/stamp.txt" 2>/dev/null)" = "$stamp" ]; }

if ! installed; then # another source, or none: whatever the stage
  FORCE=1 part install 480 bash -c install
elif wanted install; then
  part install 480 bash -c install
fi
installed || { echo "gpu: this source could not be installed; nothing else is run" >&2; exit 1; }
wanted verify && verify
wanted test && tests
wanted ceilings && part ceilings 60 "$python" -m genengine bench ceilings --device "$device" --save "$out/results"
wanted goals && goals
wanted ops && bench ops "${OPS_LIMIT:-400}"
wanted samplers && bench samplers 120
wanted models && bench models 180
wanted sanitize && sanitize
wanted profile && profile
cp -rT "${GENENGINE_CACHE:-$HOME/.cache/genengine}" "$out/verdicts" 2>/dev/null
(cd "$work" && "$python" -m genengine report "$out"/results/*/*.json --html "$out/report.html") || echo "gpu: no report"
tar czf "$work/gpu.tar.gz" -C "$out" --exclude gpu.tar.gz . && mv "$work/gpu.tar.gz" "$out/" && echo "archive: $out/gpu.tar.gz"
exit $status
