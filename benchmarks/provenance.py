"""What a record says about where it comes from: the commit of the code, the versions of packages, the hardware."""

import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any


def commit() -> str:
    """
    The commit of this checkout, with "-dirty" if tracked files other than recorded results differ from it; "unknown" without
    git or outside of a repository.
    """

    def git(*arguments: str) -> str:
        root = Path(__file__).parents[1]
        return subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=root, check=True).stdout.strip()

    try:
        name = git("rev-parse", "--short=7", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)benchmarks/*/results*")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{name}-dirty" if changed else name


def hardware(threads: int | None = None) -> str:
    """The CUDA device if there is one, otherwise the CPU with torch's threads; with `threads`, the CPU with so many."""
    import torch

    if threads is None and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    threads = threads or torch.get_num_threads()
    return f"{platform.machine()} CPU, {threads} thread{'s' if threads > 1 else ''}"


def provenance(packages: Sequence[str], threads: int | None = None) -> dict[str, Any]:
    """What a record begins with. With `threads`, the hardware is the CPU, for work that never goes to a CUDA device."""
    return {
        "commit": commit(),
        "versions": {name: version(name) for name in packages},
        "hardware": hardware(threads),
    }
