r"""
Judges that read nothing. A judge that reads has to be better than they are.

    python -m trl_sgpo.scripts.judge_eval --judge benchmarks.judges.constant.about_a_third \
        --data Qwen/ProcessBench --output outputs/constant
"""


def first_step(problem: str, steps: list[str]) -> int:
    """RTS 0."""
    return 0


def about_a_third(problem: str, steps: list[str]) -> int:
    """The step whose RTS is closest to 0.3, about the median of the annotators' RTS."""
    return min(round(0.3 * len(steps)), len(steps) - 1)


def last_step(problem: str, steps: list[str]) -> int:
    """The largest RTS that a wrong solution can get: a lenient judge."""
    return len(steps) - 1


def no_error(problem: str, steps: list[str]) -> None:
    """Never finds an error."""
    return None
