"""Processes that are gone or hang: how long the others wait, and what they say."""

from datetime import timedelta

import pytest
import torch.distributed as dist
from accelerate.state import AcceleratorState

from duet.inference.lost import Lost, named, naming_the_lost, wait_at_most
from duet.inference.processes import joined

# as torch 2.14 has them
CLOSED = "[/__w/pytorch/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:561] Connection closed"
TIMED_OUT = "[../third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 9ms"


class Asked(Exception):
    pass


@pytest.mark.parametrize(("gpus", "backend"), [(True, "cuda:nccl,cpu:gloo"), (False, "gloo")])
def test_objects_are_sent_by_gloo_on_gpus_too(monkeypatch, gpus, backend):
    """In NCCL nobody hears that another one is gone; accelerate's own choice is NCCL alone."""

    def init(**given):
        raise Asked(given["backend"])

    monkeypatch.setattr("torch.cuda.is_available", lambda: gpus)
    monkeypatch.setattr(dist, "init_process_group", init)
    started = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    for name, value in (started | {"MASTER_PORT": "0", "OMP_NUM_THREADS": "1"}).items():
        monkeypatch.setenv(name, value)
    AcceleratorState._reset_state(True)
    try:
        with pytest.raises(Asked, match=f"^{backend}$"):
            joined("auto", timedelta(1))
    finally:
        AcceleratorState._reset_state(True)


@pytest.fixture
def one_of_three(tmp_path):
    """Process 1, on its own: the store is there, as with torchrun, and nobody else is."""
    store = dist.FileStore(str(tmp_path / "store"), 3)
    # gloo would wait for the others at once
    dist.init_process_group("fake", store=store, rank=1, world_size=3)
    yield dist.group.WORLD.get_group_store()
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "error",
    [RuntimeError(CLOSED), RuntimeError(TIMED_OUT), dist.DistBackendError("NCCL communicator")],
)
def test_a_lost_process_is_named(one_of_three, monkeypatch, error):
    monkeypatch.setattr("duet.inference.lost.ROLL_CALL_SECONDS", 0)
    told = "^process 0, 2 is gone or hangs: its own lines"
    with pytest.raises(Lost, match=told) as ended, naming_the_lost():
        raise error
    assert ended.value.status == 2 and ended.value.__cause__ is error
    one_of_three.set("duet/left/2", "")  # the other one that is left says so
    assert str(named(error)).startswith("process 0 is gone")


@pytest.mark.parametrize("error", [RuntimeError("a shape"), ValueError(CLOSED), KeyError("x")])
def test_what_is_of_no_other_process_stays_itself(error):
    assert named(error) is error
    with pytest.raises(type(error)) as ended, naming_the_lost():
        raise error
    assert ended.value is error


def test_groups_that_an_engine_makes_have_the_time_out_of_the_run(tmp_path):
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    try:
        own = dist.new_group([0])  # as DeepSpeed and hybrid sharding do
        waits = [
            g._get_backend(dist.distributed_c10d.torch.device("cpu"))
            for g in (dist.group.WORLD, own)
        ]
        wait_at_most(7)
        assert [w.options._timeout for w in waits] == [timedelta(seconds=7)] * 2
    finally:
        dist.destroy_process_group()
