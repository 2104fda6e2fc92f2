"""Twelve pictures of one card, from clean to noise: what each reward makes of them.

    python -m duet.train.tiny.specimens runs/specimens

writes the pictures, `prompts.jsonl` with their row, and the table in Markdown.
"""

import argparse
import io
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from duet.configs.schema import RewardConfig
from duet.rewards.base import RewardInput, score
from duet.rewards.registry import load_reward
from duet.train.tiny.world import BLOCK_PIXELS, HEIGHT_PIXELS, WIDTH_PIXELS, Card, Shape, draw

CARD = Card("red", (Shape("circle", "blue", "on the left"),), "white", "CHAP")
_RECOLOURED = "green"
_JUDGES = Path("configs/tiny/judges")
_CLIP = {"model": f"local-dir:{_JUDGES}/clip", "pretrained": None}
OFFLINE = (
    RewardConfig("ocr", args={"limit_side_len": 192, "enlarge_to": 192}),
    RewardConfig("alignment", args=_CLIP),
    RewardConfig("aesthetic", args=_CLIP | {"head": str(_JUDGES / "aesthetic.safetensors")}),
    RewardConfig("fidelity", args=_CLIP),
    RewardConfig("fidelity", args=_CLIP, label="quality"),
    RewardConfig("brisque"),
    RewardConfig("source_consistency", args=_CLIP),
    RewardConfig("source_consistency", args=_CLIP, label="kept"),
    RewardConfig("identity", args=_CLIP),
    RewardConfig("style", args=_CLIP),
    RewardConfig("edit_direction", args=_CLIP),
    RewardConfig("diversity", args=_CLIP),
)


def specimens() -> list[tuple[str, Image.Image]]:
    """Name and 64 x 96 picture; always the same."""
    clean = draw(CARD)
    circle = CARD.shapes[0]
    return [
        ("clean", clean),
        ("blur", blurred(clean, 1.0)),
        ("strong blur", blurred(clean, 3.0)),
        ("noise", noisy(clean, 15)),
        ("strong noise", noisy(clean, 60)),
        ("JPEG", compressed(clean, 15)),
        ("wrong word", draw(replace(CARD, word="CHAT"))),
        ("missing word", draw(replace(CARD, word=""))),
        ("wrong background colour", draw(replace(CARD, background=_RECOLOURED))),
        ("wrong shape colour", draw(replace(CARD, shapes=(replace(circle, colour="purple"),)))),
        ("flat colour", Image.new("RGB", clean.size, "red")),
        ("pure noise", _pure_noise()),
    ]


def blurred(image: Image.Image, radius: float) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(radius))


def noisy(image: Image.Image, deviation: float) -> Image.Image:
    noise = np.random.default_rng(0).normal(0, deviation, (*image.size[::-1], 3))
    return Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))


def compressed(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def _pure_noise() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (HEIGHT_PIXELS, WIDTH_PIXELS, 3))
    return Image.fromarray(pixels.astype(np.uint8))


def write(folder: Path) -> dict[str, str]:
    """Save the pictures and return their row: the clean one is reference and source."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in specimens():
        picture.save(folder / _file(name))
    row = {"prompt": CARD.prompt, "text": CARD.word, "image": "clean.png", "source": "clean.png"}
    (folder / "prompts.jsonl").write_text(json.dumps(row) + "\n")
    return row | {key: str(folder / row[key]) for key in ("image", "source")}


def row_for(column: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """What a column of the table is given: that row, with what its reward reads besides."""
    if column == "quality":
        return {key: value for key, value in row.items() if key != "image"}
    recoloured = "wrong background colour"
    other = replace(CARD, background=_RECOLOURED)
    more = {
        "kept": {"keep": [[0, 0, WIDTH_PIXELS, BLOCK_PIXELS]]},  # the half with the circle
        "identity": {"subjects": [[5, 5, 27, 27]]},  # the circle
        "style": {"style": row["image"]},
        "edit_direction": {
            "source": str(Path(row["source"]).with_name(_file(recoloured))),
            "source_prompt": other.prompt,
            "target_prompt": CARD.prompt,
        },
    }
    return {**row, **more.get(column, {})}


def _file(name: str) -> str:
    return f"{name.replace(' ', '_')}.png"


def table(row: dict[str, str]) -> str:
    """Markdown: a line for each picture, a column for each reward that needs no network."""
    names, pictures = zip(*specimens(), strict=True)
    columns = {}
    for config in OFFLINE:
        seen = row_for(config.metric_name, row)
        inputs = [RewardInput(p, row["prompt"], seen) for p in pictures]
        reward = load_reward(config)
        columns[config.metric_name] = score(reward, config.metric_name, inputs, [len(inputs)])
    lines = [f"| picture | {' | '.join(columns)} |", f"|---{'|---:' * len(columns)}|"]
    for name, *scores in zip(names, *columns.values(), strict=True):
        lines.append(f"| {name} | {' | '.join(f'{s:.3f}' for s in scores)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where the pictures go")
    print(table(write(parser.parse_args().folder)))


if __name__ == "__main__":
    main()
