"""What generate and evaluate write: as it is made, never over anything, nothing before checks."""

import io
import json
import os
import resource
import shutil
import signal
import sys
import threading
import warnings
import weakref

import pytest
import torch
from diffusers import GlmImagePipeline
from PIL import Image

from duet.configs import errors
from duet.configs.errors import UserError
from duet.configs.load import load_config
from duet.configs.outputs import write_new
from duet.configs.policy_schema import LoraConfig
from duet.configs.row import Row
from duet.inference import generate, model
from duet.inference.adapter_files import AdapterInfo
from duet.inference.adapters import add_adapter, save_adapter
from duet.inference.engine import Engine
from duet.inference.parts import PARTS
from duet.inference.request import Request
from duet.inference.rollout import Rollout
from duet.train import evaluate, evaluation, report
from duet.train.lock import locked
from tests.conftest import MODEL, ROOT, SIZE

SHARPNESS = "duet.train.tiny.hackable.Sharpness"


@pytest.fixture
def no_weights(monkeypatch):
    """Reading weights is a failure."""

    def read(*args, **kwargs):
        raise AssertionError("weights were read")

    monkeypatch.setattr(GlmImagePipeline, "from_pretrained", read)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """A folder with an untrained adapter of each part."""
    folder, pipeline = tmp_path_factory.mktemp("adapters"), model.load_pipeline(str(MODEL))
    for stage, part in PARTS.items():
        (folder / stage).mkdir()
        add_adapter(part.module(pipeline), part, 2, 4.0)
        base = model.base_fingerprint(str(MODEL), part.component)
        arithmetic = load_config(config_of(stage)).arithmetic
        info = AdapterInfo(stage, str(MODEL), base, arithmetic, LoraConfig(2, 4.0))
        save_adapter(part.module(pipeline), folder / stage, info)
    return folder


def rows_of(*prompts: str) -> list[Row]:
    return [Row({"prompt": prompt}) for prompt in prompts]


def config_of(stage: str) -> str:
    return str(ROOT / "configs" / "tiny" / f"{stage}.yaml")


@pytest.fixture
def options(tmp_path):
    """Options of `generate` for one denoising step, and more."""

    def parsed(*more: str):
        common = ["--model", str(MODEL), "--steps", "1", "--output", str(tmp_path / "out")]
        return generate.parse([*common, *more])

    return parsed


@pytest.fixture
def evaluated(tmp_path):
    """Runs `evaluate` on prompts with one denoising step; the report's folder."""

    def run(prompts: list[str], *arguments: str, rewards: str = SHARPNESS, output: str = "report"):
        data = tmp_path / "eval.jsonl"
        data.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
        small = [
            f"data.eval={data}", "sampling.num_inference_steps=1", "eval.bootstrap_samples=10",
            f"rewards=[{{name: {rewards}}}]", "eval.rewards=[]", "eval.images_per_prompt=1",
        ]  # fmt: skip
        folder = tmp_path / output
        evaluate.main([config_of("decoder"), *small, "--output", str(folder), *arguments])
        return folder

    return run


# in parts


def test_parts_are_whole_requests_of_a_batch_and_the_same_pictures(engine):
    counts = [1, 2, 5, 1, 1]
    requests = [
        Request("a red card with the word 'CAT'" if n % 2 else "a card", tuple(range(count)), SIZE)
        for n, count in enumerate(counts)
    ]
    engine.batch_size = 4
    parts = list(engine.in_parts(requests))
    assert [[place for place, _ in part] for part in parts] == [[0, 1], [2], [3, 4]]
    whole = engine.rollout(requests)
    for place, rollout in (pair for part in parts for pair in part):
        assert rollout.request is requests[place]
        for one, other in zip(rollout.images, whole[place].images, strict=True):
            apart = [abs(a - b) for a, b in zip(one.tobytes(), other.tobytes(), strict=True)]
            assert max(apart) <= 1, "up to rounding"


def test_pictures_are_on_disk_when_a_later_prompt_fails(options, tmp_path, monkeypatch):
    true = Engine.rollout

    def rollout(self, requests, *rest):
        assert "bad" not in [r.prompt for r in requests]
        return true(self, requests, *rest)

    monkeypatch.setattr(Engine, "rollout", rollout)
    with pytest.raises(AssertionError):
        list(
            generate.generate(options("--batch-size", "1"), rows_of("a card", "a red card", "bad"))
        )
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"000-seed0.png", "001-seed0.png"}


def test_a_prompt_with_more_pictures_than_a_batch_is_drawn_by_shares(options):
    asked = options("--num-images", "5", "--batch-size", "2", "--seed", "3")
    paths = list(generate.generate(asked, rows_of("a card")))
    assert [p.name for p in paths] == [f"000-seed{n}.png" for n in range(3, 8)]
    assert len({p.read_bytes() for p in paths}) == 5


@pytest.fixture
def most_alive(monkeypatch):
    """Blank pictures instead of drawn ones; counts how many are held at once."""
    made, counts = [], []

    def rollout(self, requests, window=range(0)):
        rollouts = []
        for request in requests:
            images = [Image.new("RGB", (96, 64)) for _ in request.seeds]
            made.extend(weakref.ref(image) for image in images)
            rollouts.append(Rollout(request, images, torch.zeros(len(images), 6), None, None))
        counts.append(sum(ref() is not None for ref in made))
        return rollouts

    monkeypatch.setattr(Engine, "rollout", rollout)
    return lambda: (max(counts), len(made))


def test_generate_holds_a_parts_pictures(options, most_alive):
    paths = list(generate.generate(options("--batch-size", "3"), rows_of(*["a card"] * 30)))
    assert len(paths) == 30
    held, made = most_alive()
    assert made == 30 and held <= 2 * 3, "a part, and the next one while it is made"


def test_evaluate_holds_a_parts_pictures(evaluated, most_alive):
    folder = evaluated(["a card"] * 30, "rollout.batch_size=3")
    held, made = most_alive()
    assert made == 30 and held <= 2 * 3
    assert len(list((folder / "base").iterdir())) == 30


# nothing is replaced


def test_two_that_write_at_once_replace_nothing(
    options, most_alive, pipeline, tmp_path, monkeypatch
):
    monkeypatch.setattr(model, "load_pipeline", lambda *args: pipeline)  # reads for one at a time

    def run():
        paths.extend(generate.generate(options("--num-images", "100"), rows_of("a card", "b")))

    paths, pair = [], [threading.Thread(target=run) for _ in range(2)]
    for thread in pair:
        thread.start()
    for thread in pair:
        thread.join()
    assert len(set(paths)) == 400 == len(list((tmp_path / "out").iterdir()))


def test_what_stands_is_kept_and_what_is_not_whole_is_not_left(tmp_path):
    path = tmp_path / "a.png"
    write_new(path, b"mine")
    with pytest.raises(FileExistsError):
        write_new(path, b"yours")
    (tmp_path / "dangling.png").symlink_to(tmp_path / "gone")
    with pytest.raises(FileExistsError):
        write_new(tmp_path / "dangling.png", b"yours")
    assert path.read_bytes() == b"mine" and not (tmp_path / "gone").exists()
    with pytest.raises(UserError, match="cannot be written: No such file"):
        write_new(tmp_path / "gone" / "b.png", b"x")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # a disk that gets full
    try:
        with pytest.raises(UserError, match="cannot be written: File too large"):
            write_new(tmp_path / "large.png", bytes(2000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert not (tmp_path / "large.png").exists()


@pytest.mark.parametrize(
    "entry", ["index.html", "results.json", "before_after.png", "base", "{adapters}-decoder"]
)
@pytest.mark.usefixtures("no_weights")
def test_evaluate_overwrites_nothing(evaluated, adapters, tmp_path, entry):
    mine = tmp_path / "report" / entry.format(adapters=adapters.name)
    mine.parent.mkdir()
    mine.write_text("mine")
    with pytest.raises(UserError, match="already, and nothing is overwritten") as refused:
        evaluated(["a card"], "--checkpoint", str(adapters / "decoder"))
    assert mine.name in str(refused.value) and "\n" not in str(refused.value)
    assert mine.read_text() == "mine" and list(mine.parent.iterdir()) == [mine]


# what is wrong is told before weights are read

WRONG_GENERATE = {
    "height": (["--height", "50"], "height = 50 .* a multiple of 32"),
    "width alone": (["--width", "-32"], "width = -32"),
    "large": (["--height", "320000", "--width", "32"], "height = 320000"),
    "temperature": (["--temperature", "nan"], "temperature = nan"),
    "count": (["--num-images", "0"], "--num-images = 0: allowed is 1 <= x"),
    "batch": (["--batch-size", "-1"], "--batch-size = -1"),
    "seed": (["--seed", str(2**64)], "--seed = 18446744073709551616"),
    "no room": (["--height", "4096", "--width", "4096"], "height = 4096 and width = 4096 .* leave no room for a prompt"),
    "many": (["--num-images", "600000"], "allowed are 1,000,000 pictures in all"),
    "adapter": (["--adapter", "gone"], "'gone' is missing or damaged"),
    "a file": (["--output", "{tmp}/file"], "is a file: name a folder"),
    "below a file": (["--output", "{tmp}/file/x"], r"cannot be written \(Not a directory\)"),
    "read-only": (["--output", "/proc/x"], "cannot be written"),
    "long": (["--output", "{tmp}/" + "x" * 300], "cannot be written"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_GENERATE)
@pytest.mark.usefixtures("no_weights")
def test_generate_refuses_before_weights_are_read(options, tmp_path, name):
    (tmp_path / "file").write_text("mine")
    arguments, told = WRONG_GENERATE[name]
    asked = options(*(a.format(tmp=tmp_path) for a in arguments))
    with pytest.raises(UserError, match=told):
        list(generate.generate(asked, rows_of("a card", "b")))
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.usefixtures("no_weights")
def test_both_ask_the_tokenizers_before_weights_are_read(options, evaluated):
    told = "the prompt holds '<.image.>', a control token"
    with pytest.raises(UserError, match=told):
        list(generate.generate(options(), rows_of("a card", "a <|image|>")))
    with pytest.raises(UserError, match=f"eval.jsonl:2: {told}"):
        evaluated(["a card", "a <|image|>"])


@pytest.mark.usefixtures("no_weights")
def test_generate_refuses_two_adapters_of_a_stage(options, adapters):
    both = ["--adapter", str(adapters / "ar"), "--adapter", str(adapters / "ar")]
    with pytest.raises(UserError, match="--adapter .* joins adapters of ar and ar: give one of"):
        list(generate.generate(options(*both), rows_of("a card")))


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--checkpoint", "{a}/decoder", "--checkpoint", "gone"], "'gone' is missing"),
        (["--checkpoint", "{a}/decoder", "--checkpoint", "{a}/decoder"], "one model twice"),
        (["--checkpoint", "{a}/ar,{a}/ar"], "joins adapters of ar and ar"),
        (["--checkpoint", "{a}/ar", "model.dtype=bfloat16"], "was trained with 'float32'"),
        (["data.eval=gone.jsonl"], "cannot be read"),
        (["--output", "/proc/x"], "cannot be written"),
    ],
)
def test_evaluate_checks_everything_before_weights_are_read(
    evaluated, adapters, tmp_path, arguments, told
):
    with pytest.raises(UserError, match=told):
        evaluated(["a card"], *(a.format(a=adapters) for a in arguments), output="report")
    report = tmp_path / "report"
    assert not report.exists() or not list(report.iterdir())


# results


def names(folder) -> set[str]:
    return {p.name for p in folder.iterdir()}


def test_an_unfinished_evaluation_keeps_its_pictures_until_the_next_try(
    evaluated, most_alive, monkeypatch, tmp_path, capsys
):
    true, report = Engine.rollout, tmp_path / "report"

    def rollout(self, requests, *rest):
        if requests[0].prompt == "b":
            raise KeyboardInterrupt
        return true(self, requests, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Engine, "rollout", rollout)
        evaluated(["a card", "b"], "rollout.batch_size=1")
    assert names(report) == {".lock", ".duet_unfinished"}
    assert names(report / ".duet_unfinished" / "base") == {"000-0.png"}
    assert "what was made lies in" in capsys.readouterr().err
    (report / "mine.txt").write_text("mine")
    evaluated(["a red card"])
    made = {"base", "results.json", "index.html", "before_after.png"}
    assert names(report) == made | {".lock", "mine.txt"}
    assert json.loads((report / "results.json").read_text())["prompts"] == ["a red card"]


def test_what_appears_meanwhile_is_not_overwritten_either(
    evaluated, most_alive, monkeypatch, tmp_path
):
    true, mine = evaluation.summarise, tmp_path / "report" / "base"

    def summarise(*arguments):
        mine.write_text("mine")
        return true(*arguments)

    monkeypatch.setattr(evaluation, "summarise", summarise)
    with pytest.raises(UserError, match="holds base already"):
        evaluated(["a card"])
    assert mine.read_text() == "mine"


@pytest.mark.usefixtures("no_weights")
def test_one_evaluation_at_a_time_writes_to_a_folder(evaluated, tmp_path):
    with locked("--output", tmp_path / "report"):
        with pytest.raises(UserError, match=f"--output = .* in use by process {os.getpid()}"):
            evaluated(["a card"])
        assert names(tmp_path / "report") == {".lock"}


def test_a_name_that_is_no_text_is_one_in_the_report(
    evaluated, adapters, most_alive, tmp_path, monkeypatch
):
    """A folder's name is bytes, a page and what is printed are text."""
    run = tmp_path / os.fsdecode(b"run \xff")
    shutil.copytree(adapters / "decoder", run / "a\nb")
    (run / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5}\n')
    (tmp_path / "link").symlink_to(run / "a\nb")  # safetensors reads by no other name
    printed = io.TextIOWrapper(io.BytesIO(), "utf-8")
    monkeypatch.setattr(sys, "stdout", printed)
    output = os.fsdecode(b"report \xff")
    errors.exit_on_user_error(
        lambda: evaluated(["a card"], "--checkpoint", str(tmp_path / "link"), output=output)
    )
    folder = tmp_path / output
    [base, after] = strictly((folder / "results.json").read_text())["rows"]
    assert (base["model"], after["model"]) == ("base", "run__-a_b")
    assert "Training of run \\udcff" in (folder / "index.html").read_text()
    assert b"report \xff/index.html" in printed.buffer.getvalue()


def test_results_stand_before_the_page(evaluated, most_alive, monkeypatch, tmp_path):
    def fail(*args):
        raise RuntimeError("no page today")

    monkeypatch.setattr(report, "write_report", fail)
    with pytest.raises(RuntimeError):
        evaluated(["a card"])
    assert json.loads((tmp_path / "report" / "results.json").read_text())["rows"]


def strictly(text: str):
    def refuse(name: str):
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_what_has_no_score_is_null_and_warns_nobody(evaluated, adapters, most_alive, capsys):
    rewards = "tests.sample_rewards.Sometimes}, {name: tests.sample_rewards.Never"
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        folder = evaluated(
            ["a red card", "a blue card", "a green card"],
            "--checkpoint",
            str(adapters / "ar"),
            rewards=rewards,
        )
    base, after = strictly((folder / "results.json").read_text())["rows"]
    assert base["scores"] == {"Sometimes": [[1.0], [None], [None]], "Never": [[None]] * 3}
    nothing = {"mean": None, "interval": None, "change": None, "change_interval": None}
    assert after["metrics"]["Never"] == nothing | {"perfect": nothing}
    assert base["metrics"]["Sometimes"]["perfect"] == nothing | {"mean": 1.0, "interval": [1, 1]}
    assert after["metrics"]["Sometimes"]["perfect"]["change_interval"] == [0.0, 0.0]
    table, page = capsys.readouterr().out, (folder / "index.html").read_text()
    assert "Sometimes = 1" in table and "not scored" in table and "Never = 1" not in table
    assert "Sometimes = 1" in page and "not scored" in page and "nan" not in table + page.lower()


@pytest.mark.parametrize(
    ("main", "arguments"),
    [
        (generate.main, ["--model", str(MODEL), "--prompt", "a", "--output", ""]),
        (generate.main, ["--model", str(MODEL), "--prompt", "a", "--prompts", " "]),
        (evaluate.main, ["run.yaml", "--output", ""]),
    ],
)
def test_an_empty_name_is_not_the_working_directory(main, arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    last = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code == 2 and f"{arguments[-2]}: {arguments[-1]!r} names nothing" in last
