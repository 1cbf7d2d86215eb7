"""What one call of an op reads, moves, computes, and waits for, from its schema and arguments."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from genengine.ops import _registry
from genengine.ops._cost import Cost

# op -> how a user calls it: its result, or the shape of it, is needed on the host.
SYNCS = {
    "aten::_local_scalar_dense": ".item(), bool(), int() or float()",
    "aten::nonzero": "nonzero",
    "aten::masked_select": "masked_select",
    "aten::_unique2": "unique",
    "aten::unique_dim": "unique",
    "aten::unique_consecutive": "unique_consecutive",
    "aten::equal": "torch.equal",
    "aten::allclose": "torch.allclose",
    "aten::repeat_interleave": "repeat_interleave",
    "aten::bincount": "bincount",
}
# Ops that write their first argument without reading it, or take no more of it than its shape and dtype.
_OVERWRITES = frozenset(
    f"aten::{name}"
    for name in ("copy_", "fill_", "zero_", "normal_", "uniform_", "random_", "bernoulli_", "exponential_",
                 "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "randint_like",
                 "new_zeros", "new_ones", "new_full")
)  # fmt: skip
# Ops that read as much of their first argument as they return.
_GATHERS = frozenset(f"aten::{name}" for name in ("embedding", "index_select", "gather", "index", "take"))
# In place: they touch the rows or elements that an index names, and no others. Of some, what they find is added to.
_SCATTERS = {"aten::scatter_", "aten::scatter_add_", "aten::scatter_reduce_"}
_BY_ROWS = {"aten::index_copy_", "aten::index_add_", "aten::index_fill_", "aten::index_reduce_"}
_PUTS = {"aten::index_put_", "aten::_index_put_impl_"}
_ACCUMULATES = {"aten::scatter_add_", "aten::scatter_reduce_", "aten::index_add_", "aten::index_reduce_"}
# Ops that take an exponential, or what costs like one, for every element they write.
_EXPONENTIALS = frozenset(
    f"aten::{name}"
    for name in ("exp", "log", "sin", "cos", "tanh", "sigmoid", "erf", "silu", "gelu", "_softmax", "softplus", "logit",
                 "silu_backward", "gelu_backward")
)  # fmt: skip


def complete(schema, args, kwargs) -> list:
    """Every argument in the schema's order, defaults filled in."""
    rest = schema.arguments[len(args) :]
    return [*args, *(kwargs.get(argument.name, argument.default_value) for argument in rest)]


def read(schema, arguments) -> Iterator[Tensor]:
    """The tensors an op reads: all but `out=` arguments, and what an overwriting op overwrites."""
    for place, (argument, value) in enumerate(zip(schema.arguments, arguments, strict=True)):
        if argument.is_out or (place == 0 and schema.name in _OVERWRITES):
            continue
        yield from tensors(value)


def cost(func, arguments, result, reads, writes) -> Cost:
    """The op's own formula if it is ours, else every tensor once and the operations that torch's formulas count."""
    name = func._schema.name
    op = _registry.OPS.get(name.partition("::")[2])
    if op is not None and func.namespace in _registry.NAMESPACES.values():
        return op.cost(tuple(arguments), result)
    region = _region(func, arguments)
    if region is not None:
        return Cost(region, _flops(func, arguments, result))
    distinct = {operand.region: operand.nbytes for operand in reads}
    written = sum(operand.nbytes for operand in writes)
    if name in _GATHERS and reads:
        distinct[reads[0].region] = min(reads[0].nbytes, written)
    takes_exps = name.rstrip("_") in _EXPONENTIALS or (name == "aten::_addmm_activation" and arguments[-1])
    exps = math.prod(writes[0].shape) if takes_exps and writes else 0
    return Cost(sum(distinct.values()) + written, _flops(func, arguments, result), exps)


def _region(func, arguments) -> int | None:
    """Bytes of an op that writes into a part of its first argument: index, values, the part (twice if it adds to it).

    None for any other op.
    """
    name = func._schema.name
    if name not in _SCATTERS | _BY_ROWS | _PUTS:
        return None
    named = {entry.name: value for entry, value in zip(func._schema.arguments, arguments, strict=True)}
    table = named["self"]
    if name in _PUTS:
        count = _selected(table, named["indices"])
    elif name in _BY_ROWS:
        count = table.numel() // max(table.shape[named["dim"]] if table.dim() else 1, 1) * named["index"].numel()
    else:
        count = named["index"].numel()
    adds = name in _ACCUMULATES or bool(named.get("accumulate")) or named.get("reduce") is not None
    values = next((v for key in ("values", "src", "source", "value") if isinstance(v := named.get(key), Tensor)), None)
    index = sum(_nbytes(tensor) for tensor in tensors(named["indices" if name in _PUTS else "index"]))
    taken = 0 if values is None else min(values.numel(), count) * values.dtype.itemsize
    return index + taken + (2 if adds else 1) * count * table.dtype.itemsize


def _selected(table, indices) -> int:
    """How many elements `table[indices]` has."""
    shapes, place, rest = [], 0, 1
    for index in indices:
        if index is None:
            rest *= table.shape[place]
            place += 1
        elif _is_mask(index):
            shapes.append((index.numel() if index.is_meta else int(index.count_nonzero()),))
            place += index.dim()
        else:
            shapes.append(index.shape)
            place += 1
    return math.prod(torch.broadcast_shapes(*shapes)) * rest * math.prod(table.shape[place:])


def _is_mask(tensor) -> bool:
    return tensor.dtype in (torch.bool, torch.uint8)


def _nbytes(tensor) -> int:
    return tensor.numel() * tensor.dtype.itemsize


def _flops(func, arguments, result) -> int:
    positional = {argument.name: value for argument, value in zip(func._schema.arguments, arguments, strict=True)}
    half = 2 if positional.get("is_causal") is True else 1  # of the scores
    if func._schema.name == "aten::_scaled_dot_product_flash_attention_for_cpu":
        query, key = arguments[0], arguments[1]  # (B, H, N, D), (B, H, M, D): two products
        return 4 * query.numel() * key.shape[-2] // half
    if func._schema.name == "aten::_addmm_activation":  # as addmm, and torch has no formula for it
        (rows, dim), columns = arguments[1].shape, arguments[2].shape[1]
        return 2 * rows * dim * columns
    formula = flop_registry.get(func._overloadpacket)
    if formula is None:
        return 0
    named = {a.name: positional.pop(a.name) for a in func._schema.arguments if a.kwarg_only}
    return int(formula(*positional.values(), **named, out_val=result)) // half


def sync(func, arguments, result) -> str | None:
    """How a user calls this op if the host needs its result, on whatever device it ran."""
    name = func._schema.name
    if name == "aten::repeat_interleave" and arguments[-1] is not None:  # output_size is given
        return None
    if name in SYNCS:
        return SYNCS[name]
    if name in ("aten::index", "aten::index_put_", "aten::index_put"):
        indices = list(tensors(arguments[1]))
        if name != "aten::index" and _is_masked_fill(indices, *arguments[2:4]):
            return None
        return "indexing with a mask" if any(map(_is_mask, indices)) else None
    if name in ("aten::_to_copy", "aten::copy_"):
        source = arguments[0] if name == "aten::_to_copy" else arguments[1]
        waits = not (arguments[2] if name == "aten::copy_" else arguments[5])
        target = result if isinstance(result, Tensor) else arguments[0]
        return "copy to the host" if waits and source.device.type != "cpu" and target.device.type == "cpu" else None
    return None


def _is_masked_fill(indices, values, accumulate) -> bool:
    """Whether torch runs `x[mask] = number` as masked_fill, which need not know how many elements that are."""
    return len(indices) == 1 and _is_mask(indices[0]) and not accumulate and (
        values.numel() == 1 and values.device.type == "cpu"
    )  # fmt: skip


def tensors(value) -> Iterator[Tensor]:
    """The tensors in (nested) lists, tuples and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from tensors(entry)
