"""A classifier-free guidance combine that is not computed until it is needed, so that the scheduler's row can do it."""

from __future__ import annotations

import torch
from torch import Tensor

_WHOLE = (0.0, 1.0)


class Branches:
    """A model's output for two or three branches stacked along the batch; `chunk` gives each as a `Guided`.

    For everything else it is the tensor itself.
    """

    __slots__ = ("stacked",)

    def __init__(self, stacked: Tensor):
        self.stacked = stacked

    def tensor(self) -> Tensor:
        return self.stacked

    def chunk(self, chunks: int, dim: int = 0):
        stacked = self.stacked
        if chunks == 2 and dim == 0 and stacked.shape[0] % 2 == 0:
            return Guided(stacked, 2, 1.0, 0.0, 0.0), Guided(stacked, 2, 0.0, 1.0, 0.0)
        if chunks == 3 and dim == 0 and stacked.shape[0] % 3 == 0:
            return (
                Guided(stacked, 3, 1.0, 0.0, 0.0),
                Guided(stacked, 3, 0.0, 1.0, 0.0),
                Guided(stacked, 3, 0.0, 0.0, 1.0),
            )
        return stacked.chunk(chunks, dim)


class Guided:
    """w0 out_0 + w1 out_1 + w2 out_2, as the pipeline's arithmetic says: +, - and * by numbers keep it one."""

    __slots__ = ("stacked", "branches", "w0", "w1", "w2", "_value")

    def __init__(self, stacked: Tensor, branches: int, w0: float, w1: float, w2: float):
        self.stacked, self.branches = stacked, branches
        self.w0, self.w1, self.w2 = w0, w1, w2
        self._value = None

    def guidance(self) -> tuple[float, float] | None:
        """(g1, g2) of m = out_0 + g1 (out_1 - out_0) + g2 (out_2 - out_1).

        None where the weights' sum is not 1, for one branch alone, and once somebody had the combination as a tensor,
        which may have been edited in place since.
        """
        if self._value is not None:
            return None
        w0, w1, w2 = self.w0, self.w1, self.w2
        if w0 in _WHOLE and w1 in _WHOLE and w2 in _WHOLE:
            return None
        if abs(w0 + w1 + w2 - 1.0) > 1e-6 * (abs(w0) + abs(w1) + abs(w2)):
            return None
        return w1 + w2, w2

    @property
    def shape(self):
        return torch.Size((self.stacked.shape[0] // self.branches, *self.stacked.shape[1:]))

    @property
    def dtype(self):
        return self.stacked.dtype

    @property
    def device(self):
        return self.stacked.device

    def outputs(self) -> tuple[Tensor, ...]:
        return self.stacked.chunk(self.branches)

    def tensor(self) -> Tensor:
        """The combination itself, in the order of operations of a row where it is guidance."""
        if self._value is None:
            outputs, guidance = self.outputs(), self.guidance()
            weights = (self.w0, self.w1, self.w2)
            if sorted(weights) == [0.0, 0.0, 1.0]:
                self._value = outputs[weights.index(1.0)]
            elif guidance is not None:
                self._value = outputs[0] + guidance[0] * (outputs[1] - outputs[0])
                if guidance[1]:
                    self._value = self._value + guidance[1] * (outputs[2] - outputs[1])
            else:
                self._value = self.w0 * outputs[0] + self.w1 * outputs[1]
                if self.branches == 3:
                    self._value = self._value + self.w2 * outputs[2]
        return self._value

    def __add__(self, other):
        if type(other) is Guided and other.stacked is self.stacked and other.branches == self.branches:
            return Guided(self.stacked, self.branches, self.w0 + other.w0, self.w1 + other.w1, self.w2 + other.w2)
        return self.tensor() + _value(other)

    def __sub__(self, other):
        if type(other) is Guided and other.stacked is self.stacked and other.branches == self.branches:
            return Guided(self.stacked, self.branches, self.w0 - other.w0, self.w1 - other.w1, self.w2 - other.w2)
        return self.tensor() - _value(other)

    def __mul__(self, factor):
        if type(factor) is float or type(factor) is int:
            return Guided(self.stacked, self.branches, factor * self.w0, factor * self.w1, factor * self.w2)
        return self.tensor() * _value(factor)

    __rmul__ = __mul__


def _value(operand):
    return operand.tensor() if isinstance(operand, Guided | Branches) else operand


def _as_tensor(name):
    def method(self, *args, **kwargs):
        return getattr(self.tensor(), name)(*map(_value, args), **kwargs)

    method.__name__ = name
    return method


def _torch_function(cls, func, types, args=(), kwargs=None):
    plain = lambda value: type(value)(map(plain, value)) if isinstance(value, list | tuple) else _value(value)  # noqa: E731
    return func(*plain(args), **{name: plain(value) for name, value in (kwargs or {}).items()})


_OPERATORS = (
    "radd", "rsub", "truediv", "rtruediv", "floordiv", "rfloordiv", "mod", "rmod", "pow", "rpow", "matmul", "rmatmul",
    "neg", "pos", "abs", "invert", "and", "rand", "or", "ror", "xor", "rxor", "eq", "ne", "lt", "le", "gt", "ge",
    "getitem", "setitem", "contains", "len", "iter", "reversed", "bool", "float", "array", "repr", "format",
    "deepcopy", "reduce_ex",
)  # fmt: skip
for _class in (Branches, Guided):
    _class.__torch_function__ = classmethod(_torch_function)
    _class.__getattr__ = lambda self, name: getattr(self.tensor(), name)
    _class.__hash__ = object.__hash__
    for _name in (*_OPERATORS, *(() if _class is Guided else ("add", "sub", "mul", "rmul"))):
        setattr(_class, f"__{_name}__", _as_tensor(f"__{_name}__"))
