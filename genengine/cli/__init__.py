"""The `genengine` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from genengine.cli._bench import add_bench, add_report
from genengine.cli._families import add_demo, add_evaluate, add_gallery, add_sample, add_train
from genengine.cli._options import check_seed, set_threads
from genengine.cli._profile import add_profile
from genengine.cli._tools import add_env, add_trace, add_verify


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; a user's mistake is one line on stderr and exit status 2, not a traceback."""
    options = _parser().parse_args(arguments)
    try:
        check_seed(getattr(options, "seed", None))
        set_threads(getattr(options, "threads", None))
        return options.run(options) or 0
    except (ValueError, TypeError, RuntimeError, OSError, FloatingPointError) as error:
        if options.debug:
            raise
        print(f"genengine {options.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\ngenengine {options.command}: interrupted", file=sys.stderr)
        return 130


def _parser():
    import genengine

    parser = argparse.ArgumentParser(
        prog="genengine",
        description="Fused kernels for generative models: sample, train, evaluate, benchmark.",
        epilog="Example: genengine sample flow --num 100 --labels 0-9 --out digits.png",
    )
    parser.add_argument("--version", action="version", version=f"genengine {genengine.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (
        add_env, add_verify, add_demo, add_train, add_sample, add_evaluate, add_gallery, add_bench, add_report,
        add_profile, add_trace,
    ):  # fmt: skip
        add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
