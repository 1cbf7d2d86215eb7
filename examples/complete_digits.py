"""Complete half-seen digits with a shipped model: an extension of the package, and one of one's own.

    python examples/complete_digits.py

The left half of each test digit is known and comes back exactly; the model draws the right half, guided to the digit's
class by a weight that rises and falls with time.
"""

from dataclasses import replace

import numpy as np
import torch

from genengine import data, extensions
from genengine.models import FlowMatching
from genengine.table import COLUMNS


class ArchedGuidance(extensions.Extension):
    """Guidance 1 + (w - 1) sin(pi t): strong at middle times, none at either end. Arithmetic on the table is enough."""

    def extend(self, table):
        rows = table.rows.copy()
        g1 = rows[..., COLUMNS.index("g1")]
        g1 += (g1 - 1.0) * (np.sin(np.pi * table.t_model) - 1.0)
        return replace(table, rows=rows)


def main(num=40, steps=20):
    """Complete `num` test digits; returns (what is known, the mask of what is drawn, the completed images)."""
    model = FlowMatching.pretrained()
    images, labels = (tensor[:num] for tensor in data.digits("test"))
    mask = torch.zeros(8, 8)
    mask[:, 4:] = 1.0
    pieces = (ArchedGuidance(), extensions.Inpaint(mask, images, model.path, noise="row"))
    return images, mask, model.sample(num, labels, steps=steps, guidance=2.0, seed=0, extensions=pieces)


if __name__ == "__main__":
    known, mask, completed = main()
    for row in ((completed[0, 0] + 1) * 4.99).long().clamp(0, 9).tolist():
        print(" ".join(" .:-=+*#%@"[value] for value in row))
    print("the known half is kept:", torch.equal(completed[..., mask == 0], known[..., mask == 0]))
