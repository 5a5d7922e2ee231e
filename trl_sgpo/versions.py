"""Which releases of TRL this package stands on, and which releases are installed. Imports nothing of them."""

import platform
from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version


SUPPORTED_TRL = ("1.16", "2")  # from the first, below the second


def check_trl_version() -> None:
    """Raises `ValueError` if the installed TRL is not supported: which one is installed, which ones are supported."""
    installed, (lowest, below) = version("trl"), SUPPORTED_TRL
    if not Version(lowest) <= Version(installed) < Version(below):
        raise ValueError(
            f"TRL {installed} is installed, but trl-sgpo supports TRL from {lowest} up to, not including, {below}: it "
            f'stands on hooks that other versions lack. Run `pip install "trl>={lowest},<{below}"`.'
        )


def installed_versions(*names: str) -> dict[str, str]:
    """The versions of Python and of those packages that are installed: what a result came from."""
    versions = {"python": platform.python_version()}
    for name in names:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions
