"""Model files: safetensors with the configuration in their metadata, written atomically, read strictly.

Nothing here unpickles. A file is either whole or refused with a ValueError that names it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

FORMAT = 1


def write(path, tensors, config):
    """Write tensors and configuration to one file, atomically.

    The bytes go to a hidden temporary file in the same directory, are flushed to disk (fsync) and renamed
    over `path` (os.replace): a kill at any moment leaves the old file or the new one, never half of one.

    Args:
        path: file name, by custom ending in .safetensors; its directory must exist.
        tensors: dict of name -> tensor on any device; copied to the CPU.
        config: JSON-serialisable dict.
    """
    path = Path(path)
    plain = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    metadata = {"genengine": json.dumps({"format": FORMAT, **config}, sort_keys=True)}
    payload = safetensors.torch.save(plain, metadata=metadata)
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(payload)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _sync_directory(path.parent)


def _sync_directory(directory):
    if os.name != "posix":  # Windows cannot open a directory; its rename is durable enough
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read(path):
    """Read a file written by `write`.

    Returns:
        tensors (dict of name -> CPU tensor), config (dict).
    Raises:
        FileNotFoundError: no such file.
        ValueError: a pickle, a truncated or foreign file, or one without genengine's metadata; nothing is
            unpickled.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint/read: path must be an existing file, got {path}; check the name")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        with open(path, "rb") as file:
            start = file.read(2)
        if start == b"PK" or start[:1] == b"\x80":  # a zip or pickle opening; asked only of unreadable files,
            raise ValueError(  # because a good safetensors file may begin with any byte
                f"checkpoint/read: {path} must be a safetensors file, got a pickle (torch.save), which can "
                "run code when loaded; convert it in a process you trust with safetensors.torch.save_file"
            ) from error
        raise ValueError(
            f"checkpoint/read: {path} must be a whole safetensors file, got a truncated or foreign one "
            f"({error}); fetch or train it again"
        ) from error
    return tensors, _config(path, metadata)


def _config(path, metadata):
    try:
        config = json.loads(metadata.get("genengine", "null"))
    except json.JSONDecodeError:
        config = None
    if not isinstance(config, dict):
        raise ValueError(
            f"checkpoint/read: {path} must carry the metadata entry 'genengine', got "
            f"{', '.join(metadata) or 'none'}; for foreign weights build the network "
            "yourself and use load_into"
        )
    if config.pop("format", None) != FORMAT:
        raise ValueError(f"checkpoint/read: {path} must have format {FORMAT}; update genengine to read it")
    return config


def load_into(module, tensors, path):
    """Copy tensors into a module, strictly: the same names and shapes, floating-point casts allowed.

    Args:
        module: nn.Module.  tensors: dict of name -> tensor.  path: only named in errors.
    Raises:
        ValueError: missing or unexpected keys, or a wrong shape, naming file and keys.
    """
    expected = module.state_dict()
    problems = []
    missing, unexpected = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
    if missing:
        problems.append(f"missing {_some(missing)}")
    if unexpected:
        problems.append(f"unexpected {_some(unexpected)}")
    for name in sorted(set(expected) & set(tensors)):
        if expected[name].shape != tensors[name].shape:
            problems.append(f"{name} must be {tuple(expected[name].shape)}, got {tuple(tensors[name].shape)}")
    if problems:
        raise ValueError(
            f"checkpoint/load_into: {path} does not fit {type(module).__name__}: {'; '.join(problems[:4])}; "
            "use the configuration the file was trained with"
        )
    with torch.no_grad():
        module.load_state_dict(tensors)


def _some(names):
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
