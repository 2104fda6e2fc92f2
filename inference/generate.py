"""Pictures from prompts: python -m duet.inference.generate --model FOLDER --prompt '...'"""

import argparse
from pathlib import Path

from duet.configs.errors import UserError, exit_on_user_error, require_folder
from duet.configs.rows import load_rows
from duet.configs.schema import SamplingConfig


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="duet generate",
        description=__doc__,
        epilog="Unset numbers are the checkpoint's own, else the reference pipeline's.",
    )
    add = parser.add_argument
    add("--model", required=True, help="folder or hub id of a GLM-Image")
    add("--prompt", action="append", default=[], help="may be repeated")
    add("--prompts", help="JSONL file with a `prompt` a line")
    add("--adapter", action="append", default=[], help="a checkpoint-N; one for each module")
    add("--output", default="runs/images", help="folder for the PNG files")
    add("--num-images", type=int, default=1, help="pictures of each prompt")
    add("--seed", type=int, default=0, help="picture i of a prompt takes seed + i")
    add("--height", type=int, help="pixels, a multiple of 32")
    add("--width", type=int, help="pixels, a multiple of 32")
    add("--steps", type=int, help="denoising steps")
    add("--guidance-scale", type=float)
    add("--temperature", type=float)
    add("--top-k", type=int)
    add("--top-p", type=float)
    add("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    add("--batch-size", type=int, default=16, help="pictures at once")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    prompts = list(options.prompt)
    if options.prompts:
        prompts += [row["prompt"] for row in load_rows(options.prompts)]
    if not prompts:
        raise UserError("no prompt: give --prompt TEXT or --prompts FILE.jsonl")
    for name, least in (("num_images", 1), ("batch_size", 1), ("seed", 0)):
        value = getattr(options, name)
        if value < least:
            raise UserError(f"--{name.replace('_', '-')} = {value}: allowed is >= {least}")
    for path in generate(options, prompts):
        print(path)


def generate(options: argparse.Namespace, prompts: list[str]) -> list[Path]:
    """Write one PNG a picture; returns their paths. Existing files are never replaced."""
    folder = Path(options.output)
    require_folder("--output", folder)
    from duet.inference.engine import Engine  # torch loads slowly: after the options are known good
    from duet.inference.model import generation_defaults, load_adapter, load_pipeline
    from duet.inference.rollout import Request

    pipeline = load_pipeline(options.model, options.dtype)
    defaults = generation_defaults(pipeline)
    given = {
        "height": options.height,
        "width": options.width,
        "num_inference_steps": options.steps,
        "guidance_scale": options.guidance_scale,
        "temperature": options.temperature,
        "top_p": options.top_p,
        "top_k": options.top_k,
    }
    chosen = defaults | {name: value for name, value in given.items() if value is not None}
    sampling = SamplingConfig(**chosen)
    for adapter in options.adapter:
        load_adapter(pipeline, adapter)
    engine = Engine(pipeline, sampling, batch_size=options.batch_size)
    seeds = tuple(range(options.seed, options.seed + options.num_images))
    requests = [Request(p, seeds, sampling.height, sampling.width) for p in prompts]
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, rollout in enumerate(engine.generate(requests)):
        for seed, image in zip(rollout.seeds, rollout.images, strict=True):
            paths.append(_free_path(folder, f"{number:03d}-seed{seed}"))
            image.save(paths[-1])
    return paths


def _free_path(folder: Path, stem: str) -> Path:
    path, copy = folder / f"{stem}.png", 1
    while path.exists():
        path, copy = folder / f"{stem}-{copy}.png", copy + 1
    return path


if __name__ == "__main__":
    exit_on_user_error(main)
