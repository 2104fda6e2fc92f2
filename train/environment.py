"""What accelerate's environment asks of a training run: its engine, and settings that are refused
where they go against the run's own."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

from accelerate.utils import patch_environment

from duet.configs.environment import (
    ANYTHING,
    OFF,
    ON,
    Rule,
    Rules,
    common_rules,
    require,
    require_deepspeed,
    sharding,
)
from duet.configs.errors import UserError
from duet.configs.schema import RunConfig
from duet.configs.turns import turns
from duet.inference.parts import PARTS

Engine = Literal["ddp", "zero2", "zero3", "fsdp2"]

_OWN_FILE = "Duet, which writes DeepSpeed's configuration itself"
_KEEPS = "Duet, which keeps on the GPU what is trained (model.offload is for the other parts)"
_CHECKPOINTS = "Duet's checkpoints, which are whole and open in the stock libraries"
_RECOMPUTES = "optim.gradient_checkpointing, which is Duet's setting for it"
_READS = "Duet, which shards what is trained alone: transformers would shard the frozen parts too"
_BY_BLOCK = "Duet, which shards by block"
_BLOCKS = [part.block.__name__ for part in PARTS.values()]

_DEEPSPEED: Rules = {
    "ACCELERATE_CONFIG_DS_FIELDS": ANYTHING,  # the names of what the file sets
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": Rule(
        ("2", "3"), "Duet's engines: for less than ZeRO-2 take ddp"
    ),
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": Rule(("none",), _KEEPS),
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_NVME_PATH": Rule(("none",), _KEEPS),
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": Rule(("none",), _KEEPS),
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_NVME_PATH": Rule(("none",), _KEEPS),
    "ACCELERATE_DEEPSPEED_ZERO3_INIT": Rule(OFF, _READS),
    "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": Rule(OFF, _CHECKPOINTS),
    "ACCELERATE_DEEPSPEED_CONFIG_FILE": Rule(("none",), _OWN_FILE),
    "ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES": Rule(("none",), "GLM-Image, which has no experts"),
}
_FSDP: Rules = {
    "FSDP_VERSION": Rule(("2",), "Duet's engines: FSDP2 is torch's own successor of version 1"),
    # hybrid: sharded within a machine, copied between machines
    "FSDP_SHARDING_STRATEGY": Rule(("FULL_SHARD", "HYBRID_SHARD"), _BY_BLOCK),
    "FSDP_RESHARD_AFTER_FORWARD": Rule(ON, "Duet, which frees a gathered block after its forward"),
    "FSDP_OFFLOAD_PARAMS": Rule(OFF, _KEEPS),
    "FSDP_AUTO_WRAP_POLICY": Rule(("TRANSFORMER_BASED_WRAP",), _BY_BLOCK),
    "FSDP_TRANSFORMER_CLS_TO_WRAP": Rule((*_BLOCKS, ",".join(_BLOCKS)), _BY_BLOCK),
    "FSDP_MIN_NUM_PARAMS": ANYTHING,  # of a wrapping by size, which is refused
    "FSDP_BACKWARD_PREFETCH": Rule(("BACKWARD_PRE",), "FSDP2, which does that one by itself"),
    "FSDP_FORWARD_PREFETCH": Rule(OFF, "FSDP2, which has no such setting"),
    "FSDP_USE_ORIG_PARAMS": Rule(ON, "FSDP2, which always does"),
    "FSDP_SYNC_MODULE_STATES": ANYTHING,  # every process reads the same files
    # accelerate's default. Every process reads the frozen parts, as transformers does either way
    "FSDP_CPU_RAM_EFFICIENT_LOADING": ANYTHING,
    "FSDP_STATE_DICT_TYPE": Rule((), _CHECKPOINTS),
    "FSDP_ACTIVATION_CHECKPOINTING": Rule(OFF, _RECOMPUTES),
    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": Rule(OFF, _RECOMPUTES),
    "FSDP_IGNORED_MODULES": Rule((), _BY_BLOCK),
}
_ENGINES: Mapping[str | None, Rules] = {None: {}, "DEEPSPEED": _DEEPSPEED, "FSDP": _FSDP}


def sharding_engine() -> Engine:
    """What spreads the run over its processes, as accelerate's environment asks for it.

    DDP is where nothing is asked, also for one process. Raises UserError for an engine that Duet
    does not train by.
    """
    return sharding_engine_of(os.environ)


def sharding_engine_of(environment: Mapping[str, str]) -> Engine:
    kind = sharding(environment)
    if kind is None:
        return "ddp"
    # accelerate's own defaults
    name, default = {
        "DEEPSPEED": ("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"),
        "FSDP": ("FSDP_VERSION", "1"),
    }[kind]
    value = environment.get(name, default)
    require({name: value}, _ENGINES[kind])
    return "fsdp2" if kind == "FSDP" else f"zero{value}"


def hybrid() -> bool:
    """Whether FSDP2 shards within a machine alone, and machines hold copies."""
    return os.environ.get("FSDP_SHARDING_STRATEGY", "").upper() == "HYBRID_SHARD"


def require_own_settings(environment: Mapping[str, str], config: RunConfig) -> None:
    """Raises UserError for a variable by which something else would run than the config says, and
    for an engine that cannot run it.

    What `accelerate launch` sets by itself (no mixed precision, no compiler) passes.
    """
    chosen = sharding_engine_of(environment)
    optims = [part.optim for part in turns(config).values()]
    rules = common_rules(config.train.mixed_precision, config.model.device)
    for name, setting, same in (
        ("ACCUMULATION_STEPS", "gradient_accumulation_steps", str.__eq__),
        ("CLIPPING", "max_grad_norm", _same_number),
    ):
        values = {str(getattr(optim, setting)) for optim in optims}
        # one variable cannot tell of two parts
        allowed = values if len(values) == 1 else ()
        rules[f"ACCELERATE_GRADIENT_{name}"] = Rule(tuple(allowed), f"optim.{setting}", same)
    require(environment, rules | _ENGINES[sharding(environment)])
    if chosen != "ddp" and config.train.mixed_precision == "fp16":
        raise UserError(
            f"train.mixed_precision = 'fp16' under {chosen}, whose loss Duet does not scale: take "
            "'bf16', or ddp"
        )
    if chosen in ("zero2", "zero3"):
        require_deepspeed(chosen)


def _same_number(value: str, allowed: str) -> bool:
    try:
        return float(value) == float(allowed)
    except ValueError:
        return False


@contextmanager
def processes_alone() -> Iterator[None]:
    """While open accelerate makes processes that see each other, and nothing more: modules are
    spread by train/engines.py, on a CPU as on GPUs.
    """
    asked = {f"ACCELERATE_USE_{kind}": "false" for kind in ("DEEPSPEED", "FSDP")}
    with patch_environment(**asked):
        yield
