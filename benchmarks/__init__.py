"""Benchmarks: `harness` is the one timing protocol, `bench_<name>.py` says what to time, `suite` runs and reports."""
