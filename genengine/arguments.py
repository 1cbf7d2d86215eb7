"""Values of command-line arguments: settings and labels as a user writes them."""

import json
from collections.abc import Sequence


def settings(texts: Sequence[str]) -> dict:
    """["a.b=1", "c=x"] as {"a": {"b": 1}, "c": "x"}."""
    result: dict = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not all(name.split(".")):
            raise ValueError(f"--set must look like NAME=VALUE, got {text!r}")
        *outer, last = name.split(".")
        place = result
        for key in outer:
            place = place.setdefault(key, {})
            if not isinstance(place, dict):
                raise ValueError(f"--set {name} must not be inside another --set, got {key}")
        try:
            place[last] = json.loads(value)
        except json.JSONDecodeError:
            place[last] = value
    return result


def parse_labels(text: str, num_classes: int | None = None) -> list[int]:
    """ "7", "0-9" or "1,3,5-7" as a list of classes, below `num_classes` if given."""
    labels = []
    for part in text.split(","):
        low, dash, high = part.partition("-")
        try:
            first, last = int(low), int(high) if dash else int(low)
        except ValueError:
            raise ValueError(f"--labels must look like 7, 0-9 or 1,3,5, got {text!r}") from None
        if last < first:
            raise ValueError(f"--labels ranges must rise, got {part!r}")
        if num_classes is not None and last >= num_classes:
            raise ValueError(f"labels must be in 0 .. {num_classes - 1}, got {last}")
        labels += range(first, last + 1)
    return labels
