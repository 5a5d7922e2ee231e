"""
The token ids of a completion as a process reward model reads it, and the positions of its scores: [`PRMEncoder`]. A
tokenizer is enough here: no model is needed.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trl_sgpo.judges.base import JudgeItem
from trl_sgpo.judges.prm.spec import PRMSpec


_STEP_LABEL = re.compile(r"\s*step\s*\d+\s*[:.)]", re.IGNORECASE)


@dataclass(frozen=True)
class EncodedSteps:
    """One completion as the model reads it."""

    ids: list[int]  # up to the last score that fits into the model's context
    positions: list[int]  # indices in `ids` at which the scores are read; fewer than `n_steps` if not all steps fit
    starts: list[int]  # indices in `ids` at which these steps begin
    n_steps: int


class PRMEncoder:
    """
    The token ids of completions and the positions of their scores, in the layout of a [`PRMSpec`].

    The ids are joined piece by piece, and the positions are noted on the way. Nothing searches for the separator,
    because the policy may have written one itself. The text of the policy, of tools and of the data set is encoded as
    plain text: it cannot contain a special token or a token of the layout. A model that is trained on these ids is
    scored on the same ids. Raises a `ValueError` if the tokenizer does not go with the spec.
    """

    def __init__(self, tokenizer: Any, spec: PRMSpec, max_length: int | None = None) -> None:
        self.tokenizer = tokenizer
        self.spec = spec
        self.max_length = spec.max_length or max_length  # of tokens that the model reads; `None`: no limit
        # SentencePiece tokenizers put a space before every text. So a text that stands inside another one is encoded
        # after an anchor. A newline is one, because in their vocabularies it never merges with the text after it
        self._anchor = self._plain("\n")
        has_prefix_space = self._plain("\nx") != self._anchor + self._plain("x")
        self._needs_anchor = has_prefix_space and not spec.keep_prefix_space

        opening = middle = after_verdict = ""
        after_step = spec.separator
        if spec.template == "chat":
            marks = ["PRMPROBLEM", "PRMSTEPS"]
            rendered = self._render(list(zip(("user", "assistant"), marks, strict=True)))
            opening, middle, _ = _split(rendered, marks)  # text after the last score does not change it
        elif spec.template == "turns":
            opening, after_step, after_verdict = self._turns_layout()
        trusted = opening + middle + after_step + after_verdict
        added = tokenizer.added_tokens_decoder.items()
        self._control = {
            id: token.content
            for id, token in added
            # White space is always text, also if a vocabulary lists it as an added token
            if not token.content.isspace() and (token.special or token.content in trusted)
        }
        longest_first = sorted(self._control.values(), key=len, reverse=True)
        self._control_pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

        bos = tokenizer.bos_token_id if spec.template == "plain" and spec.add_bos else None
        self._opening_ids = ([] if bos is None else [bos]) + self._trusted(opening, first=True)
        self._middle_ids = self._trusted(middle)
        self._after_step_ids = self._trusted(after_step)
        self._after_verdict_ids = self._trusted(after_verdict)
        if spec.read_at == "verdict":
            self._after_verdict_ids = [single_token(tokenizer, spec.positive, "positive"), *self._after_verdict_ids]
        if spec.read_at != "step" and not self._after_step_ids:
            raise ValueError(
                f"the tokenizer makes no token of the separator {after_step!r}, so there is no token at which "
                "the score of a step can be read. Use the tokenizer that the model was trained with."
            )

    @property
    def layout_ids(self) -> list[int]:
        """The token ids that are the same for all completions."""
        return [*self._opening_ids, *self._middle_ids, *self._after_step_ids, *self._after_verdict_ids]

    def encode(self, items: Sequence[JudgeItem]) -> list[EncodedSteps | Exception]:
        """The items as the model reads them, in order. An item that cannot be encoded gives its exception."""
        texts: list[list[tuple[str, bool]] | Exception] = []
        for item in items:
            try:
                texts.append(self._texts(item))
            except Exception as error:
                texts.append(error)
        try:
            # One call for all, and each problem once for all completions of its group: calls take most of the time
            known = self._as_text({text for own in texts if not isinstance(own, Exception) for text in own})
        except Exception:
            known = {}
        results: list[EncodedSteps | Exception] = []
        for item, own in zip(items, texts, strict=True):
            try:
                if isinstance(own, Exception):
                    raise own
                results.append(self._assemble(item, own, known or self._as_text(set(own))))
            except Exception as error:
                results.append(error)
        return results

    def _texts(self, item: JudgeItem) -> list[tuple[str, bool]]:
        """The untrusted texts: the problem, then one per step. The flag says whether the text comes first."""
        spec = self.spec
        texts = [(str(item.problem), not self._opening_ids or spec.template == "plain")]
        for i, step in enumerate(item.steps):
            before = spec.before_next_steps if i else spec.before_first_step
            context = f"{item.context[i]}\n" if i in item.context else ""
            label = "" if _STEP_LABEL.match(step) else spec.step_label.format(number=i + 1)
            texts.append((before + context + label + step.strip(), False))
        return texts

    def _assemble(
        self, item: JudgeItem, texts: list[tuple[str, bool]], known: Mapping[tuple[str, bool], list[int]]
    ) -> EncodedSteps:
        ids = [*self._opening_ids, *known[texts[0]], *self._middle_ids]
        positions: list[int] = []
        starts: list[int] = []
        for text in texts[1:]:
            starts.append(len(ids))
            ids += known[text]
            if self.spec.read_at == "step":
                positions.append(len(ids) - 1)
                ids += self._after_step_ids
            else:
                ids += self._after_step_ids
                positions.append(len(ids) - 1)
            ids += self._after_verdict_ids
        limit = self.max_length if self.max_length is not None else len(ids)
        positions = [position for position in positions if position < limit]
        ids = ids[: positions[-1] + 1] if positions else []
        return EncodedSteps(ids, positions, starts[: len(positions)], len(item.steps))

    def _plain(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])

    def _trusted(self, text: str, first: bool = False) -> list[int]:
        """Ids of a text of the layout. Special tokens in it are special."""
        if not text:
            return []
        if not first and self._needs_anchor:
            ids = list(self.tokenizer("\n" + text, add_special_tokens=False)["input_ids"])
            if ids[: len(self._anchor)] == self._anchor:
                return ids[len(self._anchor) :]
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _as_text(self, texts: Iterable[tuple[str, bool]]) -> dict[tuple[str, bool], list[int]]:
        """Ids of untrusted texts, by the text and whether it comes first. No control token is in them."""
        keys = [key for key in texts if key[0]]
        given: dict[tuple[str, bool], list[int]] = {key: [] for key in texts}
        if not keys:
            return given
        # The tokenizer refuses text that is no valid Unicode, such as one half of a surrogate pair
        clean = [text.encode("utf-8", "replace").decode("utf-8") for text, _ in keys]
        anchored = [self._needs_anchor and not first for _, first in keys]
        encoded = self.tokenizer(
            ["\n" + text if anchor else text for text, anchor in zip(clean, anchored, strict=True)],
            add_special_tokens=False,
            split_special_tokens=True,
        )["input_ids"]
        for key, text, anchor, ids in zip(keys, clean, anchored, encoded, strict=True):
            own = list(ids)
            if anchor:
                own = own[len(self._anchor) :] if own[: len(self._anchor)] == self._anchor else self._plain(text)
            # `split_special_tokens` splits the tokens that the tokenizer calls special. Other added tokens stay whole
            given[key] = own if self._control.keys().isdisjoint(own) else self._cut_control_tokens(text)
        return given

    def _cut_control_tokens(self, text: str) -> list[int]:
        """
        Ids of a text in which every control token is cut in two, so that the model reads it letter by letter. The ids
        are final, so the text needs no additional spaces, as [`~trl_sgpo.judges.prompt.as_data`] must put into it.
        """
        ids: list[int] = []
        rest = [text]
        while rest:
            piece = rest.pop()
            own = self._plain(piece)
            if self._control.keys().isdisjoint(own):
                ids += own
                continue
            cuts = [match.start() + 1 for match in self._control_pattern.finditer(piece)]
            if not cuts or len(piece) == 1:  # the text does not contain it: a normalizer made it
                ids += [id for id in own if id not in self._control]
                continue
            ends = [*cuts, len(piece)]
            # A stack: the first piece must be on top
            rest += reversed([piece[a:b] for a, b in zip([0, *cuts], ends, strict=True) if a < b])
        return ids

    def _turns_layout(self) -> tuple[str, str, str]:
        """The texts that it puts before the first turn, between a step and its verdict, and after the verdict."""
        marks = ["PRMSTEPA", "PRMVERDICTA", "PRMSTEPB", "PRMVERDICTB", "PRMSTEPC", "PRMVERDICTC"]
        rendered = self._render([(("user", "assistant")[i % 2], mark) for i, mark in enumerate(marks)])
        opening, *between, _ = _split(rendered, marks)
        if between[0] != between[2] or between[1] != between[3] or not between[0]:
            raise ValueError(
                f"template='turns' needs a chat template that treats every turn alike. The tokenizer's template gives "
                f"{rendered!r}. Give the tokenizer the chat template that the model was trained with."
            )
        return opening, between[0], between[1]

    def _render(self, turns: list[tuple[str, str]]) -> str:
        messages = [{"role": role, "content": content} for role, content in turns]
        if self.spec.system is not None:
            messages = [{"role": "system", "content": self.spec.system}, *messages]
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False)
        except Exception as error:
            raise ValueError(
                f"template={self.spec.template!r} needs the tokenizer's chat template, but it failed: {error} Give a "
                "tokenizer with the chat template that the model was trained with, or a spec with template='plain'."
            ) from error


def _split(rendered: str, marks: list[str]) -> list[str]:
    parts, rest = [], rendered
    for mark in marks:
        before, found, rest = rest.partition(mark)
        if not found or mark in rest:
            raise ValueError(
                f"the tokenizer's chat template does not show every message once and in order: {rendered!r}. Give the "
                "tokenizer the chat template that the model was trained with, or a spec with template='plain'."
            )
        parts.append(before)
    return [*parts, rest]


def single_token(tokenizer: Any, text: str, argument: str) -> int:
    """The id of a text that must be one token, such as the verdict `+`."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        tokens = tokenizer.convert_ids_to_tokens(ids)
        raise ValueError(
            f"{argument}={text!r} is not one token of this tokenizer. It gives {tokens}. Give the token that the "
            "model was trained to write as its verdict, or the tokenizer that it was trained with."
        )
    return ids[0]
