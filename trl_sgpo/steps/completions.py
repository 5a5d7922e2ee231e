"""
From a completion to its text and its steps. A completion may hold thinking, tool calls and tool results. Here it is
decided what the policy wrote and what is judged.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from trl_sgpo.steps.segmenter import Segmenter, Span, check_spans, segment
from trl_sgpo.steps.thinking import restore_marks, start_of_answer, thinking_marks
from trl_sgpo.steps.tool_calls import ToolCall, place_calls, shown_call, visible


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
        calls (`tuple[ToolCall, ...]`):
            The tool calls. The policy wrote them in another form.
    """

    text: str
    by_policy: bool
    written: tuple[Span, ...] = field(default=(), repr=False, compare=False)
    calls: tuple[ToolCall, ...] = field(default=(), repr=False, compare=False)


def completion_turns(completion: str | list[dict], decoded: str | None = None) -> list[Turn]:
    """
    The turns of a completion as TRL hands it to reward functions: one per message, or a single one for a string.

    The text of a turn holds all that the policy wrote and that can be wrong. Chat parsers move thinking to a field of
    its own (`reasoning_content`, `reasoning` or `thinking`): it is put back before the content, between `<think>`
    tags. Tool calls follow the content, each on a line of its own. A message without a role counts as the policy's.

    Args:
        completion (`str` or `list[dict]`):
            A string (standard format), or the messages of the completion (conversational format; several with tools).
        decoded (`str`, *optional*):
            What the completion's own ids decode to, with the marks of thinking. A message does not tell whether its
            calls were written before its content, and its text may have lost marks that are special tokens: here they
            are found.

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
        text = restore_marks(completion, decoded)
        return [Turn(text, by_policy=True, written=((0, len(text)),))]
    if not isinstance(completion, list) or not all(isinstance(message, Mapping) for message in completion):
        raise TypeError(
            f"`completion` is {completion!r:.200} ({type(completion).__name__}), but a completion is a string or a "
            'list of messages, for example [{"role": "assistant", "content": "..."}]: pass one completion at a time, '
            "in the form in which TRL hands it to reward functions."
        )
    contents = [_content_text(message.get("content")) for message in completion]
    if len(completion) == 1:
        contents = [restore_marks(contents[0], decoded)]
    turns: list[Turn] = []
    position = 0  # where the turn begins in the decoded text
    for message, content, following in zip(completion, contents, [*contents[1:], None], strict=False):
        if message.get("role") not in ("assistant", None):
            turns.append(Turn(content, by_policy=False))
            at = decoded.find(content.strip(), position) if decoded is not None else -1
            position = at + len(content.strip()) if at >= 0 else position
            continue
        turn = _policy_turn(message, content)
        if decoded is not None:
            end = _end_of_turn(decoded, position, content, following)
            if turn.calls and (n_before := _calls_before_content(turn, decoded[position:end])):
                turn = _policy_turn(message, content, n_before)
            position = end
        turns.append(turn)
    return turns


def _policy_turn(message: Mapping[str, Any], content: str, n_calls_before: int = 0) -> Turn:
    """The text of a message, with so many of its calls before its content."""
    thoughts = (_content_text(message.get(name)) for name in ("reasoning_content", "reasoning", "thinking"))
    thinking = next((thought for thought in thoughts if thought.strip()), None)
    text, written = "", []
    if thinking:
        text = "<think>\n"
        written.append((len(text), len(text) + len(thinking)))
        text += f"{thinking}\n</think>\n\n"
    found = message.get("tool_calls") or []
    shown = [shown_call(call) for call in (found if isinstance(found, (list, tuple)) else [found])]
    calls = []
    for number in range(len(shown) + 1):
        if number == n_calls_before:
            written.append((len(text), len(text) + len(content)))
            text += content
            if content and not content.endswith("\n") and any(call for _, call, _ in shown[number:]):
                text += "\n"
        if number < len(shown):
            name, call, values = shown[number]
            calls.append(ToolCall((len(text), len(text) + len(call)), name, values))
            text += call + ("\n" if number + 1 < len(shown) or number < n_calls_before else "")
    return Turn(text, by_policy=True, written=tuple(written), calls=tuple(calls))


def _end_of_turn(decoded: str, position: int, content: str, following: str | None) -> int:
    """Where a turn ends in the decoded text: where the tool result after it begins, if that is found."""
    if following is None:
        return len(decoded)
    content, following = content.strip(), following.strip()
    own = decoded.find(content, position)
    written = own + len(content) if own >= 0 else position
    result = decoded.find(following, written) if following else -1
    return result if result >= 0 else written


def _calls_before_content(turn: Turn, decoded: str) -> int:
    """How many of a turn's calls the policy wrote before its content; `decoded` is what the turn's ids decode to."""
    start, content = start_of_answer(turn.text, decoded), None
    for span in turn.written:
        first, last = visible(turn.text, *span)
        at = decoded.find(turn.text[first:last], start) if first < last else -1
        if span != turn.written[-1]:  # thinking
            start = at + last - first if at >= 0 else start
        elif at >= 0:
            content = (at, at + last - first)
    places = place_calls(decoded, turn.calls, start, content) if content else []
    return sum(1 for place in places if place and content and place[0] < content[0])


def _content_text(content: Any) -> str:
    """Text of a message's content: a string, a list of parts, nothing, or any other thing in a data set."""
    if content is None:
        return ""
    if isinstance(content, (list, tuple)):
        return "".join(map(_content_text, content))
    if isinstance(content, Mapping):
        return _content_text(content.get("text")) if (content.get("type") or "text") == "text" else ""
    return str(content)


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


def judged_regions(text: str, *, include_thinking: bool = False) -> list[Span]:
    """
    The parts of a turn's text that are cut into steps, as `(start, end)` in characters. None holds white space alone.

    By default they are all that stands outside of thinking, so that a mark of thinking hides nothing that was written
    before it. If there is nothing else, for example because the completion ran out of tokens, it is the last thinking.
    The first opening mark may be missing, because chat templates put it into the prompt. Marks are all tags that speak
    of thinking (`<think>`, `</thinking>`, `<thought>`, `<seed:think>`, `<|START_THINKING|>`), `[THINK]`, `◁think▷`, the
    channels of gpt-oss and Gemma 4, also those of gpt-oss without their special tokens
    (`analysis...assistantfinal...`), and the sentences of Granite. `<reasoning>` is none: it is the part of the solution
    that is judged.

    Args:
        include_thinking (`bool`, *optional*, defaults to `False`):
            Whether thinking is judged too. The only region is then the whole text, with the tags.

    Example:

    ```python
    >>> judged_regions("<think>Hm.</think>It is 4."), judged_regions("<think>Hm."), judged_regions("4.<think>Hm.")
    ([(18, 26)], [(7, 10)], [(0, 2)])
    ```
    """
    outside: list[Span] = []
    thoughts: list[Span] = []
    opened, end = None, 0
    for mark in [] if include_thinking else thinking_marks(text):
        if opened is not None and not mark.closes:
            continue  # a mark inside the thinking opens nothing
        if opened is not None or (mark.closes and not thoughts and not outside):
            thoughts.append((opened or 0, mark.start))
        else:  # it opens, or closes what is closed already
            outside.append((end, mark.start))
        opened, end = None if mark.closes else mark.end, mark.end
    (outside if opened is None else thoughts).append((end if opened is None else opened, len(text)))
    outside, thoughts = ([span for span in spans if text[slice(*span)].strip()] for spans in (outside, thoughts))
    return outside or thoughts[-1:]


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

    def without(self, left_out: Collection[int]) -> "CutCompletion":
        """The same without the steps of these indices. Their text is part of no step then."""
        kept = [i for i in range(len(self.spans)) if i not in left_out]
        context = {new: self.context[old] for new, old in enumerate(kept) if old in self.context}
        return replace(self, spans=tuple([self.spans[i] for i in kept]), context=context)


def cut_completion(
    completion: str | list[dict],
    segmenter: Segmenter = segment,
    *,
    include_thinking: bool = False,
    decoded: str | None = None,
) -> CutCompletion:
    r"""
    Cuts the policy's text in a completion into steps. Each turn is cut alone. So no step crosses a tool result, and
    the segmenter's limits hold for each turn.

    Args:
        completion (`str` or `list[dict]`):
            Completion as TRL hands it to reward functions, see [`completion_turns`].
        segmenter (`Callable[[str], Sequence[tuple[int, int]]]`, *optional*, defaults to [`segment`]):
            Function from a text to the spans of its steps. It is called with each judged region of each turn.
        include_thinking (`bool`, *optional*, defaults to `False`):
            Whether thinking is cut too. See [`judged_regions`].
        decoded (`str`, *optional*):
            What the completion's own ids decode to. See [`completion_turns`].

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
    for turn in completion_turns(completion, decoded):
        if not turn.by_policy:
            pending.extend([turn.text] if turn.text.strip() else [])
            continue
        turns.append((offset, turn))
        if turn.text:
            for start, end in judged_regions(turn.text, include_thinking=include_thinking):
                region, blank = turn.text[start:end], False
                cut = check_spans(region, segmenter(region))
                if cut and pending:
                    context[len(spans)] = "\n\n".join(pending)
                    pending = []
                shift = offset + start
                spans.extend([(shift + left, shift + right) for left, right in cut] if shift else cut)
            texts.append(turn.text)
            offset += len(turn.text) + len("\n\n")
    return CutCompletion("\n\n".join(texts), tuple(spans), context, blank, tuple(turns))
