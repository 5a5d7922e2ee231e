"""The page: one HTML file with everything in it. It has no script and loads nothing."""

from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from trl_sgpo.analysis.report import tables
from trl_sgpo.analysis.report.diagnosis import LOSS_IS_ZERO
from trl_sgpo.analysis.report.glossary import GLOSSARY
from trl_sgpo.analysis.report.plots import Figure


def render(summary: Mapping[str, Any], figures: Mapping[str, Sequence[Figure]], title: str = "Training report") -> str:
    """The page of a summary, with the pictures that there are; `figures` may be empty."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    template = environment.from_string(resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8"))
    return template.render(
        title=title,
        runs=summary["runs"],
        labels=summary["labels"],
        version=summary["version"],
        findings=_findings(summary),
        sections=_sections(summary, figures),
        glossary=GLOSSARY,
    )


def _findings(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One card per run. Runs with the same reason for *unknown* share a card."""
    cards: list[dict[str, Any]] = []
    for run in summary["runs"]:
        finding = run["finding"]
        same = [card for card in cards if card["kind"] == "unknown" and card["headline"] == finding.headline]
        if finding.kind == "unknown" and not finding.evidence and same:
            same[0]["runs"].append(run["name"])
            same[0]["batches"] += _batches(run)
            continue
        cards.append(
            {
                "kind": finding.kind.replace(" ", "-"),
                "word": "mixed picture" if finding.kind == "mixed" else finding.kind,
                "runs": [run["name"]],
                "headline": finding.headline,
                "evidence": finding.evidence,
                "caveats": finding.caveats,
                "batches": _batches(run) if not run["sharpening"] else [],
            }
        )
    return cards


def _batches(run: Mapping[str, Any]) -> list[str]:
    """What the training batches of a run without probes say."""
    numbers, size = run["numbers"], run["group_size"]
    if "accuracy" not in numbers:
        return []
    shown = ["accuracy", *([f"pass@{size}"] if size and size > 1 and f"pass@{size}" in numbers else [])]
    said = ", ".join(
        f"{name} {tables.number(numbers[name]['start'].value)} → {tables.with_interval(numbers[name]['end'])}"
        for name in shown
    )
    return [f"{run['name']}: in its training batches {said}. This alone says nothing about the base's support."]


def _sections(summary: Mapping[str, Any], figures: Mapping[str, Sequence[Figure]]) -> list[dict[str, Any]]:
    def section(key: str, title: str, intro: str = "", tables: Sequence[Any] = (), **parts: Any) -> dict[str, Any]:
        empty: dict[str, Any] = {"figures": [], "parts": [], "lists": []}
        shown = [table for table in tables if table]
        return {"key": key, "title": title, "intro": intro, "tables": shown, **empty, **parts}

    diagnoses = [
        {
            "title": run["name"] if len(summary["runs"]) > 1 else "",
            "text": run["diagnosis"]["answer"],
            "items": run["diagnosis"]["advice"],
        }
        for run in summary["runs"]
    ]
    numbers = tables.comparison(summary)
    sections = [
        section("numbers", numbers.title if numbers else "", tables=[numbers]),
        section(
            "groups",
            "My loss is 0: is it broken?",
            LOSS_IS_ZERO,
            lists=diagnoses,
            figures=figures.get("groups", []),
            tables=[tables.group_shares(summary)],
        ),
        section("training", "Over the run", figures=figures.get("training", [])),
        section("judge", "The judge", figures=figures.get("judge", []), tables=[tables.judge_cost(summary)]),
    ]
    probed = [run for run in summary["runs"] if run["sharpening"]]
    parts = [
        {
            "title": run["name"],
            "open": run["label"] not in [other["label"] for other in probed[:i]],  # one run of each label
            "tables": tables.probe_numbers(run),
            "figures": figures.get(f"probe:{run['name']}", []),
        }
        for i, run in enumerate(probed)
    ]
    missing = [{"title": "", "text": "", "items": summary["missing"]}] if summary["missing"] else []
    sections += [
        section(
            "sharpening",
            "Sharpened or expanded?",
            "Base and policy on the same fixed prompts, sampled with the same settings. Shaded: 95 % intervals over "
            "prompts.",
            figures=figures.get("probes", []),
            parts=parts,
        ),
        section("missing", "What is missing, and why", lists=missing),
        section("runs", "What was read", tables=[tables.run_list(summary)]),
    ]
    return [s for s in sections if s["tables"] or s["figures"] or s["lists"] or s["parts"]]
