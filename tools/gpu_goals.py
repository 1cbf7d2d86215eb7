"""Write benchmarks/GPU_GOALS.md: what the GPU path is to reach on an H200, beside what result files say it does.

    python tools/gpu_goals.py [benchmarks/results/nvidia-h200/*.json] [--check] [--commands]

A row whose work no file has timed says "not measured". Of several files the last by name counts. --check: write
nothing, exit status 1 if the page would change. --commands: only print what is to be run for all of them, one name and
command a line.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "benchmarks" / "GPU_GOALS.md"
DEVICE = "NVIDIA H200"
LARGE = 64 << 20  # bytes of what is bound by memory alone
TORCHS = ("torch, flash_attention", "torch, efficient_attention", "torch, cudnn_attention", "torch, math")
GRAPHED = "torch.compile + CUDA graph"
MATRIX_BOUND = ("attention", "steps", "linear_epilogues", "patch_step", "pixelcnn_sample", "transformer_sample")
NOT_MEASURED = "not measured"

Rows = list[dict]


@dataclass(frozen=True)
class Figure:
    """One number of a goal: its name, the bound, how it is read from the rows that time the work (None: it is not)."""

    name: str
    bound: float
    read: Callable[[Rows], float | None]
    unit: str = "x"

    def text(self, rows: Rows) -> str:
        value = self.read(rows)
        goal = f"{self.name} >= {self.bound:g}{self.unit}"
        if value is None:
            return f"{goal}: {NOT_MEASURED}"
        return f"{goal}: {value:.3g}{self.unit}" + ("" if value >= self.bound else " **missed**")


@dataclass(frozen=True)
class Goal:
    """One line of the page: the work, what of `genengine bench` times it at which labels, and its figures."""

    work: str
    what: str
    labels: tuple[str, ...]
    figures: tuple[Figure, ...]


def command(what: str, labels: Iterable[str]) -> str:
    dtypes = "bfloat16,float32" if what == "ops" else "bfloat16"  # noise is float32 alone
    chosen = (f"--label {shlex.quote(label)}" for label in labels)
    return " ".join(["genengine bench", what, "--dtype", dtypes, *chosen])


def of(name: str, label: str, dtype: str = "bfloat16") -> Callable[[Rows], Rows]:
    return lambda rows: [
        row for row in rows if (row["name"], row["label"], row["dtype"]) == (name, label, dtype) and "error" not in row
    ]


def over(chosen: Callable[[Rows], Rows], *baselines: str) -> Callable[[Rows], float | None]:
    """The ratio to the strongest of these baselines, the least over the rows."""

    def read(rows):
        found = [
            min(known)
            for row in chosen(rows)
            if (known := [row["ratios"][name]["ratio"] for name in baselines if name in row["ratios"]])
        ]
        return min(found, default=None)

    return read


def rate(chosen: Callable[[Rows], Rows]) -> Callable[[Rows], float | None]:
    return lambda rows: min((row["TFLOP_per_s"] for row in chosen(rows)), default=None)


def share(chosen: Callable[[Rows], Rows]) -> Callable[[Rows], float | None]:
    """Percent of the ceiling that binds, the least over the rows."""
    return lambda rows: min((row["ceiling"]["percent"] for row in chosen(rows) if "ceiling" in row), default=None)


def memory_bound(backward: bool) -> Callable[[Rows], Rows]:
    """Ops whose inputs come from memory, each large enough that nothing else counts."""

    def chosen(rows):
        return [
            row
            for row in rows
            if row["kind"] == "ops" and "error" not in row and row["group"] not in MATRIX_BOUND
            and row.get("sets", 1) > 1 and row.get("cost", {"bytes": 0})["bytes"] >= LARGE
            and ("backward" in row["name"]) == backward
        ]  # fmt: skip

    return chosen


def _attention(label, rate_bound, by=1.0, name="attention"):
    rows = of(name, label)
    figures = (Figure("best SDPA backend / ours", by, over(rows, *TORCHS)),)
    return figures + ((Figure("rate", rate_bound, rate(rows), " TFLOP/s"),) if rate_bound else ())


def _dit(label, by, *more):
    rows = of("DiT step, CFG", label)
    eager = Figure("eager / ours", 1.0, over(rows, "eager"))
    return Goal(
        label.replace(", ", ", 256 px, CFG step, "), "steps", (label,),
        (Figure(f"{GRAPHED} / ours", by, over(rows, GRAPHED)), eager, *more),
    )  # fmt: skip


def _attention_goal(work, label, *bounds, name="attention"):
    return Goal(work, "attention", (label,), _attention(label, *bounds, name=name))


MANY = ("SDXL, 1,024 images", "CogVideoX-5B", "SDXL, 128 px, 16 images")  # 64 MB and more
UNET = "DDPM, CIFAR-10, 64 images"
GOALS = (
    Goal("memory-bound ops, 64 MB and more, from memory: the worst", "ops", MANY, (
        Figure("of the ceiling that binds", 92, share(memory_bound(False)), " %"),
        Figure("torch.compile / ours", 1.1, over(memory_bound(False), "torch.compile")),
    )),
    Goal("their backward passes: the worst", "ops", MANY, (
        Figure("of the ceiling that binds", 80, share(memory_bound(True)), " %"),
    )),
    _attention_goal("attention, bfloat16, head dim 128, 4k tokens", "hd 128, 4k", None),
    _attention_goal("attention, head dim 128, 16k", "hd 128, 16k", 640),
    _attention_goal("attention, head dim 64, 512", "hd 64, 512", 335),
    _attention_goal("attention, head dim 64, 16k", "hd 64, 16k", 500),
    _attention_goal("attention, head dim 72, DiT-XL/2 at 256 tokens", "DiT-XL/2", None, 1.4),
    _attention_goal("attention, head dim 72, DiT-XL/2 at 1024 tokens", "DiT-XL/2, 512 px", None, 1.4),
    _attention_goal("attention backward, head dim 128, 4k", "hd 128, 4k", 520, name="attention_backward"),
    _attention_goal("attention backward, head dim 128, 8k", "hd 128, 8k", 560, name="attention_backward"),
    _dit("DiT-XL/2, 1 image", 1.5),
    _dit("DiT-XL/2, 8 images", 1.2),
    _dit("DiT-XL/2, 64 images", 1.12,
         Figure("of the measured matrix ceiling", 77, share(of("DiT step, CFG", "DiT-XL/2, 64 images")), " %")),
    _dit("DiT-S/2, 1 image", 3.5),
    Goal("DDPM U-Net, 35.7M, 32x32, 64 images", "steps", (UNET,), (
        Figure("eager, channels_last / ours", 1.4, over(of("U-Net step", UNET), "eager")),
        Figure("torch.compile / ours", 1.2, over(of("U-Net step", UNET), "torch.compile")),
    )),
)  # fmt: skip

# What a benchmark does not say: `make gpu` runs it, and its logs are committed beside the results.
TESTS = (
    ("the same noise bits on CUDA C++ and Triton as on a CPU", "`genengine verify`", "verify.log"),
    ("compute-sanitizer memcheck, racecheck, initcheck over the op tests: clean", "`make gpu`, stage sanitize",
     "sanitize-*.log"),
)  # fmt: skip


def commands() -> dict[str, str]:
    """What of `genengine bench` -> the command that times all its goals."""
    found: dict[str, dict[str, None]] = {}
    for goal in GOALS:
        found.setdefault(goal.what, {}).update(dict.fromkeys(goal.labels))
    return {what: command(what, labels) for what, labels in found.items()}


def page(reports: list[dict], logs: list[Path]) -> str:
    rows = {
        (row["name"], row["label"], tuple(row["shape"]), row["dtype"]): row
        for report in reports
        if report["environment"]["device"] == DEVICE
        for row in report["rows"]
    }
    lines = [
        "# Goals of the GPU path, and what was measured",
        "",
        f"Made by `python tools/gpu_goals.py` from the result files of an {DEVICE}. On one, `make gpu` fills every",
        "row, `make gpu STAGE=goals` the benchmarks alone, after `STAGE=verify`.",
        "Ratios are times of the baseline over ours. What no file has timed says so.",
        "",
        "| work | goal and figure | command |",
        "|---|---|---|",
    ]
    for goal in GOALS:
        figures = "; ".join(figure.text(list(rows.values())) for figure in goal.figures)
        lines.append(f"| {goal.work} | {figures} | `{command(goal.what, goal.labels)}` |")
    for work, how, log in TESTS:
        found = sorted(path.name for path in logs if path.match(log))
        lines.append(f"| {work} | {', '.join(found) or NOT_MEASURED} | {how} |")
    return "\n".join(lines) + "\n"


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="example: python tools/gpu_goals.py benchmarks/results/nvidia-h200/*.json",
    )
    parser.add_argument(
        "files", nargs="*", type=Path, help="result files of `genengine bench` (default: all committed)"
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if the page would change")
    parser.add_argument("--commands", action="store_true", help="print what is to be run for all goals; write nothing")
    options = parser.parse_args(arguments)
    if options.commands:
        print("\n".join(f"{what}\t{text}" for what, text in commands().items()))
        return 0
    files = options.files or ROOT.glob("benchmarks/results/*/*.json")
    reports = [json.loads(path.read_text()) for path in sorted(files, key=lambda path: path.name)]
    text = page(reports, list(ROOT.glob("benchmarks/results/*/*.log")))
    if options.check:
        return int(not PAGE.exists() or PAGE.read_text() != text)
    PAGE.write_text(text)
    print(f"{PAGE}: {text.count(NOT_MEASURED)} figures not measured")
    return 0


if __name__ == "__main__":
    sys.exit(main())
