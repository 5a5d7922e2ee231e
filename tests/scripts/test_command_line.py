"""What the training scripts read from a command line and a YAML file, beyond TRL's parser."""

import shlex
from importlib import resources
from types import SimpleNamespace

import pytest
import yaml

from trl_sgpo import StepwiseJudge
from trl_sgpo.command_line import find_checkpoint, parse
from trl_sgpo.scripts import judge_train, sgpo


SCRIPTS = {"trl_sgpo.scripts.sgpo": sgpo, "trl_sgpo.scripts.judge_train": judge_train}
CPU = ["--use_cpu", "true", "--bf16", "false", "--report_to", "none", "--output_dir", "out"]
ZERO2 = str(resources.files("trl.accelerate_configs").joinpath("zero2.yaml"))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def refused():
    """What the error for a command line says, and the words of the command in it."""

    def refused(*words, module="trl_sgpo.scripts.sgpo"):
        data = ["--data", "rows.jsonl"] if module.endswith("judge_train") else []
        with pytest.raises(ValueError, match="accelerate launch") as error:
            parse(SCRIPTS[module].make_parser(), module, [*words, *data, *CPU])
        before, command = str(error.value).strip().split("\n\n    ")
        start, _, script = command.partition(f" -m {module} ")
        assert script.endswith(shlex.join([*data, *CPU]))
        return before, shlex.split(start), shlex.split(script)[: -len([*data, *CPU])]

    return refused


@pytest.mark.parametrize("module", SCRIPTS)
class TestOptionsOfTheTrlCommand:
    def test_on_the_command_line(self, refused, module):
        before, launch, script = refused(
            "--max_steps", "4", "--num_processes", "4", "--learning_rate", "4", module=module
        )
        assert before.startswith("num_processes: this is for `accelerate launch`, which starts the processes")
        assert before.endswith("Use:")
        assert launch == ["accelerate", "launch", "--num_processes", "4"]
        assert script == ["--max_steps", "4", "--learning_rate", "4"]

    def test_in_the_yaml_file(self, folder, refused, module):
        given = {"accelerate_config": "zero2", "num_processes": 2, "multi_gpu": True, "tpu": False, "max_steps": 4}
        (folder / "a run.yaml").write_text(yaml.safe_dump(given, sort_keys=False))
        before, launch, script = refused("--config", "a run.yaml", module=module)
        assert before.endswith("Take accelerate_config, num_processes, multi_gpu out of a run.yaml, and use:")
        assert launch == ["accelerate", "launch", "--config_file", ZERO2, "--num_processes", "2", "--multi_gpu"]
        assert script == ["--config", "a run.yaml"]

    def test_the_command_line_goes_before_the_file(self, folder, refused, module):
        (folder / "run.yaml").write_text("num_processes: 2")
        _, launch, _ = refused("--config", "run.yaml", "--num_processes=8", module=module)
        assert launch == ["accelerate", "launch", "--num_processes", "8"]


@pytest.mark.parametrize(
    ("words", "launch"),
    [
        (["--accelerate_config", "zero2"], ["--config_file", ZERO2]),
        (["--accelerate_config=zero2"], ["--config_file", ZERO2]),
        (["--accelerate_config", "mine.yaml"], ["--config_file", "mine.yaml"]),
        (["--config_file", "mine.yaml"], ["--config_file", "mine.yaml"]),
        (["--num-processes", "4"], ["--num-processes", "4"]),
        (["--num_machines", "2", "--machine_rank=1"], ["--num_machines", "2", "--machine_rank", "1"]),
        (["--main_process_port", "29501"], ["--main_process_port", "29501"]),
        (["--multi_gpu", "--gpu_ids", "0,1"], ["--multi_gpu", "--gpu_ids", "0,1"]),
        (["--use_deepspeed", "--zero_stage", "3"], ["--use_deepspeed", "--zero_stage", "3"]),
    ],
)
def test_every_option_that_starts_processes(folder, refused, words, launch):
    (folder / "mine.yaml").write_text("num_processes: 2")
    # Options of the same name that are the script's stay the script's
    _, found, script = refused("--gradient_accumulation_steps", "4", *words)
    assert found == ["accelerate", "launch", *launch]
    assert script == ["--gradient_accumulation_steps", "4"]


def test_an_accelerate_config_that_is_not_there():
    with pytest.raises(ValueError, match="Accelerate config zero9 is neither a file nor a valid config"):
        parse(sgpo.make_parser(), "trl_sgpo.scripts.sgpo", [*CPU, "--accelerate_config", "zero9"])


def test_other_unknown_words_are_as_in_trl(folder):
    (folder / "run.yaml").write_text("num_generatons: 2")
    with pytest.raises(ValueError, match=r"not used by the HfArgumentParser: \['--num_generatons', '2'\]"):
        parse(sgpo.make_parser(), "trl_sgpo.scripts.sgpo", [*CPU, "--num_generatons", "2"])
    with pytest.raises(ValueError, match=r"Unknown arguments from config file:.*num_generatons"):
        parse(sgpo.make_parser(), "trl_sgpo.scripts.sgpo", [*CPU, "--config", "run.yaml"])


def test_what_is_known_is_parsed(monkeypatch):
    monkeypatch.setattr("sys.argv", ["sgpo", *CPU, "--judge", "arithmetic"])
    script_args, training_args, *_ = parse(sgpo.make_parser(), "trl_sgpo.scripts.sgpo")
    assert script_args.judge == "arithmetic"
    assert training_args.output_dir == "out"


class TestCheckpoint:
    @pytest.mark.parametrize("given", ["true", "True", "yes", "1", True])
    def test_the_latest_one(self, folder, given):
        for step in (3, 20):
            (folder / "out" / f"checkpoint-{step}").mkdir(parents=True)
        found = find_checkpoint(SimpleNamespace(resume_from_checkpoint=given, output_dir="out"))
        assert found == "out/checkpoint-20"

    @pytest.mark.parametrize("given", ["false", "False", "no", "0", False, None])
    def test_none(self, folder, given):
        assert find_checkpoint(SimpleNamespace(resume_from_checkpoint=given, output_dir="out")) is None

    @pytest.mark.parametrize("name", ["out/checkpoint-3", "true", "1"])
    def test_a_folder(self, folder, name):
        (folder / name).mkdir(parents=True)
        assert find_checkpoint(SimpleNamespace(resume_from_checkpoint=name, output_dir="out")) == name

    @pytest.mark.parametrize(("given", "made"), [("true", None), (True, None), ("true", "out"), (True, "out/other")])
    def test_the_latest_of_none(self, folder, given, made):
        if made:
            (folder / made).mkdir(parents=True)
        with pytest.raises(
            ValueError, match=f"resume_from_checkpoint={given!r} asks for .* output_dir='out' holds none"
        ):
            find_checkpoint(SimpleNamespace(resume_from_checkpoint=given, output_dir="out"))

    @pytest.mark.parametrize("given", ["out/checkpoint-3", "last", ""])
    def test_a_folder_that_is_not_there(self, folder, given):
        with pytest.raises(ValueError, match=f"resume_from_checkpoint={given!r} is no folder.* true for the latest"):
            find_checkpoint(SimpleNamespace(resume_from_checkpoint=given, output_dir="out"))

    @pytest.mark.parametrize("kind", ["discriminative", "generative"])
    def test_of_a_judge(self, folder, kind, monkeypatch):
        def train(arguments, training_args, *others):
            raise InterruptedError(training_args.resume_from_checkpoint)

        (folder / "out" / "checkpoint-3").mkdir(parents=True)
        monkeypatch.setattr(
            judge_train, "read_data", lambda *args: SimpleNamespace(train=[], dev=[], excluded=0, skipped={})
        )
        monkeypatch.setattr(judge_train, "_train", train)
        words = ["--data", "rows.jsonl", "--kind", kind, "--model_name_or_path", "m", "--resume_from_checkpoint"]
        given = parse(judge_train.make_parser(), "trl_sgpo.scripts.judge_train", [*CPU, *words, "true"])
        expected = InterruptedError if kind == "discriminative" else ValueError
        with pytest.raises(
            expected, match="out/checkpoint-3" if kind == "discriminative" else "goes with kind='generative' only if"
        ):
            judge_train.run(*given)
        given = parse(judge_train.make_parser(), "trl_sgpo.scripts.judge_train", [*CPU, *words, "false"])
        with pytest.raises(InterruptedError, match="None"):
            judge_train.run(*given)


class TestRewardsOfTheScript:
    @pytest.fixture
    def given_to_the_trainer(self, folder, monkeypatch):
        """The arguments that the script makes its trainer with."""
        (folder / "rows.jsonl").write_text('{"prompt": "1 + 1 =", "solution": "2"}\n')
        monkeypatch.setattr("trl_sgpo.SGPOTrainer", lambda **given: given)

        def make(*words, **of_file):
            (folder / "run.yaml").write_text(yaml.safe_dump({"dataset_name": "rows.jsonl", **of_file}))
            words = ["--config", "run.yaml", *CPU, "--model_name_or_path", "m", *words]
            return sgpo.make_trainer(*parse(sgpo.make_parser(), "trl_sgpo.scripts.sgpo", words))

        return make

    grpo_file = {"reward_funcs": ["accuracy_reward", "think_format_reward"], "outcome_reward": "accuracy_reward"}

    @pytest.mark.parametrize("failed_groups", ["sgpo", "prefix"])
    def test_the_weights_of_a_grpo_file_leave_the_judge_at_one(self, given_to_the_trainer, failed_groups):
        given = given_to_the_trainer(
            "--judge", "arithmetic", **self.grpo_file, reward_weights=[1.0, 0.2], failed_groups=failed_groups
        )
        assert isinstance(given["reward_funcs"][2], StepwiseJudge)
        assert given["args"].reward_weights == [1.0, 0.2, 1.0]

    @pytest.mark.parametrize("weights", [[1.0, 0.2, 0.7], [1.0], None])
    def test_other_weights_stay_as_they_are(self, given_to_the_trainer, weights):
        given = given_to_the_trainer("--judge", "arithmetic", **self.grpo_file, reward_weights=weights)
        assert given["args"].reward_weights == weights

    def test_without_a_judge_nothing_is_added(self, given_to_the_trainer):
        given = given_to_the_trainer(**self.grpo_file, reward_weights=[1.0, 0.2])
        assert given["args"].reward_weights == [1.0, 0.2]

    def test_a_judge_among_the_reward_functions(self, given_to_the_trainer):
        with pytest.raises(
            ValueError, match=r"reward_funcs='arithmetic' is unknown.* A judge is no reward function: name it by"
        ):
            given_to_the_trainer(reward_funcs=["accuracy_reward", "arithmetic"])

    @pytest.mark.parametrize("given", ["true", "false"])
    def test_the_checkpoint(self, given_to_the_trainer, folder, given):
        (folder / "out" / "checkpoint-3").mkdir(parents=True)
        args = given_to_the_trainer("--resume_from_checkpoint", given)["args"]
        assert args.resume_from_checkpoint == ("out/checkpoint-3" if given == "true" else None)
