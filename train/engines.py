"""What spreads a policy over processes, by name."""

from duet.train.environment import Engine
from duet.train.fully_sharded import FullySharded
from duet.train.sharding import Sharding
from duet.train.zero import Zero2, Zero3

_SHARDINGS = {"ddp": Sharding, "zero2": Zero2, "zero3": Zero3, "fsdp2": FullySharded}


def sharding_of(engine: Engine) -> type[Sharding]:
    return _SHARDINGS[engine]
