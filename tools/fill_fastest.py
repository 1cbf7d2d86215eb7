"""Write genengine/ops/fastest.json, the table of which backend is fastest where, from benchmark results of GPUs.

    python tools/fill_fastest.py benchmarks/results/h200/*.json [--check]

Of every row of an op it takes the time of each backend ("fused, cuda", "fused, triton"), with inputs from memory, not
the cache, and that of torch's own op ("torch") as "reference" where the op falls back to it. Files later in the order
of their names replace rows of earlier ones. --check: only say whether the table would change.
"""

import argparse
import json
import sys
from pathlib import Path

from genengine import ops
from genengine.ops._fastest import TABLE

VARIANTS = {"fused, cuda": "cuda", "fused, triton": "triton"}
OWN = {"attention": "torch"}  # ops whose fallback is torch's own op, and the variant that times it


def rows_of(report: dict):
    """(device, op, row of the table) of every row that timed two backends or more."""
    device = report["environment"]["device"]
    for row in report["rows"]:
        if row.get("device") != "cuda" or "error" in row or row["name"] not in ops._registry.OPS:
            continue
        variants = VARIANTS | ({OWN[row["name"]]: "reference"} if row["name"] in OWN else {})
        seconds = {variants[name]: timing["median"] for name, timing in row["variants"].items() if name in variants}
        if len(seconds) > 1:
            yield device, row["name"], {"dtype": row["dtype"], "shape": row["shape"], "seconds": seconds}


def table(reports: list[dict]) -> dict:
    found: dict = {}
    for report in reports:
        for device, op, row in rows_of(report):
            rows = found.setdefault(device, {}).setdefault(op, {})
            rows[row["dtype"], tuple(row["shape"])] = row
    return {
        device: {op: [rows[key] for key in sorted(rows)] for op, rows in sorted(ops.items())}
        for device, ops in sorted(found.items())
    }


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
