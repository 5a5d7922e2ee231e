"""What each number of the report means and when it misleads: the one place, for the page and for docs/howto/read_a_report.md."""

from typing import NamedTuple


class Entry(NamedTuple):
    """A number: its name, what it means, and when it misleads."""

    name: str
    meaning: str
    misleads: str


GLOSSARY: dict[str, Entry] = {
    "accuracy": Entry(
        "accuracy",
        "Share of logged completions with an outcome that reaches the threshold: pass@1 of the policy during training.",
        "These are training prompts, and every batch has other prompts. It says nothing about held-out problems.",
    ),
    "groups": Entry(
        "solved, mixed, failed",
        "A group is the G completions of one prompt. Solved: all correct. Mixed: some correct. Failed: none correct. GRPO "
        "learns only from mixed groups, because only there rewards differ.",
        "Only logged batches are counted. With logging_steps above 1 most batches are not logged.",
    ),
    "rescued": Entry(
        "rescued",
        "Failed groups that teach, because a step-wise judge gave their completions different scores (with "
        "failed_groups='prefix': because it found right steps).",
        "It says that there is a gradient. Whether the gradient is useful depends on the judge.",
    ),
    "other_rewards": Entry(
        "failed, other rewards",
        "Failed groups in which another reward (format, length) differs. They teach that reward, and nothing about the answer.",
        "It keeps grad_norm above 0 even if no answer is ever right.",
    ),
    "tied": Entry(
        "tied",
        "Failed groups that were judged and got equal scores (with failed_groups='prefix': without any right step). They have "
        "no gradient.",
        "A few long steps tie more often than many short steps, so the share depends on the segmenter.",
    ),
    "abstained": Entry(
        "judge silent",
        "Failed groups in which the judge named a wrong step for fewer than half of the completions. For the others it "
        "abstained, or it found no error although the answer is wrong.",
        "A judge that cannot be reached looks like an unsure judge. The completions' column judge_reason tells.",
    ),
    "unjudged": Entry(
        "failed, not judged",
        "Failed groups that were not judged and teach nothing.",
        "In a run without a judge these are all failed groups: the share that SGPO could use.",
    ),
    "teaching": Entry(
        "groups that teach",
        "Groups in which some advantage is not zero.",
        "Group scaling gives advantages of full size even to a group with a tiny difference of rewards.",
    ),
    "effective_tokens": Entry(
        "effective tokens",
        "Share of the completions' tokens with an advantage, and so with a gradient. Counted by characters without --tokenizer.",
        "Per-token credit is not logged. With failed_groups='prefix' fewer tokens count.",
    ),
    "pass@k": Entry(
        "pass@k",
        "Probability that at least one of k samples is correct, without bias from n samples: 1 - C(n-c, k) / C(n, k).",
        "At large k guessing wins: see the chance level, Cover@tau and the process-verified pass@k. In training batches every "
        "point has other prompts.",
    ),
    "answer_entropy": Entry(
        "answer entropy, distinct answers",
        "Entropy (nats) and number of the distinct answers of a group. If they fall, the samples agree more.",
        "They also fall if the samples agree on a wrong answer. The answer is found by text matching: see --answer.",
    ),
    "entropy": Entry(
        "policy entropy",
        "Mean entropy of the next token under the policy, in nats (TRL's `entropy`).",
        "Sharpening may raise it if the base seldom solves and the solutions differ. A fall alone proves nothing.",
    ),
    "rts": Entry(
        "RTS",
        "Reasoning trajectory score: share of a completion before its first wrong step, without steps that the judge did not check, 0 to 1.",
        "It is as good as the judge. Many small right steps at the beginning raise it.",
    ),
    "rts_gap": Entry(
        "RTS gap",
        "RTS by steps minus RTS by characters. If it grows, the policy pads with small right steps.",
        "Its level depends on the task. Only its growth is an alarm.",
    ),
    "judge": Entry(
        "judge's cost",
        "Completions judged, seconds in the judge, and these seconds as a share of all step time.",
        "Totals are extrapolated from logged means, with one generation round per update. With num_iterations above 1 they are "
        "too high by that factor.",
    ),
    "loss": Entry(
        "loss and grad_norm",
        "With one update per batch (num_iterations=1) the ratio of new to old policy is 1, so the printed loss is minus the "
        "mean advantage. That is 0, because advantages sum to zero in a group, or wobbles around 0 if the loss is averaged "
        "over tokens and lengths differ. The gradient is not 0: look at grad_norm.",
        "A grad_norm above 0 may come only from other rewards or the KL term.",
    ),
    "cover": Entry(
        "Cover@tau",
        "Share of prompts with at least a share tau of correct samples.",
        "At small tau with few samples it equals pass@n.",
    ),
    "process": Entry(
        "process-verified pass@k",
        "pass@k that counts a sample only if every step is right as well.",
        "It is as good as the step checker.",
    ),
    "support": Entry(
        "support table",
        "Prompts solved by both (preserved), only by the policy (won), only by the base (lost), and by neither, in the drawn "
        "samples. Chance: how many would be won and lost if policy and base had the same pass@1 on every prompt.",
        '"Not solved" means not solved in n samples. The line below the table says how large the pass rate may still be. A policy '
        "with a higher pass@1 wins prompts without knowing anything new.",
    ),
    "base_rate": Entry(
        "the base's rate on won prompts",
        "Mean over the policy's samples of 1{correct} q(y|x) / pi(y|x). By importance sampling this is the base's pass@1 on "
        "prompts that it never solved in its own samples. Its inverse is the number of samples that the base would need.",
        "In practice a lower bound: it misses solutions that the base knows and the policy never writes.",
    ),
    "tilt_line": Entry(
        "tilt line",
        "The line between the logits of pass@1 under base and policy, over prompts. A pure reweighting of the base by the "
        "reward (a tilt) has slope 1 and intercept beta. Slope below 1: hard prompts gained more than that.",
        "It assumes normal logits over prompts. If that fails (some prompts impossible, others easy), its intervals are too "
        "narrow.",
    ),
    "tilt_fit": Entry(
        "tilt strength",
        "beta: by how many nats training raised correct samples over incorrect samples of the same prompt. The spread of that "
        "change inside each class is 0 for a pure tilt.",
        "It grows with the length of the samples. A large spread says that training changed much else.",
    ),
    "kl": Entry(
        "KL(policy, base)",
        "Mean of log pi(y|x) - log q(y|x) over samples of the policy, in nats per sample: how far the policy went.",
        "It does not say how good the policy is. Long samples have more of it.",
    ),
    "base_perplexity": Entry(
        "base perplexity of policy samples",
        "How surprising the policy's samples are to the base, per token. If it is lower than for the base's own samples, the "
        "policy writes what the base finds likely.",
        "Shorter and more repetitive samples are less surprising too.",
    ),
    "rank": Entry(
        "rank of correct samples",
        "Mean rank of correct samples among the samples of their prompt, by log-probability: 1 most likely, 0 least likely, 0.5 "
        "no bias.",
        "Log-probabilities are sums, so short samples rank high.",
    ),
    "saturation": Entry(
        "saturation",
        "Gain in pass@1 by the base's pass@1. A tilt gives a hump: nothing to gain at 0 (no support) and at 1 (saturated).",
        "Half of the base's samples choose the bucket of a prompt, the other half measure the gain. Few prompts per bucket give "
        "wide intervals.",
    ),
    "efficiency_gap": Entry(
        "sampling-efficiency gap",
        "pass@k of the base minus pass@1 of the policy: what the base finds in k samples and the policy does not yet find in one.",
        "It is no upper limit to training: the base's pass@k grows with k.",
    ),
    "seeds": Entry(
        "mean and range",
        "Runs with the same label are averaged. The numbers after a mean, and the shaded band, are the smallest and the largest "
        "run.",
        "Two or three seeds give a range, not an interval.",
    ),
    "interval": Entry(
        "value [low, high]",
        "95 % interval. Prompts (or groups) are resampled, never single samples.",
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
