"""What `step` returns: x' at once, the other fields (x0, say) only when somebody looks at them."""

from __future__ import annotations

import functools
from collections import OrderedDict
from dataclasses import fields

_READERS = ("__iter__", "__len__", "__contains__", "__eq__", "__repr__", "keys", "values", "items", "to_tuple")


class LazyTuple(tuple):
    """(x', further fields), the further ones computed when they are read."""

    def __new__(cls, x, run, k):
        self = super().__new__(cls, (x,))
        self._rest = None
        self._evaluate = run.fields_of(k)
        return self

    def _all(self):
        if self._rest is None:
            self._rest = (tuple.__getitem__(self, 0), *self._evaluate().values())
        return self._rest

    def __getitem__(self, index):
        return tuple.__getitem__(self, 0) if index == 0 and isinstance(index, int) else self._all()[index]

    def __iter__(self):
        return iter(self._all())

    def __len__(self):
        return len(self._all())

    def __eq__(self, other):
        return self._all() == other

    def __add__(self, other):
        return self._all() + tuple(other)

    def __contains__(self, item):
        return item in self._all()

    def __repr__(self):
        return repr(self._all())

    def __reduce__(self):
        return tuple, (self._all(),)

    __hash__ = None


@functools.cache
def _lazy_class(output_class):
    """A subclass of an output class that fills in its further fields when they are read, by name or as a mapping."""
    first, *rest = (field.name for field in fields(output_class))

    class Lazy(output_class):
        def __init__(self, x, evaluate):
            OrderedDict.__init__(self)
            object.__setattr__(self, "_evaluate", evaluate)
            OrderedDict.__setitem__(self, first, x)
            object.__setattr__(self, first, x)

        def __getattribute__(self, name):
            if name in rest:
                object.__getattribute__(self, "_fill")()
            return object.__getattribute__(self, name)

        def __getitem__(self, key):
            if key == 0 or key == first:
                return OrderedDict.__getitem__(self, first)
            self._fill()
            return output_class.__getitem__(self, key)

        def _fill(self):
            evaluate = self.__dict__.pop("_evaluate", None)
            if evaluate is not None:
                for name, value in evaluate().items():
                    OrderedDict.__setitem__(self, name, value)
                    object.__setattr__(self, name, value)

        def __reduce__(self):
            self._fill()
            return output_class, tuple(getattr(self, field.name) for field in fields(output_class))

    for name in _READERS:
        setattr(Lazy, name, _filling(getattr(output_class, name)))
    for name in ("__name__", "__qualname__", "__module__"):
        setattr(Lazy, name, getattr(output_class, name))
    return Lazy


def _filling(method):
    @functools.wraps(method)
    def filled(self, *args, **kwargs):
        self._fill()
        return method(self, *args, **kwargs)

    return filled


def lazy_output(output_class, x, run, k):
    """output_class(x', ...) with the further fields of row k of a run computed when they are read."""
    if not run.plan.fields[k]:
        return output_class(x)
    return _lazy_class(output_class)(x, run.fields_of(k))
