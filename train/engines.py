"""What spreads a policy over processes, by name."""

from torch.distributed import is_initialized

from duet.train.environment import Engine, sharding_engine
from duet.train.fully_sharded import FullySharded
from duet.train.sharding import Sharding
from duet.train.zero import Zero2, Zero3

_SHARDINGS = {"ddp": Sharding, "zero2": Zero2, "zero3": Zero3, "fsdp2": FullySharded}


def sharding_of(engine: Engine) -> type[Sharding]:
    return _SHARDINGS[engine]


def chosen_sharding() -> type[Sharding]:
    """What accelerate's environment asks for; a process without others has nothing to share."""
    return sharding_of(sharding_engine()) if is_initialized() else Sharding
