"""Environment variables of accelerate: a run's settings stand in its YAML."""

import os

from duet.configs.errors import UserError
from duet.configs.schema import RunConfig

_SPREADING = ("DEEPSPEED", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG")


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
