"""
Per-token credit: from a verdict's step, a span of characters, to the tokens of the completion, and from there to advantages.

A sequence-level reward pays every token of a wrong completion alike, those after the error too. The verdict says more: what
stands before the first wrong step is verified, that step is wrong, and nobody has judged what follows. Here the verified
tokens are rewarded, those of the wrong step blamed, and the rest is left alone (VPPO, arXiv 2601.18984, after a similar
thought). Differs from the paper of SGPO, which has no per-token credit. Nothing here knows about TRL.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class StepTokens(NamedTuple):
    """
    The tokens of a completion that a verdict speaks of, as half-open ranges of positions in the completion: the verified
    prefix is `[start, error)`, the first wrong step `[error, end)`.
    """

    start: int
    error: int
    end: int


def locate_steps(
    decode: Callable[[Sequence[int]], str],
    ids: Sequence[int],
    steps: Sequence[str],
    first_error: int,
    by_policy: Sequence[bool] | None = None,
) -> StepTokens | None:
    """
    Finds the verified prefix and the first wrong step among a completion's own tokens.

    The steps are looked for in the text that the ids decode to, since the text of a parsed message has lost characters (special
    tokens, the marks around thinking or a tool call). The last step comes first and each one before the next, for what is
    judged stands at the end: thinking in front of it may hold the same sentences. White space around a step is not looked
    for: that behind the wrong step is not part of it, and a token that holds the end of one step and the beginning of the
    next is the next one's. A character that is spread over several tokens, as in byte-level vocabularies, takes all of them along.

    Args:
        decode (`Callable`):
            Decodes a list of ids into text. Decoding a beginning of the ids gives a beginning of the text, save for a
            last character that is not complete yet.
        ids (`Sequence[int]` of length T):
            The completion's ids, without padding.
        steps (`Sequence[str]`):
            The texts of the steps, in order.
        first_error (`int`):
            0-based index of the first wrong one.
        by_policy (`Sequence[bool]` of length T, *optional*):
            Which tokens the policy wrote. Steps are looked for in these only; tool results in between are part of no step.

    Returns:
        [`StepTokens`] or `None`: `None` if the steps cannot be found in the decoded text.
    """
    runs = _runs(by_policy, len(ids))
    pieces = [list(ids[start:end]) for start, end in runs]
    texts = [decode(piece) for piece in pieces]
    places: dict[int, tuple[int, int, int]] = {}
    run, position = len(runs) - 1, len(texts[-1]) if texts else 0
    for index in range(len(steps) - 1, -1, -1):
        found = _find_before(steps[index], texts, run, position)
        if found is not None:  # what cannot be found cannot be paid; the others still can
            places[index] = found
            run, position = found[0], found[1]
    if first_error not in places:
        return None

    def token(run: int, position: int) -> int:
        return runs[run][0] + _token_at(decode, pieces[run], texts[run], position)

    first_run, first_begin, _ = places[min(places)]
    run, begin, end = places[first_error]
    error_token = token(run, begin)
    end_token = (
        token(run, end) if end < len(texts[run]) else runs[run][0] + _n_tokens_of(decode, pieces[run], texts[run])
    )
    return StepTokens(token(first_run, first_begin), error_token, max(end_token, error_token + 1))


def prefix_credit(
    tokens: Sequence[StepTokens | None], length: int, prefix_reward: float, error_penalty: float
) -> Tensor:
    """
    The advantages per token that the verdicts give: `prefix_reward` on the verified prefix, `-error_penalty` on the first
    wrong step, 0 behind it and where there is no verdict.

    Args:
        tokens (`Sequence[StepTokens | None]` of length N):
            What the verdicts speak of.
        length (`int`):
            Number of token positions T.
        prefix_reward, error_penalty (`float`):
            The two coefficients, both at least 0.

    Returns:
        `torch.Tensor` of shape `(N, T)`.

    Example:

    ```python
    >>> prefix_credit([StepTokens(0, 2, 3), None], length=5, prefix_reward=0.5, error_penalty=1.0)
    tensor([[ 0.5000,  0.5000, -1.0000,  0.0000,  0.0000],
            [ 0.0000,  0.0000,  0.0000,  0.0000,  0.0000]])
    ```
    """
    credit_NT = torch.zeros(len(tokens), length)
    for row_T, place in zip(credit_NT, tokens, strict=True):
        if place is not None:
            row_T[place.start : place.error] = prefix_reward
            row_T[place.error : place.end] = -error_penalty
    return credit_NT


def _find_before(step: str, texts: Sequence[str], run: int, position: int) -> tuple[int, int, int] | None:
    """
    Where a step stands for the last time before `position` of `texts[run]`: the text, and the step's first and last character
    in it. A step whose whole text is not there, since it holds a tool call as a reader sees it, is found by the lines that are.
    """
    content = step.strip()
    for i in range(run, -1, -1):
        begin = texts[i].rfind(content, 0, position if i == run else len(texts[i]))
        if begin >= 0:
            return i, begin, begin + len(content)
    lines = [line.strip() for line in content.splitlines() if line.strip()]
    for i in range(run, -1, -1):
        limit = position if i == run else len(texts[i])
        begin = texts[i].rfind(lines[0], 0, limit) if len(lines) > 1 else -1
        if begin >= 0:
            end = begin + len(lines[0])
            for line in lines[1:]:
                at = texts[i].find(line, end, limit)
                end = at + len(line) if at >= 0 else end
            return i, begin, end
    return None


def _runs(by_policy: Sequence[bool] | None, length: int) -> list[tuple[int, int]]:
    """The stretches of tokens that the policy wrote."""
    if by_policy is None:
        return [(0, length)]
    runs: list[tuple[int, int]] = []
    for i, mine in enumerate(by_policy):
        if mine and runs and runs[-1][1] == i:
            runs[-1] = (runs[-1][0], i + 1)
        elif mine:
            runs.append((i, i + 1))
    return runs


def _decoded_length(decode: Callable[[Sequence[int]], str], ids: Sequence[int], text: str) -> int:
    """How many characters of `text` these first ids give in full."""
    beginning = decode(ids)
    if not text.startswith(beginning):
        beginning = beginning.rstrip("\ufffd")  # a character whose last bytes are still to come
        while beginning and not text.startswith(beginning):
            beginning = beginning[:-1]
    return len(beginning)


def _token_at(decode: Callable[[Sequence[int]], str], ids: Sequence[int], text: str, position: int) -> int:
    """Position of the first token that takes part in the character at `position`."""
    low, high = 0, len(ids)  # the first `low` ids end at or before `position`
    while high - low > 1:
        middle = (low + high) // 2
        if _decoded_length(decode, ids[:middle], text) <= position:
            low = middle
        else:
            high = middle
    # Before it there may be tokens with the first bytes of the same character, which add no text of their own
    while low > 0 and _decoded_length(decode, ids[:low], text) == _decoded_length(decode, ids[: low - 1], text):
        low -= 1
    return low


def _n_tokens_of(decode: Callable[[Sequence[int]], str], ids: Sequence[int], text: str) -> int:
    """Number of ids up to the end of the text, without those behind it that decode to nothing (an end-of-text token)."""
    low, high = 0, len(ids)
    while low < high:
        middle = (low + high) // 2
        if _decoded_length(decode, ids[:middle], text) < len(text):
            low = middle + 1
        else:
            high = middle
    return low
