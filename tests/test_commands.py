"""The commands as a stranger types them: exit status, one clear line; one that loads torch as a
process that begins from nothing, and the others by the same entries."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass

import pytest
from accelerate.state import AcceleratorState
from PIL import Image

from duet.configs.errors import exit_on_user_error
from duet.inference import generate
from duet.train import __main__ as training
from duet.train import evaluate
from tests import forked
from tests.conftest import MODEL, ROOT

CARD = 'a red card with the white word "CAT"'
TINY = "configs/tiny/decoder.yaml"


def run(*arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@dataclass
class Ended:
    """As a process does."""

    returncode: int
    stderr: str


MAINS = {
    "duet.train": training.main,
    "duet.inference.generate": generate.main,
    "duet.train.evaluate": evaluate.main,
}


def call(capfd, _: str, module: str, *arguments: str) -> Ended:
    """The entry of `python -m MODULE`, in this process."""
    AcceleratorState._reset_state(True)
    capfd.readouterr()
    status = 0
    try:
        exit_on_user_error(lambda: MAINS[module](list(arguments)))
    except SystemExit as end:
        status = end.code
    return Ended(status, capfd.readouterr().err)


def test_generate_writes_pictures_and_never_replaces_one(tmp_path, capfd):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": 'a blue card with the black word "PEN"'}) + "\n")
    command = [
        "-m", "duet.inference.generate", "--model", str(MODEL), "--prompt", CARD, "--prompts", str(prompts),
        "--num-images", "2", "--seed", "5", "--steps", "4", "--guidance-scale", "2",
        "--output", str(tmp_path / "out"),
    ]  # fmt: skip
    first = forked.run(*command[1:])
    assert first.returncode == 0, first.stderr
    assert "top_k 50, top_p 0.9, float32" in first.stderr, (
        "what stock generation takes, and says so"
    )
    names = {"000-seed5.png", "000-seed6.png", "001-seed5.png", "001-seed6.png"}
    assert {p.name for p in (tmp_path / "out").iterdir()} == names
    assert Image.open(tmp_path / "out" / "000-seed5.png").size == (96, 64)
    before = (tmp_path / "out" / "000-seed5.png").read_bytes()
    assert call(capfd, *command, "--height", "96", "--width", "64").returncode == 0
    assert (tmp_path / "out" / "000-seed5.png").read_bytes() == before
    assert Image.open(tmp_path / "out" / "000-seed5-1.png").size == (64, 96)


def test_evaluate_writes_a_report_that_needs_no_network(tmp_path, capfd):
    rows = (ROOT / "configs/tiny/prompts/eval.jsonl").read_text().splitlines()[:3]
    data = tmp_path / "eval.jsonl"
    absolute = [json.loads(r) for r in rows]
    for row in absolute:
        row["image"] = str(ROOT / "configs/tiny/prompts" / row["image"])
    data.write_text("".join(json.dumps(r) + "\n" for r in absolute))
    small = [
        f"data.eval={data}", "sampling.num_inference_steps=6", f"output_dir={tmp_path / 'run'}",
        "rollout.prompts_per_step=1", "rollout.num_generations=2", "train.trackers=[]",
        "optim.per_device_train_batch_size=2", "optim.gradient_accumulation_steps=1",
        "train.max_steps=1", "eval.images_per_prompt=1",
    ]  # fmt: skip
    trained = forked.run("duet.launch.cli", "train", TINY, *small)
    assert trained.returncode == 0, trained.stderr
    assert all(line.startswith("duet: ") for line in trained.stderr.splitlines()), trained.stderr
    checkpoint = str(tmp_path / "run" / "checkpoint-1")
    output = tmp_path / "report"
    command = [
        "-m",
        "duet.train.evaluate",
        TINY,
        *small,
        "sde.window_size=99",  # training alone would mind
        "--checkpoint",
        checkpoint,
        "--output",
        str(output),
    ]
    done = run(*command)
    assert done.returncode == 0 and not done.stderr, done.stderr
    results = json.loads((output / "results.json").read_text())
    base, after = results["rows"]
    assert (base["model"], after["model"]) == ("base", "run-checkpoint-1")
    assert set(base["metrics"]) == {
        "ocr", "fidelity", "alignment", "aesthetic", "ColourObedience"
    }  # fmt: skip
    assert "change_interval" in after["metrics"]["ocr"]
    assert all((output / path).is_file() for path in after["images"])
    page = (output / "index.html").read_text()
    assert page.count("data:image/png;base64,") == 6 and "<svg" in page
    assert 'src="http' not in page and "href=" not in page.replace('xlink:href="#', "")
    again = call(capfd, *command)
    assert again.returncode == 2 and "index.html" in again.stderr and "already" in again.stderr
    command[-1], command[-3] = str(tmp_path / "joined"), f"{checkpoint},{checkpoint}"
    joined = call(capfd, *command)
    assert joined.returncode == 2 and "joins adapters of decoder and decoder" in joined.stderr
    assert not (tmp_path / "joined").exists()


WRONG = {
    "unknown key": (["-m", "duet.train", TINY, "optim.lr=1"], "unknown key 'optim.lr'"),
    "wrong type": (["-m", "duet.train", TINY, "seed=x"], "seed = 'x' must be of type int"),
    "missing config": (["-m", "duet.train", "gone.yaml"], "cannot be read"),
    "missing model": (["-m", "duet.train", TINY, "model.path=gone/model"], "no such folder"),
    "odd size": (["-m", "duet.train", TINY, "sampling.width=100"], "a multiple of 32"),
    "empty prompts": (["-m", "duet.train", TINY, "data.train={tmp}/empty.jsonl"], "is empty"),
    "bad line": (["-m", "duet.train", TINY, "data.train={tmp}/bad.jsonl"], "bad.jsonl:2 is not JSON"),
    "reward raises": (["-m", "duet.train", TINY, "rewards=[{{name: tests.bad_rewards.Raises}}]"], "raised KeyError"),
    "reward miscounts": (["-m", "duet.train", TINY, "rewards=[{{name: tests.bad_rewards.Miscounts}}]"], "answered 1 scores for"),
    "reward is infinite": (["-m", "duet.train", TINY, "rewards=[{{name: tests.bad_rewards.Infinite}}]"], "answered inf"),
    "generate size": (["-m", "duet.inference.generate", "--model", str(MODEL), "--prompt", CARD, "--height", "50"], "a multiple of 32"),
    "generate nothing": (["-m", "duet.inference.generate", "--model", str(MODEL)], "give --prompt"),
    "generate adapter": (["-m", "duet.inference.generate", "--model", str(MODEL), "--prompt", CARD, "--adapter", "gone"], "missing or damaged"),
    "evaluate adapter": (["-m", "duet.train.evaluate", TINY, "--checkpoint", "gone", "--output", "{tmp}/report"], "missing or damaged"),
    "unknown command": (["-m", "duet.launch.cli", "trian"], "choose one of train, generate, evaluate"),
}  # fmt: skip


# as processes: what is told before torch is loaded
PROCESSES = ("unknown key", "missing config", "generate nothing", "unknown command")


@pytest.mark.parametrize("name", WRONG)
def test_a_mistake_is_one_clear_line_and_status_2(name, tmp_path, capfd):
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"prompt"\n')
    arguments = [a.format(tmp=tmp_path) for a in WRONG[name][0]]
    if arguments[1] == "duet.train":
        arguments += [
            "rollout.prompts_per_step=1", "rollout.num_generations=2", "sampling.num_inference_steps=6",
            "optim.per_device_train_batch_size=2", "optim.gradient_accumulation_steps=1",
            "train.trackers=[]", f"output_dir={tmp_path / 'run'}",
        ]  # fmt: skip
    done = run(*arguments) if name in PROCESSES else call(capfd, *arguments)
    errors = [line for line in done.stderr.splitlines() if "duet: error:" in line]
    assert done.returncode == 2, done.stderr
    assert len(errors) == 1 and WRONG[name][1] in errors[0]
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.rglob("checkpoint-*"))
