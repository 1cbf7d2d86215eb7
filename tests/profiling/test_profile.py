"""`profile` end to end on a CPU: what it says, as dataclasses, JSON, text and page."""

import dataclasses
import gzip
import json
import re
import xml.etree.ElementTree as ET

import pytest
import torch

from genengine import profiling
from genengine.benchmarks.bench_adaln import eager_adaln
from genengine.profiling import Profile, flame, page, profile, report, timeline
from genengine.profiling.record import record


class Ceilings:
    """1 GB/s, 1 GFLOP/s, a launch of 1 us: round numbers to check percentages with."""

    matmul = {"float32": 1e9}

    def bandwidth(self, nbytes):
        return 1e9

    def floor(self, cost, dtype):
        assert isinstance(dtype, torch.dtype)
        floors = {"bandwidth": cost.bytes / 1e9, "matrix products": cost.flops / 1e9, "launch": 1e-6}
        name = max(floors, key=floors.get)
        return floors[name], name


X, ROWS = torch.randn(4, 32, 64), torch.randn(4, 128)


def work():
    h = eager_adaln(X, ROWS[:, :64], ROWS[:, 64:])
    total = 0.0
    for _ in range(3):
        total += (h @ h.mT).sum().item()
    return total


@pytest.fixture(scope="module")
def found() -> Profile:
    with torch.no_grad():
        return profile(work, device="cpu", repeats=2, ceilings=Ceilings(), name="work")


def test_kernels_have_calls_bytes_operations_and_shares(found):
    (product,) = [kernel for kernel in found.kernels if kernel.name == "aten::bmm"]
    assert product.calls == 3 and product.dtype == "float32" and product.shapes.startswith("4x32x64, 4x64x32")
    assert product.bytes == 3 * 4 * (4 * 32 * 64 + 4 * 32 * 32)  # h and its transpose are read as one
    assert product.flops == 3 * 2 * 4 * 32 * 32 * 64
    assert product.bandwidth == product.bytes / product.seconds and product.rate == product.flops / product.seconds
    assert product.floor == pytest.approx(product.flops / 1e9) and product.bound == "matrix products"
    assert product.of_ceiling == pytest.approx(product.floor / product.seconds)


def test_totals_add_up(found):
    assert found.bytes == sum(kernel.bytes for kernel in found.kernels) and found.missing == 0
    assert found.busy == pytest.approx(sum(kernel.seconds for kernel in found.kernels))
    assert 0 < found.busy <= found.profiled and found.seconds > 0
    assert sum(gap.seconds for gap in found.gaps) == pytest.approx(found.idle)
    assert [kernel.seconds for kernel in found.kernels] == sorted((k.seconds for k in found.kernels), reverse=True)


def test_syncs_and_fusions_name_the_users_line(found):
    (sync,) = found.syncs
    assert sync.count == 3 and sync.seconds is None and "item" in sync.call and "test_profile.py" in sync.line
    assert ".sum().item()" in report.place(sync.line)
    (fusion,) = found.fusions
    assert fusion.op == "adaln" and 0 < fusion.saved < fusion.bytes and fusion.seconds > 0


def test_json_is_json_and_holds_the_rates(found):
    plain = json.loads(json.dumps(found.to_json()))
    assert plain["schema_version"] == 1 and plain["name"] == "work"
    assert plain["kernels"][0].keys() >= {"bytes_per_s", "of_ceiling", "lines"} and len(plain["syncs"]) == 1


def test_the_table_is_aligned_and_complete(found):
    text = found.table(top=3)
    for part in ("work on cpu", "under the profiler", "in kernels", "moved at least", "of ceiling", "and ", "gaps: ",
                 "host syncs: these would wait", "adaln: 4 kernels in 1 place become 1"):  # fmt: skip
        assert part in text, part
    lines = text.splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("  kernel "))
    ends = {line.index("us" if "us" in line else "ms") + 2 for line in lines[head + 1 : head + 4]}
    assert len(ends) == 1  # the first column of times ends at one place
    assert not any(line != line.rstrip() for line in lines)


def test_without_ceilings_there_are_no_percentages_of_them():
    found = profile(lambda: X * 2, device="cpu", warmup=0, repeats=1)
    assert found.kernels[0].floor is None and "of ceiling" not in found.table()
    assert "host syncs: none" in found.table() and "nothing found" in found.table()


def test_a_function_that_does_nothing():
    found = profile(lambda: None, device="cpu")
    assert found.kernels == [] and found.bytes == 0 and any("no op was recorded" in note for note in found.notes)
    assert "host syncs: none" in found.table() and json.dumps(found.to_json())


def test_autograd_is_profiled_too():
    weight = torch.nn.Parameter(torch.randn(8, 8))
    found = profile(lambda: (X[0, :8, :8] @ weight).square().sum().backward(), device="cpu", repeats=1)
    assert sum(kernel.name == "aten::mm" for kernel in found.kernels) >= 1 and found.missing == 0


def test_compiled_code_stays_compiled_and_is_one_row():
    function = torch.compile(lambda: eager_adaln(X, ROWS[:, :64], ROWS[:, 64:]).sin())
    with torch.no_grad():
        found = profile(function, device="cpu", repeats=2)
    (region,) = [kernel for kernel in found.kernels if kernel.name.startswith("Torch-Compiled Region")]
    assert region.seconds > 0 and region.bytes is None and found.fusions == []
    assert any("torch.compile" in note for note in found.notes)
    assert not any(kernel.name == "aten::native_layer_norm" for kernel in found.kernels)
    assert "Torch-Compiled Region" in found.table() and found.to_json()["kernels"]
    torch._dynamo.reset()


def test_a_compiled_region_stands_in_the_flame():
    function = torch.compile(lambda: X.sin().cos())
    with torch.no_grad():
        found = profile(function, device="cpu", repeats=2)
    assert any(name.startswith("Torch-Compiled") and kind == "op" for name, kind in found.flame.children)
    assert found.flame.seconds == pytest.approx(found.profiled, rel=1e-6)
    torch._dynamo.reset()


def test_eager_work_beside_compiled_keeps_its_own_shapes():
    """The recording sees the compiled product, too: its bytes and time are not those of the eager one."""
    small, large = torch.randn(4, 4), torch.randn(128, 128)
    compiled = torch.compile(lambda: (large.sin() * 2).exp())

    with torch.no_grad():
        found = profile(lambda: (compiled(), small.sin()), device="cpu", repeats=2)
    (sine,) = [kernel for kernel in found.kernels if kernel.name == "aten::sin"]
    assert sine.shapes == "4x4" and found.bytes == 2 * 4 * 16
    torch._dynamo.reset()


def test_no_percentage_where_a_launch_binds_or_the_host_waits():
    found = profile(lambda: X[0, 0, :4].sin().sum().item(), device="cpu", repeats=1, ceilings=Ceilings())
    rows = {kernel.name: kernel for kernel in found.kernels}
    assert rows["aten::sin"].bound == "launch" and rows["aten::sin"].of_ceiling is None
    assert rows["aten::_local_scalar_dense"].floor is None
    assert all(row["of_ceiling"] is None for row in found.to_json()["kernels"])


def test_a_copy_to_another_device_has_no_ceiling():
    """And a number that stays on the host beside a tensor on the GPU does not take an op's away."""
    recording = record(lambda: (X.double(), X * X[0, 0, 0]))
    for step, operands in zip(recording.steps, ("writes", "reads"), strict=True):
        first, *rest = getattr(step, operands)
        setattr(step, operands, (dataclasses.replace(first, device="cuda"), *rest))
    times = timeline.Timeline(1e-3, 1e-3, {0: 1e-4, 1: 1e-4})
    found = profiling._summary(recording, times, torch.device("cuda"), 1, Ceilings(), "copies")
    floors = {kernel.name: kernel.floor for kernel in found.kernels}
    assert floors["aten::_to_copy"] is None and floors["aten::mul"] > 0


def test_ceilings_are_measured_for_the_dtypes_of_the_products():
    asked = []
    a, b = torch.randn(32, 32, dtype=torch.float64), X.bfloat16()

    def measure(device, dtypes):
        asked.extend(dtypes)
        assert device == torch.device("cpu")
        return Ceilings()  # in which only float32 is known

    found = profile(lambda: (a @ a, b @ b.mT), device="cpu", repeats=1, ceilings=measure)
    assert asked == [torch.bfloat16, torch.float64]
    assert all(kernel.floor is None for kernel in found.kernels if kernel.flops) and found.flops


def test_the_threads_of_the_ceilings_are_noted(monkeypatch):
    for threads in (1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=threads: n)
        notes = profile(lambda: X.sin(), device="cpu", repeats=1, ceilings=Ceilings()).notes
        assert any("ceilings are of one thread" in note for note in notes) == (threads > 1)


def test_more_work_than_was_recorded_is_noticed():
    calls = []

    def grows():
        calls.append(None)
        for _ in range(1 if len(calls) <= 1 else 9):
            X.sin()

    notes = profile(grows, device="cpu", warmup=0, repeats=1).notes
    assert any("0 of 1 recorded ops were not seen in the timed pass, and 8 ran" in note for note in notes)
    assert not any("same work" in note for note in profile(lambda: X.sin(), device="cpu", repeats=1).notes)


def test_ops_on_lists_of_tensors_are_matched():
    found = profile(lambda: (torch._foreach_mul([X, ROWS], 2.0), torch.cat([X, X])), device="cpu", repeats=1)
    assert {kernel.name for kernel in found.kernels} == {"aten::_foreach_mul", "aten::cat"}
    assert found.missing == 0 and not found.notes


def test_the_device_is_that_of_the_recorded_tensors(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert profile(lambda: X.sin(), repeats=1).device == "cpu"
    with pytest.raises(ValueError, match="device is cuda, but the function's tensors are on cpu"):
        profile(lambda: X.sin(), device="cuda")
    with pytest.raises(ValueError, match="device must be cpu or cuda, got meta"):
        profile(lambda: X.sin(), device="meta")


def test_another_profiler_is_refused_before_anything_runs():
    calls = []
    active = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
    with active, pytest.raises(RuntimeError, match="another profiler is active"):
        profile(lambda: calls.append(None), device="cpu")
    assert not calls


def test_on_a_gpu_bytes_are_of_what_launched_a_kernel():
    """A captured op was recorded, and launches nothing: neither its bytes nor a row of its own."""
    recording = record(lambda: (X.sin(), X.cos()))
    times = timeline.Timeline(1e-3, 1e-3, {1: 1e-4}, stray={"in_a_graph": (3, 4e-4)})
    found = profiling._summary(recording, times, torch.device("cuda"), 1, None, "captured")
    size = 2 * 4 * X.numel()
    assert found.bytes == size and found.known == pytest.approx(1e-4) and found.busy == pytest.approx(5e-4)
    assert [kernel.name for kernel in found.kernels] == ["in_a_graph", "aten::cos"]
    assert f"({report.quantity(size / 1e-4, 'B')}/s), in the 100 us of kernels of recorded ops" in found.table()


def test_the_trace_is_written(tmp_path):
    path = tmp_path / "folder" / "trace.json"
    profile(lambda: X.sin(), device="cpu", repeats=1, trace=path)
    events = json.loads(path.read_text())["traceEvents"]
    assert any(event["name"] == "aten::sin" for event in events)


@pytest.mark.parametrize("name", ["trace.json.gz", "trace"])
def test_the_trace_is_written_by_any_name(tmp_path, name):
    path = tmp_path / name
    assert profile(lambda: X.sin(), device="cpu", repeats=1, trace=path).kernels
    content = path.read_bytes()
    events = json.loads(gzip.decompress(content) if name.endswith(".gz") else content)["traceEvents"]
    assert any(event["name"] == "aten::sin" for event in events)


def test_a_trace_that_cannot_be_written_is_refused_before_anything_runs(tmp_path):
    calls = []
    with pytest.raises(IsADirectoryError):
        profile(lambda: calls.append(None), device="cpu", trace=tmp_path)
    assert not calls


@pytest.mark.parametrize("bad", [{"warmup": -1}, {"repeats": 0}])
def test_bad_arguments(bad):
    with pytest.raises(ValueError, match="warmup must be >= 0 and repeats >= 1"):
        profile(lambda: None, **bad)


def test_errors_of_the_function_pass_through():
    with pytest.raises(ZeroDivisionError):
        profile(lambda: 1 / 0, device="cpu")


# ---- page ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def html(found):
    pytest.importorskip("matplotlib", reason="the roofline is drawn by Matplotlib")
    return page.render(found)


def test_the_page_needs_nothing_else(html):
    assert "<script" not in html and len(html.encode()) < 2_000_000
    namespaces = r"http://www\.w3\.org/\S+"
    assert re.findall(r"https?://\S+", re.sub(namespaces, "", html)) == []
    for heading in ("Flame view", "Roofline", "Kernels", "Gaps", "Host syncs", "Fused ops"):
        assert f"<h2>{heading}" in html, heading


def test_the_roofline_has_ceilings_and_numbered_dots(html):
    assert "1 GB/s" in html and "float32 products, 1 GFLOP/s" in html
    assert "mathdefault" not in html and "$" not in html  # numbers, not the source of formulas
    drawing = html[html.index('<figure class="roofline">') :]
    assert "var(--ink)" in drawing[: drawing.index("</figure>")]


def test_every_box_of_the_flame_has_a_title_and_lies_within_its_parent(found):
    drawing = ET.fromstring(flame.svg(found.flame))
    boxes = list(drawing)
    assert all(box[0].tag == "title" and box[0].text for box in boxes)
    spans = [(int(r.get("y")), float(r.get("x")), float(r.get("width"))) for r in (box[1] for box in boxes)]
    for y, x, width in spans:
        if y:
            assert any(
                above == y - flame.ROW and px <= x + 0.2 and x + width <= px + wide + 0.7 for above, px, wide in spans
            )


def test_a_box_lasts_as_long_as_what_is_in_it(found):
    def check(box):
        if box.children:
            assert box.seconds == pytest.approx(sum(child.seconds for child in box.children.values()))
        for child in box.children.values():
            check(child)

    check(found.flame)
    assert found.flame.seconds == pytest.approx(found.profiled, rel=1e-6)


def test_names_are_escaped():
    box = flame.build([], {}, [(1.0, -1)], {}, {}, "<b>&")
    assert "&lt;b&gt;&amp;" in flame.svg(box) and "<b>" not in flame.svg(box)


def test_without_matplotlib_the_remedy_is_named(found, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(RuntimeError, match=r"pip install 'genengine\[plot\]'"):
        page.render(found)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1.5, "1.5 s"),
        (0.0123, "12.3 ms"),
        (1.2e-6, "1.2 us"),
        (9999e-6, "10 ms"),
        (5e-9, "5 ns"),
        (0.99951, "1 s"),
        (2345.0, "2345 s"),
    ],
)
def test_times_are_short(value, text):
    assert report.seconds(value) == text


def test_quantities_are_short():
    assert report.quantity(12_345_678, "B") == "12.3 MB" and report.quantity(0, "B") == "0 B"
    assert report.quantity(999_999, "B") == "1 MB"
