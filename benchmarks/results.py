"""Result files: written row by row, read back, checked against `schema.json`."""

from __future__ import annotations

import json
import os
import re
import sys
from importlib.util import find_spec
from pathlib import Path

SCHEMA_VERSION = 2
SCHEMA = Path(__file__).with_name("schema.json")


def key(row: dict) -> tuple:
    """What makes two rows the same piece of work; the label, too, for it may name a network."""
    return row["name"], row["label"], tuple(row["shape"]), row["dtype"], row["device"]


def path_of(report: dict, folder: Path) -> Path:
    """<folder>/<device>/<date>-<commit>[-<suite>], then what the options say of shapes and dtypes, ".json".

    The suite "all" goes without its name.
    """
    options = report["options"]
    words = [report["environment"]["time"][:10], report["environment"]["commit"] or "uncommitted"]
    words += [] if report["suite"] == "all" else [report["suite"]]
    words += ["first"] if options.get("first") else []
    words += ["x".join(map(str, options.get("shape") or ())), "_".join(options.get("dtypes") or ())]
    words += [f"by_{options['sweep']}"] if options.get("sweep") else []
    words += [f"{len(options['labels'])}_labels"] if options.get("labels") else []
    name = re.sub(r"[^\w.,+-]+", "_", "-".join(filter(None, words)))
    return folder / device_folder(report["environment"]["device"]) / f"{name}.json"


def device_folder(device: str) -> str:
    return "-".join(device.lower().replace("(r)", "").replace("(tm)", "").split())


def save(report: dict, path: Path) -> Path:
    """Check a finished report, then write it. Raises ValueError if it is malformed."""
    validate(report, str(path))
    return write(report, path)


def write(report: dict, path: Path) -> Path:
    """Write a report, finished or not, whole or not at all: a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".json.partial")
    with partial.open("w") as file:
        file.write(json.dumps(report, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    return path


def load(path: str | Path) -> dict:
    """Read a result file. Raises ValueError, naming the file, if it is none or of another version."""
    try:
        report = json.loads(Path(path).read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"bench: {path} is not a result file: {error}") from None
    version = report.get("schema_version") if isinstance(report, dict) else None
    if version != SCHEMA_VERSION:
        raise ValueError(
            f"bench: {path} has schema version {version}, this reads {SCHEMA_VERSION}; measure again with "
            "`genengine bench ... --save benchmarks/results`"
        )
    validate(report, str(path))
    return report


def merged(reports: list[dict]) -> dict:
    """One report of the rows of several, the later of two rows of the same work.

    Raises ValueError unless all are of one device and commit: ratios of several machines are no comparison.
    """
    kinds = {(r["environment"]["device"], r["environment"]["commit"]) for r in reports}
    if len(kinds) != 1:
        found = "; ".join(f"{device} at {commit}" for device, commit in sorted(kinds, key=str))
        raise ValueError(f"bench: reports of one device and commit can be shown together, these are of {found}")
    if len(reports) == 1:
        return reports[0]
    rows = {key(row): row for report in reports for row in report["rows"]}
    ceilings = next((report["ceilings"] for report in reports if report["ceilings"]), None)
    suites = list(dict.fromkeys(report["suite"] for report in reports))
    options = reports[-1]["options"] | {"suites": suites}
    name = suites[0] if len(suites) == 1 else f"{len(suites)} suites"
    return reports[-1] | {"suite": name, "options": options, "rows": list(rows.values()), "ceilings": ceilings}


def validate(report: dict, name: str = "the report") -> None:
    """Raise ValueError, naming the place, unless the report fits the schema; without jsonschema say so, once."""
    if find_spec("jsonschema") is None:
        if not _told:
            _told.append(True)
            print("bench: result files are not validated, jsonschema is missing: pip install 'genengine[bench]'",
                  file=sys.stderr)  # fmt: skip
        return
    import jsonschema

    try:
        jsonschema.validate(report, json.loads(SCHEMA.read_text()))
    except jsonschema.ValidationError as error:
        raise ValueError(f"bench: {name} is malformed at {error.json_path}: {error.message[:200]}") from None


_told: list[bool] = []
