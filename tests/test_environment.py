"""Variables of accelerate: each one is honoured, harmless or refused by its name."""

import importlib.util
import re
from dataclasses import replace
from pathlib import Path

import accelerate
import pytest
import torch

from duet.configs.environment import require_shared_work
from duet.configs.errors import UserError
from duet.configs.schema import RewardConfig
from duet.inference.model import pick_device
from duet.rewards.registry import load_reward, load_rewards
from duet.train.environment import (
    hybrid,
    require_own_settings,
    sharding_engine,
    sharding_engine_of,
)

ZERO = {"ACCELERATE_USE_DEEPSPEED": "true"}
ZERO3 = ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
# they change no result, or only say how something would be done
HARMLESS = {
    "ACCELERATE_USE_CPU", "ACCELERATE_CPU_AFFINITY", "ACCELERATE_DEBUG_MODE",
    "ACCELERATE_DEBUG_RDV_FILE", "ACCELERATE_LOG_LEVEL", "ACCELERATE_ENABLE_RICH", "ACCELERATE_CONFIG_DS_FIELDS",
    "FSDP_MIN_NUM_PARAMS", "FSDP_SYNC_MODULE_STATES", "FSDP_CPU_RAM_EFFICIENT_LOADING",
}  # fmt: skip


def known_to_accelerate() -> list[str]:
    """Every variable that its code names, whole or behind a prefix."""
    names = set()
    for path in Path(accelerate.__file__).parent.rglob("*.py"):
        if "test_utils" in path.parts:
            continue
        text = path.read_text()
        names |= set(
            re.findall(r'"((?:ACCELERATE|FSDP|PARALLELISM_CONFIG)_[A-Z0-9_]*[A-Z0-9])"', text)
        )
        for body in re.split(r"\n(?:class|def) ", text):
            prefix = re.search(r'prefix = "([A-Z0-9_]+_)"', body)
            names |= {prefix[1] + n for n in re.findall(r'prefix \+ "(\w+)"', body) if prefix}
    return sorted(names)


KNOWN = known_to_accelerate()


@pytest.fixture(autouse=True)
def deepspeed_is_there(monkeypatch):
    """As far as anybody asks: nothing here starts it."""
    true = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: n == "deepspeed" or true(n))


def test_the_names_were_found():
    assert {"ACCELERATE_DEEPSPEED_ZERO3_INIT", "FSDP_OFFLOAD_PARAMS", "FSDP_VERSION", "MEGATRON_LM_TP_DEGREE"} <= set(KNOWN)  # fmt: skip
    assert {"ACCELERATE_FP8_MARGIN", "ACCELERATE_DYNAMO_MODE", "PARALLELISM_CONFIG_TP_SIZE"} <= set(
        KNOWN
    )
    assert len(KNOWN) > 90 and set(KNOWN) >= HARMLESS


@pytest.mark.parametrize("name", [*KNOWN, "ACCELERATE_OF_NEXT_YEAR", "FSDP_OF_NEXT_YEAR"])
def test_a_variable_that_says_what_nobody_honours_is_refused(small_run, name):
    given = ZERO3 if "DEEPSPEED" in name or "DS_FIELDS" in name else {}
    given = FSDP2 if name.startswith("FSDP") else given
    config = small_run("ar")
    if name in HARMLESS:
        require_own_settings(given | {name: "odd"}, config)
        return
    with pytest.raises(UserError, match=f"{name} = 'odd'"):
        require_own_settings(given | {name: "odd"}, config)


@pytest.mark.parametrize("name", [n for n in KNOWN if n.startswith(("FSDP_", "ACCELERATE_DEEPSPEED_"))])  # fmt: skip
def test_a_setting_of_an_engine_that_is_not_asked_for_is_refused(small_run, name):
    """DDP would run, whatever it says."""
    with pytest.raises(UserError, match=f"{name} = '2' .* nothing of the kind"):
        require_own_settings({name: "2"}, small_run("ar"))


@pytest.mark.parametrize(
    ("environment", "chosen"),
    [
        ({}, "ddp"),
        ({"ACCELERATE_USE_FSDP": "false", "ACCELERATE_USE_DEEPSPEED": "0"}, "ddp"),
        (ZERO, "zero2"),
        (ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}, "zero2"),
        (ZERO3, "zero3"),
        (FSDP2, "fsdp2"),
        ({"ACCELERATE_USE_FSDP": "True", "FSDP_VERSION": "2"}, "fsdp2"),
    ],
)
def test_the_engine_is_the_one_asked_for(small_run, monkeypatch, environment, chosen):
    assert sharding_engine_of(environment) == chosen
    require_own_settings(environment, small_run("decoder"))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert sharding_engine() == chosen and not hybrid()
    monkeypatch.setenv("FSDP_SHARDING_STRATEGY", "HYBRID_SHARD")
    assert hybrid()


@pytest.mark.parametrize(
    "honoured",
    [
        {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO"},
        {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_DYNAMO_USE_DYNAMIC": "False"},
        {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "2", "ACCELERATE_GRADIENT_CLIPPING": "1"},
        {"ACCELERATE_USE_MEGATRON_LM": "false", "SOME_OTHER": "odd"},
        ZERO3 | {"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none", "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false"},
        FSDP2 | {"FSDP_TRANSFORMER_CLS_TO_WRAP": "GlmImageTransformerBlock", "FSDP_SHARDING_STRATEGY": "HYBRID_SHARD"},
        FSDP2 | {"FSDP_BACKWARD_PREFETCH": "BACKWARD_PRE", "FSDP_RESHARD_AFTER_FORWARD": "true"},
    ],
)  # fmt: skip
def test_what_duet_does_anyway_passes(small_run, honoured):
    require_own_settings(
        honoured, small_run("ar", "train.mixed_precision=bf16", "model.dtype=bfloat16")
    )


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "7"}, "optim.gradient_accumulation_steps.*allowed is 2"),
        ({"ACCELERATE_GRADIENT_CLIPPING": "0.5"}, "optim.max_grad_norm.*allowed is 1.0"),
        ({"ACCELERATE_GRADIENT_CLIPPING": "auto"}, "optim.max_grad_norm"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "train.mixed_precision"),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "train.mixed_precision"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "compiles nothing"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "DDP, ZeRO or FSDP2"),
        ({"ACCELERATE_USE_DEEPSPEED": "1"}, "allowed is true or false"),
        ({"ACCELERATE_USE_FSDP": "yes"}, "allowed is true or false"),
        (ZERO | FSDP2, "one of the two"),
        (ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}, "take ddp"),
        (ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"}, "take ddp"),
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP_VERSION = '1' .* FSDP2"),
        (ZERO | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": "ds.json"}, "writes DeepSpeed's configuration"),
        (ZERO3 | {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}, "keeps on the GPU"),
        (ZERO3 | {"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_NVME_PATH": "/nvme"}, "keeps on the GPU"),
        (ZERO3 | {"ACCELERATE_DEEPSPEED_ZERO3_INIT": "true"}, "would shard the frozen parts too"),
        (FSDP2 | {"FSDP_OFFLOAD_PARAMS": "true"}, "keeps on the GPU"),
        (FSDP2 | {"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "optim.gradient_checkpointing"),
        (FSDP2 | {"FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}, "Duet's checkpoints"),
        (FSDP2 | {"FSDP_SHARDING_STRATEGY": "SHARD_GRAD_OP"}, "allowed is FULL_SHARD or HYBRID_SHARD"),
    ],
)  # fmt: skip
def test_what_goes_against_a_setting_is_told_with_what_to_take(small_run, environment, told):
    with pytest.raises(UserError, match=told):
        require_own_settings(environment, small_run("ar"))


@pytest.mark.parametrize(("name", "device"), [("USE_CPU", "cuda"), ("TORCH_DEVICE", "cpu")])
def test_a_device_against_the_configs_is_refused(small_run, name, device):
    with pytest.raises(UserError, match=f"ACCELERATE_{name} = 'true' .* model.device"):
        require_own_settings(
            {f"ACCELERATE_{name}": "true"}, small_run("ar", f"model.device={device}")
        )


@pytest.mark.parametrize(
    ("value", "device"), [("true", "cpu"), ("1", "cpu"), ("Yes", "cpu"), ("no", "cuda"), (None, "cuda")]
)  # fmt: skip
def test_auto_is_the_cpu_where_accelerate_asks_for_it(monkeypatch, value, device):
    """On a machine with a GPU, as `--accelerate cpu` promises."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    if value is not None:
        monkeypatch.setenv("ACCELERATE_USE_CPU", value)
    assert pick_device().type == device
    assert load_reward(RewardConfig("alignment")).device.type == device


ON_GPU = {
    "model.device = 'cuda'": lambda: pick_device("cuda"),
    "device 'cuda'": lambda: load_reward(RewardConfig("alignment", args={"device": "cuda"})),
    "device 'cuda:1'": lambda: load_reward(RewardConfig("pyiqa", args={"metric": "niqe", "device": "cuda:1"})),
    "ocr engine 'cuda'": lambda: load_rewards([RewardConfig("ocr", args={"engine": "cuda"})]),
}  # fmt: skip


@pytest.mark.parametrize("asked", ON_GPU)
def test_a_gpu_asked_for_against_accelerate_is_refused(monkeypatch, asked):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: providers)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    told = rf"^{re.escape(asked)} goes against ACCELERATE_USE_CPU = 'true' .* or unset it$"
    with pytest.raises(UserError, match=told) as refused:
        ON_GPU[asked]()
    assert refused.value.status == 2


def test_a_word_that_accelerate_does_not_read_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "")
    with pytest.raises(UserError, match="ACCELERATE_USE_CPU = '': allowed is true or false"):
        pick_device()


@pytest.mark.parametrize("sharded", [ZERO, ZERO3, FSDP2])
def test_sharding_needs_a_loss_that_is_not_scaled(small_run, sharded):
    config = small_run("ar", "train.mixed_precision=fp16", "model.dtype=float16")
    with pytest.raises(UserError, match="'fp16' under .* take 'bf16', or ddp"):
        require_own_settings(sharded, config)


@pytest.mark.parametrize("sharded", [ZERO, ZERO3])
def test_deepspeed_that_is_missing_is_named_with_its_extra(small_run, sharded, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'duet\[deepspeed\]', or take fsdp2"):
        require_own_settings(sharded, small_run("ar"))
    require_own_settings(FSDP2, small_run("ar"))


def test_two_parts_that_differ_leave_no_value_for_one_variable(small_run):
    config = small_run("both")
    first, second = config.stages
    first = replace(first, optim=replace(first.optim, max_grad_norm=0.5))
    config = replace(config, stages=(first, second))
    for value in ("0.5", "1.0"):
        with pytest.raises(UserError, match="optim.max_grad_norm"):
            require_own_settings({"ACCELERATE_GRADIENT_CLIPPING": value}, config)


def test_a_command_that_trains_nothing_shares_work_alone():
    require_shared_work({"ACCELERATE_GRADIENT_CLIPPING": "7", "ACCELERATE_USE_CPU": "true"}, "priors")  # fmt: skip
    for sharded in (ZERO, FSDP2):
        with pytest.raises(UserError, match="`duet evaluate` trains nothing: .* Take ddp"):
            require_shared_work(sharded, "evaluate")
    for name, value in (("ACCELERATE_MIXED_PRECISION", "bf16"), ("FSDP_VERSION", "2")):
        with pytest.raises(UserError, match=name):
            require_shared_work({name: value}, "generate")
