import itertools

import pytest
from conftest import first_long_word
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_sgpo import CallableJudge, JudgeItem, StepJudge, StepwiseJudge, Verdict
from trl_sgpo.judges.combinators import EarliestError, Fallback, MajorityVote


N_STEPS = 4
ABSTAIN = "abstain"
NO_ERROR = "no_error"


class Table(StepJudge):
    """Answers from a list by the number of the item: an index, `NO_ERROR` or `ABSTAIN`. Keeps what it was asked."""

    def __init__(self, answers, label="Table"):
        self.answers = answers
        self.label = label
        self.asked = []

    @property
    def name(self):
        return self.label

    def judge(self, items):
        numbers = [int(item.problem) for item in items]
        self.asked.append(numbers)
        return [self.verdict(self.answers[number]) for number in numbers]

    def verdict(self, answer):
        if answer == ABSTAIN:
            return Verdict.abstain(f"{self.label} cannot say")
        if answer == NO_ERROR:
            return Verdict.no_error(reason=self.label)
        return Verdict.error(answer, confidence=0.9, reason=self.label)


class Broken(StepJudge):
    """`how(items)` is what its `judge` does."""

    def __init__(self, how):
        self.how = how

    def judge(self, items):
        return self.how(items)


def items_of(n, known_wrong=None):
    steps = tuple("abcd")
    return [JudgeItem(str(i), steps, known_wrong=known_wrong[i] if known_wrong else True) for i in range(n)]


def short(verdicts):
    """Verdicts as a `Table` has them."""
    return [verdict.first_error if verdict.status == "error" else verdict.status for verdict in verdicts]


class Exits(tuple):
    def __iter__(self):
        raise SystemExit


def crash(items):
    raise RuntimeError("no GPU left")


BROKEN = {
    "raises": (crash, "RuntimeError: no GPU left"),
    "one short": (lambda items: [Verdict.error(0)] * (len(items) - 1), "the judge gave 2 verdicts for 3 items"),
    "one long": (lambda items: [Verdict.error(0)] * (len(items) + 1), "the judge gave 4 verdicts for 3 items"),
    "no list": (lambda items: None, "TypeError: 'NoneType' object is not iterable"),
    "no verdicts": (lambda items: [0] * len(items), "the judge returned int, not a Verdict"),
    "no step": (
        lambda items: [Verdict.error(9)] * len(items),
        "first_error=9 is not the 0-based index of one of 4 steps",
    ),
    "half a verdict": (lambda items: [Verdict("error")] * len(items), "first_error=None is of type NoneType"),
    "checked no step": (
        lambda items: [Verdict.error(1, checked=[0, 4])] * len(items),
        "checked: 4 is not the 0-based index of one of 4 steps",
    ),
    "checked no index": (
        lambda items: [Verdict.no_error(checked=[True])] * len(items),
        "checked: True is a bool, and the index of a step is an integer",
    ),
    "checked no list": (
        lambda items: [Verdict.error(1, checked="01")] * len(items),
        "checked is of type str, and not a list of indices of steps",
    ),
    "checked endless": (
        lambda items: [Verdict.error(1, checked=itertools.repeat(0))] * len(items),
        "checked is of type repeat, and not a list",
    ),
    "checked breaks": (
        lambda items: [Verdict.error(1, checked=Exits())] * len(items),
        "the judge returned a verdict that cannot be read (SystemExit)",
    ),
    "mixed up": (lambda items: [Verdict.error(0, 7)] * len(items), "the judge saw 7 steps where there are 4"),
}

# Rows: members; columns: items
tables = st.integers(1, 6).flatmap(
    lambda n: st.lists(
        st.lists(st.sampled_from([0, 1, 3, NO_ERROR, ABSTAIN]), min_size=n, max_size=n), min_size=1, max_size=6
    )
)


def naive_vote(answers, min_agreement):
    best, tied = None, False
    for candidate in [0, 1, 2, 3, NO_ERROR]:
        count = answers.count(candidate)
        if count == 0:
            continue
        if best is None or count > answers.count(best):
            best, tied = candidate, False
        elif count == answers.count(best):
            tied = True
    if best is None or tied or answers.count(best) / len(answers) < min_agreement:
        return ABSTAIN, None
    return best, answers.count(best) / len(answers)


def naive_earliest(answers):
    for index in range(N_STEPS):
        if index in answers:
            return index
    return NO_ERROR if NO_ERROR in answers else ABSTAIN


def naive_fallback(answers, known_wrong):
    """The answer, and how many members were asked."""
    first = ABSTAIN
    for asked, answer in enumerate(answers, 1):
        if answer in range(N_STEPS) or (answer == NO_ERROR and not known_wrong):
            return answer, asked
        if first == ABSTAIN:
            first = answer
    return first, len(answers)


class TestMajorityVote:
    @settings(deadline=None, max_examples=150)
    @given(tables, st.sampled_from([0, 0.25, 0.5, 0.6, 2 / 3, 1]))
    def test_equals_a_naive_vote(self, table, min_agreement):
        verdicts = MajorityVote([Table(row) for row in table], min_agreement).judge(items_of(len(table[0])))
        expected = [naive_vote([row[i] for row in table], min_agreement) for i in range(len(table[0]))]
        assert [(s, v.confidence) for s, v in zip(short(verdicts), verdicts, strict=True)] == expected

    def test_the_tally_is_the_reason(self):
        rows = [[2], [NO_ERROR], [2], [ABSTAIN], [2]]
        verdict = MajorityVote([Table(row) for row in rows]).judge(items_of(1))[0]
        assert verdict == Verdict.error(
            2, 4, 0.6, "first_error=2: 3 of 5, no_error: 1 of 5, abstain: 1 of 5 (Table cannot say)"
        )

    def test_why_it_abstains(self):
        def reason(*answers, min_agreement=0.5):
            verdict = MajorityVote([Table([x]) for x in answers], min_agreement).judge(items_of(1))[0]
            assert verdict.status == "abstain"
            return verdict.reason

        assert reason(1, 2) == "the vote is tied: first_error=1: 1 of 2, first_error=2: 1 of 2"
        assert reason(1, NO_ERROR) == "the vote is tied: first_error=1: 1 of 2, no_error: 1 of 2"
        assert reason(1, ABSTAIN, ABSTAIN).startswith(
            "the agreement is below min_agreement=0.5: first_error=1: 1 of 3"
        )
        assert reason(ABSTAIN, ABSTAIN) == "abstain: 2 of 2 (Table cannot say)"

    def test_the_floor_itself_is_enough(self):
        judges = [Table([1])] * 7 + [Table([2])] * 3
        assert short(MajorityVote(judges, min_agreement=0.7).judge(items_of(1))) == [1]
        assert short(MajorityVote(judges, min_agreement=0.71).judge(items_of(1))) == [ABSTAIN]

    def test_the_same_judge_several_times_is_asked_several_times(self):
        answers = iter([0, 1, 1, 1, None])
        vote = MajorityVote([CallableJudge(lambda problem, steps: next(answers))] * 5)
        assert vote.judge(items_of(1))[0].confidence == 0.6
        assert vote.name.startswith("MajorityVote(5 x ")

    def test_no_error_is_a_vote_whatever_is_known(self):
        for known_wrong in (True, False):
            vote = MajorityVote([Table([NO_ERROR]), Table([NO_ERROR]), Table([1])])
            assert short(vote.judge(items_of(1, [known_wrong]))) == [NO_ERROR]

    def test_bad_min_agreement(self):
        for bad in (-0.1, 1.5, 3, float("nan")):
            with pytest.raises(ValueError, match=r"must lie in \[0, 1\]: it is the share of all votes"):
                MajorityVote([Table([0])], min_agreement=bad)
        for bad in ("half", None, True):
            with pytest.raises(TypeError, match=f"min_agreement={bad!r} is not a number"):
                MajorityVote([Table([0])], min_agreement=bad)


def checks(*verdicts):
    """Judges that give one verdict each."""
    return [CallableJudge(lambda problem, steps, verdict=verdict: verdict) for verdict in verdicts]


class TestCheckedSteps:
    def test_a_step_is_checked_if_any_member_has_checked_it(self):
        members = checks(
            Verdict.error(3, checked=[0, 2]), Verdict.no_error(checked=[1]), Verdict.abstain("no equation")
        )
        (verdict,) = EarliestError(members).judge(items_of(1))
        assert (verdict.first_error, verdict.checked) == (3, (0, 1, 2))
        (verdict,) = EarliestError(checks(Verdict.no_error(checked=[1]), Verdict.no_error())).judge(items_of(1))
        assert (verdict.status, verdict.checked) == ("no_error", None)

    def test_a_vote_counts_those_that_agree_with_it(self):
        members = checks(Verdict.error(3, checked=[0]), Verdict.error(3, checked=[1]), Verdict.error(2, checked=[2]))
        assert MajorityVote(members).judge(items_of(1))[0].checked == (0, 1)

    def test_who_comes_first_decides(self):
        members = checks(Verdict.abstain("no equation"), Verdict.error(3, checked=[0]), Verdict.error(2))
        assert Fallback(members).judge(items_of(1))[0].checked == (0,)

    def test_what_was_checked_before_counts_if_the_next_one_finds_the_error(self):
        members = checks(Verdict.no_error(checked=[1, 2]), Verdict.error(3, checked=[0]))
        assert Fallback(members).judge(items_of(1))[0] == Verdict.error(3, 4, checked=[0, 1, 2])
        members = checks(Verdict.no_error(checked=[1]), Verdict.no_error())
        assert Fallback(members).judge(items_of(1))[0].checked is None


class TestEarliestError:
    @settings(deadline=None, max_examples=150)
    @given(tables)
    def test_equals_a_naive_minimum(self, table):
        n = len(table[0])
        verdicts = EarliestError([Table(row) for row in table]).judge(items_of(n))
        assert short(verdicts) == [naive_earliest([row[i] for row in table]) for i in range(n)]

    def test_the_verdict_is_that_of_the_member_who_found_it(self):
        judge = EarliestError([Table([3], "late"), Table([1], "early"), Table([1], "as early"), Table([NO_ERROR])])
        assert judge.judge(items_of(1)) == [Verdict.error(1, 4, 0.9, "early")]

    def test_why_it_abstains(self):
        judge = EarliestError([Table([ABSTAIN], "a"), Table([ABSTAIN], "b"), Table([ABSTAIN], "a")])
        assert judge.judge(items_of(1)) == [Verdict.abstain("all judges abstained: a cannot say; b cannot say")]


class TestFallback:
    @settings(deadline=None, max_examples=150)
    @given(tables, st.data())
    def test_equals_a_naive_chain(self, table, data):
        n = len(table[0])
        known_wrong = data.draw(st.lists(st.booleans(), min_size=n, max_size=n))
        members = [Table(row, f"judge {i}") for i, row in enumerate(table)]
        verdicts = Fallback(members).judge(items_of(n, known_wrong))
        expected = [naive_fallback([row[i] for row in table], known_wrong[i]) for i in range(n)]
        assert short(verdicts) == [answer for answer, _ in expected]
        # Each member is asked once at most, about what is still open, in order
        for depth, member in enumerate(members):
            still_open = [i for i in range(n) if expected[i][1] > depth]
            assert member.asked == ([still_open] if still_open else [])

    def test_the_first_no_error_stands_if_nobody_finds_the_error(self):
        members = [Table([ABSTAIN], "a"), Table([NO_ERROR], "b"), Table([ABSTAIN], "c"), Table([NO_ERROR], "d")]
        assert Fallback(members).judge(items_of(1, [True])) == [Verdict.no_error(4, reason="b")]
        assert [len(member.asked) for member in members] == [1, 1, 1, 1]

    def test_no_error_of_a_right_answer_ends_it(self):
        members = [Table([NO_ERROR], "a"), Table([1], "b")]
        assert Fallback(members).judge(items_of(1, [False])) == [Verdict.no_error(4, reason="a")]
        assert members[1].asked == []

    def test_why_it_abstains(self):
        judge = Fallback([Table([ABSTAIN], "a"), Table([ABSTAIN], "b")])
        assert judge.judge(items_of(1)) == [Verdict.abstain("all judges abstained: a cannot say; b cannot say")]


@pytest.mark.parametrize("combinator", [MajorityVote, EarliestError, Fallback])
class TestAll:
    @pytest.mark.parametrize("kind", BROKEN)
    def test_a_broken_member_abstains(self, combinator, kind):
        how, reason = BROKEN[kind]
        alone = combinator([Broken(how)]).judge(items_of(3))
        assert short(alone) == [ABSTAIN] * 3
        assert all(reason in verdict.reason for verdict in alone)
        # And the others decide
        for members in ([Broken(how), Table([2, 0, 1])], [Table([2, 0, 1]), Broken(how)]):
            assert short(combinator(members).judge(items_of(3))) == [2, 0, 1]

    def test_only_the_items_without_a_verdict_are_lost(self, combinator):
        halfway = Broken(lambda items: [Verdict.error(3), "what?", Verdict.no_error(7)])
        assert short(combinator([halfway]).judge(items_of(3))) == [3, ABSTAIN, ABSTAIN]

    def test_a_member_cannot_change_the_batch_of_the_others(self, combinator):
        def empty(items):
            n = len(items)
            items.clear()
            return [Verdict.abstain("hm")] * n

        assert short(combinator([Broken(empty), Table([2, 0, 1])]).judge(items_of(3))) == [2, 0, 1]

    def test_one_traceback_is_shown(self, combinator, caplog):
        judge = combinator([Broken(crash), Broken(crash)])
        for _ in range(2):
            judge.judge(items_of(3))
        assert caplog.text.count("Traceback") == 1
        assert f"a member of {combinator.__name__}(2 x Broken), raised an exception" in caplog.text

    def test_an_interrupt_is_no_verdict(self, combinator):
        def interrupt(items):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            combinator([Broken(interrupt)]).judge(items_of(1))

    def test_functions_and_combinators_are_members(self, combinator):
        judge = combinator([lambda problem, steps, level: level, combinator([Table([2])])])
        assert isinstance(judge.judges[0], CallableJudge)
        assert short(judge.judge([JudgeItem("0", tuple("abcd"), row={"level": 2})])) == [2]

    def test_in_the_reward_function(self, combinator):
        reward = StepwiseJudge(combinator([lambda problem, steps: 1]), transform="identity")
        assert reward(prompts=["What is 2 + 2?"], completions=["First add the numbers.\n\nThat gives 5."]) == [0.5]

    def test_name_and_cache_key(self, combinator):
        class Versioned(Table):
            cache_key = "prompt 2"

        judge = combinator([Table([], "a"), Versioned([], "b"), Versioned([], "b")])
        assert judge.name == f"{combinator.__name__}(a, 2 x b)"
        assert judge.cache_key.startswith(f"{combinator.__name__}(a, 2 x prompt 2)")

    def test_bad_arguments(self, combinator):
        name = combinator.__name__
        with pytest.raises(ValueError, match=rf"judges=\[\] is empty. `{name}` needs at least one judge"):
            combinator([])
        for bad in (Table([]), "abc", len, {1: 2}):
            with pytest.raises(TypeError, match=rf"is not a list. Give a list of judges, `{name}\(\[a, b\]\)`"):
                combinator(bad)
        with pytest.raises(
            TypeError, match=r"judges\[1\]=Table is a class, not a judge: give an instance, `Table\(\)`"
        ):
            combinator([Table([]), Table])
        with pytest.raises(TypeError, match=r"judges\[0\]=7 is neither a `StepJudge` nor a function"):
            combinator([7])
        with pytest.raises(TypeError, match=r"judges\[0\] is a `StepwiseJudge`, a reward function"):
            combinator([StepwiseJudge(first_long_word)])


def test_the_floor_is_part_of_the_cache_key():
    assert MajorityVote([Table([])], 0.5).cache_key != MajorityVote([Table([])], 0.6).cache_key
