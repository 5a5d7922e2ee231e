"""
What a run did: metrics as pure functions, a callback that compares the policy with its base, and the report of runs.
The public name is imported at its first use, so that the metrics are quick to import.
"""

from typing import TYPE_CHECKING, Any


__all__ = ["SharpeningCallback"]

if TYPE_CHECKING:
    from trl_sgpo.analysis.sharpening.callback import SharpeningCallback


def __getattr__(name: str) -> Any:
    if name == "SharpeningCallback":
        from trl_sgpo.analysis.sharpening.callback import SharpeningCallback

        return SharpeningCallback
    raise AttributeError(f"module 'trl_sgpo.analysis' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
