"""README.md: its commands are run, small; its names of settings, metrics, files exist."""

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from accelerate.state import AcceleratorState
from PIL import Image, ImageStat

from duet.configs import listing
from duet.configs.load import load_config
from duet.inference import generate
from duet.inference.model import load_pipeline
from duet.launch import cli
from duet.launch.rewards import read_rewards
from duet.rewards.base import RewardInput, score
from duet.rewards.registry import BUILT_IN, load_reward
from duet.train import __main__ as training
from duet.train import evaluate, priors
from tests.conftest import MODEL, ROOT

PAGE = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
# code in the text, broken over lines as it may be
INLINE = [" ".join(code.split()) for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", PAGE)]
MAINS = {
    "duet.train": training.main,
    "duet.train.evaluate": evaluate.main,
    "duet.train.priors": priors.main,
    "duet.inference.generate": generate.main,
}
# seconds instead of minutes: what the page leaves to the config
SMALL = [
    "data.eval=eval.jsonl", "rollout.prompts_per_step=1", "rollout.num_generations=2",
    "optim.per_device_train_batch_size=2", "sampling.num_inference_steps=6",
    "train.max_steps=1", "eval.images_per_prompt=1", "eval.bootstrap_samples=10",
]  # fmt: skip


def commands() -> list[list[str]]:
    text = "".join(text for language, text in BLOCKS if language == "sh").replace("\\\n", " ")
    lines = [shlex.split(line, comments=True) for line in text.splitlines()]
    return [line for line in lines if line]


def module_of(command: list[str]) -> tuple[str, list[str]]:
    """What `accelerate launch -m` or `python -m` runs, and its arguments."""
    if command[0] == "accelerate":
        told = launch_command_parser().parse_args(command[2:])
        assert told.module, "a module, as -m says"
        assert told.config_file is None or (ROOT / told.config_file).is_file()
        return told.training_script, told.training_script_args
    assert command[:2] == ["python", "-m"]
    return command[2], command[3:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A user's folder beside the page's configs; the commands on the tiny model were run there."""
    folder = tmp_path_factory.mktemp("user")
    for name in ("configs", "launch"):
        (folder / name).symlink_to(ROOT / name)
    rows = (ROOT / "configs/tiny/prompts/eval.jsonl").read_text().splitlines()[:2]
    made = [json.loads(row) for row in rows]
    for row in made:
        row["image"] = str(ROOT / "configs/tiny/prompts" / row["image"])
    for name, row in zip(("a.png", "b.png"), made, strict=True):
        (folder / name).symlink_to(row["image"])
    (folder / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    before = Path.cwd()
    os.chdir(folder)
    ran = []
    try:
        for command in commands():
            if command[0] == "make" or "glm_image" in " ".join(command):
                continue
            module, arguments = module_of(command)
            # the config's last checkpoint is the small run's only one
            arguments = [a.replace("checkpoint-250", "checkpoint-1") for a in arguments]
            AcceleratorState._reset_state(True)
            MAINS[module](arguments + (SMALL if module.startswith("duet.train") else []))
            ran.append(module)
    finally:
        os.chdir(before)
    assert ran == [
        "duet.train", "duet.train", "duet.train.evaluate", "duet.inference.generate",
        "duet.inference.generate", "duet.train.priors",
    ]  # fmt: skip
    return folder


def test_the_commands_do_what_the_page_says(folder):
    assert (folder / "runs/ar/checkpoint-1").is_dir()
    assert (folder / "runs/decoder/checkpoint-1").is_dir()
    assert load_config(ROOT / "configs/tiny/decoder.yaml").train.max_steps == 250
    assert (folder / "runs/decoder/evaluation/index.html").is_file()
    assert (folder / "runs/priors/priors/SHA256SUMS").is_file()
    text, edit = (folder / "runs/images").iterdir()
    assert Image.open(text).size == Image.open(edit).size == (96, 64)


def test_the_real_checkpoints_command_is_a_run_that_could_start():
    [command] = [c for c in commands() if "glm_image" in " ".join(c)]
    module, (config, *overrides) = module_of(command)
    assert module == "duet.train"
    load_config(config, overrides).require_trainable()
    ours, tiny = (load_config(ROOT / f"configs/{n}/decoder.yaml") for n in ("glm_image", "tiny"))
    assert ours.optim.adam_epsilon < tiny.optim.adam_epsilon


COMMANDS_OF = {"test": 0, "quickstart": 4, "reproduce": 3, "edits": 3}


@pytest.mark.parametrize("target", COMMANDS_OF)
def test_make_knows_its_targets_and_their_configs(target, tmp_path):
    """Each line of the recipe is a command whose config and overrides are read."""
    # `install` counts as done: its file is newer than pyproject.toml
    asked = ["make", "--dry-run", "--assume-old=.venv/installed", target]
    done = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=True)
    recipe = done.stdout.replace("\\\n", " ").splitlines()
    modules = [shlex.split(line) for line in recipe if " -m duet." in line]
    assert len(modules) == COMMANDS_OF[target]
    for _, _, module, *words in modules:
        if module == "duet.inference.generate":
            asked = generate.parse(words)
            assert all(Path(ROOT, picture).is_file() for picture in asked.image)
            continue
        assert module in {*MAINS, "duet.train.tiny.edit_success"}
        load_config(ROOT / words[0], [word for word in words[1:] if "=" in word])


def test_the_page_names_the_targets_of_make():
    assert {c[1] for c in commands() if c[0] == "make"} <= COMMANDS_OF.keys()


def test_stock_libraries_load_the_adapters_as_the_page_says(folder):
    stock = load_pipeline(str(MODEL))
    calls = [code for code in INLINE if re.match(r"load_(lora_)?adapter\(dir", code)]
    assert len(calls) == 2
    for call in calls:
        stage, part = {
            "load_adapter": ("ar", stock.vision_language_encoder),
            "load_lora_adapter": ("decoder", stock.transformer),
        }[call.partition("(")[0]]
        adapter = str(folder / "runs" / stage / "checkpoint-1" / "adapter")
        eval(f"part.{call}", {"part": part, "dir": adapter})
        assert [n for n, _ in part.named_parameters() if "lora_B" in n], call


def test_the_reward_of_ten_lines_scores(tmp_path, monkeypatch):
    [code] = [text for language, text in BLOCKS if language == "python"]
    [config] = [t for language, t in BLOCKS if language == "yaml" and t.startswith("rewards:")]
    (tmp_path / "brightness.py").write_text(code)
    (tmp_path / "rewards.yaml").write_text(config)
    assert len([line for line in code.splitlines() if line and line[0] != "#"]) <= 10
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")  # a user's folder
    brightness, composition = read_rewards("rewards.yaml")
    assert composition.metric_name == "composition" and load_reward(composition)
    image = Image.new("RGB", (8, 8), (200, 200, 200))
    made = score(load_reward(brightness), "Brightness", [RewardInput(image, "x", {})], [1])
    grey = ImageStat.Stat(image.convert("L")).mean[0] / 255
    assert made == [pytest.approx(1 - abs(grey - 0.6))] and brightness.weight == 0.5


def test_settings_that_the_page_names_exist():
    known = {one.name for one in listing.settings()}
    sections = {name.partition(".")[0] for name in known if "." in name}
    words = [w for code in INLINE for w in re.findall(r"[a-z_]+\.[a-z_]+(?:\.[a-z_]+)*", code)]
    named = {w for w in words if w.split(".")[0] in sections and not w.endswith((".py", ".log"))}
    assert {"grpo.old_logprobs", "train.max_not_scored", "watch.drop"} <= named <= known


def test_metrics_that_the_page_names_are_logged(folder):
    logged = set()
    for stage in ("ar", "decoder"):
        logged |= set(json.loads((folder / "runs" / stage / "metrics.jsonl").read_text()))
    named = {c for c in INLINE if re.fullmatch(r"(rollout|reward|watch|images|ratio)/[\w*]+", c)}
    assert "reward/wait_seconds" in named
    for name in named | {"reward", "reward_std", "entropy", "frac_reward_zero_std"}:
        start = name.removesuffix("*")
        assert name in logged or (start != name and any(n.startswith(start) for n in logged)), name


def test_files_modules_and_rewards_that_the_page_names_exist():
    linked = re.findall(r"\]\(([^)#]+)[^)]*\)", PAGE)
    paths = {c for c in INLINE if re.fullmatch(r"(configs|rewards|launch|train|tests)/[\w/.]*", c)}
    assert "configs/tiny/model" in paths and "LICENSE" in linked
    assert not [name for name in {*linked, *paths} if not (ROOT / name).exists()]
    for module in re.findall(r"python -m duet\.([\w.]+)", PAGE):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module
    table = PAGE[PAGE.index("| name | score |") :].partition("\n\n")[0]
    rewards = re.findall(r"`(\w+)`", "".join(line.split("|")[1] for line in table.splitlines()))
    assert sorted(rewards) == sorted(BUILT_IN)


COMMANDS = re.search(r"`duet ([^`]+)`\s+are", PAGE)[1]


@pytest.mark.parametrize("command", [*COMMANDS.split(" | "), "plan", "settings"])
def test_every_command_has_help(command, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["duet", command, "--help"])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 0 and f"usage: duet {command}" in capsys.readouterr().out


def test_the_list_has_every_setting_with_type_default_range_and_meaning(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["duet", "settings"])
    cli.main()
    printed = capsys.readouterr().out
    told = "optim.adam_epsilon  (float, 0 < x <= 1; default 1e-08)\n    well below the gradients'"
    assert told in printed and "stage  (ar | decoder | null; default null)" in printed
    assert all(f"{one.name}  ({one.kind}" in printed and one.meaning for one in listing.settings())
    assert "rewards[].weight" in printed and "None" not in printed


def test_a_version_is_told(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["duet", "--version"])
    cli.main()
    assert re.fullmatch(r"duet \d+\.\d+\.\d+\n", capsys.readouterr().out)
