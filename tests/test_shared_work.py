"""Evaluation and `generate` on two processes: the files of one, each picture once, one end."""

import json
import math
from itertools import chain
from pathlib import Path

import pytest
import torch

from duet.configs.load import load_config
from duet.configs.schema import LoraConfig
from duet.inference import generate
from duet.inference.adapter_files import AdapterInfo
from duet.inference.adapters import add_adapter, save_adapter
from duet.inference.engine import Engine
from duet.inference.model import base_fingerprint, load_pipeline
from duet.inference.parts import PARTS
from duet.inference.request import Request
from duet.train import evaluate
from tests import forked
from tests.conftest import MODEL, ROOT, SIZE, held_out_edits

PICTURES = {"found": 27, "drawn": 10}  # of evaluations the sources and before_after.png too
MAINS = {"generate": generate.main, "evaluate": evaluate.main}
TINY = str(ROOT / "configs" / "tiny" / "decoder.yaml")
REWARDS = "{name: duet.train.tiny.hackable.Sharpness}, {name: duet.train.tiny.obedience.EditKept}"


def write_average(folder: Path) -> None:
    """A checkpoint of both parts that holds averages alone: what else were read would fail."""
    pipeline = load_pipeline(str(MODEL))
    for stage, part in PARTS.items():
        average, module = folder / stage / "average", part.module(pipeline)
        average.mkdir(parents=True)
        add_adapter(module, part, 2, 4.0)
        for parameter in module.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.3)
        base = base_fingerprint(str(MODEL), part.component)
        arithmetic = load_config(TINY).arithmetic
        save_adapter(
            module, average, AdapterInfo(stage, str(MODEL), base, arithmetic, LoraConfig(2, 4.0))
        )


def asked(inputs: Path, output: Path) -> dict[str, tuple[str, list[str]]]:
    """Commands by the folders that they write to: three parts, so that one process makes two."""

    def evaluation(name: str, rewards: str, *more: str) -> tuple[str, list[str]]:
        small = [
            f"data.eval={inputs}/five.jsonl", "sampling.num_inference_steps=1", "rollout.batch_size=4",
            "eval.bootstrap_samples=10", "eval.rewards=[]", "eval.images_per_prompt=2",
            f"rewards=[{rewards}]",
        ]  # fmt: skip
        return "evaluate", [TINY, *small, "--output", str(output / name), *more]

    drawn = [
        "--model", str(MODEL), "--prompts", str(inputs / "five.jsonl"), "--steps", "1",
        "--num-images", "2", "--batch-size", "4", "--output", str(output / "drawn"),
    ]  # fmt: skip
    return {
        "raised": evaluation("raised", "{name: tests.bad_rewards.RaisesOnOne}"),
        "interrupted": evaluation("interrupted", "{name: tests.bad_rewards.InterruptsOnOne}"),
        "drawn": ("generate", drawn),
        "found": evaluation("found", REWARDS, "--checkpoint", str(inputs / "both"), "--average"),
    }  # fmt: skip


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """What two processes made of the commands, in `two`; beside what one did, in `alone`."""
    folder = tmp_path_factory.mktemp("shared")
    rows = "".join(json.dumps(row) + "\n" for row in held_out_edits(5))
    (folder / "five.jsonl").write_text(rows)
    write_average(folder / "both")
    commands = asked(folder, folder / "two")
    (folder / "commands.json").write_text(json.dumps(list(commands.values())))
    done = forked.run("tests.shared_work", str(folder / "commands.json"), processes=2)
    assert done.returncode == 0, done.stderr
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        for name in ("found", "drawn"):
            kind, arguments = asked(folder, folder / "alone")[name]
            MAINS[kind](arguments)
    ends = [json.loads((folder / f"ends-{rank}.json").read_text()) for rank in (0, 1)]
    assert {end["processes"] for own in ends for end in own} == {2}
    told = {name: [own[i]["told"] for own in ends] for i, name in enumerate(commands)}
    return folder, told, done


def contents(folder: Path) -> dict[str, bytes]:
    files = (p for p in folder.rglob("*") if p.is_file() and p.name != ".lock")
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


@pytest.mark.parametrize("name", ["found", "drawn"])
def test_two_processes_write_the_files_of_one(shared, name):
    """Pictures to the byte, with their scores and intervals."""
    folder, told, _ = shared
    assert told[name] == [None, None]
    ours, theirs = contents(folder / "two" / name), contents(folder / "alone" / name)
    assert len([path for path in ours if path.endswith(".png")]) == PICTURES[name]
    assert ours == theirs


def test_both_rewards_score_what_is_compared(shared):
    told = json.loads((shared[0] / "two" / "found" / "results.json").read_text())
    for model in told["rows"]:
        assert model["scores"].keys() == {"Sharpness", "EditKept"}
        for prompts in model["scores"].values():
            assert all(map(math.isfinite, chain.from_iterable(prompts)))


def test_a_process_prints_whole_lines_and_the_main_one_what_is_once(shared):
    folder, _, done = shared
    paths = [line for line in done.stdout.splitlines() if "/drawn/" in line]
    assert sorted(paths) == sorted(map(str, (folder / "two" / "drawn").iterdir()))
    assert done.stdout.count("report: ") == 1, "of the evaluation that ended well"
    assert done.stderr.count("top_k 50") == 1


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("raised", "reward 'RaisesOnOne' raised KeyError: 'only here'"),
        ("interrupted", "KeyboardInterrupt"),
    ],
)
def test_what_ends_one_ends_both_and_half_a_report_is_none(shared, name, reason):
    folder, told, done = shared
    assert told[name][0] == f"UserError: process 1 ended: {reason}"
    assert reason in told[name][1]
    left = folder / "two" / name
    assert {p.name for p in left.iterdir()} == {".lock", ".duet_unfinished"}
    assert done.stderr.count(f"what was made lies in '{left}/.duet_unfinished'") == 1


@pytest.mark.parametrize("of", [2, 3, 7])
def test_the_parts_of_all_processes_are_those_of_one(engine, monkeypatch, of):
    monkeypatch.setattr(Engine, "rollout", lambda self, requests: [r.seeds for r in requests])
    counts = [1, 2, 5, 1, 1, 3, 1]
    requests = [Request("a card", tuple(range(count)), SIZE) for count in counts]
    engine.batch_size = 4
    alone = list(engine.in_parts(requests))
    dealt = [list(engine.in_parts(requests, rank, of)) for rank in range(of)]
    assert sorted(part for own in dealt for part in own) == sorted(alone) and len(alone) == 4
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1
