"""How a network finds its configuration: a named size, a dict or a dataclass, with fields replaced."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping


def resolve(net, config_class, named, config, overrides):
    """An instance of `config_class` for the network called `net` in error messages.

    Args:
        net: "nets/VAENet", say.  config_class: frozen dataclass.  named: name -> dict of fields.
        config: a name in `named`, a dict of fields or a config_class.  overrides: fields that replace its own.
    Raises:
        ValueError: unknown name or field, or values that do not fit together.
    """
    if isinstance(config, str):
        if config not in named:
            raise ValueError(f"{net}: config must be one of {', '.join(named)}, got {config!r}")
        config = named[config]
    if not isinstance(config, (Mapping, config_class)):
        raise ValueError(f"{net}: config must be a name, a dict or a {config_class.__name__}, got {config!r:.60}")
    fields = dataclasses.asdict(config) if isinstance(config, config_class) else dict(config)
    fields.update(overrides)
    known = [field.name for field in dataclasses.fields(config_class)]
    unknown = sorted(set(fields) - set(known))
    if unknown:
        raise ValueError(f"{net}: config fields must be among {', '.join(known)}, got {', '.join(unknown)}")
    return config_class(**fields)


def is_int(value, least=0) -> bool:
    """True for an int of at least `least`; a bool is none."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_number(value, least=0.0, below=math.inf) -> bool:
    """True for an int or float in [least, below); a bool or nan is none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and least <= value < below


def check_ints(net, config, names, least=1):
    """Refuse a field of `config` that is no int of at least `least`."""
    for name in names:
        value = getattr(config, name)
        if not is_int(value, least):
            raise ValueError(f"{net}: {name} must be an int >= {least}, got {value!r}")


def check_widths(net, config, name):
    """The field as a tuple of at least one positive int (JSON gives a list); refuse anything else."""
    value = getattr(config, name)
    good = isinstance(value, (list, tuple)) and len(value) > 0
    if not good or not all(is_int(v, 1) for v in value):
        raise ValueError(f"{net}: {name} must be a sequence of ints >= 1, got {value!r}")
    object.__setattr__(config, name, tuple(value))


def check_share(net, config, name):
    """Refuse a field that is no number in [0, 1)."""
    value = getattr(config, name)
    if not is_number(value, below=1):
        raise ValueError(f"{net}: {name} must be a number in [0, 1), got {value!r}")
