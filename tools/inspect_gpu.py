"""Compile every GPU kernel ahead of time, without a GPU, and read its machine code.

    python tools/inspect_gpu.py [--arch 80 90 100] [--json FILE] [--table FILE]
                                [--only NAME] [--no-cuda] [--jobs N]

Triton: every entry of `variants()` in kernels/*.py, for sm_80, sm_90 and sm_100. CUDA C++: every kernel of
csrc/cuda/**/*.cu, for the architectures of CMakeLists.txt (units of csrc/cuda/hopper: sm_90a). A check is one
kernel on one architecture. It fails on: a compile error, spills (LDL, STL), stack, the ptxas warnings C7508,
C7510, C7512 and C7515 (serialised wgmma), an instruction that is meant but missing, and no 16-byte access in a
streaming kernel. Registers, shared memory, DEPBAR per HGMMA (above 0.25 the products are serialised) and
instructions per element (static: rare paths count too) are recorded, not judged.

What a Triton variant may say beside what its compilation needs: "streaming": False, "needs": ["HGMMA", ...],
"elements": elements per program, "archs": [90, ...] where its launch configuration is used. What a CUDA unit
may say, in a comment line, of the kernels whose name contains NAME:
    // inspect: NAME [streaming] [needs=HGMMA,UTMALDG] [elements=4] [registers=96,128]
elements and registers per thread, the latter what a launch may give where setmaxnreg divides them. A CUDA kernel
with "vectorised" in its name is streaming. Exit status: 0 if all checks passed, else 1.
"""

import argparse
import importlib
import importlib.util
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TRITON_ARCHS = (80, 90, 100)
HOPPER = 90
WGMMA_WARNINGS = ("C7508", "C7510", "C7512", "C7515")

REMEDIES = {
    "compile": "see the compiler's message",
    "spills": "keep fewer values alive: smaller tiles, more warps, __launch_bounds__ with fewer threads",
    "stack": "index local arrays by constants alone (unroll), and call no function that is not inlined",
    "registers": "setmaxnreg hands on what the launch has: else it waits for ever for registers that nobody gives up",
    "wgmma": "wgmma is serialised: leave its registers alone until it has finished",
    "missing": "the tile shapes, dtypes or warps do not allow the instruction that is meant",
    "narrow": "declare pointers and row lengths divisible by 16; give each thread 16 consecutive bytes",
    "variants": "export variants(): name, fn, signature, constexprs, divisible, num_warps, enable_fp_fusion",
}


@dataclass
class Machine:
    """What the machine code of one kernel holds."""

    registers: int = 0
    stack: int = 0
    shared: int = 0
    opcodes: Counter = field(default_factory=Counter)

    def count(self, name: str) -> int:
        """Instructions with this opcode, whatever their modifiers: "HGMMA" counts HGMMA.64x128x16.F32."""
        return sum(n for opcode, n in self.opcodes.items() if opcode == name or opcode.startswith(name + "."))

    def wide(self, name: str) -> int:
        """Of those, the ones that move 16 or 32 bytes per thread."""
        pattern = re.compile(rf"{name}\.(.*\.)?(128|256)(\.|$)")
        return sum(n for opcode, n in self.opcodes.items() if pattern.match(opcode))


@dataclass
class Intent:
    """What a kernel is meant to be."""

    streaming: bool = True
    needs: tuple[str, ...] = ()
    elements: int | None = None  # per thread
    registers: tuple[int, ...] = ()  # at the launch; any, if none are named


@dataclass
class Check:
    """One kernel on one architecture: its failures as (rule, what was found), and its record."""

    source: str
    name: str
    arch: str
    failures: list[tuple[str, str]]
    record: dict = field(default_factory=dict)


# ---- reading -----------------------------------------------------------------------------------------------


def parse_resources(text: str) -> dict[str, Machine]:
    """Kernels of `cuobjdump --dump-resource-usage`."""
    found = {}
    for name, line in re.findall(r"Function (\S+):\s*\n\s*(.*)", text):
        values = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
        found[name] = Machine(values.get("REG", 0), values.get("STACK", 0), values.get("SHARED", 0))
    return found


_SECTION = re.compile(r"\s*\.section\s+\.text\.([^\s,\"]+)")
_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(?!NOP)([A-Z][A-Z0-9_.]*)")


def parse_sass(text: str) -> dict[str, Counter]:
    """Opcodes of each function of `nvdisasm -c`; padding (NOP) left out."""
    found, current = {}, Counter()
    for line in text.splitlines():
        if section := _SECTION.match(line):
            current = found.setdefault(section[1], Counter())
        elif instruction := _INSTRUCTION.match(line):
            current[instruction[1]] += 1
    return found


def read_cubin(path: Path) -> dict[str, Machine]:
    """Every kernel of a cubin, by mangled name."""
    resources = run([binary("cuobjdump"), "--dump-resource-usage", str(path)])
    kernels = parse_resources(resources)
    for name, opcodes in parse_sass(run([binary("nvdisasm"), "-c", str(path)])).items():
        if name in kernels:
            kernels[name].opcodes = opcodes
    return kernels


def judge(machine: Machine, intent: Intent, log: str = "") -> list[tuple[str, str]]:
    """The rules: (rule, what was found) of each one broken."""
    failures = []
    spills = {name: n for name in ("LDL", "STL") if (n := machine.count(name))}
    if spills:
        failures.append(("spills", ", ".join(f"{n} {name}" for name, n in spills.items())))
    if machine.stack:
        failures.append(("stack", f"{machine.stack} bytes of stack"))
    failures += [("wgmma", f"ptxas warning {code}") for code in WGMMA_WARNINGS if code in log]
    failures += [("missing", f"no {name}") for name in intent.needs if not machine.count(name)]
    if intent.registers and machine.registers not in intent.registers:
        failures.append(("registers", f"{machine.registers} registers a thread"))
    bulk = machine.count("UTMALDG") + machine.count("UBLKCP")
    if intent.streaming and not bulk and not any(machine.wide(name) for name in ("LDG", "STG", "LDGSTS")):
        narrow = machine.count("LDG") + machine.count("STG")
        failures.append(("narrow", f"none of {narrow} global accesses moves 16 bytes"))
    return failures


def record(machine: Machine, intent: Intent, shared: int | None = None) -> dict:
    """The figures that are kept, not judged."""
    instructions, products = sum(machine.opcodes.values()), machine.count("HGMMA")
    return {
        "registers": machine.registers,
        "shared": machine.shared if shared is None else shared,
        "instructions": instructions,
        "per_element": round(instructions / intent.elements, 1) if intent.elements else None,
        "loads": machine.count("LDG") + machine.count("LDGSTS"),
        "wide_loads": machine.wide("LDG") + machine.wide("LDGSTS"),
        "stores": machine.count("STG"),
        "wide_stores": machine.wide("STG"),
        "hgmma": products,
        "depbar_per_hgmma": round(machine.count("WARPGROUP.DEPBAR") / products, 3) if products else None,
    }


# ---- tools -------------------------------------------------------------------------------------------------


def run(command: list[str]) -> str:
    """Output of a command; RuntimeError with what it printed if it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stderr or done.stdout).strip())
    return done.stdout + done.stderr


def binary(name: str) -> str:
    """cuobjdump or nvdisasm: those that Triton ships, else the CUDA toolkit's."""
    spec = importlib.util.find_spec("triton")
    shipped = Path(spec.origin).parent / "backends/nvidia/bin" / name if spec else Path(name)
    path = str(shipped) if shipped.exists() else shutil.which(name)
    if path is None:
        raise RuntimeError(f"{name} was not found; pip install triton, which ships it")
    return path


def find_nvcc() -> str | None:
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "nvcc"
    return os.environ.get("CUDACXX") or shutil.which("nvcc") or (str(toolkit) if toolkit.exists() else None)


def demangle(names: list[str]) -> list[str]:
    """C++ names without namespace and parameters; as they are where binutils are missing."""
    if not names or not shutil.which("c++filt"):
        return names
    lines = subprocess.run(["c++filt", *names], capture_output=True, text=True).stdout.splitlines()
    return [re.sub(r"\(anonymous namespace\)::|genengine::|^void |\(.*", "", line) for line in lines]


# ---- Triton ------------------------------------------------------------------------------------------------


def triton_modules() -> list[str]:
    return sorted(path.stem for path in (ROOT / "kernels").glob("*.py") if not path.stem.startswith("_"))


def jitted(text: str) -> list[str]:
    """Names of the Triton functions of a source file."""
    return re.findall(r"^@triton\.jit.*\n(?:@.*\n)*def (\w+)", text, re.MULTILINE)


def has_kernel(module: str) -> bool:
    return bool(jitted((ROOT / "kernels" / f"{module}.py").read_text()))


def triton_variants(module: str) -> list[dict]:
    loaded = importlib.import_module(f"genengine.kernels.{module}")
    return loaded.variants() if hasattr(loaded, "variants") else []


def triton_source(variant: dict):
    """The variant as Triton's compiler takes it."""
    from triton.compiler import ASTSource

    names = list(variant["signature"])
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in variant["divisible"]}
    return ASTSource(fn=variant["fn"], signature=variant["signature"], constexprs=variant["constexprs"], attrs=aligned)


def triton_intent(variant: dict) -> Intent:
    elements = variant.get("elements")
    if elements is None and "QUADS" in variant["constexprs"]:
        elements = 4 * variant["constexprs"]["QUADS"]
    per_thread = elements // (32 * variant["num_warps"]) if elements else None
    return Intent(variant.get("streaming", True), tuple(variant.get("needs", ())), per_thread)


def wgmma_log(ptx: str, arch: int) -> str:
    """What ptxas says of a kernel with wgmma: Triton discards its warnings."""
    if "wgmma" not in ptx:
        return ""
    from triton.backends.nvidia.compiler import get_ptxas  # Triton ships two: the one that reads this PTX

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        output = str(source.with_suffix(".cubin"))
        return run([get_ptxas(arch).path, "-v", f"-arch=sm_{arch}a", str(source), "-o", output])


def check_triton(module: str, index: int, arch: int) -> list[Check]:
    import triton
    from triton.backends.compiler import GPUTarget

    variant = triton_variants(module)[index]
    intent, name = triton_intent(variant), variant["name"]
    if arch != HOPPER:
        intent.needs = ()  # wgmma and its TMA loads are Hopper's
    options = {key: variant[key] for key in ("num_warps", "num_stages", "enable_fp_fusion") if key in variant}
    try:
        compiled = triton.compile(triton_source(variant), target=GPUTarget("cuda", arch, 32), options=options)
        log = wgmma_log(compiled.asm["ptx"], arch)
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder) / "kernel.cubin"
            cubin.write_bytes(compiled.asm["cubin"])
            (machine,) = read_cubin(cubin).values()
    except Exception as error:  # the compiler raises many types; each is this check's failure
        return [Check("triton", name, f"sm_{arch}", [("compile", f"{type(error).__name__}: {error}")])]
    kept = record(machine, intent, compiled.metadata.shared)
    return [Check("triton", name, f"sm_{arch}", judge(machine, intent, log), kept)]


# ---- CUDA C++ ----------------------------------------------------------------------------------------------


def cuda_units() -> list[Path]:
    return sorted((ROOT / "csrc" / "cuda").rglob("*.cu"))


def cmake_archs() -> list[int]:
    match = re.search(r'GENENGINE_CUDA_ARCHS "([\d;]+)"', (ROOT / "CMakeLists.txt").read_text())
    return [int(arch) for arch in match[1].split(";")]


def declared_intents(unit_text: str) -> list[tuple[str, Intent]]:
    """(part of a kernel's name, intent) of each `// inspect:` line."""
    found = []
    for name, rest in re.findall(r"^// inspect: (\S+)(.*)$", unit_text, re.MULTILINE):
        options = dict(word.partition("=")[::2] for word in rest.split())
        needs = tuple(options["needs"].split(",")) if "needs" in options else ()
        elements = int(options["elements"]) if "elements" in options else None
        registers = tuple(map(int, options["registers"].split(","))) if "registers" in options else ()
        found.append((name, Intent("streaming" in options or "vectorised" in name, needs, elements, registers)))
    return found


def cuda_intent(name: str, declared: list[tuple[str, Intent]]) -> Intent:
    for part, intent in declared:
        if part in name:
            return intent
    return Intent(streaming="vectorised" in name)


def nvcc_command(nvcc: str, unit: Path, arch: str, output: Path) -> list[str]:
    """As CMakeLists.txt compiles the unit, for one architecture."""
    spec = importlib.util.find_spec("torch")
    include = Path(spec.origin).parent / "include"
    portable = [] if arch.endswith("a") else ["--fmad=false"]
    return [
        nvcc, "-cubin", f"-arch=sm_{arch}", "-std=c++20", "-O3", "-DNDEBUG", *portable, "-Xptxas=-v",
        "-DTORCH_TARGET_VERSION=0x020b000000000000", f"-I{ROOT / 'csrc' / 'include'}", f"-I{ROOT / 'csrc'}",
        "-isystem", str(include), "-o", str(output), str(unit),
    ]  # fmt: skip


def check_cuda(nvcc: str, unit: Path, arch: str) -> list[Check]:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "unit.cubin"
        try:
            log = run(nvcc_command(nvcc, unit, arch, cubin))
            kernels = read_cubin(cubin)
        except RuntimeError as error:
            return [Check("cuda", unit.stem, f"sm_{arch}", [("compile", str(error))])]
    declared, checks = declared_intents(unit.read_text()), []
    for name, (mangled, machine) in zip(demangle(list(kernels)), kernels.items(), strict=True):
        intent = cuda_intent(name, declared)
        failures = judge(machine, intent, kernel_log(log, mangled))
        checks.append(Check("cuda", name, f"sm_{arch}", failures, record(machine, intent)))
    return checks


def kernel_log(log: str, mangled: str) -> str:
    """The lines of ptxas's output that name a kernel: its warnings do."""
    return "\n".join(line for line in log.splitlines() if mangled in line)


# ---- all of it ---------------------------------------------------------------------------------------------


def plan(arguments) -> tuple[list[tuple], list[Check]]:
    """(function, arguments...) of every compilation, and the checks that already failed."""
    wanted, jobs, failed = arguments.arch, [], []
    chosen = lambda *names: arguments.only is None or any(arguments.only in name for name in names)  # noqa: E731
    if not arguments.no_cuda:
        for unit in filter(lambda unit: chosen(unit.stem), cuda_units()):
            archs = [f"{HOPPER}a"] if unit.parent.name == "hopper" else [str(arch) for arch in cmake_archs()]
            archs = [arch for arch in archs if wanted is None or int(arch.rstrip("a")) in wanted]
            jobs += [(check_cuda, find_nvcc(), unit, arch) for arch in archs]
    for module in triton_modules():
        variants = triton_variants(module)
        if not variants and has_kernel(module) and chosen(module):
            failed.append(Check("triton", module, "any", [("variants", "no variants()")]))
        for index, variant in enumerate(variants):
            if chosen(module, variant["name"]):
                archs = [arch for arch in wanted or TRITON_ARCHS if arch in variant.get("archs", (arch,))]
                jobs += [(check_triton, module, index, arch) for arch in archs]
    return jobs, failed


def execute(jobs: list[tuple], workers: int) -> list[Check]:
    checks = []
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for done in as_completed([pool.submit(*job) for job in jobs]):
            checks += done.result()
    order = lambda check: (check.source, check.name, int(re.sub(r"\D", "", check.arch)))  # noqa: E731
    return sorted(checks, key=order)


COLUMNS = {
    "registers": "regs", "shared": "shared", "instructions": "instr", "per_element": "/elem",
    "loads": "loads", "stores": "stores", "hgmma": "hgmma", "depbar_per_hgmma": "depbar/",
}  # fmt: skip


def figure(kept: dict, key: str) -> str:
    """One cell; loads and stores as 16-byte ones of all."""
    value = "-" if kept.get(key) is None else str(kept[key])
    return f"{kept[f'wide_{key}']}/{value}" if f"wide_{key}" in kept else value


def table(checks: list[Check]) -> str:
    """One line per check."""
    rows = [("source", "kernel", "arch", *COLUMNS.values(), "")]
    for check in checks:
        cells = [figure(check.record, key) for key in COLUMNS]
        rows.append((check.source, check.name, check.arch, *cells, "FAIL" if check.failures else "ok"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def records(checks: list[Check], versions: str) -> str:
    """The records as one Markdown table: a row a kernel, registers of every architecture, the rest of sm_90."""
    kernels: dict[tuple[str, str], dict[str, Check]] = {}
    for check in checks:
        kernels.setdefault((check.source, check.name), {})[check.arch.rstrip("a")] = check
    archs = sorted({arch for found in kernels.values() for arch in found}, key=lambda arch: int(arch[3:]))
    figures = [key for key in COLUMNS if key != "registers"]
    registers = "registers " + "/".join(arch[3:] for arch in archs)
    head = ["kernel", registers, *(key.replace("_", " ") for key in figures)]
    lines = [RECORDS_HEAD.format(versions=versions), f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for (source, name), found in sorted(kernels.items()):
        shown = found.get(f"sm_{HOPPER}") or next(iter(found.values()))
        counts = "/".join(figure(found[arch].record, "registers") if arch in found else "-" for arch in archs)
        cells = [f"{source} `{name}`", counts, *(figure(shown.record, key) for key in figures)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


RECORDS_HEAD = """# Machine code of the GPU kernels

Written by `python tools/inspect_gpu.py --table FILE`; {versions}. Static: nothing here was run. Every
kernel in the table passed the checks of `make inspect` (no spills, no stack, 16-byte accesses in streaming kernels,
HGMMA where it is meant). Registers per architecture; the other columns are sm_90's (where a kernel is not compiled for
it, its first architecture's). Loads and stores: 16-byte ones of all. Above 0.25 DEPBAR per HGMMA the products wait for
one another. Instructions per element count rare paths too.
"""


def tool_versions() -> str:
    import triton

    nvcc = find_nvcc()
    release = re.search(r"release ([\d.]+)", run([nvcc, "--version"])) if nvcc else None
    commit = run(["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"]).strip()
    return f"commit {commit}, Triton {triton.__version__}, nvcc {release[1] if release else 'none'}"


def report(checks: list[Check], file: str | None) -> int:
    """Print the table, the failures and the summary; the number of failed checks."""
    print(table(checks))
    for check in checks:
        for rule, found in check.failures:
            print(f"\nFAIL {check.source} {check.name} {check.arch}: {rule}: {found}")
            print(f"     remedy: {REMEDIES[rule]}")
    if file:
        Path(file).write_text(json.dumps([vars(check) for check in checks], indent=1) + "\n")
    return sum(bool(check.failures) for check in checks)


def parse_arguments(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--arch", type=int, nargs="+", help="only these, e.g. 80 90 100")
    parser.add_argument("--json", metavar="FILE", help="write the records there")
    parser.add_argument("--table", metavar="FILE", help="write the records there, as one Markdown table")
    parser.add_argument("--only", metavar="NAME", help="only files and variants whose name contains NAME")
    parser.add_argument("--no-cuda", action="store_true", help="leave out the CUDA C++ units; needs no nvcc")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 2, help="processes; default: all cores")
    return parser.parse_args(argv)


def why_not() -> str | None:
    """What is missing to inspect anything."""
    for package in ("triton", "torch", "genengine"):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed; run `make setup`"
    if importlib.util.find_spec("genengine.kernels") is None:
        return "genengine.kernels is not importable; run `pip install --no-build-isolation -e .`"
    return None


def main() -> int:
    arguments = parse_arguments()
    if os.environ.pop("TRITON_INTERPRET", None):  # read at Triton's import: start anew without it
        os.execv(sys.executable, [sys.executable, *sys.argv])
    reason = why_not()
    if reason is None and not arguments.no_cuda and cuda_units() and find_nvcc() is None:
        reason = "nvcc was not found; install the CUDA toolkit and set CUDACXX or PATH, or pass --no-cuda"
    if reason:
        print(f"inspect: {reason}\n0 passed, 1 failed")
        return 1
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(TRITON_CACHE_DIR=folder, TRITON_ALWAYS_COMPILE="1")
        jobs, failed = plan(arguments)
        checks = failed + execute(jobs, arguments.jobs)
    failures = report(checks, arguments.json)
    if arguments.table:
        Path(arguments.table).write_text(records(checks, tool_versions()))
    print(f"\n{len(jobs)} compilations in {time.monotonic() - start:.0f} s")
    if not checks:
        print("inspect: nothing to check; --arch or --only leave nothing")
    print(f"{len(checks) - failures} passed, {failures} failed")
    return 1 if failures or not checks else 0


if __name__ == "__main__":
    sys.exit(main())
