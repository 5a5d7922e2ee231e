"""What each number of the report means and when it misleads: the one place, for the page and for docs/report.md."""

from typing import NamedTuple


class Entry(NamedTuple):
    """A number: its name, what it means, and when it misleads."""

    name: str
    meaning: str
    misleads: str


GLOSSARY: dict[str, Entry] = {
    "accuracy": Entry(
        "accuracy",
        "Share of logged completions whose outcome reaches the threshold: pass@1 of the policy as it was trained.",
        "These are training prompts, and another batch each time. It says nothing about held-out problems.",
    ),
    "groups": Entry(
        "solved, mixed, failed",
        "A group is the G completions of one prompt. Solved: all correct. Mixed: some. Failed: none. GRPO learns from mixed "
        "groups alone, for only there do rewards differ.",
        "Only logged batches are counted: with logging_steps above 1 most batches are not.",
    ),
    "rescued": Entry(
        "rescued",
        "Failed groups that teach, since a step-wise judge scored their completions differently (with "
        "failed_groups='prefix': since it found right steps).",
        "Says that there is a gradient, not that it points the right way: that depends on the judge.",
    ),
    "other_rewards": Entry(
        "failed, other rewards",
        "Failed groups in which another reward (format, length) differs: they teach that reward and nothing about the answer.",
        "Keeps grad_norm alive while no answer is ever right.",
    ),
    "tied": Entry(
        "tied",
        "Failed groups that were judged, with equal scores (with failed_groups='prefix': without any right step): still no "
        "gradient.",
        "A few long steps tie more often than many short ones, so the share depends on how completions are cut.",
    ),
    "abstained": Entry(
        "judge silent",
        "Failed groups for fewer than half of whose completions the judge named a wrong step: it abstained, or found no error "
        "where the answer is known to be wrong.",
        "An unreachable judge looks the same as an unsure one; the column judge_reason of the completions tells.",
    ),
    "unjudged": Entry(
        "failed, not judged",
        "Failed groups that nobody judged and from which nothing is learnt.",
        "In a run without a judge these are all failed groups; it is the share that SGPO could work on.",
    ),
    "teaching": Entry(
        "groups that teach",
        "Groups in which some advantage is not zero.",
        "Group scaling gives a group with one odd reward in a million the same size of advantages as any other.",
    ),
    "effective_tokens": Entry(
        "effective tokens",
        "Share of the completions' tokens that carry an advantage, hence a gradient. By characters without --tokenizer.",
        "Per-token credit is not logged: with failed_groups='prefix' fewer tokens count.",
    ),
    "pass@k": Entry(
        "pass@k",
        "Probability that at least one of k samples is correct, without bias from n samples: 1 - C(n-c, k) / C(n, k).",
        "At large k guessing wins: see the chance level, Cover@tau and the process-verified pass@k. In training batches each "
        "point has other prompts.",
    ),
    "answer_entropy": Entry(
        "answer entropy, distinct answers",
        "Entropy (nats) and number of the distinct answers of a group. Falling: the samples agree more.",
        "Agreement on a wrong answer falls too. The answer is found by text matching: see --answer.",
    ),
    "entropy": Entry(
        "policy entropy",
        "Mean entropy of the next token under the policy, nats (TRL's `entropy`).",
        "Sharpening may raise it where the base seldom solves and solutions differ; a fall alone proves nothing.",
    ),
    "rts": Entry(
        "RTS",
        "Reasoning trajectory score: share of a completion before its first wrong step, 0 to 1.",
        "As good as the judge. Many small right steps in front raise it.",
    ),
    "rts_gap": Entry(
        "RTS gap",
        "RTS by steps minus RTS by characters. Growing: the policy pads with small right steps.",
        "Its level depends on the task; only its growth is an alarm.",
    ),
    "judge": Entry(
        "judge's cost",
        "Completions judged, seconds in the judge, and these seconds as a share of all step time.",
        "Totals are extrapolated from logged means, one generation round per update assumed: with num_iterations above 1 they "
        "are too high by that factor.",
    ),
    "loss": Entry(
        "loss and grad_norm",
        "With one update per batch (num_iterations=1) the ratio of new to old policy is 1, so the printed loss is minus the "
        "mean advantage: about 0 by construction, since advantages sum to zero in a group. The gradient does not: look at "
        "grad_norm.",
        "A grad_norm that is not zero may come from other rewards or the KL term alone.",
    ),
    "cover": Entry(
        "Cover@tau",
        "Share of prompts of whose samples at least a share tau is correct.",
        "At small tau with few samples it is pass@n.",
    ),
    "process": Entry(
        "process-verified pass@k",
        "pass@k that counts a sample only if every step is right as well.",
        "As good as the step checker.",
    ),
    "support": Entry(
        "support table",
        "Prompts solved by both (preserved), by the policy alone (won), by the base alone (lost), by neither, in the samples "
        "that were drawn; and how many chance would win and lose if policy and base had the same pass@1 on every prompt.",
        '"Not solved" means not in n samples: the line below the table says how large a pass rate that leaves open. A policy '
        "whose pass@1 rises wins prompts without knowing anything new.",
    ),
    "base_rate": Entry(
        "the base's rate on won prompts",
        "Mean over the policy's samples of 1{correct} q(y|x) / pi(y|x): the base's pass@1 on prompts that it never solved in its "
        "own samples, by importance sampling. Its inverse is how many samples the base would need.",
        "A lower bound in practice: solutions that the base knows and the policy never writes are not in it.",
    ),
    "tilt_line": Entry(
        "tilt line",
        "The line between the logits of pass@1 under base and policy, over prompts. A pure reweighting of the base by the "
        "reward (a tilt) has slope 1 and intercept beta. Slope below 1: hard prompts gained more than that.",
        "Assumes logits that are normal over prompts; its intervals are narrow where that fails (some prompts impossible, "
        "others easy).",
    ),
    "tilt_fit": Entry(
        "tilt strength",
        "beta: by how many nats training raised correct samples over incorrect ones of the same prompt; and the spread of that "
        "change inside each class, which a pure tilt leaves at 0.",
        "Grows with the length of the samples; a large spread says that training did much else.",
    ),
    "kl": Entry(
        "KL(policy, base)",
        "Mean of log pi(y|x) - log q(y|x) over samples of the policy, nats per sample: how far it went.",
        "Not how well. Long samples have more of it.",
    ),
    "base_perplexity": Entry(
        "base perplexity of policy samples",
        "How surprising the policy's samples are to the base, per token. Falling below that of the base's own samples: the "
        "policy moves inside what the base finds likely.",
        "Shorter and more repetitive samples are less surprising too.",
    ),
    "rank": Entry(
        "rank of correct samples",
        "Mean rank of correct samples among those of their prompt, by log-probability: 1 likeliest, 0 least, .5 no bias.",
        "Log-probabilities are sums, so short samples rank high.",
    ),
    "saturation": Entry(
        "saturation",
        "Gain in pass@1 by the base's pass@1. A tilt gives a hump: nothing to gain at 0 (no support) and at 1 (saturated).",
        "Half of the base's samples sort a prompt into its bucket, the other half tell the gain; few prompts per bucket, wide "
        "intervals.",
    ),
    "efficiency_gap": Entry(
        "sampling-efficiency gap",
        "pass@k of the base minus pass@1 of the policy: what the base finds within k samples and the policy not yet at once.",
        "Not an upper limit to training: the base's pass@k grows with k.",
    ),
    "seeds": Entry(
        "mean and range",
        "Runs with the same label are averaged; what stands behind a mean, and the shaded band, is the smallest and the largest "
        "run.",
        "Two or three seeds give a range, not an interval.",
    ),
    "interval": Entry(
        "value [low, high]",
        "95 % interval; prompts (or groups) are resampled, never single samples.",
        "It covers the choice of prompts, not the choice of the seed.",
    ),
}


def glossary_markdown() -> str:
    """The glossary as a markdown table."""
    lines = ["| number | what it means | when it misleads |", "|---|---|---|"]
    lines += [f"| {_cell(e.name)} | {_cell(e.meaning)} | {_cell(e.misleads)} |" for e in GLOSSARY.values()]
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
