"""The tree shows the architecture: nothing imports upward, and an op has all its files."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "genengine"

# Lower layers first; a module may import its own layer and those below.
LAYERS = [
    ["random", "paths", "_beta", "schedules", "prediction", "table", "_progress", "_capture", "_static", "_denoiser"],
    ["solvers"],
    ["ops", "kernels"],
    ["testing", "data"],
    ["engine", "sampler", "_loop", "_last_layer", "_request", "extensions", "rotary", "nets", "evaluate", "images"],
    ["_probe", "_registers", "_recording", "_loop_fit", "trace"],
    ["integrations"],
    ["models"],
    ["training_log", "train", "environment"],
    ["benchmarks"],
    ["profiling", "demo", "gallery", "arguments"],
    ["cli", "__main__", "__init__"],
]
LEVEL = {name: level for level, layer in enumerate(LAYERS) for name in layer}
NUMPY_ONLY = ("random", "paths", "_beta", "schedules", "prediction", "solvers", "table")
OPS = sorted(p.stem for p in (PACKAGE / "ops").glob("*.py") if not p.stem.startswith("_"))
# The files that ops lack, and why: as the heads of genengine/ops/<op>.py say.
EXCEPTIONS = {
    "attention": {
        "csrc/cpu/attention.cpp": "the CPU kernel is torch's own",
        "csrc/cpu/isa/attention.cpp": "so are its loops",
        "csrc/cuda/attention.cu": "its CUDA C++ kernel is written for one architecture, in csrc/cuda/hopper",
    },
    "patch_step": {
        "csrc/cpu/patch_step.cpp": "the product is torch's, the row sampler_step's",
        "csrc/cpu/isa/patch_step.cpp": "so are its loops",
        "csrc/cuda/patch_step.cu": "the product of blocks is Triton's",
    },
    "pixelcnn_sample": {"kernels/pixelcnn_sample.py": "Triton has no state across the steps of one launch"},
    "transformer_sample": {
        "kernels/transformer_sample.py": "on a GPU its products and attention are torch's own kernels",
        "csrc/cuda/transformer_sample.cu": "in a CUDA graph, which is made in Python",
    },
}


def sources():
    yield from ((p.relative_to(PACKAGE).parts[0].removesuffix(".py"), p) for p in PACKAGE.rglob("*.py"))
    yield from (("kernels", p) for p in (ROOT / "kernels").glob("*.py"))
    yield from (("benchmarks", p) for p in (ROOT / "benchmarks").glob("*.py"))


def imports(path, *, top_level_only):
    """(module, names) of the genengine imports of a file; those inside functions are made late on purpose."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "genengine":
            parts = node.module.split(".")
            yield from ([parts[1]] if len(parts) > 1 else [alias.name for alias in node.names])
        elif isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("genengine."))


@pytest.mark.parametrize(("unit", "path"), [pytest.param(u, p, id=str(p.relative_to(ROOT))) for u, p in sources()])
def test_nothing_imports_upward(unit, path):
    if path.name == "__init__.py" and path.parent == PACKAGE:
        return
    for imported in imports(path, top_level_only=True):
        if imported in LEVEL:
            assert LEVEL[imported] <= LEVEL[unit], (
                f"{path.relative_to(ROOT)} ({unit}) imports {imported}, which is above it"
            )


@pytest.mark.parametrize("name", NUMPY_ONLY)
def test_tables_are_written_without_torch(name):
    module = PACKAGE / f"{name}.py"
    for path in [module] if module.exists() else sorted((PACKAGE / name).glob("*.py")):
        text = path.read_text()
        assert "import torch" not in text and "from torch" not in text, path.name


def test_kernels_import_only_triton_torch_and_siblings():
    for path in (ROOT / "kernels").glob("*.py"):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            modules = [node.module] if isinstance(node, ast.ImportFrom) else []
            modules += [a.name for a in node.names] if isinstance(node, ast.Import) else []
            for module in modules:
                root = module.split(".")[0]
                assert root in ("triton", "torch", "math", "functools", "__future__") or module.startswith(
                    "genengine.kernels"
                ), f"{path.name} imports {module}"


@pytest.mark.parametrize("op", OPS)
def test_an_op_is_one_name(op):
    wanted = [
        f"tests/ops/test_{op}.py", f"genengine/testing/{op}.py", f"benchmarks/bench_{op}.py", f"kernels/{op}.py",
        f"csrc/cpu/{op}.cpp", f"csrc/cpu/isa/{op}.cpp", f"csrc/cuda/{op}.cu",
    ]  # fmt: skip
    missing = [name for name in wanted if not (ROOT / name).exists() and name not in EXCEPTIONS.get(op, {})]
    assert not missing, f"{op} lacks {missing}"


@pytest.mark.parametrize("op", EXCEPTIONS)
def test_the_exceptions_are_true_and_documented(op):
    text = (PACKAGE / "ops" / f"{op}.py").read_text()
    for name in EXCEPTIONS[op]:
        assert not (ROOT / name).exists(), f"{name} exists: it is no exception"
        assert name in text, f"genengine/ops/{op}.py does not say why there is no {name}"


def test_every_kernel_file_says_what_to_compile():
    for path in (ROOT / "kernels").glob("[!_]*.py"):
        names = {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}
        assert "variants" in names, f"{path.name} has no variants()"


def test_isa_loops_include_no_torch_and_no_stl():
    for path in (ROOT / "csrc/cpu/isa").iterdir():
        for line in path.read_text().splitlines():
            if line.startswith("#include <"):
                header = line.split("<")[1].split(">")[0]
                assert header in ("stdint.h", "string.h", "immintrin.h"), f"{path.name} includes {header}"
