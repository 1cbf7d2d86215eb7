"""The forms that people write our ops in, as data: longest first, each with what the op also returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from genengine.ops import _registry
from genengine.ops.adaln import MAX_DIM
from genengine.ops.attention import MAX_HEAD_DIM
from genengine.ops.qk_norm_rope import MAX_DIM as MAX_ROTATED_DIM
from genengine.profiling import patterns as on
from genengine.profiling.patterns import Items, Leaf, Match, Number, Part, Pattern, either, op


@dataclass(frozen=True)
class Form:
    """One way of writing one of our ops.

    op: its public name. root: the pattern of its last node. results: bound names that the op returns too, which may be
    used elsewhere. check: a last condition. also: further results, computed from what is bound. grow: how the rest of
    a chain is taken in, see `fusions`. one_launch: all matches at a line are one call.
    """

    op: str
    root: Pattern
    results: tuple[str, ...] = ()
    check: Callable[[Match], bool] | None = None
    also: tuple[Pattern, ...] = ()
    grow: str | None = None
    one_launch: bool = False


def _exactly(number):
    return Number(test=lambda value: value == number)


# ---- norms and modulations -------------------------------------------------------------------------------------------


def _modulated(y: Pattern, condition) -> Pattern:
    """y * (1 + scale) + shift, y * factor + shift, or y + y * scale + shift."""
    scale = Leaf("scale", (condition,))
    factor = either(op("add", scale, _exactly(1)), scale)
    return op("add", either(op("mul", y, factor), op("add", y, op("mul", y, scale))), Leaf("shift", (condition,)))


_LAYER_NORM = op("layer_norm", Leaf("x"), name="normed", where=on.of_one_dimension)
_GATED = op(
    "add", Leaf("x", (on.full,)), op("mul", Leaf("gate", (on.per_row,)), Leaf("branch", (on.full,))), name="x_new"
)
_GATED_NORM = op("layer_norm", _GATED, name="normed", where=on.of_one_dimension)
_GROUP_NORM = op("group_norm", Leaf("x"), name="normed")
_ADAGN = _modulated(_GROUP_NORM, on.per_channel_row)

_MEAN_SQUARE = op("mean", op("square", Leaf("x")), where=on.over_last_dimension_alone)
_RMS = op("rms_norm", Leaf("x"), where=on.of_one_dimension)
_UNWEIGHTED = either(_RMS, op("mul", Leaf("x"), op("rsqrt", op("add", _MEAN_SQUARE, Number()))))
_RMS_NORM = either(op("mul", _UNWEIGHTED, Leaf("weight")), _UNWEIGHTED)


def _rotated(y: Pattern) -> Pattern:
    """Rotary embedding: halves or neighbours turned (cat, stack of -second and first), pairs, a complex product."""
    piece, cos, sin = Part(whole=y), Leaf("cos"), Leaf("sin")
    turned = op("cat|stack", Items((op("mul", piece, _exactly(-1)), piece)))
    pair = Items((op("sub", op("mul", piece, cos), op("mul", piece, sin)),
                  op("add", op("mul", piece, sin), op("mul", piece, cos))))  # fmt: skip
    return either(
        op("add", op("mul", y, cos), op("mul", turned, sin)),
        op("stack|cat", pair),
        op("mul", y, Leaf("turn", (on.is_complex,))),
    )


# ---- activations -----------------------------------------------------------------------------------------------------

_ACTS = "relu|leaky_relu|silu|gelu|tanh|sigmoid"
_SUM = op("add", Leaf("x", (on.full,)), Leaf("bias", (on.per_channel,)))
_BIASED, _BARE = op(_ACTS, _SUM), op(_ACTS, Leaf("x"))


def _gain(inner):
    return op("mul", inner, Number())


def _clamped(inner):
    return op("clamp", inner, where=lambda node: None not in node.args[1:3] and node.args[1] == -node.args[2])


def _glu(act: str) -> Pattern:
    """act(gate) * value, halves of one tensor, which may be a product plus its bias."""
    return either(*(op("mul", op(act, Part("gate", whole)), Part("value", whole)) for whole in (_SUM, None)))


def _halves(found: Match) -> bool:
    """The gate and the value are two slices of one tensor, side by side in the last dimension."""
    gate, value = (found.names[name].operand for name in ("gate", "value"))
    same = (gate.storage, gate.version, gate.shape, gate.stride) == (
        value.storage,
        value.version,
        value.shape,
        value.stride,
    )
    return same and abs(gate.offset - value.offset) == gate.shape[-1]


# ---- attention -------------------------------------------------------------------------------------------------------

_SCORES = op("bmm", Leaf("q", through=True), Leaf("k", through=True))
_WEIGHTS = op("softmax", either(op("mul", _SCORES, Number("scale")), _SCORES), where=on.over_last_dimension)

# ---- noise, guidance, updates ----------------------------------------------------------------------------------------

_EPS = op("randn", name="eps")
_STD = op("exp", op("mul", Leaf("logvar"), _exactly(0.5)), name="std")
_SIGMA, _TERM = Leaf("sigma", (on.per_sample,)), Leaf(None, (on.per_sample,))
_X0 = Leaf("x0", (on.full,))
_EPS_TERM, _X0_TERM = op("mul", _EPS, _TERM), op("mul", _X0, _TERM)
_NOISED = either(
    op("add", op("mul", _X0, Leaf("alpha", (on.per_sample,))), op("mul", _EPS, _SIGMA)),
    op("add", _X0, op("mul", op("sub", _EPS, _X0), _SIGMA)),
)
_TARGETS = (
    op("sub", _EPS, _X0),
    op("add", _EPS_TERM, _X0_TERM),
    op("sub", _EPS_TERM, _X0_TERM),
    op("sub", _X0_TERM, _EPS_TERM),
)

_U, _C = Leaf("u", (on.full, on.activation)), Leaf("c", (on.full, on.activation))


def _stretched(number):
    return op("mul", op("sub", _C, _U), either(number, Leaf(None, (on.scalar,))))


# Between u and c lies an interpolation; guidance goes beyond.
_BEYOND = Number(test=lambda value: not 0 <= value <= 1)
_GUIDED = either(
    op("add", _U, _stretched(_BEYOND), name="guided"),
    op("add", _C, _stretched(Number()), name="guided"),
)


def _deviation(inner):
    return op("std", inner, where=on.of_a_sample)


def _same_shape(found: Match) -> bool:
    return found.names["logvar"].shape == found.names["mean"].shape


def _in_place(found: Match) -> bool:
    """The last step writes the average itself, which was there before."""
    average, step = found.names["average"].operand, found.names["root"].step
    return average.outside and step.name.endswith("_") and step.writes[0].storage == average.storage


def _weights_add_up(found: Match) -> bool:
    decay, rest = found.names["decay"], found.names["rest"]
    return _in_place(found) and abs(decay + rest - 1) < 1e-6 and 0 < decay < 1


_AVERAGE, _VALUE = Leaf("average"), Leaf("value", (on.full,))

# ---- what our kernels take -------------------------------------------------------------------------------------------

_LIMITS: dict[str, Callable[[Match], bool]] = {
    "adaln": lambda found: found.names["normed"].shape[-1] <= MAX_DIM,
    "gated_adaln": lambda found: found.names["normed"].shape[-1] <= MAX_DIM,
    "qk_norm_rope": lambda found: found.names["x"].shape[-1] <= MAX_ROTATED_DIM,
    "attention": lambda found: found.names["q"].shape[-1] == found.names["v"].shape[-1] <= MAX_HEAD_DIM,
    "bias_act": lambda found: len(found.names["root"].shape) > 0,
}


def fits(form: Form, found: Match) -> bool:
    """Whether a kernel of the op takes tensors of these sizes and dtypes: what runs on its reference saves nothing."""
    written = {operand.dtype for node in found.nodes for operand in node.step.writes}
    kernels = {*_registry.KERNEL_DTYPES, torch.complex64}  # complex only in between: pairs that are turned
    return written <= kernels and _LIMITS.get(form.op, lambda found: True)(found)


# What a form has claimed, none of the later ones takes.
FORMS: tuple[Form, ...] = (
    Form("gated_adaln", _modulated(_GATED_NORM, on.per_row), results=("x_new",)),
    Form("adaln", _modulated(_LAYER_NORM, on.per_row)),
    Form("group_norm_silu", op("silu", either(_ADAGN, _GROUP_NORM))),
    Form("group_norm_silu", _ADAGN),
    Form("qk_norm_rope", _rotated(_RMS_NORM)),
    Form("attention", op("bmm", _WEIGHTS, Leaf("v", through=True))),
    Form("geglu", _glu("gelu"), check=_halves),
    Form("swiglu", _glu("silu"), check=_halves),
    Form("reparameterize", op("add", Leaf("mean", (on.full,)), op("mul", _STD, _EPS)), check=_same_shape, grow="kl"),
    Form("diffuse", _NOISED, results=("eps",), also=_TARGETS),
    Form("guidance_moments", _deviation(_GUIDED), also=(_deviation(Leaf("c")),)),
    Form("sampler_step", _GUIDED, grow="row"),
    Form("bias_act", _clamped(either(_gain(_BIASED), _BIASED))),
    Form("bias_act", _gain(_BIASED)),
    Form("bias_gelu", op("gelu", _SUM)),
    Form("bias_act", _BIASED),
    Form("bias_act", _clamped(_gain(_BARE))),
    Form("bias_act", _gain(_BARE)),
    Form(
        "ema_update", op("add", op("mul", _AVERAGE, Number("decay")), op("mul", _VALUE, Number("rest"))),
        check=_weights_add_up, one_launch=True,
    ),
    Form(
        "ema_update", op("add", _AVERAGE, op("mul", op("sub", _VALUE, _AVERAGE), Number())), check=_in_place,
        one_launch=True,
    ),
)  # fmt: skip
