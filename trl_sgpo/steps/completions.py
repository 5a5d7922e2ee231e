"""
From a completion to its text and its steps. A completion may hold thinking, tool calls and tool results. Here it is
decided what the policy wrote and what is judged.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trl_sgpo.steps.segmenter import Segmenter, Span, check_spans, segment


_THINK_TAG = re.compile(r"<(/?)think(?:ing)?>")


@dataclass(frozen=True)
class Turn:
    """
    One message of a completion as text: thinking, content and tool calls.

    Args:
        text (`str`):
            The text.
        by_policy (`bool`):
            Whether the policy wrote it. A tool result, for example, is not its work and is never judged.
        written (`tuple[tuple[int, int], ...]`):
            Spans of `text` that are word for word what the policy wrote: its thinking and its content. The tags around
            thinking do not belong to them, because they may come from the prompt.
        calls (`tuple[tuple[tuple[int, int], str], ...]`):
            Spans of the tool calls, each with the name of its function. The policy wrote the calls in another form.
    """

    text: str
    by_policy: bool
    written: tuple[Span, ...] = field(default=(), repr=False, compare=False)
    calls: tuple[tuple[Span, str], ...] = field(default=(), repr=False, compare=False)


def completion_turns(completion: str | list[dict]) -> list[Turn]:
    """
    The turns of a completion as TRL hands it to reward functions: one per message, or a single one for a string.

    The text of a turn holds all that the policy wrote and that can be wrong. Chat parsers move thinking to a field of
    its own (`reasoning_content`, `reasoning` or `thinking`): it is put back before the content, between `<think>`
    tags. Tool calls follow the content, each on a line of its own. A message without a role counts as the policy's.

    Args:
        completion (`str` or `list[dict]`):
            A string (standard format), or the messages of the completion (conversational format; several with tools).

    Raises:
        `TypeError`: If `completion` is neither a string nor a list of dicts.

    Example:

    ```python
    >>> call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
    >>> completion_turns([{"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "3"}])
    [Turn(text='add({"a": 1, "b": 2})', by_policy=True), Turn(text='3', by_policy=False)]
    ```
    """
    if isinstance(completion, str):
        return [Turn(completion, by_policy=True, written=((0, len(completion)),))]
    if not isinstance(completion, list) or not all(isinstance(message, Mapping) for message in completion):
        raise TypeError(
            f"`completion` is {completion!r:.200} ({type(completion).__name__}), but a completion is a string or a "
            'list of messages, for example [{"role": "assistant", "content": "..."}]: pass one completion at a time, '
            "in the form in which TRL hands it to reward functions."
        )
    turns = []
    for message in completion:
        by_policy = message.get("role") in ("assistant", None)
        content = _content_text(message.get("content"))
        turns.append(_policy_turn(message, content) if by_policy else Turn(content, by_policy=False))
    return turns


def _policy_turn(message: Mapping[str, Any], content: str) -> Turn:
    thoughts = (_content_text(message.get(name)) for name in ("reasoning_content", "reasoning", "thinking"))
    thinking = next((thought for thought in thoughts if thought.strip()), None)
    text, written = "", []
    if thinking:
        text = "<think>\n"
        written.append((len(text), len(text) + len(thinking)))
        text += f"{thinking}\n</think>\n\n"
    written.append((len(text), len(text) + len(content)))
    text += content
    found = message.get("tool_calls") or []
    named = [_call(call) for call in (found if isinstance(found, (list, tuple)) else [found])]
    if any(shown for _, shown in named) and content and not content.endswith("\n"):
        text += "\n"
    calls = []
    for number, (name, shown) in enumerate(named):
        text += "\n" if number else ""
        calls.append(((len(text), len(text) + len(shown)), name))
        text += shown
    return Turn(text, by_policy=True, written=tuple(written), calls=tuple(calls))


def _content_text(content: Any) -> str:
    """Text of a message's content: a string, a list of parts, nothing, or any other thing in a data set."""
    if content is None:
        return ""
    if isinstance(content, (list, tuple)):
        return "".join(map(_content_text, content))
    if isinstance(content, Mapping):
        return _content_text(content.get("text")) if (content.get("type") or "text") == "text" else ""
    return str(content)


def _call(call: Any) -> tuple[str, str]:
    """The name of a tool call's function, and the call as text."""
    if not isinstance(call, Mapping):
        return "", str(call)
    function = call["function"] if isinstance(call.get("function"), Mapping) else call
    name, arguments = str(function.get("name") or ""), function.get("arguments")
    if not isinstance(arguments, str):
        try:
            arguments = json.dumps({} if arguments is None else arguments, ensure_ascii=False, default=str)
        except (TypeError, ValueError):  # keys that JSON does not have, circular references
            arguments = str(arguments)
    return name, f"{name}({arguments})"


def completion_to_text(completion: str | list[dict]) -> str:
    r"""
    The text in a completion (see [`completion_turns`]) that the policy wrote: its turns, joined by a blank line,
    without tool results and empty turns.

    Example:

    ```python
    >>> completion_to_text([{"role": "assistant", "reasoning_content": "1 + 1 is 2.", "content": "2"}])
    '<think>\n1 + 1 is 2.\n</think>\n\n2'
    ```
    """
    return "\n\n".join(turn.text for turn in completion_turns(completion) if turn.by_policy and turn.text)


def judged_region(text: str, *, include_thinking: bool = False) -> Span:
    """
    The part of a turn's text that is cut into steps, as `(start, end)` in characters.

    By default it is the text after the last `</think>`. If there is none, for example because the completion ran out
    of tokens, it is the thinking itself. The opening `<think>` may be missing, because chat templates put it into the
    prompt. `<thinking>` is read the same way.

    Args:
        include_thinking (`bool`, *optional*, defaults to `False`):
            Whether thinking is judged too. The region is then the whole text, with the tags.

    Example:

    ```python
    >>> judged_region("<think>Hm.</think>It is 4."), judged_region("<think>Hm.")
    ((18, 26), (7, 10))
    ```
    """
    whole = (0, len(text))
    first = _THINK_TAG.search(text)
    if include_thinking or first is None:
        return whole
    thoughts: list[Span] = []
    opened, closed = None, 0
    for tag in _THINK_TAG.finditer(text):
        if tag[1]:
            thoughts.append((closed if opened is None else opened, tag.start()))
            opened, closed = None, tag.end()
        elif opened is None:  # a tag inside the thinking opens nothing
            opened = tag.end()
    answer = (closed if opened is None or thoughts else opened, len(text))
    # The text before the first tag comes last: it matters only if there is nothing else to judge.
    regions = [answer, *reversed(thoughts), (0, first.start())]
    return next((region for region in regions if text[slice(*region)].strip()), answer)


@dataclass(frozen=True)
class CutCompletion:
    """
    A completion and its steps.

    Args:
        text (`str`):
            The text that the policy wrote, as [`completion_to_text`] returns it.
        spans (`tuple[tuple[int, int], ...]`):
            Spans of the steps in `text`, in order. Empty if there is nothing to judge, or the segmenter found no step.
        context (`dict[int, str]`):
            By index of a step, the text before it that the policy did not write (tool results).
        blank (`bool`):
            Whether there is nothing to judge: the text is empty, or only white space and the tags of thinking.
        turns (`tuple[tuple[int, Turn], ...]`):
            The policy's turns, also the empty ones, each with the position in `text` where it begins.
    """

    text: str
    spans: tuple[Span, ...]
    context: dict[int, str]
    blank: bool
    turns: tuple[tuple[int, Turn], ...] = field(default=(), repr=False, compare=False)

    @property
    def steps(self) -> tuple[str, ...]:
        """Texts of the steps."""
        return tuple([self.text[start:end] for start, end in self.spans])


def cut_completion(
    completion: str | list[dict], segmenter: Segmenter = segment, *, include_thinking: bool = False
) -> CutCompletion:
    r"""
    Cuts the policy's text in a completion into steps. Each turn is cut alone. So no step crosses a tool result, and
    the segmenter's limits hold for each turn.

    Args:
        completion (`str` or `list[dict]`):
            Completion as TRL hands it to reward functions, see [`completion_turns`].
        segmenter (`Callable[[str], Sequence[tuple[int, int]]]`, *optional*, defaults to [`segment`]):
            Function from a text to the spans of its steps. It is called with the judged region of each turn.
        include_thinking (`bool`, *optional*, defaults to `False`):
            Whether thinking is cut too. See [`judged_region`].

    Raises:
        `TypeError`, `ValueError`: If the completion or the spans of the segmenter have the wrong form.

    Example:

    ```python
    >>> cut = cut_completion("<think>Hm.</think>3 * 4 = 12.\n\n12 + 1 = 14.")
    >>> cut.spans, cut.steps
    (((18, 31), (31, 43)), ('3 * 4 = 12.\n\n', '12 + 1 = 14.'))
    ```
    """
    texts: list[str] = []
    spans: list[Span] = []
    context: dict[int, str] = {}
    turns: list[tuple[int, Turn]] = []
    offset, pending, blank = 0, [], True
    for turn in completion_turns(completion):
        if not turn.by_policy:
            pending.extend([turn.text] if turn.text.strip() else [])
            continue
        turns.append((offset, turn))
        if turn.text:
            start, end = judged_region(turn.text, include_thinking=include_thinking)
            region = turn.text[start:end]
            cut = check_spans(region, segmenter(region)) if region.strip() else []
            blank = blank and not region.strip()
            if cut and pending:
                context[len(spans)] = "\n\n".join(pending)
                pending = []
            shift = offset + start
            spans.extend([(shift + left, shift + right) for left, right in cut] if shift else cut)
            texts.append(turn.text)
            offset += len(turn.text) + len("\n\n")
    return CutCompletion("\n\n".join(texts), tuple(spans), context, blank, tuple(turns))
