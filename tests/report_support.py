"""Reports of genengine bench made up for tests of what reads them; all of them fit the schema."""

from genengine.benchmarks import results

CEILINGS = {
    "device": "cpu", "copy": {"32768": 3e10, "2097152": 5e10, "134217728": 1.3e10},
    "triad": {"32768": 2e10, "2097152": 5.1e10, "134217728": 1.4e10}, "matmul": {"float32": 1.8e11, "bfloat16": 1e11},
    "exps": 3e9, "launch": 4e-7,
}  # fmt: skip


def timing(median):
    return {
        "min": 0.8 * median, "p20": 0.9 * median, "median": median, "p80": 1.2 * median, "clock": "process time",
        "wall": 2 * median,
    }  # fmt: skip


def timings(seconds, others):
    """Variants and ratios of a row, others given by their ratio to ours."""
    return {
        "variants": {"fused": timing(seconds)} | {name: timing(seconds * ratio) for name, ratio in others.items()},
        "ratios": {name: {"ratio": r, "low": 0.9 * r, "high": 1.2 * r} for name, r in others.items()},
    }


def row(name="adaln", *, others=None, seconds=2e-3, shape=(16, 256, 1152), device="cpu", **changes):
    """A timed row; others: variant -> ratio to ours."""
    others = {"eager": 3.0, "torch.compile": 1.5, "copy_": 0.5} if others is None else others
    return {
        "name": name, "group": "adaln", "kind": "ops", "label": "DiT", "shape": list(shape), "dtype": "float32",
        "device": device, "samples": 20, "goals": [], "skipped": {}, "accuracy": None,
        "first_call": dict.fromkeys(others, 0.25), "sets": 1, "unchecked": [], "state": [{"load": 0.5}, {"load": 0.75}],
    } | timings(seconds, others) | changes  # fmt: skip


def costly(nbytes=38_000_000, flops=38_000_000, seconds=2e-3, ceiling="bandwidth"):
    """What a row with a cost says beyond its times."""
    return {
        "cost": {"bytes": nbytes, "flops": flops, "exps": 0}, "GB_per_s": nbytes / seconds * 1e-9,
        "TFLOP_per_s": flops / seconds * 1e-12,
        "ceiling": {"name": ceiling, "seconds": 1e-3, "percent": 100 * 1e-3 / seconds},
    }  # fmt: skip


def failed(name, error, **changes):
    keep = ("name", "group", "kind", "label", "shape", "dtype", "device")
    return {key: value for key, value in row(name, **changes).items() if key in keep} | {"error": error}


def report(rows, *, suite="ops", ceilings=CEILINGS, environment=None, **options):
    made = {
        "schema_version": results.SCHEMA_VERSION, "suite": suite,
        "options": {"budget": 2.0, "shape": None, "dtypes": [], "compile_modes": ["default"], "sweep": None,
                    "device": "cpu"} | options,
        "environment": {
            "time": "2026-01-02T03:04:05+00:00", "commit": "0123456789ab", "dirty": False, "genengine": "0.1.0",
            "torch": "2.13.0", "triton": None, "python": "3.11.7", "threads": 1, "load_average": [0.5, 0.25, 0.125],
            "malloc": {"MALLOC_MMAP_THRESHOLD_": "1073741824", "MALLOC_TRIM_THRESHOLD_": None}, "device": "A CPU",
        } | (environment or {}),
        "ceilings": ceilings, "rows": rows,
    }  # fmt: skip
    results.validate(made)
    return made
