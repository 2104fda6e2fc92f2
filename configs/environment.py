"""Environment variables of accelerate: what a run is stands in its own settings, and a variable
that asks for something else is honoured or refused by its name, never passed over.

What `accelerate launch` makes of a config file reaches the processes as such variables.
"""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from duet.configs.errors import UserError

# accelerate's words
OFF = ("false", "0", "no", "off", "f", "n")
ON = ("true", "1", "yes", "on", "t", "y")
# of accelerate, and of what it hands to the engines
_PREFIXES = ("ACCELERATE_", "FSDP_", "MEGATRON_LM_", "PARALLELISM_CONFIG_")


@dataclass(frozen=True)
class Rule:
    """What a variable may say, and what anything else goes against."""

    allowed: Sequence[str] | None  # whatever the case of its letters; None: anything
    against: str = ""
    same: Callable[[str, str], bool] = str.__eq__  # what it says, and what is allowed

    def passes(self, value: str) -> bool:
        if self.allowed is None:
            return True
        return any(self.same(value.lower(), allowed.lower()) for allowed in self.allowed)


Rules = Mapping[str, Rule]
ANYTHING = Rule(None)  # it changes no result, or only says how something would be done
_UNKNOWN = Rule((), "Duet, which does nothing of the kind in this run")
_COMPILES = "Duet, which compiles nothing"


def common_rules(mixed_precision: str, device: str) -> dict[str, Rule]:
    """Of every command. `device`: as model.device has it."""
    rules = {
        "ACCELERATE_MIXED_PRECISION": Rule(
            tuple(dict.fromkeys(("no", mixed_precision))), "train.mixed_precision"
        ),
        "ACCELERATE_DYNAMO_BACKEND": Rule(("no",), _COMPILES),
        "ACCELERATE_DYNAMO_MODE": Rule(("default",), _COMPILES),
        "ACCELERATE_DYNAMO_USE_FULLGRAPH": Rule(OFF, _COMPILES),
        "ACCELERATE_DYNAMO_USE_DYNAMIC": Rule(OFF, _COMPILES),
        "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": Rule(OFF, _COMPILES),
        "ACCELERATE_USE_CPU": Rule(OFF, "model.device") if device == "cuda" else ANYTHING,
        "ACCELERATE_TORCH_DEVICE": Rule(
            () if device == "auto" else (device,), "model.device (CUDA_VISIBLE_DEVICES picks a GPU)"
        ),
        "ACCELERATE_USE_DEEPSPEED": ANYTHING,  # read by `sharding`
        "ACCELERATE_USE_FSDP": ANYTHING,
        "ACCELERATE_CPU_AFFINITY": ANYTHING,  # where threads run
        "ACCELERATE_DEBUG_MODE": ANYTHING,  # collectives are checked
        "ACCELERATE_DEBUG_RDV_FILE": ANYTHING,  # where processes meet
        "ACCELERATE_LOG_LEVEL": ANYTHING,
        "ACCELERATE_ENABLE_RICH": ANYTHING,
    }
    for kind in ("MEGATRON_LM", "PARALLELISM_CONFIG", "SAGEMAKER"):
        rules[f"ACCELERATE_USE_{kind}"] = Rule(OFF, "Duet, which spreads by DDP, ZeRO or FSDP2")
    return rules


def require(environment: Mapping[str, str], rules: Rules) -> None:
    """Raises UserError for a variable of accelerate's that says what its rule does not allow, or
    that has none."""
    for name in sorted(environment):
        rule = rules.get(name, _UNKNOWN if name.startswith(_PREFIXES) else ANYTHING)
        if not rule.passes(environment[name]):
            allowed = f" (allowed is {' or '.join(rule.allowed)})" if rule.allowed else ""
            raise UserError(
                f"{name} = {environment[name]!r} in the environment goes against {rule.against}: "
                f"change or unset it, where it was set or in accelerate's config file{allowed}"
            )


def on_cpu_alone(environment: Mapping[str, str]) -> bool:
    """Whether accelerate's environment keeps the processes from GPUs that are there.

    Raises UserError for a value that accelerate does not read.
    """
    value = environment.get("ACCELERATE_USE_CPU", "false")
    if value.lower() not in (*ON, *OFF):
        raise UserError(f"ACCELERATE_USE_CPU = {value!r}: allowed is true or false")
    return value.lower() in ON


def require_gpus_allowed(environment: Mapping[str, str], asked: str) -> None:
    """`asked`: the setting that names a GPU, for the message. Raises UserError where the processes
    are to stay on the CPU."""
    if on_cpu_alone(environment):
        raise UserError(
            f"{asked} goes against ACCELERATE_USE_CPU = {environment['ACCELERATE_USE_CPU']!r} in "
            "the environment (--accelerate cpu sets it): ask for the CPU, or unset it"
        )


def sharding(environment: Mapping[str, str]) -> str | None:
    """`DEEPSPEED` or `FSDP`, where accelerate's environment asks for it.

    Raises UserError for both, and for a value by which accelerate would spread by DDP in silence.
    """
    asked = []
    for kind in ("DEEPSPEED", "FSDP"):
        name = f"ACCELERATE_USE_{kind}"
        value = environment.get(name, "false").lower()
        if value not in ("true", *OFF):
            raise UserError(f"{name} = {environment[name]!r}: allowed is true or false")
        if value == "true":
            asked.append(kind)
    if len(asked) == 2:
        raise UserError("ACCELERATE_USE_DEEPSPEED and ACCELERATE_USE_FSDP: ask for one of the two")
    return next(iter(asked), None)


def require_shared_work(
    environment: Mapping[str, str], command: str, mixed_precision: str = "no", device: str = "auto"
) -> None:
    """Of a command that trains nothing: its processes share work, and hold the model each.

    Raises UserError where the weights are asked to be sharded, and as `require` does.
    """
    kind = sharding(environment)
    if kind is not None:
        raise UserError(
            f"ACCELERATE_USE_{kind} = 'true' shards what is trained, and `duet {command}` trains "
            "nothing: its processes share the pictures. Take ddp (duet "
            f"{command} ... --accelerate ddp)"
        )
    # of updates, which are not made
    idle = dict.fromkeys(
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "ACCELERATE_GRADIENT_CLIPPING"), ANYTHING
    )
    require(environment, common_rules(mixed_precision, device) | idle)


def require_deepspeed(asked: str) -> None:
    """Raises UserError where DeepSpeed is not installed."""
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError(f"{asked} needs DeepSpeed: pip install 'duet[deepspeed]', or take fsdp2")
