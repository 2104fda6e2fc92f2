"""Environment variables of accelerate: a run's settings stand in its YAML."""

import os
from collections.abc import Mapping
from typing import Literal

from duet.configs.errors import UserError
from duet.configs.schema import RunConfig

_SPREADING = ("DEEPSPEED", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG")


Engine = Literal["ddp", "zero2", "zero3", "fsdp2"]


def engine() -> Engine:
    """What spreads the run over its processes, as accelerate's environment asks for it.

    DDP is where nothing is asked, also for one process. Raises UserError for an engine that Duet
    does not train by.
    """
    return _engine(os.environ)


def _engine(environment: Mapping[str, str]) -> Engine:
    asked = [k for k in ("DEEPSPEED", "FSDP") if environment.get(f"ACCELERATE_USE_{k}") == "true"]
    match asked:
        case []:
            return "ddp"
        case ["DEEPSPEED"]:
            stage = environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
            return "zero3" if stage == "3" else "zero2"
        case _:
            return "fsdp2"


def require_own_settings(config: RunConfig) -> None:
    """Raises UserError for a variable that would run something else than the config says.

    What `accelerate launch` sets by itself (no mixed precision, no compiler) passes.
    """
    device, mixed = config.model.device, config.train.mixed_precision
    steps = str(config.optim.gradient_accumulation_steps)
    kept = {
        "GRADIENT_ACCUMULATION_STEPS": ("optim.gradient_accumulation_steps", (steps,)),
        "MIXED_PRECISION": ("train.mixed_precision", ("no", mixed)),
        "DYNAMO_BACKEND": ("Duet, which compiles nothing", ("no",)),
    }
    if device != "auto":
        kept["TORCH_DEVICE"] = ("model.device", (device,))
    if device == "cuda":
        kept["USE_CPU"] = ("model.device", ("false", "0", "no"))
    for kind in _SPREADING:
        kept[f"USE_{kind}"] = ("Duet, which spreads a run by DDP", ("false", "0", "no"))
    for short, (setting, allowed) in kept.items():
        name = f"ACCELERATE_{short}"
        value = os.environ.get(name, allowed[0])
        if value.lower() not in allowed:
            raise UserError(
                f"{name} = {value!r} in the environment goes against {setting}: "
                f"unset it (allowed is {' or '.join(dict.fromkeys(allowed))})"
            )
