"""The table of the fastest backends: filled from result files, read at the nearest shape, obeyed by the choice."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from genengine.ops import _fastest, _registry, _verify

GPU, ROOT = torch.device("cuda"), Path(__file__).resolve().parents[1]
BF16 = torch.bfloat16


def load_tool():
    spec = importlib.util.spec_from_file_location("fill_fastest", ROOT / "tools" / "fill_fastest.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def row(name, shape, dtype="bfloat16", **seconds):
    variants = {variant.replace("_", ", "): {"median": value} for variant, value in seconds.items()}
    group = "sampler_step" if name.startswith("CFG") else "adaln"
    return {"name": name, "group": group, "shape": shape, "dtype": dtype, "device": "cuda", "variants": variants}


REPORT = {
    "environment": {"device": "GPU X"},
    "rows": [
        row("attention", [8, 256, 16, 72], fused_cuda=1.0, fused_triton=2.0, torch=3.0),
        row("attention", [8, 256, 16, 64], fused_cuda=3.0, fused_triton=2.0, torch=2.5),
        row("attention", [8, 256, 16, 128], fused_cuda=3.0, fused_triton=2.0, torch=1.0),
        row("attention", [2, 8192, 16, 128], fused_cuda=1.0, fused_triton=2.0, torch=1.5),
        row("adaln", [2, 3, 4], fused_cuda=1.1, fused_triton=1.0),
        row("adaln", [20, 30, 40], fused_cuda=1.0, fused_triton=2.0),
        row("adaln", [2, 3, 4], "float32", fused_triton=1.0),  # nothing to compare with
        row("CFG + Euler row", [2, 3, 4], fused_cuda=1.0, fused_triton=2.0),
        row("CFG + DDPM row", [2, 3, 4], fused_cuda=4.0, fused_triton=2.0),
        row("adaln, forward and backward", [2, 3, 4], fused_cuda=1.0, fused_triton=2.0),  # of two ops
        row("adaln", [2, 3, 4]) | {"error": "broke"},
    ],
}


@pytest.fixture
def filled(tmp_path, monkeypatch):
    """The table that the tool writes of REPORT, and a device that bears its name."""
    tool, file = load_tool(), tmp_path / "2026-01-01-ops.json"
    file.write_text(json.dumps(REPORT))
    monkeypatch.setattr(tool, "TABLE", tmp_path / "fastest.json")
    monkeypatch.setattr(_fastest, "TABLE", tmp_path / "fastest.json")
    (tmp_path / "fastest.json").write_text("{}")
    assert tool.main([str(file), "--check"]) == 1
    assert tool.main([str(file)]) == 0 and tool.main([str(file), "--check"]) == 0
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU X")
    _fastest._table.cache_clear(), _fastest._order.cache_clear()
    yield json.loads((tmp_path / "fastest.json").read_text())
    _fastest._table.cache_clear(), _fastest._order.cache_clear()


def test_the_tool_keeps_what_can_be_compared(filled):
    assert list(filled["GPU X"]) == ["adaln", "attention", "sampler_step_out"]
    assert filled["GPU X"]["sampler_step_out"][0]["seconds"] == {"cuda": 5.0, "triton": 4.0}
    assert [entry["shape"] for entry in filled["GPU X"]["adaln"]] == [[2, 3, 4], [20, 30, 40]]
    assert filled["GPU X"]["attention"][0]["seconds"].keys() == {"cuda", "triton", "reference"}


def test_the_nearest_shape_decides(filled):
    order = lambda *shape: _fastest.order("attention", GPU, BF16, shape)  # noqa: E731
    assert order(8, 256, 16, 72) == ("cuda", "triton", "reference")
    assert order(1, 4096, 2, 72) == order(8, 256, 16, 72)  # the innermost size first: it chooses the kernel's form
    assert order(8, 300, 16, 64) == ("triton", "reference", "cuda")
    assert order(1, 512, 16, 128) == ("reference", "triton", "cuda")
    assert order(1, 16384, 16, 128) == ("cuda", "reference", "triton")


def test_without_a_shape_the_fastest_on_the_whole(filled):
    assert _fastest.order("adaln", GPU, BF16) == ("cuda", "triton")  # 1.1 and 1 against 1 and 2
    assert _fastest.order("adaln", GPU, torch.float32) == _fastest.DEFAULT
    assert _fastest.order("diffuse", GPU, BF16) == _fastest.DEFAULT


def test_another_device_has_the_default(filled, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU Y")
    _fastest._order.cache_clear()
    assert _fastest.order("attention", GPU, BF16, (8, 256, 16, 72)) == _fastest.DEFAULT


def test_the_choice_obeys_and_takes_only_what_was_seen_right(filled, monkeypatch):
    monkeypatch.setattr(_registry, "why_not", lambda op, name, *where: None)
    monkeypatch.setattr(_verify, "verified", lambda name, backend, device: f"{name}/{backend}" not in wrong)
    op, wrong = _registry.OPS["attention"], set()
    chosen = lambda dim: _registry.automatic(op, GPU, BF16, (torch.empty(8, 256, 16, dim),))  # noqa: E731
    assert [chosen(dim) for dim in (64, 72, 128)] == ["triton", "cuda", "reference"]
    wrong.add("attention_backward/cuda")
    assert [chosen(dim) for dim in (64, 72, 128)] == ["triton", "triton", "reference"]


def test_the_shipped_table_is_what_the_committed_results_say():
    tool = load_tool()
    results = sorted(ROOT.glob("benchmarks/results/*/*.json"))
    assert tool.main([*map(str, results), "--check"]) == 0
