"""--accelerate: the packaged files, what accelerate makes of them, and processes that it starts."""

import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time

import accelerate.commands.launch as accelerate_launch
import accelerate.utils.launch as environments
import pytest
from accelerate.commands.config.config_args import load_config_from_file

from duet.configs.errors import UserError
from duet.launch import cli, spread
from duet.train.environment import require_own_settings, sharding_engine_of
from tests.conftest import ROOT

FILES = {path.stem: path for path in sorted(spread.FOLDER.glob("*.yaml"))}
ENGINES = {
    "cpu": "ddp", "one_gpu": "ddp", "ddp": "ddp", "zero2": "zero2", "zero3": "zero3",
    "fsdp2": "fsdp2", "multi_node": "fsdp2",
}  # fmt: skip


@pytest.fixture
def launched(monkeypatch):
    """What accelerate would start: its own arguments and the processes' environment."""
    made = []

    def instead(name: str, environment):
        monkeypatch.setattr(accelerate_launch, name, lambda a: made.append((a, environment(a))))

    instead("multi_gpu_launcher", environments.prepare_multi_gpu_env)
    instead("deepspeed_launcher", lambda a: environments.prepare_deepspeed_cmd_env(a)[1])
    instead("simple_launcher", lambda a: environments.prepare_simple_launcher_cmd_env(a)[1])
    monkeypatch.setattr(environments, "is_port_in_use", lambda port: False)
    true = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: n == "deepspeed" or true(n))
    handlers = {n: signal.getsignal(n) for n in (15, 2, 1, 10)}
    before = dict(os.environ)
    yield made
    for number, handler in handlers.items():
        signal.signal(number, handler)
    os.environ.clear()
    os.environ.update(before)


def duet(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", ["duet", *arguments])
    cli.main()


@pytest.mark.parametrize("name", ENGINES)
def test_a_packaged_file_asks_for_its_engine_and_nothing_that_is_refused(
    launched, monkeypatch, small_run, name
):
    assert set(FILES) == set(ENGINES) and FILES[name].read_text().startswith("# ")
    assert load_config_from_file(str(FILES[name])).mixed_precision == "no"
    duet(monkeypatch, "train", "run.yaml", "--accelerate", name, "seed=1")
    [(asked, environment)] = launched
    assert (asked.training_script, asked.training_script_args) == (
        "duet.train.__main__", ["run.yaml", "seed=1"]
    )  # fmt: skip
    assert asked.module and sharding_engine_of(environment) == ENGINES[name]
    require_own_settings(environment, small_run("ar", "train.mixed_precision=bf16"))
    hybrid = environment.get("FSDP_SHARDING_STRATEGY") == "HYBRID_SHARD"
    assert hybrid == (name == "multi_node")
    if ENGINES[name].startswith("zero"):
        assert environment["ACCELERATE_USE_DEEPSPEED"] == "true"
        assert environment["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == name[-1]
        assert asked.deepspeed_multinode_launcher == "standard", "or it would go by ssh"
    if ENGINES[name] == "fsdp2":
        assert environment["ACCELERATE_USE_FSDP"] == "true" and environment["FSDP_VERSION"] == "2"
    assert environment.get("ACCELERATE_USE_CPU", "False") == ("true" if name == "cpu" else "False")


def test_the_number_of_processes_and_a_file_of_ones_own(launched, monkeypatch, tmp_path):
    own = tmp_path / "my.yaml"
    own.write_text(FILES["ddp"].read_text())
    duet(monkeypatch, "evaluate", "c.yaml", "--checkpoint", "a", "--accelerate", str(own), "--num-processes", "3")  # fmt: skip
    [(asked, _)] = launched
    assert asked.num_processes == 3 and asked.nproc_per_node == "3"
    assert asked.training_script == "duet.train.evaluate"
    assert asked.training_script_args == ["c.yaml", "--checkpoint", "a"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("train c.yaml --accelerate zero4", "'zero4': allowed is cpu, ddp, fsdp2, multi_node, one_gpu, zero2, zero3, or a file"),
        ("train c.yaml --num-processes 2", "--num-processes goes with --accelerate"),
        ("train c.yaml --accelerate ddp --num-processes 0", "--num-processes = 0"),
        ("evaluate c.yaml --accelerate zero2", "DEEPSPEED shards .* take ddp"),
        ("generate --model m --prompt x --accelerate fsdp2", "FSDP shards .* take ddp"),
        ("priors c.yaml --accelerate zero3", "DEEPSPEED shards .* take ddp"),
    ],
)  # fmt: skip
def test_what_cannot_be_started_is_one_line(launched, monkeypatch, capsys, arguments, told):
    with pytest.raises(SystemExit) as left:
        duet(monkeypatch, *arguments.split())
    error = capsys.readouterr().err
    assert left.value.code == 2 and re.search(told, error) and error.count("\n") == 1
    assert not launched


BASE = (
    "compute_environment: LOCAL_MACHINE\nmixed_precision: 'no'\nnum_processes: 2\nnum_machines: 1\n"
)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (BASE + "distributed_type: MULTI_CPU", "MULTI_CPU: allowed is NO, MULTI_GPU, .* use_cpu: true"),
        (BASE + "distributed_type: MEGATRON_LM", "MEGATRON_LM: allowed is"),
        (BASE + "distributed_type: GPUS", "accelerate does not read it: 'GPUS'"),
        (BASE + "distributed_type: MULTI_GPU\nprocesses: 3", "does not read it: .*processes"),
        (BASE + "distributed_type: [", "does not read it"),
        ("", "does not read it"),
        (BASE + "distributed_type: FSDP\nfsdp_config: {fsdp_version: 2, fsdp_mixed_precision_policy: bf16}", "passes over fsdp_config.fsdp_mixed_precision_policy"),
        (BASE + "distributed_type: DEEPSPEED\ndeepspeed_config: {zero_stag: 3}", "passes over deepspeed_config.zero_stag"),
        (BASE + "distributed_type: FSDP\ndeepspeed_config: {zero_stage: 3}", "deepspeed_config goes against distributed_type = FSDP"),
        (BASE + "distributed_type: MULTI_GPU\nfp8_config: {backend: TE}", "fp8_config goes against"),
    ],
)  # fmt: skip
def test_a_file_that_accelerate_would_not_start_as_it_reads(launched, tmp_path, text, told):
    file = tmp_path / "own.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=told):
        spread.start(spread.Spread(file, None), "duet.train", [], trains=True)
    assert not launched


def test_deepspeed_that_is_missing_is_named_before_anything_starts(launched, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        duet(monkeypatch, "train", "c.yaml", "--accelerate", "zero3")
    assert "pip install 'duet[deepspeed]', or take fsdp2" in capsys.readouterr().err


def test_the_batch_file_starts_one_launcher_a_machine(launched, small_run):
    """SLURM's variables in the place of which it puts its own; no SLURM is at hand."""
    batch = ROOT / "launch" / "slurm.sbatch"
    subprocess.run(["bash", "-n", str(batch)], check=True)
    text = batch.read_text().replace("\\\n", " ")
    options = set(re.findall(r"^#SBATCH (\S+)", text, re.MULTILINE))
    assert {"--signal=USR1@120", "--requeue", "--ntasks-per-node=1"} <= options
    [command] = re.findall(r"-m duet\.launch\.spread (.*?)' duet", text)
    told = {
        "FILE": str(FILES["fsdp2"]), "SLURM_JOB_NUM_NODES": "4", "PROCESSES": "32", "SLURM_NODEID": "3",
        "MAIN_IP": "node0", "MAIN_PORT": "0", "@": "run.yaml",
    }  # fmt: skip
    for name, value in told.items():
        command = command.replace(f'"${name}"', value)
    assert "$" not in command
    spread.launch(shlex.split(command))
    [(asked, environment)] = launched
    assert (asked.nnodes, asked.nproc_per_node, asked.node_rank) == ("4", "8", 3)
    assert asked.rdzv_endpoint.startswith("node0:") and asked.training_script == "duet.train"
    assert asked.training_script_args == ["run.yaml", "train.resume=latest"]
    assert sharding_engine_of(environment) == "fsdp2"
    require_own_settings(environment, small_run("ar"))


def test_processes_start_over_gloo_and_a_signal_reaches_them(tmp_path):
    """What is sent to the launcher alone comes to all, and its status is theirs."""
    run = tmp_path / "run"
    command = [
        sys.executable, "-m", "duet.launch.cli", "train", "configs/tiny/decoder.yaml", "--accelerate", "cpu",
        "rollout.prompts_per_step=2", "rollout.num_generations=2", "optim.per_device_train_batch_size=2",
        "optim.gradient_accumulation_steps=1", "grpo.num_iterations=1", "sampling.num_inference_steps=4", "sde.window_start_max=0",
        "train.trackers=[]", "rewards=[{name: duet.train.tiny.hackable.Sharpness}]", f"output_dir={run}",
    ]  # fmt: skip
    with (tmp_path / "err").open("w") as err:
        started = subprocess.Popen(command, cwd=ROOT, stderr=err, start_new_session=True)
    try:
        until = time.monotonic() + 240
        while not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").read_text():
            assert started.poll() is None and time.monotonic() < until, (
                tmp_path / "err"
            ).read_text()
            time.sleep(0.1)
        started.send_signal(signal.SIGUSR1)
        assert started.wait(60) == 128 + signal.SIGUSR1
    finally:
        if started.poll() is None:
            os.killpg(started.pid, signal.SIGKILL)
    [checkpoint] = run.glob("*checkpoint*")
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    assert state["num_processes"] == 2
    lines = [line for line in (tmp_path / "err").read_text().splitlines() if "duet: error" in line]
    assert sum(f"SIGUSR1 ended the run; {checkpoint} is whole" in line for line in lines) == 2
    assert lines[-1] == "duet: error: SIGUSR1 ended the processes"
