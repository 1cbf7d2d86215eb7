"""Where it ran: device, versions, commit and load, without which a figure means nothing."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch

# Without these, eager PyTorch at tens of MB mostly times page faults: set before the process starts, for every variant.
MALLOC_SETTINGS = {"MALLOC_MMAP_THRESHOLD_": "1073741824", "MALLOC_TRIM_THRESHOLD_": "4294967296"}
ROOT = Path(__file__).resolve().parents[1]
_GPU_FIELDS = "name,driver_version,clocks.sm,clocks.mem,power.limit,power.draw,temperature.gpu"


def restart_with_malloc_settings() -> None:
    """Start this process again with the allocator settings of the protocol, unless they are set."""
    if sys.platform != "linux" or all(os.environ.get(name) for name in MALLOC_SETTINGS):
        return
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | MALLOC_SETTINGS)


def environment(device: str) -> dict:
    """What a result file says about the machine and the software; of a GPU, clocks and power as they are now."""
    import genengine

    info = {
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        **_source(),
        "genengine": genengine.__version__,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "malloc": {name: os.environ.get(name) for name in MALLOC_SETTINGS},
    }
    return info | (_gpu() if device == "cuda" else _cpu())


def _source():
    """Commit, and whether files were edited since: of this checkout, or as whoever installed this copy passes on."""
    commit, dirty = os.environ.get("GENENGINE_COMMIT"), os.environ.get("GENENGINE_DIRTY")
    top = _git("rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != ROOT:  # an installed copy may lie in somebody else's repository
        return {"commit": commit, "dirty": dirty == "1"}
    edited = bool(_git("status", "--porcelain", "--untracked-files=no"))
    return {"commit": commit or _git("rev-parse", "--short=12", "HEAD"), "dirty": dirty == "1" or edited}


def _gpu():
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "device": properties.name, "cuda": torch.version.cuda, "gpu": gpu_state(),
        "multiprocessors": properties.multi_processor_count, "l2_bytes": properties.L2_cache_size,
    }  # fmt: skip


def _cpu():
    from genengine import testing
    from genengine.ops import EXTENSION

    isa = testing.current_isa() if EXTENSION.loaded else "no extension"
    return {"device": _cpu_name(), "cores": os.cpu_count(), "isa": isa}


def gpu_state() -> dict | None:
    """Driver, clocks, power and temperature of the current device, read and never set; None if nvidia-smi fails."""
    command = ["nvidia-smi", f"--id={_nvidia_smi_id()}", f"--query-gpu={_GPU_FIELDS}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    values = [part.strip() for part in done.stdout.split("\n")[0].split(",")]
    names = _GPU_FIELDS.split(",")
    return dict(zip(names, values, strict=True)) if len(values) == len(names) else None


def _nvidia_smi_id():
    """The current device as nvidia-smi names it: it knows nothing of CUDA_VISIBLE_DEVICES, and may count otherwise."""
    index = torch.cuda.current_device()
    uuid = getattr(torch.cuda.get_device_properties(index), "uuid", None)
    if uuid is not None:
        return str(uuid) if str(uuid).startswith("GPU-") else f"GPU-{uuid}"
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return visible[index] if index < len(visible) else str(index)


def _version(module):
    try:
        return __import__(module).__version__
    except ImportError:
        return None


def _git(*arguments):
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _cpu_name():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
