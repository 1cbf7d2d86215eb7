"""Writes the README's figures from results of `genengine bench ... --save benchmarks/results`.

    python tools/readme_figures.py [FILE.json ...] [--check] [--readme README.md]

A table stands between two markers, of which the first names the result file that it shows, by its path from the README:

    <!-- figures models: benchmarks/results/<device>/<file>.json --> ... <!-- /figures models -->

"figures" and a suite (ops, samplers, models, peers) shows the first shapes of its rows and those with goals; "ops"
shows a line per op, with the ratios of its first row. Above each stands the command, the device and the file. Without
arguments every table is written anew from the file that its marker names. FILE.json is put in the place of what fits:
a result of the suite "models" in that of models, one of "all" in that of every suite, of a GPU where a GPU's is shown.
--check changes nothing and fails, naming the markers, if a table is not what its file says.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from genengine.benchmarks import registry, results, table

README = Path(__file__).resolve().parents[1] / "README.md"
ALL = "CPU, Triton, CUDA"
TORCH = "CPU (torch's), Triton, CUDA (Hopper)"
# op: what it computes; backends; directions; floor in elements moved per element; the benchmarks that show the forward
# and the backward
OPS = [
    ("`normal`, `uniform`", "the noise above", ALL, "forward", "1", ("normal",)),
    ("`sampler_step`", "a whole solver step: guidance, prediction, clipping, history, noise, the next network input",
     ALL, "forward", "4, with guidance", ("CFG + Euler row",)),
    ("`guidance_moments`", "the sums of two branches that rescaled and projected guidance need", ALL, "forward", "2",
     ("moments of two branches",)),
    ("`diffuse`", "x_t and the regression target for training, noise drawn in the kernel",
     ALL, "both", "3", ("diffuse",)),
    ("`adaln`", "LayerNorm, then modulation", ALL, "both", "2; backward 3", ("adaln", "adaln_backward")),
    ("`gated_adaln`", "gate and residual, then adaln",
     ALL, "both", "4; backward 6", ("gated_adaln", "gated_adaln_backward")),
    ("`attention`", "softmax(q k^T * scale) v, any head dim to 256 (72 in 80 columns, not 128), self, cross, causal",
     TORCH, "both", "4; backward 8", ("attention", "attention_backward")),
    ("`qk_norm_rope`", "RMSNorm of q and k, then rotary embedding (1-D, 2-D, 3-D), in the packed projection",
     ALL, "both", "2; backward 3", ("qk_norm_rope", "qk_norm_rope_backward")),
    ("`reparameterize`", "z = mean + exp(logvar / 2) eps and its KL, noise drawn in the kernel, also in the backward",
     ALL, "both", "3; backward 5", ("reparameterize + KL", "reparameterize + KL, forward and backward")),
    ("`group_norm_silu`", "GroupNorm, time scale and shift, SiLU; contiguous and channels_last",
     ALL, "both", "2 (3 if a group exceeds the chip); backward 3", ("group_norm_silu", "group_norm_silu_backward")),
    ("`bias_act`, `bias_gelu`", "bias, activation, gain, clamp", ALL, "both, twice", "2; backward 3",
     ("bias_gelu, none", "bias_act, lrelu, forward and backward")),
    ("`geglu`, `swiglu`", "a gated half times the other, of one packed projection",
     ALL, "both", "3; backward 5", ("geglu", "geglu, forward and backward")),
    ("`logistic_mixture`", "discretised-logistic log-likelihood, and sampling with the same bits everywhere",
     ALL, "both", "parameters once; backward twice", ("logistic_mixture_log_prob",)),
    ("`ema_update`", "the moving average of a whole model, in one launch", ALL, "forward", "3", ("ema_update",)),
]  # fmt: skip
OPS_HEAD = (
    "| op | computes | backends | directions | floor, elements | over eager | over torch.compile |\n|" + "---|" * 7
)
MARKERS = ("ops", *(f"figures {kind}" for kind in registry.KINDS))
OPENING = re.compile(rf"<!-- ({'|'.join(MARKERS)}): (\S+) -->\n")


# ---- tables ------------------------------------------------------------------------------------------------------


def shown(marker: str, report: dict, path: str) -> str:
    """What stands between a marker and its end. Raises ValueError if the result has nothing to show there."""
    if marker == "ops":
        body = "\n".join([OPS_HEAD, *(op_line(report["rows"], *op) for op in OPS)])
    else:
        kind = marker.removeprefix("figures ")
        rows = [row for row in _told(report["rows"]) if row["kind"] == kind]
        if not rows:
            raise ValueError(f"{path} has no rows of {kind}; it is of the suite {report['suite']!r}")
        body = table.markdown(report | {"rows": rows})
    return f"{source(report, path)}\n\n{body}\n"


def _told(rows):
    """The first shape of every benchmark in each dtype, and every row with a goal; the file has the rest."""
    seen = set()
    for row in rows:
        first = (row["name"], row["dtype"]) not in seen
        seen.add((row["name"], row["dtype"]))
        if first or row.get("goals"):
            yield row


def source(report: dict, path: str) -> str:
    """The line above a table: command, device, versions and file."""
    found = report["environment"]
    where = found["device"] if "gpu" in found else f"one thread of {found['device']} ({found.get('isa', 'CPU')})"
    commit = f"commit {found['commit']}{' with uncommitted changes' if found['dirty'] else ''}"
    return (
        f"`{table.command(report)}`, {where}, torch {found['torch']}, {commit}, {found['time'][:10]}; "
        f"with intervals and spread: [`{Path(path).name}`]({path})."
    )


def op_line(rows, op, computes, backends, directions, floor, names):
    found = [first(rows, name, op) for name in names]
    eager, compiled = (
        " / ".join(ratio(row, wanted) for row in found) for wanted in (table.is_pytorch, table.is_compiled)
    )
    return f"| {op} | {computes} | {backends} | {directions} | {floor} | {eager} | {compiled} |"


def first(rows, name, op):
    """The first row of that name, float32 before the rest."""
    fits = [row for row in rows if row["name"] == name]
    if not fits:
        raise ValueError(f"{op} has no row {name!r}; measure it, or correct OPS in tools/readme_figures.py")
    return min(fits, key=lambda row: row["dtype"] != "float32")


def ratio(row, wanted):
    """To the strongest of the variants that `wanted` picks."""
    if "error" in row:
        return "failed"
    found = table.strongest(row["ratios"], wanted)
    return f"{found[1]['ratio']:.2f}" if found else "-"


# ---- markers -----------------------------------------------------------------------------------------------------


def between(text, marker, body):
    """The text with another body between `<!-- marker -->` and `<!-- /marker -->`."""
    pattern = rf"(<!-- {marker} -->\n).*?(<!-- /{marker} -->)"
    if not re.search(pattern, text, re.DOTALL):
        raise SystemExit(f"README.md has no <!-- {marker} --> ... <!-- /{marker} -->")
    return re.sub(pattern, lambda match: f"{match[1]}{body}\n{match[2]}", text, flags=re.DOTALL)


def tables_of(text: str) -> list[tuple[str, str, int, int]]:
    """Marker, file, and where between the two markers begins and ends, of every table in the order of the text."""
    found = []
    for opening in OPENING.finditer(text):
        end = text.find(f"<!-- /{opening[1]} -->", opening.end())
        if end < 0 or OPENING.search(text, opening.end(), end):
            raise ValueError(f"<!-- {opening[1]}: {opening[2]} --> has no <!-- /{opening[1]} --> behind it")
        found.append((opening[1], opening[2], opening.end(), end))
    if not found:
        raise ValueError(f"there is no marker; one begins with {' or '.join(f'<!-- {m}:' for m in MARKERS)}")
    return found


def rewritten(text: str, folder: Path) -> tuple[str, list[str]]:
    """The text with every table as its file has it, and the markers whose tables were otherwise.

    Raises ValueError, naming each marker whose file cannot be shown.
    """
    stale, broken = [], []
    for marker, path, begin, end in reversed(tables_of(text)):
        name = f"<!-- {marker}: {path} -->"
        try:
            body = shown(marker, results.load(folder / path), path)
        except (ValueError, OSError) as error:
            broken.insert(0, f"{name}: {error}")
            continue
        if text[begin:end] != body:
            stale.insert(0, name)
            text = text[:begin] + body + text[end:]
    if broken:
        raise ValueError("\n".join(["", *broken]))
    return text, stale


def pointed(text: str, file: Path, folder: Path) -> str:
    """The text with the fitting markers naming another file. Raises ValueError if none fits."""
    report = results.load(file)
    name = file.resolve().relative_to(folder.resolve()).as_posix()
    fits = [
        (marker, path)
        for marker, path, _, _ in tables_of(text)
        if takes(marker, suite_of(folder / path), report["suite"]) and is_gpu(folder / path) in (None, is_gpu(file))
    ]
    if not fits:
        raise ValueError(f"no marker fits {file}, a result of the suite {report['suite']!r}")
    for marker, path in fits:
        text = text.replace(f"<!-- {marker}: {path} -->", f"<!-- {marker}: {name} -->")
    return text


def takes(marker: str, shown: str | None, suite: str) -> bool:
    """Whether a marker that shows a result of the suite `shown` is for one of `suite`, too: the same, or its kind's."""
    kinds = ("all", marker.removeprefix("figures "))
    return suite == shown or (suite in kinds and shown in (None, *kinds))


def suite_of(file: Path) -> str | None:
    """The suite of a result of any version; None if there is no such file."""
    return json.loads(file.read_text(encoding="utf-8")).get("suite") if file.exists() else None


def is_gpu(file: Path) -> bool | None:
    """Whether a result of any version is of a GPU; None if there is no such file."""
    return "cuda" in json.loads(file.read_text(encoding="utf-8"))["environment"] if file.exists() else None


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="readme_figures", description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE.json")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--readme", type=Path, default=README)
    options = parser.parse_args(arguments)
    before = text = options.readme.read_text(encoding="utf-8")
    try:
        for file in options.files:
            text = pointed(text, file, options.readme.parent)
        text, stale = rewritten(text, options.readme.parent)
    except ValueError as error:
        raise SystemExit(f"readme_figures: {options.readme.name}: {error}") from error
    if not options.check:
        options.readme.write_text(text, encoding="utf-8")
    elif text != before:
        raise SystemExit(
            f"readme_figures: {options.readme.name} is not what the results say at {', '.join(stale)}; "
            "run python tools/readme_figures.py, or measure again"
        )


if __name__ == "__main__":
    main()
