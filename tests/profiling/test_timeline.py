"""Traces are read right: on a CPU by nesting, on a GPU by correlation, with gaps and waits; on made-up events."""

import pytest

from genengine.profiling import timeline


def op(name, start, end, external=0, tid=1, dims=()):
    return {"ph": "X", "cat": "cpu_op", "name": name, "ts": start, "dur": end - start, "tid": tid,
            "args": {"External id": external, "Input Dims": list(dims)}}  # fmt: skip


def kernel(name, start, end, external, stream=7, cat="kernel", correlation=0):
    args = {"External id": external, "stream": stream, "correlation": correlation}
    return {"ph": "X", "cat": cat, "name": name, "ts": start, "dur": end - start, "tid": stream, "args": args}


def runtime(name, start, end, external, correlation=0):
    args = {"External id": external, "correlation": correlation}
    return {"ph": "X", "cat": "cuda_runtime", "name": name, "ts": start, "dur": end - start, "tid": 1, "args": args}


def whole(start, end):
    return {"ph": "X", "cat": "user_annotation", "name": timeline.PASS, "ts": start, "dur": end - start, "tid": 1}


def read(events, names):
    keys = [name if isinstance(name, tuple) else (name, ()) for name in names]
    return timeline.read(timeline.parse({"traceEvents": events}), keys, plain=1e-4)


def test_nested_ops_belong_to_the_outermost_recorded_one():
    events = [
        whole(0, 100),
        op("aten::linear", 10, 40), op("aten::t", 11, 12), op("aten::addmm", 15, 39), op("aten::copy_", 16, 17),
        op("aten::copy_", 50, 60),
    ]  # fmt: skip
    found = read(events, ["aten::addmm", "aten::copy_"])
    assert found.durations == pytest.approx({0: 24e-6, 1: 10e-6}) and found.missing == 0
    assert found.profiled == pytest.approx(100e-6) and found.plain == 1e-4


def test_gaps_on_a_cpu_end_with_the_op_that_comes_next():
    found = read([whole(0, 100), op("aten::mul", 20, 30), op("aten::add", 35, 60)], ["aten::mul", "aten::add"])
    assert found.gaps == [pytest.approx((20e-6, 0)), pytest.approx((5e-6, 1)), pytest.approx((40e-6, -1))]


def test_times_are_those_of_the_pass_of_median_length():
    events = []
    for begin, length in ((0, 10), (100, 30), (200, 20)):
        events += [whole(begin, begin + 2 * length), op("aten::mul", begin + 1, begin + 1 + length)]
    found = read(events, ["aten::mul"])
    assert found.profiled == pytest.approx(40e-6) and found.durations == pytest.approx({0: 20e-6})
    assert sum(length for length, _ in found.gaps) == pytest.approx(20e-6)  # the parts add up to the pass


def test_what_was_recorded_but_not_seen_is_counted():
    found = read([whole(0, 100), op("aten::mul", 20, 30)], ["aten::mul", "aten::mul", "aten::add"])
    assert found.missing == 2 and set(found.durations) == {0}


def test_an_in_place_form_counts_as_the_op():
    found = read([whole(0, 100), op("aten::add_", 20, 30), op("aten::add", 40, 45)], ["aten::add", "aten::add"])
    assert found.durations == pytest.approx({0: 10e-6, 1: 5e-6})


GPU = [
    whole(0, 300),
    op("aten::linear", 5, 30, external=1), op("aten::addmm", 6, 29, external=2),
    runtime("cudaLaunchKernel", 10, 12, external=2), runtime("cudaLaunchKernel", 14, 16, external=2),
    op("aten::item", 40, 190, external=3), op("aten::_local_scalar_dense", 41, 189, external=4),
    runtime("cudaMemcpyAsync", 45, 180, external=4, correlation=9),
    runtime("cudaStreamSynchronize", 180, 188, external=4),
    op("aten::relu", 200, 210, external=5),
    runtime("cudaDeviceSynchronize", 270, 299, external=0),
    kernel("gemm", 50, 100, external=2), kernel("splitk_reduce", 101, 111, external=2),
    kernel("Memcpy DtoH (Device -> Pageable)", 120, 122, external=4, cat="gpu_memcpy", correlation=9),
    kernel("relu_kernel", 222, 232, external=5), kernel("graph_kernel", 240, 250, external=0),
    kernel("other_stream", 245, 260, external=0, stream=20),
]  # fmt: skip
GPU_NAMES = ["aten::addmm", "aten::_local_scalar_dense", "aten::relu"]


def test_on_a_gpu_kernels_count_for_the_op_that_launched_them():
    found = read(GPU, GPU_NAMES)
    assert found.durations == pytest.approx({0: 60e-6, 1: 2e-6, 2: 10e-6})
    assert found.stray == {"graph_kernel": (1, pytest.approx(10e-6)), "other_stream": (1, pytest.approx(15e-6))}


def test_on_a_gpu_a_gap_is_when_no_stream_works():
    gaps = read(GPU, GPU_NAMES).gaps
    assert [step for _, step in gaps] == [0, 1, 2, -1]
    assert [length for length, _ in gaps] == pytest.approx([1e-6, 9e-6, 100e-6, 8e-6])


def test_on_a_gpu_waits_are_the_calls_that_block():
    waits = read(GPU, GPU_NAMES).waits
    assert [(call, step) for _, call, step in waits] == [
        ("cudaMemcpyAsync", 1), ("cudaStreamSynchronize", 1),
    ]  # fmt: skip  # the last, cudaDeviceSynchronize, ends the pass
    assert [length for length, *_ in waits] == pytest.approx([135e-6, 8e-6])


def test_on_a_gpu_a_kernel_that_names_no_op_belongs_to_the_call_that_launched_it():
    events = [
        whole(0, 100), op("aten::mul", 5, 20, external=1), runtime("cudaLaunchKernel", 6, 8, 0, correlation=3),
        runtime("cudaStreamSynchronize", 15, 19, 0, correlation=5),
        runtime("cudaGraphLaunch", 30, 32, 0, correlation=4),
        kernel("mul_kernel", 10, 12, 0, correlation=3), kernel("in_a_graph", 40, 45, 0, correlation=4),
    ]  # fmt: skip
    found = read(events, ["aten::mul"])
    assert found.durations == pytest.approx({0: 2e-6}) and set(found.stray) == {"in_a_graph"}
    assert [(call, step) for _, call, step in found.waits] == [("cudaStreamSynchronize", 0)]


def test_a_copy_to_pinned_memory_does_not_block():
    events = [
        whole(0, 100), op("aten::copy_", 5, 20, external=1), runtime("cudaMemcpyAsync", 6, 8, 1, correlation=3),
        kernel("Memcpy DtoH (Device -> Pinned)", 10, 12, 1, cat="gpu_memcpy", correlation=3),
    ]  # fmt: skip
    assert read(events, ["aten::copy_"]).waits == []


def test_ranges_around_an_op_are_known_and_rows_are_one():
    row = {"ph": "X", "cat": "user_annotation", "name": "genengine::row 3", "ts": 5, "dur": 40, "tid": 1}
    own = {"ph": "X", "cat": "user_annotation", "name": "mine", "ts": 10, "dur": 20, "tid": 1}
    events = [whole(0, 100), row, own, op("aten::mul", 15, 20), op("aten::add", 35, 40), op("aten::sin", 60, 61)]
    found = read(events, ["aten::mul", "aten::add", "aten::sin"])
    assert found.ranges == {0: ("genengine::row", "mine"), 1: ("genengine::row",)}


def test_a_trace_without_a_pass_says_why():
    with pytest.raises(RuntimeError, match="another profiler"):
        read([op("aten::mul", 0, 1)], ["aten::mul"])


def test_ops_of_one_name_are_told_apart_by_their_shape():
    """An op that the recording holds eagerly, but that ran compiled, shifts no other."""
    events = [
        whole(0, 100),
        op("aten::mm", 10, 30, dims=[[8, 4], [4, 2]]),
        op("aten::mm", 40, 45, dims=[[2, 2], [2, 2]]),
    ]
    found = read(events, [("aten::mm", (64, 64)), ("aten::mm", (8, 4)), ("aten::mm", (2, 2))])
    assert found.durations == pytest.approx({1: 20e-6, 2: 5e-6}) and found.missing == 1 and found.surplus == 0


@pytest.mark.parametrize(
    ("dims", "shape"),
    [([], ()), ([[], [3, 4]], (3, 4)), ([[[2, 1], [5]], [7]], (7,)), ([[], []], ())],
)
def test_the_shape_of_an_op_is_that_of_its_first_tensor_with_dimensions(dims, shape):
    (event,) = timeline.parse({"traceEvents": [op("aten::mul", 0, 1, dims=dims)]})
    assert event.shape == shape


def test_what_ran_and_was_not_recorded_is_counted_once():
    events = [whole(0, 100), op("aten::mul", 10, 20), op("aten::mul", 30, 40), op("aten::mul", 31, 35),
              op("aten::sin", 50, 60)]  # fmt: skip
    found = read(events, ["aten::mul"])
    assert found.surplus == 1 and found.missing == 0


def test_a_captured_op_that_launches_nothing_has_no_time():
    """On a GPU: the ops of a graph are called while it is captured, or not at all; its kernels name none of them."""
    events = [
        whole(0, 100), op("aten::mul", 5, 9, external=1), op("aten::add", 10, 20, external=2),
        runtime("cudaLaunchKernel", 11, 12, external=2, correlation=3),
        kernel("add_kernel", 15, 18, external=2, correlation=3), kernel("in_a_graph", 40, 45, 0, correlation=4),
    ]  # fmt: skip
    found = read(events, ["aten::mul", "aten::add"])
    assert found.durations == pytest.approx({1: 3e-6}) and found.missing == 0
    assert set(found.stray) == {"in_a_graph"}


def test_an_op_without_an_external_id_owns_no_kernel():
    events = [whole(0, 100), op("aten::mul", 5, 9, external=0), kernel("somebodys", 15, 18, external=0)]
    found = read(events, ["aten::mul"])
    assert found.durations == {} and set(found.stray) == {"somebodys"}


def test_a_compiled_region_within_another_is_counted_once():
    outer, inner = f"{timeline.COMPILED}: 0/0", f"{timeline.COMPILED}: 1/0"
    events = [whole(0, 100), op(outer, 10, 60), op(inner, 20, 40), op("aten::mul", 25, 30), op("aten::add", 45, 49)]
    found = read(events, ["aten::mul", "aten::add"])
    assert found.stray[outer] == (1, pytest.approx(26e-6)) and found.stray[inner] == (1, pytest.approx(15e-6))
    assert sum(found.durations.values()) + 41e-6 == pytest.approx(50e-6)
