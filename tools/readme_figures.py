"""Writes the README's figures from a result of `genengine bench all|models|peers --save benchmarks/results`.

    python tools/readme_figures.py benchmarks/results/<device>/<file>.json

Of the suite "all", between `<!-- ops -->` and `<!-- figures -->` markers and their `/` forms: the table of ops, with
the ratio of each op's first row to eager and to torch.compile; and every row of the result, reached goals and missed
ones alike. Of the suites "models" and "peers", their rows between `<!-- model figures -->` and `<!-- peer figures -->`.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from genengine.benchmarks.suite import duration

README = Path(__file__).resolve().parents[1] / "README.md"
ALL = "CPU, Triton, CUDA"
TORCH = "CPU (torch's), Triton"
# op: what it computes; backends; directions; floor in elements moved per element; the rows of the result that show the
# forward and the backward, by the beginning of their names
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
     TORCH, "both", "4; backward 8", ("attention,", "attention_backward")),
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
     ALL, "both", "parameters once; backward twice", ("logistic_mixture",)),
    ("`ema_update`", "the moving average of a whole model, in one launch", ALL, "forward", "3", ("ema_update",)),
]  # fmt: skip
OPS_HEAD = (
    "| op | computes | backends | directions | floor, elements | over eager | over torch.compile |\n|" + "---|" * 7
)
ROWS_HEAD = "| work | shape, dtype | fused | the others' time over ours | goals |\n|" + "---|" * 5


def ratios(row, wanted):
    """The smallest ratio among the variants that `wanted` picks: the strongest of them."""
    found = [entry["ratio"] for name, entry in row["ratios"].items() if wanted(name)]
    return f"{min(found):.2f}" if found else "-"


def is_eager(name):
    return not name.startswith(("torch.compile", "copy_", "fused"))


def op_line(rows, op, computes, backends, directions, floor, names):
    shown = [row for name in names if (row := first(rows, name))]
    eager = " / ".join(ratios(row, is_eager) for row in shown) or "-"
    compiled = " / ".join(ratios(row, lambda name: name.startswith("torch.compile")) for row in shown) or "-"
    return f"| {op} | {computes} | {backends} | {directions} | {floor} | {eager} | {compiled} |"


def first(rows, name):
    """The first row of that name, else the first whose name begins so; float32 before the rest."""
    fits = [row for row in rows if "ratios" in row and row["name"].startswith(name)]
    return min(fits, key=lambda row: (row["name"] != name, row["dtype"] != "float32"), default=None)


def row_line(row):
    if "error" in row:
        return f"| {row['name']} | {row['shape']}, {row['dtype']} | failed | {row['error'].splitlines()[0]} | |"
    others = ", ".join(f"{name} {entry['ratio']:.2f}" for name, entry in row["ratios"].items())
    goals = "; ".join(
        f"{goal['goal']}: {goal['value']:.2f}" + ("" if goal["reached"] else " **missed**") for goal in row["goals"]
    )
    fused = duration(row["variants"]["fused"]["median"])
    return f"| {row['name']} | {row['shape']}, {row['dtype']} | {fused} | {others} | {goals or '-'} |"


def between(text, marker, body):
    pattern = rf"(<!-- {marker} -->\n).*?(<!-- /{marker} -->)"
    if not re.search(pattern, text, re.DOTALL):
        raise SystemExit(f"readme_figures: README.md has no <!-- {marker} --> ... <!-- /{marker} -->")
    return re.sub(pattern, lambda match: f"{match[1]}{body}\n{match[2]}", text, flags=re.DOTALL)


def main():
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    report = json.loads(Path(sys.argv[1]).read_text())
    rows, text = report["rows"], README.read_text()
    table = "\n".join([ROWS_HEAD, *map(row_line, rows)])
    if report["suite"] in ("models", "peers"):
        text = between(text, {"models": "model figures", "peers": "peer figures"}[report["suite"]], table)
    else:
        text = between(text, "ops", "\n".join([OPS_HEAD, *(op_line(rows, *op) for op in OPS)]))
        text = between(text, "figures", table)
    README.write_text(text)


if __name__ == "__main__":
    main()
