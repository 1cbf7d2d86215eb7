"""Builds the extension `genengine/_C.abi.so` with CMake when PyTorch's headers and a compiler are at hand.

`pip install .` never fails for want of a compiler: it then installs the pure-Python package, whose ops run on their
eager references (or Triton), and leaves the reason in `genengine/_build.json` for `genengine env` to show.

Environment: GENENGINE_CUDA=AUTO|ON|OFF, GENENGINE_NO_EXT=1, GENENGINE_TORCH_DIR=<site-packages/torch>,
GENENGINE_CMAKE_ARGS="-D...", MAX_JOBS=<n>.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def torch_dir() -> Path | None:
    """The directory of the installed torch package, found without importing it (isolated builds cannot)."""
    if override := os.environ.get("GENENGINE_TORCH_DIR"):
        return Path(override)
    if spec := importlib.util.find_spec("torch"):
        return Path(spec.origin).parent
    candidate = Path(sysconfig.get_path("purelib")) / "torch"
    return candidate if (candidate / "include").is_dir() else None


def torch_has_cuda(directory: Path) -> bool:
    """True for a CUDA build of torch, read off its shared libraries."""
    return (directory / "lib" / "libtorch_cuda.so").exists()


def reason_not_to_build() -> str | None:
    if os.environ.get("GENENGINE_NO_EXT") == "1":
        return "GENENGINE_NO_EXT=1 was set at installation"
    if sys.platform != "linux":
        return f"compiled kernels are built on Linux only, this is {sys.platform}"
    if torch_dir() is None:
        return "PyTorch's headers were not found at installation (install torch first, then reinstall genengine)"
    if not shutil.which("cmake"):
        return "cmake was not found at installation"
    if not (os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")):
        return "no C++ compiler was found at installation (install g++, then reinstall genengine)"
    return None


class CMakeBuild(build_ext):
    """Runs CMake; a failed or impossible build is recorded, never fatal, unless GENENGINE_CUDA=ON demands it."""

    def get_ext_filename(self, fullname):
        return os.path.join(*fullname.split(".")) + ".abi.so"

    def run(self):
        reason = reason_not_to_build()
        if reason is None:
            try:
                super().run()
            except (subprocess.CalledProcessError, OSError) as error:
                if os.environ.get("GENENGINE_CUDA") == "ON" or os.environ.get("GENENGINE_REQUIRE_EXT") == "1":
                    raise
                reason = f"the build of the compiled kernels failed ({error}); rerun pip with -v to see why"
        if reason:
            print(f"genengine: installing without compiled kernels: {reason}", file=sys.stderr)
        self._write_record(reason)
        if reason:
            self._drop_stale_library()
            self.extensions = []

    def _write_record(self, reason):
        target = ROOT if self.inplace or self.editable_mode else Path(self.build_lib).resolve()
        record = target / "genengine" / "_build.json"
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps({"extension": reason is None, "reason": reason}) + "\n")
        self._record = str(record)

    def _drop_stale_library(self):
        """An earlier build's library must not slip into a wheel that says it has none."""
        if not (self.inplace or self.editable_mode):
            for ext in self.extensions:
                Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)

    def build_extension(self, ext):
        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        work = Path(self.build_temp).resolve()
        cuda = os.environ.get("GENENGINE_CUDA", "AUTO")
        if cuda == "AUTO" and not torch_has_cuda(torch_dir()):
            cuda = "OFF"
        try:
            self._cmake(work, output, cuda)
        except subprocess.CalledProcessError:
            if cuda != "AUTO":
                raise
            print("genengine: the CUDA kernels failed to build; building the CPU kernels alone", file=sys.stderr)
            shutil.rmtree(work)
            self._cmake(work, output, "OFF")

    def _cmake(self, work, output, cuda):
        work.mkdir(parents=True, exist_ok=True)
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        configure = ["cmake", *generator, "-S", str(ROOT), "-B", str(work), "-DCMAKE_BUILD_TYPE=Release",
                     f"-DTORCH_DIR={torch_dir()}", f"-DGENENGINE_CUDA={cuda}",
                     f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output}"]  # fmt: skip
        subprocess.check_call([*configure, *os.environ.get("GENENGINE_CMAKE_ARGS", "").split()])
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 2))
        subprocess.check_call(["cmake", "--build", str(work), "-j", jobs])

    def get_outputs(self):
        outputs = [self.get_ext_fullpath(ext.name) for ext in self.extensions]
        return outputs + ([self._record] if hasattr(self, "_record") else [])


class Wheel(bdist_wheel):
    """No Python ABI inside the shared object: one wheel serves every Python 3."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


setup(
    packages=[
        "genengine", "genengine.cli", "genengine.data", "genengine.evaluate", "genengine.extensions",
        "genengine.integrations", "genengine.integrations.diffusers", "genengine.models", "genengine.nets",
        "genengine.ops", "genengine.paths", "genengine.profiling", "genengine.solvers", "genengine.testing",
        "genengine.kernels", "genengine.benchmarks",
    ],
    package_dir={"genengine.kernels": "kernels", "genengine.benchmarks": "benchmarks"},
    package_data={
        "genengine": ["py.typed", "assets/*", "pretrained/*", "ops/*.json"],
        "genengine.benchmarks": ["schema.json", "page.css", "page.js", "results/*/*.json"],
    },
    ext_modules=[Extension("genengine._C", [], optional=False)],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": Wheel},
)  # fmt: skip
