"""What training tells: a progress bar, a line of JSON per interval, TensorBoard, and a stop at what is not finite.

A line has step, the mean of every term of the losses since the last line, what `Model.diagnose` finds, lr, and seconds
and CPU seconds since the run was started or resumed; and warnings, if there are any.
"""

from __future__ import annotations

import json
import os
import time

import torch
from tqdm import tqdm

from genengine import data

STATE_FILE, LOG_FILE = "state.safetensors", "log.jsonl"


class Log:
    """The progress bar, log.jsonl, TensorBoard, and the watch for numbers that are not finite, of one `train.Run`.

    Args:
        out_dir: folder of the log.  run: the run.  progress: show the bar.  tensorboard: write for TensorBoard too.
    """

    def __init__(self, out_dir, run, progress, tensorboard):
        self.out_dir, self.run, self.start = out_dir, run, (time.monotonic(), time.process_time())
        self.pending, self.seen = [], set()
        self.board = _tensorboard(out_dir) if tensorboard else None
        self.bar = tqdm(total=run.config.steps, initial=run.step, disable=not progress, unit="step")

    def __enter__(self):
        self.file = open(self.out_dir / LOG_FILE, "a", encoding="utf-8")  # noqa: SIM115
        return self

    def __exit__(self, *error):
        self.file.close()
        self.bar.close()
        if self.board is not None:
            self.board.close()

    def add(self, terms):
        self.pending.append(terms)
        self.bar.update()

    def check(self):
        """Refuse what is not finite among the terms not yet written; returns the mean of each by name.

        A term may be missing from some steps (a lazy penalty, say).
        """
        if not self.pending:
            return {}
        first = self.run.step - len(self.pending) + 1
        places = [(first + row, name) for row, terms in enumerate(self.pending) for name in terms]
        values = torch.stack([terms[name].float() for terms in self.pending for name in terms])
        values = values.double().cpu()  # one wait for the device
        bad = (~torch.isfinite(values)).nonzero()
        if len(bad):
            step, name = places[bad[0]]
            self._stop(name, float(values[bad[0]]), step)
        by_name: dict[str, list[float]] = {}
        for (_, name), value in zip(places, values.tolist(), strict=True):
            by_name.setdefault(name, []).append(value)
        return {name: sum(column) / len(column) for name, column in by_name.items()}

    def _stop(self, name, value, step):
        state = self.out_dir / STATE_FILE
        kept = f"the last good state is {state}" if state.exists() else "no state was saved yet"
        raise FloatingPointError(
            f"train/train: {name} must stay finite, got {value} at step {step}; {kept}; lower lr, or use precision fp32"
        )

    def write(self):
        means = self.check()
        self.pending.clear()
        run = self.run
        pick = data.batch_indices(len(run.dataset), run.config.batch_size, run.step, seed=run.config.seed)
        x0, labels, _ = run.dataset.batch(pick)
        numbers, warnings = run.model.diagnose(x0.to(run.device), labels, seed=run.config.seed, step=run.step)
        entry = {"step": run.step, **means, **numbers, "lr": run.learning_rate}
        entry["seconds"], entry["cpu_seconds"] = time.monotonic() - self.start[0], time.process_time() - self.start[1]
        entry |= {"warnings": warnings} if warnings else {}
        self.file.write(json.dumps(entry) + "\n")
        self.file.flush()
        for name, value in (means | numbers).items() if self.board is not None else ():
            self.board.add_scalar(name, value, run.step)
        self.bar.set_postfix({k: f"{v:.4f}" for k, v in means.items() if k.endswith("loss")})
        self._warn(warnings)

    def _warn(self, warnings):
        """Each warning once, however often its numbers change, above the bar."""
        for text in warnings:
            kind = text.split(":")[0]
            if kind not in self.seen and not self.bar.disable:
                self.seen.add(kind)
                tqdm.write(f"step {self.run.step}: {text}", file=self.bar.fp)


def _tensorboard(out_dir):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise RuntimeError("train/train: tensorboard=True needs TensorBoard: pip install tensorboard") from error
    return SummaryWriter(str(out_dir))


def trim(path, step):
    """Drop log lines past `step` (written after the state that is resumed) and a last, half-written one."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            break
        if entry["step"] <= step:
            kept.append(line)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    os.replace(temporary, path)
