"""Pictures from prompts: python -m duet.inference.generate --model FOLDER --prompt '...'"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from duet.configs.errors import UserError, exit_on_user_error, require_folder
from duet.configs.row import Row, check_row
from duet.configs.rows import load_rows
from duet.configs.schema import Arithmetic, SamplingConfig


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="duet generate",
        description=__doc__,
        epilog="Unset numbers are what stock generation takes for the checkpoint.",
    )
    add = parser.add_argument
    add("--model", required=True, help="folder or hub id of a GLM-Image")
    add("--prompt", action="append", default=[], help="may be repeated")
    add("--prompts", help="a dataset with a `prompt`: JSONL, CSV, text, parquet, ...")
    add("--adapter", action="append", default=[], help="a checkpoint-N; one for each module")
    add("--output", default="runs/images", help="folder for the PNG files")
    add("--num-images", type=int, default=1, help="pictures of each prompt")
    add("--seed", type=int, default=0, help="picture i of a prompt takes seed + i")
    add("--height", type=int, help="pixels, a multiple of 32")
    add("--width", type=int, help="pixels, a multiple of 32")
    add("--steps", type=int, dest="num_inference_steps", help="denoising steps")
    add("--guidance-scale", type=float)
    add("--temperature", type=float)
    add("--top-k", type=int, help="0: all")
    add("--top-p", type=float)
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the weights, without mixed precision (default: as the adapters were trained, "
        "else float32)",
    )
    add("--batch-size", type=int, default=16, help="pictures at once")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    rows = [Row({"prompt": prompt}, f"--prompt[{i}]") for i, prompt in enumerate(options.prompt)]
    for row in rows:
        check_row(row)
    if options.prompts:
        rows += load_rows(options.prompts, show=True)
    if not rows:
        raise UserError("no prompt: give --prompt TEXT or --prompts FILE.jsonl")
    for name, least in (("num_images", 1), ("batch_size", 1), ("seed", 0)):
        value = getattr(options, name)
        if value < least:
            raise UserError(f"--{name.replace('_', '-')} = {value}: allowed is >= {least}")
    for path in generate(options, rows):
        print(path)


_SETTINGS = (
    "height",
    "width",
    "num_inference_steps",
    "guidance_scale",
    "temperature",
    "top_k",
    "top_p",
)


def generate(options: argparse.Namespace, rows: Sequence[Row]) -> list[Path]:
    """Write one PNG a picture; returns their paths. Existing files are never replaced."""
    folder = Path(options.output)
    require_folder("--output", folder)
    # torch loads slowly: after the options are known good
    from duet.inference.adapter_files import check_adapter
    from duet.inference.adapters import load_adapter
    from duet.inference.engine import Engine, autocast_dtype
    from duet.inference.layout import Size
    from duet.inference.model import generation_defaults, load_pipeline
    from duet.inference.prompt_check import check_prompts
    from duet.inference.request import Request

    for adapter in options.adapter:  # before the model's weights are read
        check_adapter(adapter, options.model)
    arithmetic = choose_arithmetic(options.dtype, options.adapter)
    pipeline = load_pipeline(options.model, arithmetic.dtype)
    given = {n: getattr(options, n) for n in _SETTINGS if getattr(options, n) is not None}
    sampling = SamplingConfig(**generation_defaults(pipeline) | given)
    told = ", ".join(f"{name} {getattr(sampling, name)}" for name in _SETTINGS)
    print(f"{told}, {arithmetic.precision}", file=sys.stderr)
    for adapter in options.adapter:
        load_adapter(pipeline, adapter)
    engine = Engine(
        pipeline,
        sampling,
        batch_size=options.batch_size,
        autocast=autocast_dtype(arithmetic),
    )
    seeds = tuple(range(options.seed, options.seed + options.num_images))
    size = Size(sampling.height, sampling.width)
    check_prompts(pipeline, rows, size)
    requests = [Request(row.prompt, seeds, size) for row in rows]
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, rollout in enumerate(engine.rollout(requests)):
        for seed, image in zip(seeds, rollout.images, strict=True):
            paths.append(_free_path(folder, f"{number:03d}-seed{seed}"))
            image.save(paths[-1])
    return paths


def choose_arithmetic(dtype: str | None, adapters: Sequence[str]) -> Arithmetic:
    """What was asked for, else what the adapters were trained in, so that theirs is the policy.

    Raises UserError where they differ, and for a folder that holds no adapter.
    """
    from duet.inference.adapter_files import adapter_info

    trained = {adapter: adapter_info(adapter).arithmetic for adapter in adapters}
    if dtype is not None:
        return Arithmetic(dtype)
    if len(set(trained.values())) > 1:
        told = " and ".join(
            f"{name} in {how.dtype}, mixed precision {how.mixed_precision}"
            for name, how in trained.items()
        )
        raise UserError(f"--adapter: trained were {told}: give --dtype")
    return next(iter(trained.values()), Arithmetic())


def _free_path(folder: Path, stem: str) -> Path:
    path, copy = folder / f"{stem}.png", 1
    while path.exists():
        path, copy = folder / f"{stem}-{copy}.png", copy + 1
    return path


if __name__ == "__main__":
    exit_on_user_error(main)
