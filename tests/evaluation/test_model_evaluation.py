"""Evaluations, whole: real models of one layer, a real server on loopback, real files."""

import json
from pathlib import Path

import pytest
import yaml
from server import Answer, started
from toys import byte_tokenizer, save_model, write_rows, writer

from trl_sgpo.evaluation import evaluation
from trl_sgpo.evaluation.engines import Decoding, Question, TransformersEngine
from trl_sgpo.evaluation.samples import Samples
from trl_sgpo.evaluation.tables import markdown, tables
from trl_sgpo.scripts.evaluate import EvaluateArguments, main, make_parser


ROOT = Path(__file__).parents[2]
pytest.importorskip("math_verify")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A set of six problems, half of which have the answer 6. It is in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    rows = [{"question": f"Problem {i} of six", "answer": f"So.\n#### {6 if i % 2 else 4}"} for i in range(6)]
    write_rows(tmp_path / "set.jsonl", rows)
    return tmp_path


@pytest.fixture
def models(folder):
    """A base that writes 6 a quarter of the time, else 9, and a checkpoint that writes it mostly."""
    tokenizer = byte_tokenizer()
    save_model(writer(tokenizer, {"6": 0.25, "9": 0.75}), tokenizer, folder / "base")
    save_model(writer(tokenizer, {"6": 0.9, "9": 0.1}), tokenizer, folder / "trained")
    return ["base", "better=trained"]


def arguments(models, **kwargs):
    settings = {"sets": ["set.jsonl", "set.jsonl@4"], "output": "out", "max_new_tokens": 16}
    settings |= {"batch_size": 8, "resamples": 100}
    return EvaluateArguments(models=models, **{**settings, **kwargs})


def lines(output="out"):
    return sorted(Path(output, "samples.jsonl").read_text().splitlines())


@pytest.mark.slow
class TestModels:
    def test_two_models_side_by_side(self, models, capsys):
        Path("README.md").write_text("# Model\n")
        main(
            [
                "--models",
                *models,
                "--sets",
                "set.jsonl",
                "set.jsonl@4",
                "--output",
                "out",
                "--max_new_tokens",
                "16",
                "--batch_size",
                "8",
                "--temperature",
                "1.0",
                "--top_p",
                "1.0",
                "--card",
                "README.md",
            ]
        )
        printed = capsys.readouterr().out
        assert "set, greedy pass@1, 6 problems" in printed
        results = json.loads(Path("out/results.json").read_text())
        greedy, sampled = (results["benchmarks"][f"set {kind}"]["models"] for kind in ("greedy", "avg@4"))
        assert greedy["base"]["accuracy"]["value"] == 0  # 9 is the likeliest answer
        assert greedy["better"]["accuracy"]["value"] == 0.5  # the problems with the answer 6
        assert greedy["better"]["against_base"]["difference"]["value"] == 0.5
        assert greedy["better"]["against_base"]["p"] == 0.25  # 2 of the 8 ways to flip three signs
        assert greedy["base"]["tokens"] == len(r"\boxed{6}") + 1
        assert greedy["base"]["cut"] == greedy["base"]["no_answer"] == 0
        values = [json.loads(line) for line in lines()]
        right = [
            line for line in values if line["model"] == "better" and line["kind"] == "avg@4" and line["index"] % 2
        ]
        assert {tuple(text == r"\boxed{6}" for text in line["texts"]) == tuple(line["correct"]) for line in right} == {
            True
        }
        assert sampled["better"]["accuracy"]["value"] > sampled["base"]["accuracy"]["value"]
        assert sampled["base"]["pass_at_k"]["4"]["value"] >= sampled["base"]["accuracy"]["value"]
        assert results["versions"]["math-verify"]
        assert str(Path.cwd()) not in Path("out/results.json").read_text()
        card = Path("README.md").read_text()
        assert "## Evaluation" in card
        assert "| set greedy (6 problems) | 0.0 | 50.0 [" in card

    def test_a_run_that_was_cut_off_goes_on_as_if_it_had_not_been(self, models, monkeypatch):
        whole = evaluation.evaluate(arguments(models, output="whole"))
        answer, calls = TransformersEngine.answer, []

        def stops(self, questions, n):
            calls.append(n)
            if len(calls) == 4:
                raise KeyboardInterrupt
            return answer(self, questions, n)

        with monkeypatch.context() as patch:
            patch.setattr(TransformersEngine, "answer", stops)
            with pytest.raises(SystemExit, match="run the same command again"):
                evaluation.evaluate(arguments(models))
        kept = lines()
        assert 0 < len(kept) < len(lines("whole"))
        with open("out/samples.jsonl", "a") as file:
            file.write('{"model": "bett')  # as a process leaves it that is killed while it writes
        results = evaluation.evaluate(arguments(models))
        assert lines() == lines("whole")
        assert set(kept) < set(lines())
        assert results == whole

        def never(*args, **kwargs):
            raise AssertionError("a model was loaded")

        monkeypatch.setattr(TransformersEngine, "__init__", never)
        assert evaluation.evaluate(arguments(models)) == whole
        with pytest.raises(ValueError, match=r"There and here: temperature=0.6 and 1.0; top_p=0.95 and 1.0\. Give"):
            evaluation.evaluate(arguments(models, temperature=1.0, top_p=1.0))
        Path("set.jsonl").write_text('{"problem": "a", "answer": "1"}\n')
        with pytest.raises(ValueError, match="sets set="):
            evaluation.evaluate(arguments(models))

    def test_an_adapter_with_or_without_a_tokenizer(self, models):
        peft = pytest.importorskip("peft")
        from transformers import AutoModelForCausalLM

        base = AutoModelForCausalLM.from_pretrained("base")
        tuned = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["lm_head"]))
        tuned.save_pretrained("adapter")
        decoding = Decoding(16, 0.6, 0.95, "{problem}", None, "auto")
        engine = TransformersEngine("adapter", decoding, 8, {})
        [[sample]] = engine.answer([Question("1 + 1?", 0)], 0)
        assert (sample.text, sample.cut) == (r"\boxed{9}", False)
        assert any("lora" in name for name, _ in engine.model.named_parameters())


class TestServer:
    @pytest.fixture(autouse=True)
    def client(self):
        pytest.importorskip("aiohttp")

    def args(self, url, **kwargs):
        return arguments(["base=m1", "m2"], engine="server", base_url=[url], **kwargs)

    @staticmethod
    def reply(request):
        """The second model solves what has the answer 6. One problem is cut off."""
        number = request.number
        text = r"\boxed{6}" if request.body["model"] == "m2" else r"\boxed{9}"
        return Answer(text, finish_reason="length" if number == 3 else "stop")

    def test_what_is_asked_and_measured(self, folder):
        with started() as start:
            server = start(self.reply)
            results = evaluation.evaluate(
                self.args(server.url, system_prompt="Think.", engine_args='{"min_p": 0.1}', limit=5)
            )
            asked = [request.body for request in server.requests]
        greedy = results["benchmarks"]["set greedy"]["models"]
        of_six = [json.loads(line)["index"] % 2 for line in lines() if '"m2"' in line and '"greedy"' in line]
        assert greedy["m2"]["accuracy"]["value"] == pytest.approx(sum(of_six) / 5)
        assert greedy["base"]["accuracy"]["value"] == 0
        assert greedy["base"]["tokens"] == 7  # as the server counts them
        assert len(asked) == 2 * (5 + 5 * 4)
        assert {body["model"] for body in asked} == {"m1", "m2"}
        assert [message["role"] for message in asked[0]["messages"]] == ["system", "user"]
        assert asked[0]["messages"][1]["content"].endswith("final answer within \\boxed{}.")
        sampled = [body for body in asked if body["temperature"]]
        assert {(body["temperature"], body["top_p"], body["max_tokens"], body["min_p"]) for body in sampled} == {
            (0.6, 0.95, 16, 0.1)
        }
        assert len({(body["model"], body["seed"]) for body in sampled}) == len(sampled) == 40

    def test_without_chat(self, folder):
        def reply(request):
            assert request.path == "/v1/completions"
            assert request.body["prompt"].startswith("Problem ")
            return Answer(body={"choices": [{"text": r"\boxed{6}", "finish_reason": "stop"}]})

        with started() as start:
            results = evaluation.evaluate(self.args(start(reply).url, chat="off", sets=["set.jsonl"]))
        numbers = results["benchmarks"]["set greedy"]["models"]["m2"]
        assert (numbers["accuracy"]["value"], numbers["tokens"]) == (0.5, None)

    def test_what_a_server_does_not_answer_is_asked_again(self, folder, caplog):
        down = True

        def reply(request):
            return 403 if down and request.number == 2 else self.reply(request)

        with started() as start:
            args = self.args(start(reply).url, sets=["set.jsonl"])
            with pytest.raises(
                ValueError, match=r"1 of 6 problems of set have no answer of base: HTTP 403.*run the same"
            ):
                evaluation.evaluate(args)
            assert len(lines()) == 10
            assert not [record for record in caplog.records if "judge" in record.getMessage().lower()]
            down = False
            evaluation.evaluate(args)
        assert len(lines()) == 12


def test_a_folder_without_samples_takes_other_settings(tmp_path):
    """A model that did not fit into the memory, say, has left no sample."""

    def opened(temperature, sets):
        return Samples(tmp_path, {"temperature": temperature}, {"m": "m"}, sets)

    opened(0.6, {"a": "1"})
    samples = opened(1.0, {"a": "2"})
    samples.add([{"model": "m", "set": "a", "kind": "greedy", "index": 3}])
    assert opened(1.0, {"b": "7"}).of("m", "a", "greedy").keys() == {3}
    with pytest.raises(ValueError, match=r"temperature=1.0 and 0.6; sets a=\"2\" and \"1\"\. Give another --output"):
        opened(0.6, {"a": "1"})
    (tmp_path / "settings.json").unlink()
    with pytest.raises(ValueError, match=r"has no settings.json beside it"):
        opened(1.0, {})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"n": -1}, "n=-1 must be at least 0"),
        ({"temperature": 0.0}, "temperature=0.0 must be positive. For greedy answers"),
        ({"top_p": 1.5}, r"top_p=1.5 must lie in \(0, 1\]"),
        ({"template": "Solve it."}, "has no {problem}"),
        ({"base_url": ["a", "b", "c"]}, "base_url has 3 addresses for 2 models"),
    ],
)
def test_arguments_that_cannot_be(changed, message):
    with pytest.raises(ValueError, match=message):
        EvaluateArguments(["a", "b"], ["gsm8k"], "out", **changed)


@pytest.mark.parametrize(
    ("models", "sets", "message"),
    [
        (["a/x", "b/x"], ["set.jsonl"], "are both called 'x'. Name them: first=a/x second=b/x"),
        (["x"], ["set.jsonl@2", "set.jsonl@2"], "'set' is there twice"),
        (["x"], ["words.jsonl"], "no answer of 'words' is one that math-verify can parse"),
    ],
)
def test_what_is_refused_before_a_model_is_loaded(folder, models, sets, message):
    write_rows(folder / "words.jsonl", [{"problem": "p", "answer": "\\boxed{}"}])
    with pytest.raises(ValueError, match=message):
        evaluation.evaluate(arguments(models, sets=sets))


def test_the_recipe_of_the_paper():
    path = ROOT / "recipes" / "evaluate" / "paper.yaml"
    (args,) = make_parser().parse_args_and_config(["--config", str(path), "--models", "base=a", "sgpo=b"])
    benchmarks = [evaluation.parse_benchmark(written, args.n) for written in args.sets]
    assert len(benchmarks) == 9
    assert {one.n for one in benchmarks} == {0, 16}
    assert (args.temperature, args.top_p, args.max_new_tokens, args.models) == (0.6, 0.95, 8192, ["base=a", "sgpo=b"])
    assert yaml.safe_load(path.read_text())["engine"] == args.engine == "vllm"


def boxes_six(prompts, completions, answer, **kwargs):
    """Right if the model writes 6 and the row's answer ends in 6: the columns of the set come as in training."""
    assert all(prompt[-1]["content"].startswith("Problem ") for prompt in prompts)
    texts = [completion[0]["content"] for completion in completions]
    return [float("{6}" in text and own.endswith("6")) for text, own in zip(texts, answer, strict=True)]


def plain_six(prompts, completions, **kwargs):
    """For a model that was trained without a chat template."""
    assert all(prompt.startswith("Problem ") for prompt in prompts)
    return [float(text.endswith("{6}")) for text in completions]


def of_another_task(completions, expected, **kwargs):
    return [0.0] * len(completions)


def one_for_all(completions, **kwargs):
    return [1.0] * 3


class TestRewardFunction:
    @pytest.mark.slow
    def test_it_takes_the_place_of_math_verify(self, models, monkeypatch):
        given = arguments(models, reward_func="test_model_evaluation.boxes_six", temperature=1.0, top_p=1.0)
        with monkeypatch.context() as patch:
            patch.setattr(evaluation, "check_math_verify", None)
            results = evaluation.evaluate(given)
        greedy = results["benchmarks"]["set greedy"]["models"]
        assert greedy["base"]["accuracy"]["value"] == 0
        assert greedy["better"]["accuracy"]["value"] == 0.5
        assert greedy["better"]["no_answer"] is None
        [_, header, cells, _] = tables(results)[1]
        assert [row[header.index("no answer %")] for row in cells] == ["-", "-"]
        assert "compared by test_model_evaluation.boxes_six" in markdown(results)
        assert evaluation.evaluate(given) == results
        with pytest.raises(ValueError, match=r"There and here: reward_func=.*boxes_six. and null"):
            evaluation.evaluate(arguments(models, temperature=1.0, top_p=1.0))

    @pytest.mark.slow
    def test_a_model_without_a_chat_template_gets_texts(self, folder):
        tokenizer = byte_tokenizer(chat_template=None)
        save_model(writer(tokenizer, {"6": 0.9, "9": 0.1}), tokenizer, folder / "plain")
        results = evaluation.evaluate(arguments(["plain"], reward_func="test_model_evaluation.plain_six"))
        assert results["benchmarks"]["set greedy"]["models"]["plain"]["accuracy"]["value"] == 1

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            (
                "of_another_task",
                "of_another_task failed: TypeError: .*'expected'.* and the columns .'answer', 'question'.",
            ),
            (
                "one_for_all",
                r"one_for_all gave \[1.0, 1.0, 1.0\] for 1 completions. It has to give a list with one number",
            ),
            ("Path", "is no reward function. Give the dotted path of a function"),
            ("nowhere", "reward_func='test_model_evaluation.nowhere' could not be imported"),
        ],
    )
    def test_what_it_cannot_do_is_said_before_a_model_is_loaded(self, folder, name, message):
        byte_tokenizer().save_pretrained(folder / "only_a_tokenizer")
        with pytest.raises(ValueError, match=message):
            evaluation.evaluate(arguments(["only_a_tokenizer"], reward_func=f"test_model_evaluation.{name}"))
        assert not Path("out/samples.jsonl").exists()
