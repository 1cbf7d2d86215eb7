"""Write genengine/ops/fastest.json, the table of which backend is fastest where, from benchmark results of GPUs.

    python tools/fill_fastest.py benchmarks/results/h200/*.json [--check]

Of every row of an op it takes the time of each backend ("fused, cuda", "fused, triton"), with inputs from memory, not
the cache, and that of torch's own op ("torch") as "reference" where the op falls back to it. Rows of one op, shape and
dtype (Euler's row and a multistep one) count together. Files later in the order of their names replace what earlier
ones say of a device and op. --check: only say whether the table would change.
"""

import argparse
import json
import sys
from pathlib import Path

from genengine import ops
from genengine.ops._fastest import TABLE

VARIANTS = {"fused, cuda": "cuda", "fused, triton": "triton"}
OWN = {"attention": "torch"}  # ops whose fallback is torch's own op, and the variant that times it


def op_of(row: dict) -> str | None:
    """The dispatcher op that a row times: of its name ("attention, causal"), else of its group ("CFG + Euler row").

    None of a row that runs forward and backward.
    """
    if "forward and backward" in row["name"]:
        return None
    names = (row["name"].split(",")[0], row["group"], f"{row['group']}_out")
    return next((name for name in names if name in ops._registry.OPS), None)


def rows_of(report: dict) -> dict:
    """(op, dtype, shape) -> seconds by backend, of what timed two backends or more."""
    found: dict = {}
    for row in report["rows"]:
        if row["device"] != "cuda" or "error" in row or (op := op_of(row)) is None:
            continue
        variants = VARIANTS | ({OWN[op]: "reference"} if op in OWN else {})
        seconds = {variants[name]: timing["median"] for name, timing in row["variants"].items() if name in variants}
        if len(seconds) > 1:
            key = (op, row["dtype"], tuple(row["shape"]))
            before = found.get(key, dict.fromkeys(seconds, 0.0))
            found[key] = {name: before[name] + seconds[name] for name in before.keys() & seconds.keys()}
    return found


def table(reports: list[dict]) -> dict:
    found: dict = {}
    for report in reports:
        by_op: dict = {}
        for (op, dtype, shape), seconds in sorted(rows_of(report).items()):
            entry = {"dtype": dtype, "shape": list(shape), "seconds": dict(sorted(seconds.items()))}
            by_op.setdefault(op, []).append(entry)
        if by_op:
            found.setdefault(report["environment"]["device"], {}).update(by_op)
    return {device: dict(sorted(found[device].items())) for device in sorted(found)}


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="example: python tools/fill_fastest.py benchmarks/results/h200/*.json",
    )
    parser.add_argument("files", nargs="*", type=Path, help="result files of `genengine bench` on GPUs")
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if the table would change")
    options = parser.parse_args(arguments)
    reports = [json.loads(path.read_text()) for path in sorted(options.files, key=lambda path: path.name)]
    text = json.dumps(table(reports), indent=1) + "\n"
    if options.check:
        return int(json.loads(TABLE.read_text()) != json.loads(text))
    TABLE.write_text(text)
    print(f"{TABLE}: {sum(len(rows) for ops in json.loads(text).values() for rows in ops.values())} rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
