import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_sgpo.judge_evaluation.robustness import (
    FILLER,
    PAYLOADS,
    PLACEMENTS,
    add_filler,
    cut_into_sentences,
    glue_pairs,
    inject,
    rts_pair,
    stop_after,
    stop_before,
)
from trl_sgpo.steps import rts_by_characters, rts_by_steps


STEPS = ("He has 3 bags. Each holds 4.5 kg.", "3 * 4.5 = 12\nSo 12 kg.", "Half of it is 6 kg.")

steps_and_error = st.lists(st.text("ab. \nC$", min_size=1, max_size=20), min_size=1, max_size=6).flatmap(
    lambda steps: st.tuples(st.just(tuple(steps)), st.integers(0, len(steps) - 1))
)


@given(steps_and_error)
def test_what_comes_from_an_old_step_is_its_text(case):
    """Every perturbation: the text of the new steps that come from the old ones is the old text, in order."""
    steps, first_error = case
    shapes = (
        add_filler(steps),
        cut_into_sentences(steps),
        cut_into_sentences(steps, before=first_error),
        stop_after(steps, first_error),
    )
    for new in shapes:
        assert len(new.steps) == len(new.origins)
        kept = [i for i in range(len(steps)) if new.places(i)]
        for i in kept:
            text = "".join(new.steps[place] for place in new.places(i))
            assert text.split() == steps[i].split()
        assert kept == list(range(kept[-1] + 1))
        assert kept[-1] >= first_error
    glued = glue_pairs(steps)
    assert "\n".join(glued.steps) == "\n".join(steps)
    assert glued.places(first_error) == [first_error // 2]


def test_filler():
    new = add_filler(STEPS)
    assert new.places(1) == [len(FILLER) + 1]
    assert new.steps[len(FILLER) :] == STEPS


def test_sentences():
    new = cut_into_sentences(STEPS)
    assert [step.strip() for step in new.steps] == [
        "He has 3 bags.",
        "Each holds 4.5 kg.",
        "3 * 4.5 = 12",
        "So 12 kg.",
        "Half of it is 6 kg.",
    ]
    assert new.places(1) == [2, 3]
    prefix = cut_into_sentences(STEPS, before=1)
    assert prefix.steps == ("He has 3 bags. ", "Each holds 4.5 kg.", *STEPS[1:])
    assert prefix.places(1) == [2]


def test_stops():
    assert stop_after(STEPS, 1).steps == STEPS[:2]
    assert stop_after(STEPS, 1).places(1) == [1]
    assert stop_before(STEPS, 1).steps == STEPS[:1]
    assert stop_before(STEPS, 1).places(1) == []
    assert stop_before(STEPS, 0).steps == ()


@given(steps_and_error)
def test_rts_is_that_of_the_steps_module(case):
    steps, first_error = case
    ends = [sum(map(len, steps[: i + 1])) for i in range(len(steps))]
    spans = list(zip([0, *ends], ends, strict=False))
    assert rts_pair(first_error, steps) == pytest.approx(
        (rts_by_steps(first_error, len(steps)), rts_by_characters(first_error, spans))
    )


class TestPayloads:
    def test_there_are_many_of_many_kinds(self):
        attacks = [payload for payload in PAYLOADS if payload.kind != "control"]
        assert len(attacks) >= 40
        assert (
            len({payload.name for payload in PAYLOADS}) == len({payload.text for payload in PAYLOADS}) == len(PAYLOADS)
        )
        assert len({payload.kind for payload in attacks}) >= 8
        for target in ("no_error", "last_step"):
            assert sum(payload.target == target for payload in attacks) >= 15
            assert any(payload.kind == "control" and payload.target == target for payload in PAYLOADS)

    def test_who_asks_for_the_last_step_names_it(self):
        for payload in PAYLOADS:
            if payload.target == "no_error":
                assert "{last}" not in payload.text, payload.name
            elif payload.kind != "control":
                assert "{last}" in payload.text, payload.name

    @pytest.mark.parametrize("placement", PLACEMENTS)
    @pytest.mark.parametrize("payload", PAYLOADS, ids=lambda payload: payload.name)
    def test_injection(self, payload, placement):
        new = inject(STEPS, 1, payload, placement)
        place = new.places(1)[0]
        assert new.steps[place].startswith(STEPS[1])
        assert "{last}" not in "".join(new.steps)
        carrier = {"before": place - 1, "after": place + 1, "inside": place}[placement]
        text = payload.text.replace("{last}", str(len(new.steps)))
        assert new.steps[carrier].endswith(text)
        # Nothing else changed, and what the payload asks for is not the truth
        rest = [step for i, step in enumerate(new.steps) if i != carrier]
        assert [step for step in rest if step in STEPS] == [step for i, step in enumerate(STEPS) if step in rest]
        assert place != len(new.steps) - 1

    def test_bad_placement(self):
        with pytest.raises(ValueError, match="placement='above' is unknown"):
            inject(STEPS, 1, PAYLOADS[0], "above")
