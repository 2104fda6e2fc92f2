"""Pictures from prompts: python -m duet.inference.generate --model FOLDER --prompt '...'"""

import argparse
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from duet.configs.environment import require_shared_work
from duet.configs.errors import UserError, exit_on_user_error, not_empty
from duet.configs.launcher import is_first_here
from duet.configs.outputs import make_folder
from duet.configs.policy_schema import Arithmetic, SamplingConfig
from duet.configs.row import Row, check_row
from duet.configs.rows import load_rows


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="duet generate",
        description=__doc__,
        epilog="Unset numbers are what stock generation takes for the checkpoint. Several "
        "processes share the pictures: accelerate launch -m duet.inference.generate ...",
    )
    add = parser.add_argument
    add("--model", required=True, help="folder or hub id of a GLM-Image")
    add("--prompt", action="append", default=[], help="may be repeated")
    add(
        "--image",
        action="append",
        default=[],
        help="a source that every --prompt edits; may be repeated",
    )
    add(
        "--prompts",
        type=not_empty,
        help="a dataset with a `prompt`, and `sources` to edit: JSONL, CSV, parquet, ...",
    )
    add("--adapter", action="append", default=[], help="a checkpoint-N; one for each module")
    add("--average", action="store_true", help="the moving averages of the checkpoints' weights")
    add("--output", type=not_empty, default="runs/images", help="folder for the PNG files")
    add("--num-images", type=int, default=1, help="pictures of each prompt")
    add("--seed", type=int, default=0, help="picture i of a prompt takes seed + i")
    add("--height", type=int, help="pixels, a multiple of 32 (an edit: its first source's)")
    add("--width", type=int, help="pixels, a multiple of 32 (an edit: its first source's)")
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
    if options.image and not options.prompt:
        raise UserError(f"--image = {options.image[0]!r}: say what to make of it with --prompt")
    sources = {"sources": options.image} if options.image else {}
    rows = [
        Row({"prompt": prompt} | sources, f"--prompt[{i}]")
        for i, prompt in enumerate(options.prompt)
    ]
    for row in rows:
        check_row(row)
    if options.prompts:
        rows += load_rows(options.prompts, show=is_first_here())
    if not rows:
        raise UserError("no prompt: give --prompt TEXT or --prompts FILE.jsonl")
    for path in generate(options, rows):
        tqdm.write(f"{path}\n", end="")  # not into a bar, nor into another process's line
        sys.stdout.flush()


_MOST_PICTURES = 1_000_000  # more than anybody waits for
_BOUNDS = {
    "num_images": (1, _MOST_PICTURES),
    "batch_size": (1, _MOST_PICTURES),
    "seed": (0, 2**63 - 1 - _MOST_PICTURES),  # a picture's own seed fits 63 bits
}
_SETTINGS = (
    "height",
    "width",
    "num_inference_steps",
    "guidance_scale",
    "temperature",
    "top_k",
    "top_p",
)


def generate(options: argparse.Namespace, rows: Sequence[Row]) -> Iterator[Path]:
    """Write one PNG a picture, yielding the paths as they are made; no file is ever replaced.

    Raises UserError, before weights are read, for options, adapters, prompts and folders that
    are wrong.
    """
    _check_counts(options, len(rows))
    given = {n: getattr(options, n) for n in _SETTINGS if getattr(options, n) is not None}
    SamplingConfig(**given)  # raises for what is out of range
    # torch loads slowly: after the options are known good
    from duet.inference.adapter_set import joined_adapters
    from duet.inference.drawing import Drawing, draw
    from duet.inference.layout import Size
    from duet.inference.outline import read_outline
    from duet.inference.prompt_check import check_prompts

    adapters = joined_adapters("--adapter", options.adapter, options.model, options.average)
    trained = {adapter: info.arithmetic for adapter, info in adapters.items()}
    arithmetic = choose_arithmetic(options.dtype, trained)
    require_shared_work(os.environ, "generate", arithmetic.mixed_precision)
    outline = read_outline(options.model)
    sampling = SamplingConfig(**outline.defaults | given)
    source_sized = not {"height", "width"} & given.keys()
    check_prompts(outline, rows, Size.of(sampling), is_first_here(), source_sized=source_sized)
    folder = Path(options.output)
    make_folder("--output", folder)
    if is_first_here():
        told = ", ".join(f"{name} {getattr(sampling, name)}" for name in _SETTINGS)
        print(f"{told}, {arithmetic.precision}", file=sys.stderr)
    seeds = range(options.seed, options.seed + options.num_images)
    drawing = Drawing(
        options.model, list(adapters), sampling, arithmetic, options.batch_size, source_sized
    )
    yield from draw(drawing, rows, seeds, folder)


def _check_counts(options: argparse.Namespace, prompts: int) -> None:
    for name, (least, most) in _BOUNDS.items():
        value = getattr(options, name)
        if not least <= value <= most:
            option = f"--{name.replace('_', '-')}"
            raise UserError(f"{option} = {value}: allowed is {least} <= x <= {most:,}")
    if prompts * options.num_images > _MOST_PICTURES:
        raise UserError(
            f"{prompts} prompts x --num-images = {options.num_images}: allowed are "
            f"{_MOST_PICTURES:,} pictures in all, divide the prompts"
        )


def choose_arithmetic(dtype: str | None, trained: Mapping[str, Arithmetic]) -> Arithmetic:
    """What was asked for, else what the adapters were `trained` in, so that theirs is the policy.

    Raises UserError where they differ.
    """
    if dtype is not None:
        return Arithmetic(dtype)
    if len(set(trained.values())) > 1:
        told = " and ".join(
            f"{name} in {how.dtype}, mixed precision {how.mixed_precision}"
            for name, how in trained.items()
        )
        raise UserError(f"--adapter: trained were {told}: give --dtype")
    return next(iter(trained.values()), Arithmetic())


if __name__ == "__main__":
    exit_on_user_error(main)
