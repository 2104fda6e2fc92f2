"""Full tuning: how much memory a process needs until its weights are there, at growing model size.

    python -m duet.train.tiny.start_memory [--engines ddp zero3 fsdp2] [--processes 2 4]

Decoders of random weights in the place of the tiny model's; on this machine's CPU over gloo. What
counts is a process's own memory (RssAnon of proc(5)), beside what it has before the model: files
that are only mapped can be given up at any time.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from accelerate import PartialState
from accelerate.utils import gather_object
from diffusers import GlmImageTransformer2DModel

from duet.configs.load import load_config
from duet.train.setup import prepare
from duet.train.tiny.engines import ENGINES, TINY

_MIB = 2**20
_LAYERS = (2, 4, 8)  # of 16 heads x 64: about 60 MiB each in float32


def make_model(layers: int, folder: Path) -> int:
    """The tiny model with another decoder; the decoder's size in bytes, in float32."""
    folder.mkdir()
    for part in (TINY / "model").iterdir():
        if part.name != "transformer":
            (folder / part.name).symlink_to(part)
    config = GlmImageTransformer2DModel.load_config(TINY / "model" / "transformer")
    large = {"num_layers": layers, "num_attention_heads": 16, "attention_head_dim": 64}
    decoder = GlmImageTransformer2DModel.from_config({**config, **large})
    decoder.save_pretrained(folder / "transformer", max_shard_size="50MB")
    return 4 * sum(p.numel() for p in decoder.parameters())


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


def start(model: Path, output: Path) -> None:
    """One process of a run, as far as its first step."""
    config = load_config(
        TINY / "decoder.yaml",
        [
            f"model.path={model}",
            "tuning=full",
            f"output_dir={output}",
            "rollout.prompts_per_step=4",
            "rollout.num_generations=2",
            "optim.per_device_train_batch_size=2",
            "optim.gradient_accumulation_steps=1",
            "rewards=[{name: duet.train.tiny.hackable.Sharpness}]",
            "train.trackers=[]",
        ],
    )
    peaks: list[int] = []

    def built(*given: object) -> None:
        """The first thing that is done with the parts; the next one samples."""
        peaks.append(seen[1] - seen[0])

    with largest() as seen, mock.patch("duet.train.gate.check_schedule", built):
        prepare(config)
    most = max(gather_object(peaks))
    if PartialState().is_main_process:
        (output / "peak.json").write_text(json.dumps(most))


def launch(engine: str, processes: int, model: Path, output: Path) -> int:
    """The most that any process needed, in bytes."""
    output.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", str(processes), "-m", "duet.train.tiny.start_memory"]
    own = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"} | ENGINES[engine]
    subprocess.run(
        [*command, "--process-of", str(model), str(output)],
        env=os.environ | own,
        cwd=TINY.parents[1],
        check=True,
        capture_output=True,
    )
    return json.loads((output / "peak.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engines", nargs="+", default=["ddp", "zero3", "fsdp2"], choices=ENGINES)
    parser.add_argument("--processes", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--process-of", nargs=2, type=Path, help=argparse.SUPPRESS)  # of a process
    options = parser.parse_args()
    if options.process_of:
        start(*options.process_of)
        return
    with tempfile.TemporaryDirectory() as name:
        folder, sizes = Path(name), {}
        for layers in _LAYERS:
            sizes[layers] = make_model(layers, folder / f"model-{layers}")
        told = " | ".join(f"{size / _MIB:.0f} MiB" for size in sizes.values())
        print(f"| engine | processes | {told} |\n|---|---|{'---|' * len(sizes)}")
        for engine in options.engines:
            for processes in options.processes:
                peaks = [
                    launch(
                        engine,
                        processes,
                        folder / f"model-{n}",
                        folder / f"{engine}-{processes}-{n}",
                    )
                    for n in _LAYERS
                ]
                cells = " | ".join(f"{peak / _MIB:.0f} MiB" for peak in peaks)
                print(f"| {engine} | {processes} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
