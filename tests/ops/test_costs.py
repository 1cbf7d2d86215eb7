"""Costs: bytes against an independent count over every case, operations against those that the references execute."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count

from genengine import ops, testing
from genengine.ops import _registry
from genengine.ops._activations import ACTIVATIONS
from genengine.ops._cost import Cost, bytes_alone, each, per_element, traffic
from genengine.ops._pixelcnn_weights import PixelCNNShape
from genengine.ops.pixelcnn_sample import reference as pixelcnn_reference

CPU = torch.device("cpu")
WRITES_ARGUMENTS = (
    "sampler_step_out", "advance", "ema_update", "normal_out", "uniform_out", "qk_norm_rope_", "pixelcnn_sample",
    "transformer_sample_out", "patch_step_out",
)  # fmt: skip
OPS = sorted(_registry.OPS)
PUBLIC = sorted(  # neither the classes beside the ops, nor what prepares weights
    name for name in ops.__all__ if name[0].islower() and not name.startswith("pack_") and name != "backend"
)


def tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for entry in value for t in tensors(entry)] if isinstance(value, (list, tuple)) else []


def size(*values):
    return sum(t.numel() * t.dtype.itemsize for t in tensors(values))


def mapped(value, function):
    if isinstance(value, (list, tuple)):
        return type(value)(mapped(entry, function) for entry in value)
    return function(value) if isinstance(value, torch.Tensor) else value


def run(name, args):
    return _registry.OPS[name].overloads["reference"](*mapped(args, torch.clone))


def cost(name, *args):
    return _registry.OPS[name].cost(args, run(name, args))


def needless(name, args):
    """Bytes of the arguments that no perfect kernel reads, less those of the arguments that it moves twice."""
    if name == "ema_update":
        return -size(args[0])
    if name in ("bias_act_backward", "bias_act_backward_backward"):
        grad, x, bias, activation, _, _, clamp = args[-7:]
        unread = [x, bias] if activation == "linear" and clamp is None else []
        if name.endswith("backward_backward") and activation in ("linear", "relu", "lrelu"):
            unread.append(grad)
        return size(unread)
    if name == "qk_norm_rope_":  # of three parts, two, twice
        return -size(args[0]) // 3
    if name == "qk_norm_rope_backward":
        return size(args[1]) // 3 * (1 if args[7] else 3)
    if name == "logistic_mixture_sample":
        params, channels = args[:2]
        per = 1 + 2 * channels + channels * (channels - 1) // 2
        k, pixels = params.shape[1] // per, params.numel() // params.shape[1]
        return size(params) * (k - 1) * (per - 1) // (k * per) if pixels else 0
    if name == "sampler_step_out":
        return size(args[2]) - 64 * len(args[0])
    if name == "patch_step_out":
        return size(args[5]) - 64 * len(args[0])
    if name == "advance":
        return size(args[1]) - 8 * len(args[0])
    if name == "pixelcnn_sample":  # what it keeps between rows
        return size(args[2])
    return 0


@pytest.mark.parametrize("name", OPS)
def test_every_op_has_a_formula_of_its_own(name):
    assert _registry.OPS[name].cost is not bytes_alone


@pytest.mark.parametrize("name", OPS)
def test_bytes_are_those_of_the_tensors_that_are_needed(name):
    for case in testing.cases(name, CPU):
        results = run(name, case.args)
        found = _registry.OPS[name].cost(case.args, results)
        assert found.bytes == size(case.args, results) - needless(name, case.args), case.label
        assert all(type(value) is int and value >= 0 for value in (found.bytes, found.flops, found.exps)), case.label
        assert found.flops >= found.exps, case.label
        assert found.flops > 0 or name == "advance", case.label


@pytest.mark.parametrize("name", OPS)
def test_fake_and_meta_tensors_cost_as_real_ones(name):
    op = _registry.OPS[name]
    for case in testing.cases(name, CPU)[:40]:
        real = op.cost(case.args, run(name, case.args))
        with FakeTensorMode() as mode:
            fake = mapped(case.args, mode.from_tensor)
            assert op.cost(fake, op.overloads["reference"](*fake)) == real, case.label
        meta = mapped(case.args, lambda t: t.to("meta"))
        if name in WRITES_ARGUMENTS:
            assert op.cost(meta, None) == real, case.label
        else:
            assert op.cost(meta, op.overloads["reference"](*mapped(meta, torch.empty_like))) == real, case.label


# ---- operations ------------------------------------------------------------------------------------------------------

# (flops, exps) of torch's functions at one element, as written out in the formulas
WORK = dict.fromkeys(("add", "sub", "rsub", "mul", "div", "sqrt", "square", "reciprocal", "leaky_relu"), (1, 0))
WORK |= dict.fromkeys(("pow", "sum", "mean"), (1, 0))
WORK |= dict.fromkeys(("exp", "expm1", "log", "tanh", "erf"), (1, 1))
WORK |= {"sigmoid": (3, 1), "silu": (4, 1), "gelu": (5, 1), "softplus": (3, 2), "logsumexp": (3, 1)}
WORK |= dict.fromkeys(("softmax", "log_softmax"), (4, 1))
GELU_TANH = (9, 1)  # torch has one function for both


class Executed(TorchDispatchMode):
    """Counts the floating-point operations that a reference runs, in whatever shape it runs them."""

    def __init__(self):
        super().__init__()
        self.flops = self.exps = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "genengine_reference":
            with self:  # a mode is off inside of what it sees: look into the op
                return function._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args)
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__.strip("_")
        if isinstance(result, torch.Tensor) and result.is_floating_point() and name in WORK:
            flops, exps = GELU_TANH if (kwargs or {}).get("approximate") == "tanh" else WORK[name]
            count = max(result.numel(), *(t.numel() for t in tensors(args)))
            self.flops += flops * count
            self.exps += exps * count
        return result


def executed(name, args):
    with Executed() as counter:
        run(name, args)
    return counter


def spelt_out(name, args):
    """Whether the case draws noise or takes e^(l v): functions to the formulas, polynomials in the references."""
    if name == "diffuse":
        return args[-1] is None
    if name.startswith("reparameterize"):
        return args[-3] is None
    return name == "sampler_step_out" and (args[5] is not None or args[8] is not None)


# Elsewhere a reference computes something twice or in vain, and 1 + scale, which stands at every element, row by row.
EXACT = ("bias_act", "glu", "ema_update", "diffuse", "reparameterize")
# Of which flops are those of products alone.
PRODUCTS = {"attention", "attention_backward", "patch_step_out", "pixelcnn_sample", "transformer_sample_out"}
DRAWN = {"normal_out", "uniform_out", "logistic_mixture_sample"}
COUNTED = set(OPS) - {"advance"} - PRODUCTS - DRAWN


@pytest.mark.parametrize("name", sorted(COUNTED))
def test_operations_are_those_that_the_reference_executes(name):
    low, high = (1, 1) if name in EXACT else (0.6, 1.12)
    low_exps = 1 if name in EXACT else 0.12  # derivatives, which share theirs, take them anew
    seen = 0
    for case in testing.cases(name, CPU):
        if set(case.dtypes) != {torch.float32} or case.large or spelt_out(name, case.args):
            continue
        found, counter = cost(name, *case.args), executed(name, case.args)
        assert low * counter.flops <= found.flops <= high * counter.flops, case.label
        assert low_exps * counter.exps <= found.exps <= high * counter.exps, case.label
        seen += 1
    assert seen


# What act^(k) of this order does for nothing: an unused w'', a sigmoid or tanh once more.
REPEATED = {("gelu_tanh", 1): (1, 0), ("tanh", 2): (1, 1), ("sigmoid", 1): (3, 1), ("sigmoid", 2): (6, 2)}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_cost_what_they_execute(name):
    u, activation = torch.randn(7, dtype=torch.float64), ACTIVATIONS[name]
    for order, function in enumerate((activation.value, activation.slope, activation.curvature)):
        if function is None:
            assert activation.work(order) == (0, 0)
            continue
        with Executed() as counter:
            function(u, 0.2)
        flops, exps = (a + b for a, b in zip(activation.work(order), REPEATED.get((name, order), (0, 0)), strict=True))
        assert (7 * flops, 7 * exps) == (counter.flops, counter.exps), order


def test_derivatives_share_their_exponentials():
    assert ACTIVATIONS["silu"].work(0, 1) == (4 + 7 - 1, 1)
    assert ACTIVATIONS["gelu"].work(0, 1, 2) == (5 + 10 + 7 - 2, 2)


@pytest.mark.parametrize(("queries", "keys"), [(17, 17), (5, 40)])
def test_attention_counts_as_torch_counts_it(queries, keys):
    q, grad = (torch.randn(2, queries, 3, 8) for _ in range(2))
    k, v = (torch.randn(2, keys, 3, 8) for _ in range(2))
    heads_first = [t.transpose(1, 2) for t in (q, k, v)]
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        F.scaled_dot_product_attention(*heads_first)
    forward = cost("attention", q, k, v, False, 0.3)
    assert (forward.flops, forward.exps) == (counter.get_total_flops(), 2 * 3 * queries * keys)
    gradients = cost("attention_backward", grad, q, k, v, *run("attention", (q, k, v, False, 0.3)), False, 0.3)
    shapes = [t.shape for t in (heads_first[0], *heads_first)]
    assert (gradients.flops, gradients.exps) == (sdpa_backward_flop_count(*shapes), 2 * 3 * queries * keys)


# ---- by hand ---------------------------------------------------------------------------------------------------------


def test_attention_of_dit_xl_2():
    shape, wide = (2, 256, 16, 72), 2 * 256 * 16 * 72
    q = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    lse = torch.empty(2, 16, 256, device="meta")
    pairs = 2 * 16 * 256 * 256
    forward, backward = (_registry.OPS[name].cost for name in ("attention", "attention_backward"))
    assert forward((q, q, q, False, 0.1), (q, lse)) == Cost(8 * wide + 32768, 603979776, pairs)
    assert forward((q, q, q, True, 0.1), (q, lse)) == Cost(8 * wide + 32768, 303169536, 2 * 16 * 32896)
    found = backward((q, q, q, q, q, lse, False, 0.1), (q, q, q))
    assert found == Cost(16 * wide + 32768, 1509949440, pairs)


@pytest.mark.parametrize("cached", [True, False])
def test_sequences_cost_the_products_that_the_reference_executes(cached):
    for case in testing.cases("transformer_sample_out", CPU)[:6:2]:
        args = (*case.args[:14], cached, *case.args[15:])
        dim, heads, depth, hidden, levels = args[2:7]
        batch, last = len(args[7]), args[13]
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            reference = _registry.OPS["transformer_sample_out"].overloads["reference"]
            reference._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *mapped(args, torch.clone))
        seen = range(1, last + 1)
        queries = [1 if cached else n for n in seen]
        # without a cache every query meets every key, of which the causal half counts; and all positions' logits
        whole = 2 * batch * sum(q * depth * (4 * dim * dim + 2 * dim * hidden) + dim * levels for q in queries)
        pairs = sum(n if cached else n * (n + 1) // 2 for n in seen)
        found = cost("transformer_sample_out", *args)
        assert found.flops == whole + 4 * batch * dim * depth * pairs, case.label
        skipped = 0 if cached else 4 * batch * dim * depth * sum(n * (n - 1) // 2 for n in seen)
        assert counter.get_total_flops() == found.flops + skipped, case.label
        tokens = batch * sum(queries)
        exps = batch * depth * heads * pairs + depth * hidden * tokens + batch * last * (levels + 1)
        assert found.exps == exps, case.label


def test_adaln_and_its_gradients():
    x, branch, grad = (torch.randn(2, 3, 8) for _ in range(3))
    gate, scale, shift = torch.randn(2, 48).chunk(6, 1)[:3]  # of the table only these rows count
    assert cost("adaln", x, scale, shift, 1e-6) == Cost((48 + 16 + 16 + 48) * 4, 8 * 48, 0)
    assert cost("adaln", x, scale.bfloat16(), shift.bfloat16(), 1e-6) == Cost(48 * 6 + 32 * 2, 8 * 48, 0)
    found = cost("gated_adaln_backward", grad, grad, x, branch, gate, scale, 1e-6)
    assert found == Cost((6 * 48 + 5 * 16) * 4, 21 * 48, 0)


def test_a_guided_step_moves_16_bytes_per_element():
    batch, n = 2, 2 * 3 * 4 * 4
    x, u, c, out = (torch.randn(batch, 3, 4, 4) for _ in range(4))
    table, step = torch.zeros(9, 1, 16), torch.zeros(batch, dtype=torch.int32)
    rows = batch * (16 * 4 + 4)
    nothing = (None,) * 5

    def found(outputs=(u, c), history=None, seed=None, ids=None, noise=None, variance=None, x_in=None):
        return cost("sampler_step_out", x, list(outputs), table, step, history, seed, ids, noise, variance, out, x_in)

    assert cost("sampler_step_out", x, [u, c], table, step, *nothing, out, None) == Cost(16 * n + rows, 11 * n, 0)
    assert found(outputs=(torch.cat([u, c]),)) == Cost(16 * n + rows, 11 * n, 0)
    assert found(x_in=torch.zeros(2 * batch, 3, 4, 4)) == Cost(24 * n + rows, 12 * n, 0)
    assert found(history=torch.zeros(3, batch, 3, 4, 4)) == Cost(28 * n + rows, 17 * n, 0)
    assert found(noise=u) == Cost(20 * n + rows, 13 * n, 0)
    seed = torch.tensor(5)
    assert found(seed=seed) == Cost(16 * n + rows + 8, 19 * n, 3 * n // 2)
    assert found(seed=seed, variance=c) == Cost(20 * n + rows + 8, 22 * n, 5 * n // 2)
    assert found(variance=c) == Cost(16 * n + rows, 11 * n, 0)  # without noise there is nothing for it to scale
    assert _registry.OPS["sampler_step_out"].cost(
        (x, [u, c], torch.zeros(500, batch, 16), step, *nothing, x, None), None
    ) == Cost(16 * n + rows, 11 * n, 0)  # in place, from a table of any length


@pytest.mark.parametrize("learned", [False, True])
def test_a_last_layer_costs_its_products_and_the_row(learned):
    x, h, out, x_in = torch.zeros(2, 3, 4, 4), torch.randn(4, 4, 7), torch.zeros(2, 3, 4, 4), torch.zeros(4, 3, 4, 4)
    weight, bias = torch.randn(12 * (1 + learned), 7), torch.randn(12 * (1 + learned))
    table, step, n = torch.zeros(9, 1, 16), torch.zeros(2, dtype=torch.int32), x.numel()

    def found(seed=None):
        return cost("patch_step_out", x, h, weight, bias, 2, table, step, None, seed, None, None, out, x_in)

    moved = 4 * (4 * n + h.numel() + weight.numel() + bias.numel()) + 2 * (64 + 4)
    assert found() == Cost(moved, (2 * 2 * 7 + 12) * n, 0)
    with FlopCounterMode(display=False) as counter:
        F.linear(h, weight[:12])
    assert counter.get_total_flops() == 2 * 2 * 7 * n
    drawn = found(torch.tensor(5))
    assert drawn == Cost(moved + 8, (2 * 7 * (2 + learned) + 20 + 3 * learned) * n, (3 + 2 * learned) * n // 2)


def test_weights_move_12_bytes_each():
    averages, values = ([torch.randn(5, 7), torch.randn(3)] for _ in range(2))
    assert cost("ema_update", averages, values, 0.1) == Cost(12 * 38, 3 * 38, 0)
    assert cost("ema_update", averages, [v.half() for v in values], 0.1) == Cost(10 * 38, 3 * 38, 0)


def test_a_linear_bias_act_needs_no_input_for_its_gradient():
    grad, x, bias = torch.randn(2, 3, 5), torch.randn(2, 3, 5), torch.randn(3)
    assert cost("bias_act_backward", grad, x, bias, "linear", 0.0, 2.0, None).bytes == (30 + 30 + 3) * 4
    assert cost("bias_act_backward", grad, x, bias, "linear", 0.0, 2.0, 1.0).bytes == (30 + 30 + 30 + 3 + 3) * 4
    assert cost("bias_act_backward_backward", x, None, grad, x, bias, "lrelu", 0.2, 1.0, None).bytes == (90 + 3) * 4


def test_activations_with_bias_gain_and_clamp():
    x, bias = torch.randn(2, 3, 5), torch.randn(3)
    assert cost("bias_act", x, bias, "silu", 0.0, 2.0, 1.0) == Cost(63 * 4, (4 + 1 + 1) * 30, 30)
    found = cost(
        "bias_act_backward", x, x, bias, "silu", 0.0, 2.0, 1.0
    )  # the clamp needs act, which shares its sigmoid
    assert found == Cost(96 * 4, (4 + 7 - 1 + 2 + 1 + 2) * 30, 30)
    found = cost("bias_act_backward_backward", x, bias, x, x, bias, "gelu", 0.0, 1.0, None)
    assert found == Cost((5 * 30 + 9) * 4, (10 + 7 - 1 + 2 + 1 + 2 + 1) * 30, 2 * 30)
    packed, bias = torch.randn(1, 5, 6), torch.randn(6)
    assert cost("glu", packed, bias, "gelu_tanh", True) == Cost((30 + 6 + 15) * 4, (9 + 1 + 2) * 15, 15)
    found = cost("glu_backward", packed[..., :3], packed, bias, "gelu_tanh", True)
    assert found == Cost((15 + 30 + 6 + 30 + 6) * 4, (9 + 17 - 1 + 3 + 4) * 15, 15)


@pytest.mark.parametrize(
    ("parameters", "modulated", "silu", "forward", "backward"),
    [(1, 1, 1, 14, 30), (1, 0, 1, 11, 23), (0, 1, 0, 8, 14), (1, 0, 0, 7, 13), (1, 1, 0, 10, 20), (0, 0, 0, 5, 9)],
)
def test_groups(parameters, modulated, silu, forward, backward):
    x, row, table, moment = torch.randn(2, 4, 3), torch.randn(4), torch.randn(2, 4), torch.rand(2, 2)
    rows = [row if parameters else None] * 2 + [table if modulated else None] * 2
    given = 8 * parameters + 16 * modulated
    found = cost("group_norm_silu", x, *rows, 2, 1e-5, bool(silu), False)
    assert found == Cost((48 + given + 8) * 4, forward * 24, silu * 24)
    found = cost("group_norm_silu_backward", x, x, *rows, moment, moment, 2, bool(silu), False)
    assert found == Cost((72 + 2 * given + 8) * 4, backward * 24, silu * 24)
    found = cost("add_group_norm_silu", x, x, *rows, 2, 1e-5, bool(silu), False)
    assert found == Cost((96 + given + 8) * 4, (forward + 1) * 24, silu * 24)
    found = cost("add_group_norm_silu_backward", x, x, x, *rows, moment, moment, 2, bool(silu), False)
    assert found == Cost((96 + 2 * given + 8) * 4, (backward + 1) * 24, silu * 24)


@pytest.mark.parametrize(
    ("free_bits", "monte_carlo", "forward", "backward"),
    [(0.0, False, (11, 2), (11, 2)), (0.5, False, (11, 2), (16, 2)), (0.0, True, (10, 1), (10, 1))],
)
def test_posteriors(free_bits, monte_carlo, forward, backward):
    x, kl = torch.randn(2, 9), torch.randn(2)
    for drawn, draw in ((0, (None, None, 0, x)), (1, (torch.tensor(7), None, 0, None))):
        noise = 8 if drawn else 72
        for name, tensors, moved, (flops, exps) in (
            ("reparameterize", (x, x), 3 * 72 + 8, forward),
            ("reparameterize_backward", (x, kl, x, x), 5 * 72 + 8, backward),
        ):
            found = cost(name, *tensors, *draw, free_bits, monte_carlo)
            assert found == Cost(moved + noise, (flops + 6 * drawn) * 18, exps * 18 + 27 * drawn)


def test_a_sampled_pixel_needs_one_component():
    channels, k = 3, 10
    params = torch.randn(2, k * 10, 4, 5)
    found = cost("logistic_mixture_sample", params, channels, 256, 1.0, torch.tensor(1), None, 0)
    assert found.bytes == 40 * (k + 9 + 3) * 4 + 8
    assert (found.flops, found.exps) == (40 * (40 + 45 + 9 + 3), 40 * (10 + 9 + 3))


def test_products_of_a_pixelcnn_are_those_that_its_cached_reference_runs():
    for case in testing.cases("pixelcnn_sample", CPU):
        with FlopCounterMode(display=False) as counter:
            pixelcnn_reference(*mapped(case.args, torch.clone))
        s = PixelCNNShape(*case.args[5])
        pixels = len(case.args[0]) * s.size**2
        below = pixels - (0 if s.early else len(case.args[0]) * s.size)  # pixels with a row above
        gates = s.width * (s.depth * pixels + s.gated * (s.depth - 1) * below)
        rest = 10 * gates + 4 * pixels * s.groups * s.outputs
        found = cost("pixelcnn_sample", *case.args)
        assert found.flops == counter.get_total_flops() + rest, case.label
        assert found.exps == 2 * gates + pixels * s.groups * s.outputs, case.label
    half = (*case.args[:-2], s.size // 2, s.size)
    assert cost("pixelcnn_sample", *half).flops > found.flops / 2  # the first row has none above


def test_log_probabilities_of_coloured_pixels():
    x, params, grad = torch.zeros(2, 3, 4), torch.randn(2, 100, 4), torch.randn(2, 4)
    assert cost("logistic_mixture_log_prob", x, params, 256) == Cost(8 * (3 + 100 + 1) * 4, 8 * 729, 8 * 262)
    found = cost("logistic_mixture_log_prob_backward", grad, x, params, 256)
    assert found == Cost(8 * (1 + 3 + 100 + 100) * 4, 8 * 1377, 8 * 351)


def test_normed_and_rotated_heads():
    qkv, weight, table = torch.randn(1, 2, 3, 5, 8), torch.randn(8), torch.randn(1, 2, 2)  # 20 heads, half rotated
    options = (weight, weight, table, table, 1e-6, True, True)
    rows = 2 * 8 + 2 * 4
    assert cost("qk_norm_rope", qkv, *options) == Cost((240 + 240 + rows) * 4, 20 * (8 * 4 + 4 * 3), 0)
    assert cost("qk_norm_rope_", qkv, *options) == Cost((160 + 160 + rows) * 4, 20 * (8 * 4 + 4 * 3), 0)
    found = cost("qk_norm_rope_backward", qkv, qkv, *options)
    assert found == Cost((240 + 160 + 240 + rows + 16) * 4, 20 * (8 * 11 + 4 * 3), 0)
    found = cost("qk_norm_rope_backward", qkv, qkv, None, None, table, table, 1e-6, False, True)
    assert found == Cost((240 + 240 + 8) * 4, 20 * 4 * 3, 0)  # a rotation alone needs no input


def test_noise_that_is_drawn_costs_operations_and_no_bytes():
    x, rows = torch.randn(2, 9), [torch.rand(2) for _ in range(4)]
    given = cost("diffuse", x, *rows, None, None, 0, torch.randn(2, 9))
    drawn = cost("diffuse", x, *rows, torch.tensor(3), None, 0, None)
    assert given == Cost((18 + 8 + 18 + 36) * 4, 6 * 18, 0)
    assert drawn == Cost((18 + 8 + 36) * 4 + 8, 12 * 18, 27)
    assert cost("normal_out", torch.empty(1, 5), torch.tensor(3), None, 0, 0) == Cost(28, 30, 8)  # 7.5 rounds up


EMPTY = {  # and the bytes of the tensors beside the empty ones
    "adaln": ((torch.empty(2, 0, 8), torch.empty(2, 8), torch.empty(2, 8), 1e-6), 128),
    "attention": ((*[torch.empty(2, 0, 3, 8)] * 3, True, 0.3), 0),
    "bias_act": ((torch.empty(0, 3, 1), torch.empty(3), "gelu", 0.0, 1.0, None), 12),
    "diffuse": ((torch.empty(0, 3), *[torch.empty(0)] * 4, None, None, 0, torch.empty(0, 3)), 0),
    "ema_update": (([], [], 0.1), 0),
    "glu": ((torch.empty(1, 0, 8), None, "silu", True), 0),
    "group_norm_silu": ((torch.empty(0, 4, 5), None, None, None, None, 2, 1e-5, True, False), 0),
    "guidance_moments": ((torch.empty(0, 3), torch.empty(0, 3)), 0),
    "logistic_mixture_log_prob": ((torch.empty(0, 1, 2), torch.empty(0, 9, 2), 256), 0),
    "logistic_mixture_sample": ((torch.empty(0, 9, 2), 1, 256, 1.0, torch.tensor(1), None, 0), 8),
    "normal_out": ((torch.empty(0, 5), torch.tensor(1), None, 0, 0), 8),
    "qk_norm_rope": ((torch.empty(2, 0, 3, 2, 8), None, None, None, None, 1e-6, True, True), 0),
    "reparameterize": ((torch.empty(0, 3), torch.empty(0, 3), None, None, 0, torch.empty(0, 3), 0.0, False), 0),
    "sampler_step_out": (
        (torch.empty(0, 3), [torch.empty(0, 3)], torch.empty(4, 1, 16), torch.empty(0, dtype=torch.int32),
         *[None] * 5, torch.empty(0, 3), None), 0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EMPTY)
def test_nothing_costs_nothing(name):
    args, rest = EMPTY[name]
    assert cost(name, *args) == Cost(rest, 0, 0)


def test_a_broadcast_row_is_one_row():
    row = torch.randn(1, 8).expand(5, 8)
    assert traffic(row) == 32 and traffic([row, None, 3.0], (torch.empty(0, 4),)) == 32
    assert cost("adaln", torch.randn(5, 2, 8), row, row, 1e-6).bytes == (80 + 8 + 8 + 80) * 4


def test_helpers():
    assert per_element(10, 3, 2.5, 0.5) == Cost(10, 8, 2)
    x = torch.empty(3, 2, dtype=torch.float16)
    assert each(2, 1)((x,), (x, x)) == Cost(36, 12, 6)
    assert bytes_alone((x, 1.0), None) == Cost(12) and Cost(1, 2, 3) + Cost(4, 5, 6) == Cost(5, 7, 9)


# ---- docstrings ------------------------------------------------------------------------------------------------------


def cost_lines(name):
    text = " ".join(getattr(ops, name).__doc__.split())
    assert text.count("Cost: ") == 1, f"{name}: the docstring must state the cost, once"
    return text.split("Cost: ")[1]


@pytest.mark.parametrize("name", PUBLIC)
def test_the_docstring_states_the_cost(name):
    words = cost_lines(name)
    assert words.startswith("reads ") and re.search(r"writes .*?; .*flops.* exponential", words), words


X, ROW, IDS = torch.randn(2, 4, 6), torch.randn(2, 6), torch.tensor(3)
STATED = {  # per element: the call, what its docstring says of it
    "adaln": ("adaln", (X, ROW, ROW, 0.0), 48, "8 flops, no exponential"),
    "gated_adaln": ("gated_adaln", (X, X, ROW, ROW, ROW, 0.0), 48, "10 flops, no exponential"),
    "bias_act": ("bias_act", (X, None, "silu", 0.0, 1.0, None), 48, "silu 4 and 1"),
    "bias_gelu": ("bias_act", (X, ROW[0, :4], "gelu", 0.0, 1.0, None), 48, '6 flops ("tanh": 10), 1 exponential'),
    "diffuse": ("diffuse", (X, *[ROW[:, 0]] * 4, None, None, 0, X), 48, "6 flops, no exponential"),
    "ema_update": ("ema_update", ([X], [X], 0.1), 48, "3 flops, no exponential"),
    "geglu": ("glu", (X, None, "gelu", True), 24, '6 flops ("tanh": 10), 1 exponential'),
    "swiglu": ("glu", (X, None, "silu", True), 24, "5 flops, 1 exponential"),
    "group_norm_silu": ("group_norm_silu", (X, *[None] * 4, 2, 1e-5, True, False), 48, "9 flops, 1 exponential"),
    "guidance_moments": ("guidance_moments", (X, X), 48, "11 flops, no exponential"),
    "normal": ("normal_out", (X, IDS, None, 0, 0), 48, "6 flops per element, of them 1.5"),
    "uniform": ("uniform_out", (X, IDS, None, 0, 0), 48, "2 flops, no exponential"),
    "reparameterize": ("reparameterize", (X, X, None, None, 0, X, 0.0, False), 48, "11 flops, 2 exponentials"),
}


@pytest.mark.parametrize("name", STATED)
def test_the_docstring_states_the_formula(name):
    op, args, count, words = STATED[name]
    assert words in cost_lines(name)
    found, numbers = cost(op, *args), [float(n) for n in re.findall(r"\d+\.?\d*", words.replace("no ", "0 "))]
    if len(numbers) == 3:  # without what the tanh form costs
        numbers.pop(1)
    assert [found.flops, found.exps] == [numbers[0] * count, numbers[1] * count]


GRADIENTS = {
    "adaln": ("adaln_backward", (X, X, ROW, 0.0), 48, "17 flops", 0),
    "gated_adaln": ("gated_adaln_backward", (X, X, X, X, ROW, ROW, 0.0), 48, "21 flops", 0),
    "geglu": ("glu_backward", (X[..., :3], X, None, "gelu", True), 24, "17 flops, 2 exponentials", 2),
    "swiglu": ("glu_backward", (X[..., :3], X, None, "silu", True), 24, "13 flops, 1 exponential", 1),
    "group_norm_silu": (
        "group_norm_silu_backward", (X, X, *[None] * 4, ROW[:, :2], ROW[:, :2], 2, True, False), 48,
        "17 flops, 1 exponential", 1,
    ),
    "reparameterize": (
        "reparameterize_backward", (X, ROW[:, 0], X, X, None, None, 0, X, 0.0, False), 48, "11 flops, 2 exponentials", 2
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GRADIENTS)
def test_the_docstring_states_the_gradient_s_formula(name):
    op, args, count, words, exps = GRADIENTS[name]
    assert words in cost_lines(name).split("Backward: ")[1]
    found = cost(op, *args)
    assert (found.flops, found.exps) == (int(words.split()[0]) * count, exps * count)
