"""Hopper's instructions as tests/emulated has them, alone: what they compute at any schedule, every misuse found."""

import ctypes
import itertools
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from emulated_support import ROOT, build

pytestmark = pytest.mark.emulated

BF16, F16 = torch.bfloat16, torch.float16
LINES = (32, 64, 128)


@pytest.fixture(scope="module")
def instructions(tmp_path_factory):
    library = ctypes.CDLL(build("hopper_instructions.cpp", tmp_path_factory.mktemp("hopper")))
    library.exp2_of.restype, library.packed.restype = ctypes.c_float, ctypes.c_uint32
    library.exp2_of.argtypes, library.packed.argtypes = [ctypes.c_float], [ctypes.c_float, ctypes.c_float, ctypes.c_int]
    return library


@pytest.fixture(scope="module")
def misuse_library(tmp_path_factory):
    return build("hopper_misuse.cpp", tmp_path_factory.mktemp("misuse"))


class ProductCall(ctypes.Structure):
    _fields_ = [*((name, ctypes.c_void_p) for name in ("a", "b", "sums")), ("seed", ctypes.c_uint64)]


# ---- products ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("line", LINES)
@pytest.mark.parametrize("columns", [64, 72, 80, 96, 128, 176])
def test_products(instructions, columns, line, dtype):
    """Every way in which a and b may lie, a in registers too, added to sums."""
    a, b = torch.randn(64, 80).to(dtype), torch.randn(80, columns).to(dtype)
    for way, (a_at, b_down) in enumerate(itertools.product(("along", "down", "registers"), (False, True))):
        lies_a = a.T.contiguous() if a_at == "down" else a
        lies_b = b if b_down else b.T.contiguous()
        sums = torch.randn(64, columns)
        expected = sums.double() + a.double() @ b.double()
        call = ProductCall(lies_a.data_ptr(), lies_b.data_ptr(), sums.data_ptr(), 7 * columns + way)
        kind = ("along", "down", "registers").index(a_at)
        instructions.product(ctypes.byref(call), int(dtype == F16), columns, line, kind, int(b_down))
        torch.testing.assert_close(sums.double(), expected, rtol=0, atol=2e-5)


# ---- copies --------------------------------------------------------------------------------------------------------


class TensorMap(ctypes.Structure):
    """TensorMap of tests/emulated/cuda/hopper/copies.h: a tensor of at most 4 dims, and the box that a copy takes."""

    _fields_ = [
        ("base", ctypes.c_void_p), ("size", ctypes.c_int64 * 4), ("stride", ctypes.c_int64 * 4),
        ("box", ctypes.c_int * 4), ("element", ctypes.c_int), ("swizzle", ctypes.c_int),
    ]  # fmt: skip


def tensor_map(array, box, swizzle=0):
    """Of an array (B, N, H, D) whose last dimension is dense; box: innermost first."""
    size, stride = array.shape[::-1], array.strides[::-1]
    four = lambda values, kind: (kind * 4)(*values)  # noqa: E731
    base, element = array.ctypes.data, array.itemsize
    return TensorMap(
        base, four(size, ctypes.c_int64), four(stride, ctypes.c_int64), four(box, ctypes.c_int), element, swizzle
    )


def aligned(shape, dtype, *, fill):
    """An array whose rows begin at multiples of 16 bytes, a slice of a larger one of `fill`."""
    whole = np.full((shape[0], shape[1] + 2, shape[2] + 1, shape[3] // 8 * 8 + 8), fill, dtype)
    flat = np.full(whole.size + 64, fill, dtype)
    first = -flat.ctypes.data % 16 // flat.itemsize
    whole = flat[first : first + whole.size].reshape(whole.shape)
    return whole[:, 1:-1, 1:, : shape[3]], whole


def box_of(array, at, box):
    """array[at : at + box] in every dimension (at and box innermost first), zeros beyond its ends."""
    found = np.zeros(box[::-1], array.dtype)
    for index in np.ndindex(*box[::-1]):
        place = tuple(i + c for i, c in zip(index, at[::-1], strict=True))
        if all(0 <= p < n for p, n in zip(place, array.shape, strict=True)):
            found[index] = array[place]
    return found


def swizzled(tile, line):
    """The bytes of a box of lines of `line` bytes, as the CUDA guide draws the patterns: chunk c of line i lies at
    c ^ i % 8, c ^ i / 2 % 4 or c ^ i / 4 % 2 of lines of 128, 64 or 32 bytes."""
    lines = tile.reshape(-1, tile.shape[-1]).view(np.uint8).reshape(-1, line // 16, 16)
    found = np.empty_like(lines)
    for i, c in np.ndindex(*lines.shape[:2]):
        other = {128: i % 8, 64: i // 2 % 4, 32: i // 4 % 2}[line]
        found[i, c ^ other] = lines[i, c]
    return found.reshape(-1)


@pytest.mark.parametrize("dtype", [np.uint16, np.float32], ids=["16 bit", "32 bit"])
@pytest.mark.parametrize("line", [0, *LINES])
def test_boxes_there_and_back(instructions, line, dtype):
    """At places within the tensor, over its ends and before its beginning; nothing beyond the target is written."""
    rng = np.random.default_rng(line)
    for trial in range(12):
        columns = (line or int(rng.integers(1, 5)) * 16) // np.dtype(dtype).itemsize
        box = (columns, *(int(n) for n in rng.integers(1, [3, 20, 3])))
        size = [int(n) for n in rng.integers([1, 1, 1, 1], [4, 24, 4, 70])]
        (source, _), (target, whole) = aligned(size, dtype, fill=7), aligned(size, dtype, fill=9)
        source[...] = rng.integers(0, 1 << 16, size)
        from_, to = ([int(rng.integers(-b, n + 1)) for b, n in zip(box, size[::-1], strict=True)] for _ in range(2))
        expected, tile = whole.copy(), box_of(source, from_, box)
        inner = expected[:, 1:-1, 1:, : size[3]]
        for index in np.ndindex(*box[::-1]):
            place = tuple(i + c for i, c in zip(index, to[::-1], strict=True))
            if all(0 <= p < n for p, n in zip(place, size, strict=True)):
                inner[place] = tile[index]
        raw = np.zeros(tile.nbytes, np.uint8)
        maps = [tensor_map(array, box, line) for array in (source, target)]
        places = [(ctypes.c_int * 4)(*place) for place in (from_, to)]
        instructions.copy_box(
            ctypes.byref(maps[0]), places[0], ctypes.byref(maps[1]), places[1],
            ctypes.c_void_p(raw.ctypes.data), ctypes.c_uint64(trial),
        )  # fmt: skip
        assert np.array_equal(raw, swizzled(tile, line) if line else tile.reshape(-1).view(np.uint8))
        assert np.array_equal(whole, expected)


def test_sums_of_blocks(instructions):
    for blocks, seed in itertools.product((1, 3), range(6)):
        sums = torch.randn(256 + 4)
        first = -sums.data_ptr() % 16 // 4
        expected = sums.clone()
        expected[first : first + 256] += blocks * torch.arange(256) + blocks * (blocks - 1) // 2
        to = ctypes.c_void_p(sums.data_ptr() + 4 * first)
        instructions.add_floats(to, 256, blocks, ctypes.c_uint64(seed))
        torch.testing.assert_close(sums, expected, rtol=1e-6, atol=1e-4)


def test_bytes_as_they_are(instructions):
    source = torch.randn(132)
    first = -source.data_ptr() % 16 // 4
    for seed in range(6):
        found = torch.zeros(128)
        places = [ctypes.c_void_p(p) for p in (source.data_ptr() + 4 * first, found.data_ptr())]
        instructions.copy_floats(*places, 128, ctypes.c_uint64(seed))
        assert torch.equal(found, source[first : first + 128])


def test_blocks_take_turns(instructions):
    for seed in range(12):
        order = (ctypes.c_int * 5)()
        instructions.in_turns(order, 5, ctypes.c_uint64(seed))
        assert list(order) == [4, 3, 2, 1, 0]


def test_many_phases_of_a_ring(instructions):
    """A barrier's parity over many uses, at every schedule: all threads see every box, once."""
    source, _ = aligned((1, 13, 1, 32), np.float32, fill=0)
    source[...] = np.random.default_rng(0).integers(-99, 99, source.shape)
    expected = np.broadcast_to(source.sum(-1).reshape(-1), (96, 13))
    for seed in range(24):
        sums = np.zeros((96, 13), np.float32)
        source_map = tensor_map(source, (32, 1, 1, 1))
        to = ctypes.c_void_p(sums.ctypes.data)
        instructions.pass_on(ctypes.byref(source_map), 13, to, ctypes.c_uint64(seed))
        assert np.array_equal(sums, expected)


# ---- arithmetic ----------------------------------------------------------------------------------------------------


def test_arithmetic(instructions):
    values = torch.cat([torch.randn(500) * 10.0 ** torch.randint(-9, 6, (500,)), torch.tensor([0.0, -0.0, 65519.0])])
    values = torch.cat([values, torch.tensor([65520.0, 6e-8, 2.9e-8, 1 + 2**-11, 1 + 3 * 2**-11, 1 + 2**-8])])
    for half, dtype in enumerate((BF16, F16)):
        words = [instructions.packed(float(x), 1.0, half) for x in values]
        found = torch.tensor([w & 0xFFFF for w in words], dtype=torch.int32).to(torch.int16).view(dtype)
        assert torch.equal(found, values.to(dtype)) and {w >> 16 for w in words} == {0x3C00 if half else 0x3F80}
    for x in (0.0, 1.5, -3.25, -126.0):
        assert instructions.exp2_of(x) == pytest.approx(2.0**x, rel=1e-6)
    assert instructions.exp2_of(-126.5) == instructions.exp2_of(float("-inf")) == 0.0
    assert instructions.exp2_of(1e-40) == 1.0


# ---- misuse --------------------------------------------------------------------------------------------------------

MISUSES = {
    "arrive too often": "more than its 1 arrivals in a phase",
    "bytes not expected": "copies brought 8192 bytes more than it expects",
    "barrier not made": "wait before barrier_init",
    "barrier not published": "wait before its maker's barrier_publish",
    "barrier made twice": "was made before",
    "barrier misaligned": "must be aligned to 8 bytes",
    "barrier overwritten": "overwritten in shared memory",
    "nobody arrives": "threads 0 .. 127 wait until for parity 0 of the barrier at 1024: in phase 0, 1 of 1 arrivals",
    "a phase passes unseen": "two phases ended while a thread waited",
    "named: too few": "for named barrier 3: 128 of 256 threads have come",
    "named: part of a warp": "named barrier 3: a warp came in part",
    "named: different counts": "named barrier 3: of (64 threads and of 128|128 threads and of 64)",
    "named: left over": "named barrier 3: 128 arrivals of 256 at the end",
    "a thread leaves": "threads 0 .. 0 wait no more: it has ended\n.*threads 1 .. 127 wait for the block",
    "copy misaligned": "must be aligned to 128 bytes",
    "copy beyond the memory": "8192 bytes at 11264 are beyond its 17408",
    "map of odd strides": "stride 2 must be a multiple of 16 bytes below 2\\^40, got 72",
    "map of long lines": "a line of 128 bytes exceeds its swizzle, 64",
    "a load is left": "still written when the block ends",
    "loads overlap": "still written by an earlier copy",
    "load where a store reads": "still read by an earlier copy",
    "store not waited for": "still to read it when its thread ends",
    "store's memory overwritten": "overwritten before a store has read it",
    "store not published": "has not published it",
    "published by another": "has not published it",
    "load of odd bytes": "bulk_load: both ends and the size must be multiples of 16, got .* and 24",
    "counted up before it is written": "count_up: this thread has not waited for its stores",
    "a turn never comes": "for a counter to reach 3 from 2",
    "beyond the memory": "written outside its 17408 bytes",
    "no fence": "no wgmma_fence before the first product",
    "no fence for the second batch": "no wgmma_fence before the first product",
    "sums written after the fence": "registers were written after the wgmma_fence",
    "sums written in flight": "sums were written while a product was to be added",
    "operand overwritten in flight": "overwritten before the product had read them",
    "operand written after the fence": "registers were written after the wgmma_fence",
    "not committed": "products were not committed when their thread ends",
    "not waited for": "products were not waited for when their thread ends",
    "different products": "issue different products",
    "different batches": "commit different products",
    "a warp does not multiply": "for products: 0 of 1 are done",
    "matrix within a pattern": "begins within a pattern of 1024 bytes",
    "matrix beyond a line": "beyond a line",
    "matrix beyond the memory": "are beyond its 17408",
    "operand not published": "has not published it",
    "not in eights": "count must be a multiple of 8 in 24 .. 256, got 100",
    "gives what it has not": "give_registers: the thread has 248 registers, got count 256",
    "takes less than it has": "take_registers: the thread has 248 registers, got count 24",
    "takes more than there are": "for 256 registers: ",
    "part of a warpgroup gives": "only part of warpgroup 0 took or gave up some",
}


@pytest.mark.parametrize("name", MISUSES)
def test_misuse_is_found(misuse_library, name):
    code = "import ctypes, sys; ctypes.CDLL(sys.argv[1]).misuse(sys.argv[2].encode(), 16)"
    done = subprocess.run([sys.executable, "-c", code, misuse_library, name], capture_output=True, text=True)
    assert done.returncode == -signal.SIGABRT and re.search(MISUSES[name], done.stderr, re.DOTALL), done.stderr


def test_no_misuse_is_left_out():
    source = (ROOT / "tests/emulated/hopper_misuse.cpp").read_text()
    assert set(re.findall(r'all\["(.*?)"\]', source)) == set(MISUSES)


def test_what_comes_too_early_is_wrong(misuse_library):
    """Sums read before the wait are never right; operands overwritten before it are seen at some schedules."""
    library = ctypes.CDLL(misuse_library)
    results = {}
    for overwrite, read in ((0, 0), (1, 0), (0, 1)):
        results[overwrite, read] = []
        for seed in range(16):
            sums = torch.zeros(128, 32)
            library.too_early(ctypes.c_void_p(sums.data_ptr()), overwrite, read, ctypes.c_uint64(seed))
            results[overwrite, read].append(bool(sums.isfinite().all()) and float(sums.sum()) == 16)
    assert all(results[0, 0]) and not any(results[0, 1]) and not all(results[1, 0]), results
