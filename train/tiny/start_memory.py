"""Full tuning: how much memory a process needs until its weights are there, at growing model size.

    python -m duet.train.tiny.start_memory [--stages decoder ar] [--engines ddp zero3 fsdp2]
        [--processes 2] [--layers 2 4 8]

Decoders and ARs of random weights in the place of the tiny model's, each made, measured and
deleted; on this machine's CPU over gloo. What counts is a process's own memory (RssAnon of
proc(5)), beside what it has before the model: files that are only mapped can be given up at any
time.
"""

import argparse
import json
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import product
from pathlib import Path
from typing import NoReturn
from unittest import mock

from accelerate import PartialState
from accelerate.utils import gather_object
from diffusers import GlmImageTransformer2DModel
from torch.nn import Module
from transformers import GlmImageConfig, GlmImageForConditionalGeneration

from duet.configs.load import load_config
from duet.inference.parts import AR, DECODER, PARTS, Part
from duet.train.setup import prepare
from duet.train.tiny.engine_updates import TINY
from duet.train.tiny.launcher import ENGINES, launched, require_success

_MIB = 2**20
_LAYERS = (2, 4, 8)


def make_model(part: Part, layers: int, folder: Path) -> int:
    """The tiny model with another part; that part's size in bytes, in float32."""
    folder.mkdir()
    for other in (TINY / "model").iterdir():
        if other.name != part.component:
            (folder / other.name).symlink_to(other)
    module, own = _WIDE[part.name](layers), folder / part.component
    module.save_pretrained(own, max_shard_size="50MB")
    told = TINY / "model" / part.component / "generation_config.json"
    if told.is_file():
        shutil.copy(told, own)
    return 4 * sum(p.numel() for p in module.parameters())


def _decoder(layers: int) -> Module:
    """Of about 50 MiB a layer."""
    config = GlmImageTransformer2DModel.load_config(TINY / "model" / DECODER.component)
    wide = {"num_layers": layers, "num_attention_heads": 16, "attention_head_dim": 64}
    return GlmImageTransformer2DModel.from_config({**config, **wide})


def _ar(layers: int) -> Module:
    """Of about 50 MiB a layer."""
    config = GlmImageConfig.from_pretrained(TINY / "model" / AR.component)
    text = config.text_config
    text.num_hidden_layers, text.num_attention_heads = layers, 36  # heads as wide as they were
    text.hidden_size, text.intermediate_size = 36 * 32, 3072
    return GlmImageForConditionalGeneration(config)


_WIDE = {"decoder": _decoder, "ar": _ar}


@contextmanager
def largest(every_seconds: float = 0.01) -> Iterator[list[int]]:
    """While open, the most memory that this process had of its own, in bytes: [before, most]."""
    seen = [_own_memory()] * 2
    done = threading.Event()

    def watch() -> None:
        while not done.wait(every_seconds):
            seen[1] = max(seen[1], _own_memory())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()


def _own_memory() -> int:
    [line] = [x for x in Path("/proc/self/status").read_text().splitlines() if "RssAnon" in x]
    return int(line.split()[1]) * 1024


class _Built(Exception):
    pass


def start(stage: str, model: Path, output: Path) -> None:
    """One process of a run, as far as its first step."""
    config = load_config(
        TINY / f"{stage}.yaml",
        [
            f"model.path={model}",
            "tuning=full",
            f"output_dir={output}",
            "rollout.prompts_per_step=4",
            "rollout.num_generations=2",
            "optim.per_device_train_batch_size=2",
            "optim.gradient_accumulation_steps=1",
            "grpo.beta=0.01",  # as the real configs: a copy of the first weights
            "rewards=[{name: duet.train.tiny.hackable.Sharpness}]",
            "train.trackers=[]",
        ],
    )

    def built(*given: object) -> NoReturn:
        """Instead of the first thing that is done with the parts; the next one samples."""
        raise _Built

    with largest() as seen, mock.patch("duet.train.gate.check_schedule", built), suppress(_Built):
        prepare(config)
    most = max(gather_object([seen[1] - seen[0]]))
    if PartialState().is_main_process:
        (output / "peak.json").write_text(json.dumps(most))


def launch(engine: str, processes: int, stage: str, model: Path, output: Path) -> int:
    """The most that any process needed, in bytes."""
    output.mkdir()
    asked = ("duet.train.tiny.start_memory", "--process-of", stage, str(model), str(output))
    own = {"MALLOC_MMAP_THRESHOLD_": str(2**16)}  # bytes: what is freed is given back at once
    require_success(launched(engine, processes, *asked, environment=own))
    return json.loads((output / "peak.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stages", nargs="+", default=["decoder", "ar"], choices=PARTS)
    parser.add_argument("--engines", nargs="+", default=["ddp", "zero3", "fsdp2"], choices=ENGINES)
    parser.add_argument("--processes", nargs="+", type=int, default=[2])
    parser.add_argument("--layers", nargs="+", type=int, default=_LAYERS)
    parser.add_argument("--process-of", nargs=3, help=argparse.SUPPRESS)  # of a process
    options = parser.parse_args()
    if options.process_of:
        stage, *folders = options.process_of
        start(stage, *map(Path, folders))
        return
    print(f"| stage | its weights | processes | {' | '.join(options.engines)} |")
    print("|---" * (3 + len(options.engines)) + "|", flush=True)
    for stage, layers in product(options.stages, options.layers):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            size = make_model(PARTS[stage], layers, folder / "model")
            for processes in options.processes:
                cells = [stage, _mib(size), str(processes)]
                for engine in options.engines:
                    output = folder / f"{engine}-{processes}"
                    cells.append(_mib(launch(engine, processes, stage, folder / "model", output)))
                print(f"| {' | '.join(cells)} |", flush=True)


def _mib(size: int) -> str:
    return f"{size / _MIB:.0f} MiB"


if __name__ == "__main__":
    main()
