"""Prints what a bug report needs: the versions of the package, of TRL and of what both use, and the machine."""

import argparse
import contextlib
import io
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version


EXTRAS = ("aiohttp", "math-verify", "matplotlib", "rich")  # of this package alone; TRL's list has the others


def describe() -> str:
    """TRL's list, with this package on top and its extras at the end."""
    from trl.scripts.env import print_env

    import trl_sgpo

    with contextlib.redirect_stdout(io.StringIO()) as printed:
        print_env()
    lines = [f"- TRL-SGPO version: {trl_sgpo.__version__}"]
    lines += [line for line in printed.getvalue().splitlines() if line.lstrip().startswith("- ")]
    return "\n".join([*lines, *(f"- {name} version: {_version(name)}" for name in EXTRAS)])


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def main(argv: Sequence[str] | None = None, prog: str = "python -m trl_sgpo.scripts.env") -> int:
    argparse.ArgumentParser(prog=prog, description=__doc__).parse_args(argv)
    print(f"Copy this into your report:\n\n{describe()}")
    return 0


if __name__ == "__main__":
    main()
