"""A denoising step of networks as large as people use: guidance, network, solver, many steps in a row.

"fused" is an `Engine`'s whole run, replayed from its graph on a GPU. "torch.compile + CUDA graph" is the network
compiled and the textbook's loop captured in one graph, the strongest that PyTorch offers; "eager" is the loop as people
write it. All take float32 states and a network in the row's dtype. A step evaluates the network once, of both branches.
"""

import copy

import numpy as np
import torch

from genengine import Engine, paths, schedules, solvers, testing
from genengine.benchmarks import eager
from genengine.benchmarks.bench_flow import filled
from genengine.benchmarks.registry import Benchmark, faster, register
from genengine.nets.dit import DiT
from genengine.nets.unet import UNet
from genengine.ops import normal
from genengine.ops._cost import Cost

STEPS, GUIDANCE = 8, 4.0
FLOW, VP = paths.RectifiedFlow(), paths.VPLinear()
GRAPHED = "torch.compile + CUDA graph"
CHECKED = 2  # images that are checked, against float64


class Loop:
    """Sampling with one network: ours, and the textbook's loop around its eager twin.

    update(x, output, step) -> x: the textbook's step; both: whether each step evaluates two branches.
    """

    def __init__(self, net, table, shape, update, *, both):
        parameter = next(net.parameters())
        self.net, self.table, self.update, self.both = net, table, update, both
        self.device, self.dtype = parameter.device, parameter.dtype
        self.engine, self.plain = Engine(net), eager.calling(net.forward)
        self.times = [float(t) for t in table.t_model[:, 0]]
        self.resize(shape)

    def resize(self, shape):
        """Another batch, with labels and noise of its own."""
        self.shape, batch = shape, shape[0]
        self.x = normal(shape, seed=0, device=self.device) * self.table.init_scale
        self.y = torch.arange(batch, device=self.device) % 10 if self.both else None
        self.labels = torch.cat([torch.full_like(self.y, self.net.null_class), self.y]) if self.both else None
        if self.device.type == "cuda" and self.x.dim() == 4 and isinstance(self.net, UNet):
            self.x = self.x.contiguous(memory_format=torch.channels_last)
        return self

    def fused(self):
        branches = {"cond": {"y": self.y}, "uncond": {"y": self.labels[: len(self.y)]}} if self.both else {}
        return self.engine.sample(self.table, x=self.x, seed=0, **branches)

    def textbook(self, net):
        x = self.x
        for step, t in enumerate(self.times):
            model_in = torch.cat([x, x]) if self.both else x
            t = torch.full((len(model_in),), t, device=x.device)
            labels = (self.labels,) if self.both else ()
            output = net(model_in.to(self.dtype), t, *labels).float()
            if self.both:
                u, c = output.chunk(2)
                output = u + GUIDANCE * (c - u)
            x = self.update(x, output, step)
        return x

    def variants(self):
        compiled = torch.compile(self.plain)
        graphed = Captured(lambda: self.textbook(compiled)) if self.device.type == "cuda" else None
        return {
            "fused": self.fused,
            "eager": lambda: self.textbook(self.plain),
            "torch.compile": lambda: self.textbook(compiled),
        } | ({GRAPHED: graphed} if graphed else {})

    def check(self):
        """The run of a few images against the textbook's in float64, at most twice as far from it as eager's."""
        few = copy.copy(self).resize((min(CHECKED, self.shape[0]), *self.shape[1:]))
        exact = copy.copy(few)
        exact.net, exact.dtype = copy.deepcopy(self.net).double(), torch.float64
        exact.x = few.x.double()
        oracle = exact.textbook(_in_double(eager.calling(exact.net.forward)))
        ours, plain = few.fused(), few.textbook(few.plain)
        limit = 2 * testing.error(plain, oracle) + torch.finfo(self.dtype).eps * oracle.abs().max().item()
        testing.assert_within(testing.error(ours, oracle), limit, type(self.net).__name__)


def _in_double(net):
    return lambda x, t, *labels: net(x.double(), t, *labels)


class Captured:
    """A function of no arguments as one CUDA graph, made at the first call and replayed by the others."""

    def __init__(self, function):
        self.function, self.graph, self.result = function, None, None

    def __call__(self):
        if self.graph is None:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):  # compiles
                    self.function()
            torch.cuda.current_stream().wait_stream(side)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.result = self.function()
        self.graph.replay()
        return self.result


# ---- DiT: flow matching, Euler -----------------------------------------------------------------------------------

# label -> the network, and how much faster than `GRAPHED` a step is to be
DITS = {
    "DiT-S/2, 1 image": ("DIT_S_2", 3.5), "DiT-XL/2, 1 image": ("DIT_XL_2", 1.5),
    "DiT-XL/2, 8 images": ("DIT_XL_2", 1.2), "DiT-XL/2, 64 images": ("DIT_XL_2", 1.12),
}  # fmt: skip
LATENT = (4, 32, 32)  # of a 256-pixel image


def dit_cost(net, images):
    """FLOPs of the products of one step, and the weights that it reads; the modulation is computed before the loop."""
    c = net.config
    tokens, d = (c.image_size // c.patch_size) ** 2, c.dim
    patch = c.patch_size**2 * c.in_channels
    products = c.depth * ((4 + 2 * c.mlp_ratio) * d * d * tokens + 2 * tokens**2 * d) + 2 * patch * d * tokens
    weights = sum(p.numel() * p.element_size() for name, p in net.named_parameters() if not name.startswith("modul"))
    return Cost(weights, int(2 * products * 2 * images))


@register(
    "DiT step, CFG", group="steps", kind="models", quick=(), axes={"batch": 0}, dtypes=("bfloat16",),
    shapes={"DiT-S/2, 1 image": (1, *LATENT)},
    cuda_shapes={label: (int(label.split()[1]), *LATENT) for label in DITS},
)  # fmt: skip
def dit_step(case):
    name, by = DITS.get(case.label, DITS["DiT-S/2, 1 image"])
    net = filled(DiT.from_config(name, learn_sigma=False)).to(case.device, case.dtype).eval()
    grid = schedules.uniform(STEPS)
    table = solvers.euler(FLOW, grid, prediction="velocity", guidance_scale=GUIDANCE)
    euler = lambda x, velocity, step: x + float(grid[step + 1] - grid[step]) * velocity  # noqa: E731
    loop = Loop(net, table, case.shape, euler, both=True)
    step = dit_cost(net, case.batch_of(LATENT))
    return Benchmark(
        loop.variants(), loop.check, elements=STEPS, cost=Cost(STEPS * step.bytes, STEPS * step.flops),
        goals=(faster(GRAPHED, by),), own_graphs=True,
    )  # fmt: skip


# ---- U-Net: DDPM's of CIFAR-10, DDIM -------------------------------------------------------------------------------


def ddim(path, grid):
    """Song et al. 2021, eq. 12, eta = 0, of a network that predicts eps."""
    alpha, sigma = (np.asarray([float(f(t)) for t in grid]) for f in (path.alpha, path.sigma))

    def update(x, eps, step):
        x0 = (x - float(sigma[step]) * eps) / float(alpha[step])
        return float(alpha[step + 1]) * x0 + float(sigma[step + 1]) * eps

    return update


@register(
    "U-Net step", group="steps", kind="models", quick=(), axes={"batch": 0}, dtypes=("bfloat16", "float32"),
    shapes={"DDPM, CIFAR-10, 1 image": (1, 3, 32, 32)}, cuda_shapes={"DDPM, CIFAR-10, 64 images": (64, 3, 32, 32)},
)  # fmt: skip
def unet_step(case):
    """The 35.7 million weights of Ho et al. 2020, without guidance, in channels_last as is eager's twin."""
    net = filled(UNet.from_config("cifar")).to(case.device, case.dtype).eval()
    grid = schedules.uniform(STEPS, t_max=0.99, t_min=0.01)
    table = solvers.ddim(VP, grid, prediction="eps")
    case.batch_of((3, 32, 32))
    loop = Loop(net, table, case.shape, ddim(VP, grid), both=False)
    stated = case.label.endswith("64 images")
    goals = (faster("eager", 1.4), faster("torch.compile", 1.2)) if stated else ()
    return Benchmark(loop.variants(), loop.check, elements=STEPS, goals=goals, own_graphs=True)
