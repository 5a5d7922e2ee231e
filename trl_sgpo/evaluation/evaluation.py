"""From models and benchmarks to `results.json`."""

import hashlib
import json
import logging
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_sgpo.analysis.jsonable import jsonable, write_json
from trl_sgpo.evaluation.engines import (
    Decoding,
    Engine,
    Question,
    TransformersEngine,
    VLLMEngine,
    is_asked_in_chat,
    load_tokenizer,
)
from trl_sgpo.evaluation.results import answers_of, comparison, summary
from trl_sgpo.evaluation.samples import Samples
from trl_sgpo.evaluation.scoring import Score, check_math_verify, check_reward_function, reward, score
from trl_sgpo.evaluation.sets import (
    Benchmark,
    Problem,
    parse_benchmark,
    read_set,
    sample_problems,
    short_name,
    split_name,
)
from trl_sgpo.loading import as_mapping, load_object
from trl_sgpo.versions import installed_versions


if TYPE_CHECKING:
    from trl_sgpo.scripts.evaluate import EvaluateArguments


logger = logging.getLogger(__name__)

_BATCH_SIZES = {"transformers": 32, "vllm": 512, "server": 256}


def evaluate(args: "EvaluateArguments") -> dict[str, Any]:
    """
    Evaluates the models that the arguments name. Writes `results.json`, whose content it returns, and `samples.jsonl`. What
    cannot be read, or a folder with samples of other settings, raises a `ValueError` before any model is loaded.
    """
    function = load_object(args.reward_func, "reward_func") if args.reward_func else None
    if function is None:
        check_math_verify()
    else:
        check_reward_function(function)
    models = named_models(args.models)
    benchmarks = [parse_benchmark(written, args.n) for written in args.sets]
    problems, sources = _read_sets(benchmarks, args)
    engine_args = as_mapping(args.engine_args, "engine_args", '{"dtype": "float32"}')
    decoding = Decoding(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        template=args.template,
        system_prompt=args.system_prompt,
        chat=args.chat,
        chat_template_kwargs=as_mapping(
            args.chat_template_kwargs, "chat_template_kwargs", '{"enable_thinking": false}'
        ),
        seed=args.seed,
    )
    batch_size = args.batch_size or _BATCH_SIZES[args.engine]
    # Further arguments of the engine may hold keys, so that only their hash is kept
    extra = hashlib.sha256(json.dumps(engine_args, sort_keys=True, default=str).encode()).hexdigest()[:16]
    samples = Samples(
        Path(args.output),
        {
            **vars(decoding),
            "engine": args.engine,
            "engine_args": extra if engine_args else None,
            "reward_func": args.reward_func,
            "success_threshold": args.success_threshold if function else None,
        },
        {name: _identity(model) for name, model in models.items()},
        {name: source["hash"] for name, source in sources.items()},
    )

    def scored(problem: Problem, texts: Sequence[str], is_chat: bool) -> list[Score]:
        if function is None:
            return [one for one in score(texts, [problem.gold] * len(texts)) if one]
        if not is_chat:
            return reward(function, texts, decoding.plain(problem.text), problem.row, args.success_threshold)
        completions = [[{"role": "assistant", "content": text}] for text in texts]
        return reward(function, completions, decoding.messages(problem.text), problem.row, args.success_threshold)

    if function:  # what it cannot do is said before any model is loaded
        for model in models.values():
            by_server = args.engine == "server"
            is_chat = decoding.chat != "off" if by_server else is_asked_in_chat(load_tokenizer(model), decoding.chat)
            for benchmark in benchmarks:
                scored(problems[benchmark.name][0], [""], is_chat)
    urls = args.base_url or [""]
    missing: list[str] = []
    for i, (name, model) in enumerate(models.items()):
        open_benchmarks = [
            one
            for one in benchmarks
            if {p.index for p in problems[one.name]} - samples.of(name, one.name, one.kind).keys()
        ]
        if not open_benchmarks:
            continue
        engine = _engine(args, model, urls[i % len(urls)], decoding, batch_size, engine_args)
        for benchmark in open_benchmarks:
            missing += answer_all(
                engine, name, benchmark, problems[benchmark.name], samples, scored, decoding, batch_size
            )
        engine.close()
    if missing:
        raise ValueError(
            f"{'; '.join(missing)}. What was answered is kept in {samples.path}: run the same command again for the rest."
        )
    results = jsonable(
        {
            "benchmarks": {
                f"{benchmark.name} {benchmark.kind}": {
                    "set": benchmark.name,
                    "kind": benchmark.kind,
                    "models": _numbers(samples, list(models), benchmark, problems[benchmark.name], args),
                }
                for benchmark in benchmarks
            },
            "models": {
                name: Path(model).resolve().name if Path(model).exists() else model for name, model in models.items()
            },
            "sets": sources,
            "decoding": {**vars(decoding), "engine": args.engine},
            "scoring": args.reward_func or "math-verify",
            "settings": {"limit": args.limit, "resamples": args.resamples},
            "versions": installed_versions(
                "trl-sgpo", "trl", "transformers", "torch", "numpy", "math-verify", "vllm", "peft"
            ),
            "hardware": _hardware(),
        }
    )
    write_json(Path(args.output) / "results.json", results)
    return results


def named_models(written: Sequence[str]) -> dict[str, str]:
    """
    Models by their names, in order. Two models of the same name are a `ValueError`.

    Example:

    ```python
    >>> named_models(["base=Qwen/Qwen2.5-0.5B", "outputs/grpo"])
    {'base': 'Qwen/Qwen2.5-0.5B', 'grpo': 'outputs/grpo'}
    ```
    """
    models: dict[str, str] = {}
    for text in written:
        name, model = split_name(text)
        name = name or short_name(model)
        if name in models:
            raise ValueError(
                f"models: {models[name]!r} and {model!r} are both called {name!r}. Name them: first={models[name]} "
                f"second={model}"
            )
        models[name] = model
    return models


def answer_all(
    engine: Engine,
    model: str,
    benchmark: Benchmark,
    problems: Sequence[Problem],
    samples: Samples,
    scored: Callable[[Problem, Sequence[str], bool], list[Score]],
    decoding: Decoding,
    batch_size: int,
) -> list[str]:
    """
    Lets a model answer what it has not answered yet, batch by batch, and keeps the scored answers. Returns what is missing at
    the end, in words. An interrupt raises `SystemExit`, and the answers until then are kept.
    """
    from tqdm.auto import tqdm

    lines = samples.of(model, benchmark.name, benchmark.kind)
    size = max(1, batch_size // (benchmark.n or 1))
    failed, why = 0, ""
    done = sum(problem.index in lines for problem in problems)
    with tqdm(
        total=len(problems), initial=done, desc=f"{model}, {benchmark.name} {benchmark.kind}", unit="problem"
    ) as bar:
        try:
            # Blocks of the whole set, not of what is missing: a resumed run has the batches of an uninterrupted one
            for start in range(0, len(problems), size):
                block = [problem for problem in problems[start : start + size] if problem.index not in lines]
                if not block:
                    continue
                seeds = [decoding.seed_of(benchmark.name, benchmark.kind, problem.index) for problem in block]
                questions = [Question(problem.text, seed) for problem, seed in zip(block, seeds, strict=True)]
                answered = engine.answer(questions, benchmark.n)
                new = []
                for problem, own in zip(block, answered, strict=True):
                    if isinstance(own, str):
                        failed, why = failed + 1, own
                        continue
                    scores = scored(problem, [sample.text for sample in own], engine.is_chat)
                    new.append(
                        {
                            "model": model,
                            "set": benchmark.name,
                            "kind": benchmark.kind,
                            "index": problem.index,
                            "problem": problem.text,
                            "gold": problem.gold,
                            "texts": [sample.text for sample in own],
                            "correct": [one.correct for one in scores],
                            "found": [one.found for one in scores],
                            "tokens": [sample.tokens for sample in own],
                            "cut": [sample.cut for sample in own],
                        }
                    )
                samples.add(new)
                bar.update(len(new))
                right = [one for problem in problems for one in lines.get(problem.index, {}).get("correct", [])]
                if right:
                    bar.set_postfix_str(f"{100 * sum(right) / len(right):.1f} % right")
        except KeyboardInterrupt:
            raise SystemExit(
                f"Interrupted. All answers until here are kept in {samples.path}; run the same command again to continue."
            ) from None
    if not failed:
        return []
    return [f"{failed} of {len(problems)} problems of {benchmark.name} have no answer of {model}: {why.rstrip('.')}"]


def _read_sets(
    benchmarks: Sequence[Benchmark], args: "EvaluateArguments"
) -> tuple[dict[str, list[Problem]], dict[str, dict[str, Any]]]:
    """The problems to ask by the name of their set, and what is known of each set. All of it is checked here."""
    problems: dict[str, list[Problem]] = {}
    sources: dict[str, dict[str, Any]] = {}
    asked: dict[str, str] = {}
    seen = set()
    for benchmark in benchmarks:
        if (benchmark.name, benchmark.kind) in seen or asked.setdefault(
            benchmark.name, benchmark.source
        ) != benchmark.source:
            raise ValueError(
                f"sets: {benchmark.name!r} is there twice. Ask each set once in each way, and name sets whose names are the "
                f"same: other={benchmark.source}"
            )
        seen.add((benchmark.name, benchmark.kind))
        if benchmark.name in problems:
            continue
        everything, source = read_set(benchmark, args.split, needs_answer=not args.reward_func)
        drawn = sample_problems(everything, args.limit, args.seed)
        if args.reward_func:
            problems[benchmark.name] = drawn
            sources[benchmark.name] = {**source, "asked": len(drawn), "unparseable": 0}
            continue
        golds = [problem.gold for problem in drawn]
        usable = [problem for problem, own in zip(drawn, score(golds, golds), strict=True) if own is not None]
        if not usable:
            raise ValueError(
                f"sets: no answer of {benchmark.name!r} is one that math-verify can parse, such as {golds[0]!r}. Give a number, "
                "an expression or LaTeX in the column `answer`."
            )
        problems[benchmark.name] = usable
        sources[benchmark.name] = {**source, "asked": len(usable), "unparseable": len(drawn) - len(usable)}
    return problems, sources


def _numbers(
    samples: Samples,
    models: Sequence[str],
    benchmark: Benchmark,
    problems: Sequence[Problem],
    args: "EvaluateArguments",
) -> dict[str, Any]:
    """The numbers of each model on a benchmark, and of all but the first one against the first one."""
    how = (args.resamples, args.seed)
    answers = {}
    for model in models:
        lines = samples.of(model, benchmark.name, benchmark.kind)
        answers[model] = answers_of([lines[problem.index] for problem in problems])
    base = answers[models[0]]
    return {
        model: {**summary(own, *how), **({} if own is base else {"against_base": comparison(base, own, *how)})}
        for model, own in answers.items()
    }


def _engine(
    args: "EvaluateArguments",
    model: str,
    base_url: str,
    decoding: Decoding,
    batch_size: int,
    engine_args: Mapping[str, Any],
) -> Engine:
    if args.engine == "transformers":
        return TransformersEngine(model, decoding, batch_size, engine_args)
    if args.engine == "vllm":
        return VLLMEngine(model, decoding, engine_args)
    from trl_sgpo.evaluation.server import ServerEngine

    return ServerEngine(model, decoding, base_url, args.api_key_env, args.timeout, engine_args)


def _identity(model: str) -> dict[str, Any]:
    """What tells models apart: the name, and of a folder when its weights were written."""
    folder = Path(model)
    if not folder.exists():
        return {"model": model}
    files = [file for end in ("safetensors", "bin") for file in folder.glob(f"*.{end}")]
    newest = max((file.stat().st_mtime_ns for file in files), default=None)
    return {"model": str(folder.resolve()), "weights_written": newest}


def _hardware() -> str:
    import torch

    gpu = f", {torch.cuda.device_count()} x {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{platform.machine()}, {os.cpu_count()} CPUs{gpu}"
