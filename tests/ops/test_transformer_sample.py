"""transformer_sample: every draw against the network in float64, orders and backends with each other, interruptions."""

import os
import signal
import sys
import threading
import time
from collections import OrderedDict

import pytest
import torch
from support import filled, skip_unless_available
from torch.library import opcheck

from genengine import backend as backend_context
from genengine import testing
from genengine.nets.transformer import Transformer
from genengine.ops import EXTENSION, _registry, _transformer_graph, _verify, transformer_sample, uniform
from genengine.ops.transformer_sample import Sequences, Sizes, pack_transformer
from genengine.testing.transformer_sample import arguments, tensors

NAME = "transformer_sample_out"
BACKENDS = ["reference", "cpu", pytest.param("cuda", marks=pytest.mark.gpu)]  # there is no Triton kernel, by design
NAMESPACES = {"genengine": "cpu", "genengine_reference": "reference"}
F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
SMALL = {"length": 23, "num_levels": 11, "num_classes": 3, "dim": 24, "depth": 2, "num_heads": 3, "mlp_ratio": 2}
# How far a uniform may lie outside of the interval of its token: rounding in the sums of the CDF and in logits.
EDGE = {F64: 1e-6, F32: 1e-5, BF16: 2e-2}
KNOWN = torch.ones(23, dtype=torch.bool)
NATS = {F64: 1e-12, F32: 2e-5, BF16: 1e-1}
needs_extension = pytest.mark.skipif(not EXTENSION.loaded, reason=f"no compiled kernels: {EXTENSION.reason}")


def make(seed=0, scale=0.3, device="cpu", **overrides):
    return filled(Transformer.from_config(SMALL, seed=seed, **overrides), seed, scale).to(device)


def oracle_logits(net, tokens, labels, dtype):
    """The float64 network, with weights rounded as they are packed."""
    wide = Transformer(net.config).to(F64)
    state = {name: value.cpu().to(F64) for name, value in net.state_dict().items()}
    if dtype == BF16:
        products = [name for name in state if name.startswith(("blocks.", "out.")) and name.endswith("weight")]
        state |= {name: state[name].bfloat16().to(F64) for name in products}
    wide.load_state_dict(state)
    with torch.no_grad():
        return wide(tokens.cpu(), None if labels is None else labels.cpu())


def assert_draws(found, net, labels, dtype, *, seed, ids=None, temperature=1.0, known=None):
    """Every token that was drawn holds its uniform between the sums of the CDF before and after it, in float64."""
    batch, length = found.tokens.shape
    assert found.done == length and found.tokens.dtype == torch.int64
    assert found.log_prob.dtype == (F64 if dtype == F64 else F32)
    tokens, log_prob = found.tokens.cpu(), found.log_prob.cpu().double()
    log_p = torch.log_softmax(oracle_logits(net, tokens, labels, dtype) / temperature, -1)
    sums = log_p.exp().cumsum(-1)
    upper = sums.gather(2, tokens[..., None])[..., 0]
    lower = torch.where(tokens == 0, 0.0, sums.gather(2, (tokens - 1).clamp_min(0)[..., None])[..., 0])
    u = uniform((batch, length), seed=seed, sample_ids=ids, backend="reference").double()
    drawn = torch.ones_like(tokens, dtype=torch.bool) if known is None else ~known
    outside = torch.maximum(lower - u, u - upper)[drawn]
    assert outside.max() <= EDGE[dtype], f"a uniform lies {outside.max():.3g} outside of its token's interval"
    exact = torch.where(drawn, log_p.gather(2, tokens[..., None])[..., 0], 0.0)
    assert (log_prob - exact).abs().max() <= NATS[dtype] / min(temperature, 1.0)


def same_up_to_ties(a, b, limit):
    """At most `limit` sequences part: a rounding decides where a uniform lies on an edge, and all after it differs."""
    parted = (a.tokens != b.tokens).any(1)
    assert parted.sum() <= limit, f"{int(parted.sum())} of {len(parted)} sequences differ"
    torch.testing.assert_close(a.log_prob[~parted], b.log_prob[~parted].to(a.log_prob.dtype), rtol=0, atol=2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_case_set(backend):
    device = skip_unless_available(NAME, backend)
    assert _verify.run(_registry.OPS[NAME], backend, device) == []


@pytest.mark.parametrize("order", ["cached", "naive"])
@pytest.mark.parametrize("dtype", [F32, BF16, F64], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_draw_is_the_network_s(backend, dtype, order):
    device = skip_unless_available(NAME, backend, dtype)
    if order == "naive" and backend != "reference":
        pytest.skip("the order 'naive' is the reference's alone")
    net, labels = make(device=device), torch.arange(19, device=device) % 4
    ids = torch.arange(19, device=device) * 5 + 2**32 - 100
    options = {"seed": 2**64 - 5, "sample_ids": ids}
    found = transformer_sample(net.packed(dtype), 19, labels=labels, order=order, backend=backend, **options)
    assert_draws(found, net, labels, dtype, seed=2**64 - 5, ids=ids.cpu())
    assert found.tokens.unique().numel() == 11 and not torch.equal(found.tokens[0], found.tokens[4])


SHAPES = {
    "one head of a vector": {"dim": 16, "num_heads": 1, "num_classes": 0},
    "odd": {"dim": 15, "num_heads": 5, "mlp_ratio": 3, "num_levels": 17, "length": 5},
    "wide heads": {"dim": 144, "num_heads": 2, "depth": 1, "length": 18},
    "one of everything": {"dim": 1, "num_heads": 1, "depth": 1, "num_levels": 2, "length": 1, "mlp_ratio": 1},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_odd_shapes(backend, dtype, shape):
    device = skip_unless_available(NAME, backend, dtype)
    net = make(scale=0.2, device=device, **SHAPES[shape])
    labels = torch.arange(3, device=device) if net.config.num_classes else None
    found = transformer_sample(net.packed(dtype), 3, labels=labels, seed=5, backend=backend)
    assert_draws(found, net, labels, dtype, seed=5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_orders_and_backends_draw_the_same_tokens(backend):
    device = skip_unless_available(NAME, backend)
    net, labels = make(device=device), torch.arange(64, device=device) % 4
    naive = transformer_sample(net.packed(), 64, labels=labels, seed=3, order="naive", backend="reference")
    cached = transformer_sample(net.packed(), 64, labels=labels, seed=3, backend=backend)
    same_up_to_ties(cached, naive, limit=1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sample_does_not_depend_on_its_batch(backend):
    device = skip_unless_available(NAME, backend)
    net, labels = make(device=device), torch.arange(37, device=device) % 3
    seeds = torch.arange(37, device=device) // 2
    whole = transformer_sample(net.packed(), 37, labels=labels, seed=seeds, backend=backend)
    for part in (slice(0, 1), slice(1, 7), slice(11, 37)):
        ids = torch.arange(37, device=device)[part]
        options = {"labels": labels[part], "seed": seeds[part], "sample_ids": ids, "backend": backend}
        alone = transformer_sample(net.packed(), len(ids), **options)
        if backend == "cpu":  # where rows of a product do not know each other
            assert torch.equal(alone.tokens, whole.tokens[part]) and torch.equal(alone.log_prob, whole.log_prob[part])
        else:
            same_up_to_ties(alone, Sequences(whole.tokens[part], whole.log_prob[part], 23), limit=1)


@needs_extension
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_threads_change_no_bit(dtype):
    weights = make().packed(dtype)
    one = transformer_sample(weights, 35, seed=1, backend="cpu")
    torch.set_num_threads(2)
    try:
        two = transformer_sample(weights, 35, seed=1, backend="cpu")
    finally:
        torch.set_num_threads(1)
    assert torch.equal(one.tokens, two.tokens) and torch.equal(one.log_prob, two.log_prob)


@needs_extension
@pytest.mark.parametrize("isa", testing.ISAS)
def test_every_instruction_set(isa):
    with testing.cpu_isa(isa) as in_use:
        if in_use != isa:
            pytest.skip(f"this CPU has no {isa}")
        assert _verify.run(_registry.OPS[NAME], "cpu", torch.device("cpu")) == []
        net = make(dim=40, num_heads=2)
        for dtype in (F32, BF16):
            found = transformer_sample(net.packed(dtype), 18, seed=3, backend="cpu")
            assert_draws(found, net, None, dtype, seed=3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_frequencies_by_chi_square(backend):
    """Of whole sequences, against the product of their probabilities."""
    device = skip_unless_available(NAME, backend)
    net = make(device=device, length=3, num_levels=3, num_classes=0, dim=8, num_heads=2)
    count = 20_000
    found = transformer_sample(net.packed(), count, seed=12, backend=backend)
    every = torch.cartesian_prod(*[torch.arange(3)] * 3)
    log_p = torch.log_softmax(oracle_logits(net, every, None, F32), -1).gather(2, every[..., None]).sum((1, 2))
    index = (found.tokens.cpu() * torch.tensor([9, 3, 1])).sum(1)
    observed, expected = torch.bincount(index, minlength=27).double(), count * log_p.exp()
    chi_square = ((observed - expected).square() / expected.clamp_min(1)).sum().item()
    assert expected.min() > 5 and chi_square < 26 + 4 * (2 * 26) ** 0.5


@pytest.mark.parametrize("backend", BACKENDS)
def test_temperature(backend):
    device = skip_unless_available(NAME, backend)
    net = make(device=device)
    for temperature in (0.5, 3.0):
        found = transformer_sample(net.packed(), 9, seed=2, temperature=temperature, backend=backend)
        assert_draws(found, net, None, F32, seed=2, temperature=temperature)
    cold = transformer_sample(net.packed(), 4, seed=2, temperature=1e-6, backend=backend)
    assert torch.equal(cold.tokens.cpu(), oracle_logits(net, cold.tokens, None, F32).argmax(-1))
    assert cold.log_prob.abs().max() < 1e-6 and torch.equal(cold.tokens[0], cold.tokens[3])


@pytest.mark.parametrize("order", ["cached", "naive"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_known_tokens_stay_and_are_seen(backend, order):
    device = skip_unless_available(NAME, backend)
    if order == "naive" and backend != "reference":
        pytest.skip("the order 'naive' is the reference's alone")
    net, given = make(device=device), torch.randint(0, 11, (6, 23), device=device)
    known = torch.rand(6, 23, device=device) < 0.5
    known[:, 4] = True  # by all: no logits are needed there
    given[~known] = 10**9  # nobody looks there
    options = {"seed": 8, "order": order, "backend": backend}
    found = transformer_sample(net.packed(), 6, given=given, known=known, **options)
    assert torch.equal(found.tokens[known], given[known]) and found.log_prob[known].abs().max() == 0
    assert_draws(found, net, None, F32, seed=8, known=known.cpu())
    row = transformer_sample(net.packed(), 6, given=given[:1], known=known[0], **options)
    assert torch.equal(row.tokens[:, known[0]], given[:1, known[0]].expand(6, -1))
    columns, places = (tensor.T.contiguous().T for tensor in (given, known))
    strided = transformer_sample(net.packed(), 6, given=columns, known=places, **options)
    assert torch.equal(strided.tokens, found.tokens) and strided.tokens.is_contiguous()
    everything = torch.ones_like(known)
    full = transformer_sample(net.packed(), 6, given=found.tokens, known=everything, **options)
    assert torch.equal(full.tokens, found.tokens) and full.log_prob.abs().max() == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_reports_change_nothing(backend):
    device = skip_unless_available(NAME, backend)
    weights, seen = make(device=device).packed(), []
    plain = transformer_sample(weights, 5, seed=4, backend=backend)
    reported = transformer_sample(weights, 5, seed=4, backend=backend, callback=lambda *now: seen.append(now))
    same_up_to_ties(reported, plain, limit=0)
    assert seen == [(done, 23) for done in range(2, 23, 2)] + [(23, 23)]


@needs_extension
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_long_calls_are_cut_for_ctrl_c_without_changing_a_bit(dtype, monkeypatch):
    weights = make().packed(dtype)
    whole = transformer_sample(weights, 5, seed=4, backend="cpu")
    module = sys.modules["genengine.ops.transformer_sample"]  # the package has the function by this name
    for flops, calls in ((1, 23), (5 * 2 * 4 * weights.matrices.numel(), 6)):
        monkeypatch.setattr(module, "_RANGE_FLOPS", flops)
        assert len(module._ranges(weights.sizes, 5, None, "cpu")) == calls
        cut = transformer_sample(weights, 5, seed=4, backend="cpu")
        assert torch.equal(cut.tokens, whole.tokens) and torch.equal(cut.log_prob, whole.log_prob)


@pytest.mark.parametrize("how", ["raised", "signal"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_ctrl_c_returns_what_is_there(backend, how):
    device = skip_unless_available(NAME, backend)
    net, given = make(device=device), torch.full((1, 23), 7, device=device)
    known = torch.zeros(1, 23, dtype=torch.bool, device=device)
    known[0, [1, 20]] = True
    options = {"seed": 4, "given": given, "known": known, "backend": backend}
    whole = transformer_sample(net.packed(), 3, **options)

    def interrupt(done, total):
        if done == 10:
            if how == "raised":
                raise KeyboardInterrupt
            os.kill(os.getpid(), signal.SIGINT)

    found = transformer_sample(net.packed(), 3, callback=interrupt, **options)
    assert found.done == 10
    same_up_to_ties(
        Sequences(found.tokens[:, :10], found.log_prob[:, :10], 10),
        Sequences(whole.tokens[:, :10], whole.log_prob[:, :10], 10), limit=0,
    )  # fmt: skip
    rest = torch.zeros(3, 13, dtype=torch.int64, device=device)
    rest[:, 20 - 10] = 7
    assert torch.equal(found.tokens[:, 10:], rest) and found.log_prob[:, 10:].abs().max() == 0


def test_another_error_of_the_callback_is_the_caller_s():
    def fail(done, total):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        transformer_sample(make().packed(), 2, seed=1, callback=fail)


@pytest.mark.parametrize("order", ["cached", "naive"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_batch(backend, order):
    device = skip_unless_available(NAME, backend)
    if order == "naive" and backend != "reference":
        pytest.skip("the order 'naive' is the reference's alone")
    found = transformer_sample(make(device=device).packed(), 0, seed=1, order=order, backend=backend)
    assert found.tokens.shape == found.log_prob.shape == (0, 23) and found.done == 23


@needs_extension
def test_weights_that_overflow_are_no_danger():
    """Finite weights may still give logits that are not: the draw must stay within the levels."""
    named = make().named_weights()
    named = {name: value.detach() * (1e30 if "blocks" in name else 1) for name, value in named.items()}
    for dtype in (F32, BF16):
        weights = pack_transformer(named, num_heads=3, dtype=dtype)
        drawn = [transformer_sample(weights, 5, seed=1, backend=name) for name in ("cpu", "reference")]
        for found in drawn:
            assert found.tokens.min() >= 0 and found.tokens.max() <= 10


@pytest.mark.parametrize("order", ["cached", "naive"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_casts_nothing(backend, order):
    device = skip_unless_available(NAME, backend)
    if order == "naive" and backend != "reference":
        pytest.skip("the order 'naive' is the reference's alone")
    weights = make(device=device).packed()
    plain = transformer_sample(weights, 3, seed=1, order=order, backend=backend)
    with torch.autocast(device.type, torch.bfloat16):
        cast = transformer_sample(weights, 3, seed=1, order=order, backend=backend)
    assert torch.equal(plain.tokens, cast.tokens) and torch.equal(plain.log_prob, cast.log_prob)


# ---- the loop that a GPU records, run step by step on a CPU ----------------------------------------------------------


@pytest.fixture
def unrecorded(monkeypatch):
    """Steps run where a GPU would replay them; the recordings that were asked for."""
    made = []

    def recorded(run):
        run()  # as the warm-up does
        made.append(run)
        return run

    monkeypatch.setattr(_transformer_graph, "recorded", recorded)
    monkeypatch.setattr(_transformer_graph, "_loops", OrderedDict())
    return made


def by_graph(args, ranges=None):
    """The op by its recorded steps, in calls of these ranges; (tokens, log_prob)."""
    args = [value.clone() if i in (15, 16, 17) else value for i, value in enumerate(args)]
    args[17].fill_(float("nan"))
    for first, last in ranges or [(0, args[13])]:
        _transformer_graph.sample(*args[:12], first, last, *args[14:])
    return Sequences(args[15], args[16], args[13])


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("ranges", [None, [(0, 1), (1, 9), (9, 23)], [(0, 23)]])
def test_recorded_steps_draw_what_the_reference_draws(unrecorded, dtype, ranges):
    net, labels = make(), torch.tensor([0, 3, 1, 2, 2])
    args = arguments(net.packed(dtype), labels, torch.tensor(9), ids=torch.arange(5) + 7)
    found = by_graph(args, ranges)
    assert_draws(found, net, labels, dtype, seed=9, ids=torch.arange(5) + 7)
    assert len(unrecorded) == 4  # of 6, 12, 18 and 23 keys


def test_recordings_serve_later_calls_and_other_weights(unrecorded):
    nets, labels = [make(dim=16, num_heads=2, seed=seed) for seed in (0, 1)], torch.tensor([0, 3])
    packed = [net.packed() for net in nets]
    kept = [weights.matrices.clone() for weights in packed]
    for net in (*nets, nets[0]):
        for seed in (1, 2):
            found = by_graph(arguments(net.packed(), labels, torch.tensor(seed)))
            assert_draws(found, net, labels, F32, seed=seed)
    assert len(unrecorded) == 4
    assert all(torch.equal(weights.matrices, matrices) for weights, matrices in zip(packed, kept, strict=True))
    given, known = torch.full((2, 23), 5), torch.rand(2, 23) < 0.5
    for _ in range(2):
        args = arguments(nets[0].packed(), labels, torch.tensor(4), given=given, known=known)
        assert_draws(by_graph(args), nets[0], labels, F32, seed=4, known=known)
    assert len(unrecorded) == 8
    for temperature in (0.5, 0.6, 0.7, 0.8, 0.9):
        by_graph(arguments(nets[0].packed(), labels, torch.tensor(4), temperature=temperature, last=2))
    assert len(_transformer_graph._loops) == 4


def test_calls_that_take_turns_do_not_disturb_each_other(unrecorded):
    """A callback may draw sequences itself: what a call needs between its ranges is in its own cache."""
    net, labels = make(), torch.tensor([0, 3])
    both = [list(arguments(net.packed(), labels, torch.tensor(seed))) for seed in (1, 2)]
    for first, last in ((0, 5), (5, 17), (17, 23)):
        for args in both:
            _transformer_graph.sample(*args[:12], first, last, *args[14:])
    for seed, args in zip((1, 2), both, strict=True):
        assert_draws(Sequences(args[15], args[16], 23), net, labels, F32, seed=seed)


def test_recordings_work_in_and_out_of_inference_mode(unrecorded):
    net, labels = make(), torch.tensor([0, 3])
    for mode in (True, False, True):
        with torch.inference_mode(mode):
            found = by_graph(arguments(net.packed(), labels, torch.tensor(1)))
        assert_draws(found, net, labels, F32, seed=1)


def test_threads_take_turns_at_a_loop(unrecorded, monkeypatch):
    monkeypatch.setattr(_transformer_graph, "step", slowly(_transformer_graph.step))
    net, labels, found = make(), torch.tensor([0, 3]), {}

    def draw(seed):
        found[seed] = by_graph(arguments(net.packed(), labels, torch.tensor(seed)))

    draw(0)
    threads = [threading.Thread(target=draw, args=(seed,)) for seed in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(4):
        assert_draws(found[seed], net, labels, F32, seed=seed)


def slowly(step):
    def run(*args, **options):
        time.sleep(1e-4)  # lets another thread go on
        return step(*args, **options)

    return run


def test_weights_that_were_copied_in_part_are_copied_again(unrecorded, monkeypatch):
    nets, labels = [make(seed=seed) for seed in (0, 1)], torch.tensor([0, 3])
    calls = [arguments(net.packed(), labels, torch.tensor(1)) for net in nets]
    by_graph(calls[0])
    everything = _transformer_graph._tensors

    def interrupted(net):
        for index, tensor in enumerate(everything(net)):
            if index == 4:
                raise KeyboardInterrupt
            yield tensor

    monkeypatch.setattr(_transformer_graph, "_tensors", interrupted)
    with pytest.raises(KeyboardInterrupt):
        by_graph(calls[1])
    monkeypatch.setattr(_transformer_graph, "_tensors", everything)
    assert_draws(by_graph(calls[0]), nets[0], labels, F32, seed=1)


def test_large_loops_are_not_kept(unrecorded, monkeypatch):
    weights = make().packed()
    by_graph(arguments(weights, torch.tensor([0, 3]), torch.tensor(1)))
    by_graph(arguments(weights, torch.tensor([0, 3, 1]), torch.tensor(1)))
    assert len(_transformer_graph._loops) == 2
    monkeypatch.setattr(_transformer_graph, "_KEPT_BYTES", 1)
    by_graph(arguments(weights, torch.tensor([0]), torch.tensor(1)))
    assert [key[1] for key in _transformer_graph._loops] == [1]


def test_another_precision_of_products_is_recorded_anew(unrecorded):
    args, products = arguments(make().packed(), torch.tensor([0, 3]), torch.tensor(1)), torch.backends.cuda.matmul
    before = products.fp32_precision
    try:
        for precision in ("ieee", "tf32", "ieee"):
            products.fp32_precision = precision
            by_graph(args)
    finally:
        products.fp32_precision = before
    assert len(unrecorded) == 8


def test_recorded_steps_need_the_cache_and_may_be_none(unrecorded):
    args = arguments(make().packed(), torch.tensor([0]), torch.tensor(1))
    with pytest.raises(RuntimeError, match="without a cache only the reference runs"):
        _transformer_graph.sample(*args[:14], False, *args[15:])
    by_graph(args, [(3, 3)])
    by_graph(arguments(make().packed(), torch.tensor([], dtype=torch.int64), torch.tensor(1)))
    assert not unrecorded


# ---- packing ---------------------------------------------------------------------------------------------------------


def test_packed_weights_are_the_network_s():
    from genengine.ops._transformer import unpack_transformer

    sizes = Sizes(15, 3, 2, 7, 19, 21, 2)
    named = tensors(None, sizes)
    for dtype in (F32, F64, BF16):
        weights = pack_transformer(named, num_heads=3, dtype=dtype)
        assert weights.sizes == sizes and weights.matrices.dtype == dtype
        assert weights.to("meta").vectors.is_meta and weights.to("meta").sizes == sizes
        net = unpack_transformer(weights.matrices, weights.vectors, sizes)
        assert torch.equal(net.start, named["start"].to(net.start.dtype)) and net.positions.shape == (21, 15)
        product = net.blocks[1][2]
        expected = named["blocks.1.fc1.weight"].to(dtype).to(product.weight.dtype)
        assert torch.equal(product.weight, expected.T) and torch.equal(product.bias.float(), named["blocks.1.fc1.bias"])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"blocks.1.fc2.weight": torch.full((24, 48), float("nan"))}, ValueError, "blocks.1.fc2.weight must be finite"),
        ({"out.bias": torch.full((11,), float("inf"))}, ValueError, "out.bias must be finite"),
        ({"out.bias": torch.full((11,), 1e300, dtype=F64)}, ValueError, "out.bias must be finite in torch.float32"),
        ({"out.bias": torch.zeros(12)}, ValueError, r"out.bias must be a tensor \(11,\), got \(12,\)"),
        ({"blocks.0.qkv.weight": None}, ValueError, r"blocks.0.qkv.weight must be a tensor \(72, 24\), got NoneType"),
        ({"levels": torch.zeros(5)}, ValueError, r"levels must be a tensor of two dimensions, got \(5,\)"),
        ({"head": torch.zeros(5)}, ValueError, "got also 'head'"),
        ({"out.bias": torch.zeros(11).int()}, TypeError, "out.bias must have dtype"),
    ],
)
def test_bad_weights(change, error, message):
    named = {name: value.detach() for name, value in make().named_weights().items()} | change
    with pytest.raises(error, match=f"pack_transformer: .*{message}"):
        pack_transformer(named, num_heads=3)


def test_bad_packing():
    named = make().named_weights()
    with pytest.raises(ValueError, match="num_heads must divide D = 24 .*, got 5"):
        pack_transformer(named, num_heads=5)
    with pytest.raises(TypeError, match="dtype must be .*, got torch.float16"):
        pack_transformer(named, num_heads=3, dtype=torch.float16)
    with pytest.raises(ValueError, match="tensors must hold 'levels', got nothing"):
        pack_transformer({}, num_heads=3)


# ---- arguments and torch's own checks --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weights": torch.zeros(3)}, TypeError, "weights must be what pack_transformer returns, got Tensor"),
        ({"num": 2.0}, TypeError, "num must be an int, got float"),
        ({"num": -1}, ValueError, "num must be at least 0, got -1"),
        ({"temperature": 0}, ValueError, "temperature must be in \\[1e-6, 1e6\\], got 0"),
        ({"temperature": "1"}, TypeError, "temperature must be a float, got str"),
        ({"order": "wavefront"}, ValueError, "order must be one of cached, naive or None, got 'wavefront'"),
        ({"labels": torch.tensor([0, 4])}, ValueError, "labels must be in 0 .. 3, got 4"),
        ({"labels": torch.tensor([0, -1])}, ValueError, "labels must be in 0 .. 3, got -1"),
        ({"labels": torch.tensor([0.0, 1.0])}, TypeError, "labels must have dtype"),
        ({"labels": torch.tensor([0])}, ValueError, "labels must be \\(B,\\) = \\(2,\\)"),
        ({"given": torch.zeros(2, 23).long()}, ValueError, "given and known must come together"),
        ({"given": torch.zeros(2, 22).long(), "known": KNOWN[:22]}, ValueError, "must broadcast to \\(B, N\\)"),
        ({"given": torch.full((2, 23), 11), "known": KNOWN}, ValueError, "given must be in 0 .. 10, got 11"),
        ({"given": torch.zeros(2, 23).long(), "known": KNOWN.float()}, TypeError, "known must have dtype torch.bool"),
        ({"callback": 3}, TypeError, "callback must be callable, got int"),
        ({"seed": -1}, ValueError, "seed must be in"),
        ({"sample_ids": torch.zeros(3).long()}, ValueError, "sample_ids must be"),
    ],
)  # fmt: skip
def test_bad_arguments(change, error, message):
    good = {"weights": make().packed(), "num": 2, "seed": 0}
    options = good | change
    with pytest.raises(error, match=f"transformer_sample: .*{message}"):
        transformer_sample(options.pop("weights"), options.pop("num"), **options)


def test_backends_that_cannot_run_say_so():
    weights = make().packed()
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run here: transformer_sample has no triton kernel"):
        transformer_sample(weights, 1, seed=1, backend="triton")
    with pytest.raises(RuntimeError, match="order 'naive' runs on backend 'reference' alone, got 'cpu'"):
        transformer_sample(weights, 1, seed=1, order="naive", backend="cpu")
    with backend_context("cpu"), pytest.raises(RuntimeError, match="order 'naive' runs on backend 'reference' alone"):
        transformer_sample(weights, 1, seed=1, order="naive")
    with pytest.raises(RuntimeError, match="its kernels take .*, not torch.float64"):
        transformer_sample(make().packed(F64), 1, seed=1, backend="cpu")


@needs_extension
@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (0, torch.zeros(5), "must hold a packed transformer"),
        (1, torch.zeros(5), "must hold a packed transformer"),
        (7, torch.tensor([0, 4]), "labels must be in 0 .. 3, got 4"),
        (13, 24, "first .. last must lie within the tokens"),
        (14, False, "without a cache only the reference runs"),
        (17, torch.zeros(8), "cache is too small"),
    ],
)
def test_the_kernel_checks_what_it_reads(index, value, message):
    args = list(arguments(make().packed(), torch.tensor([0, 3]), torch.tensor(1)))
    args[index] = value
    with pytest.raises(RuntimeError, match=message):
        _registry.OPS[NAME].overloads["cpu"](*args)


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_opcheck(namespace):
    skip_unless_available(NAME, NAMESPACES[namespace])
    args = arguments(make().packed(), torch.tensor([0, 3]), torch.tensor(1), last=4)
    opcheck(getattr(getattr(torch.ops, namespace), NAME).default, args)


def test_the_result_is_a_normal_tensor_and_needs_no_gradient():
    with torch.enable_grad():
        found = transformer_sample(make().packed(), 2, seed=1)
    assert not found.tokens.is_inference() and not found.log_prob.requires_grad
    found.log_prob.add_(1)
