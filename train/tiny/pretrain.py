"""Build and pretrain `configs/tiny/model`: python -m duet.train.tiny.pretrain [STAGE ...]

Seeded. Without arguments every stage runs, the AR beside the others, on a core each; a stage reads
what the stages before it wrote, so any one can be repeated by name.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from torch.nn import functional as F
from tqdm import tqdm, trange

from duet.train.tiny import ar_pretraining, decoder_pretraining, dit_pretraining, edit_rows, judges
from duet.train.tiny.ar_pretraining import draw_preview
from duet.train.tiny.codes import vision_features
from duet.train.tiny.edits import sample_styled
from duet.train.tiny.parts import CODEBOOK_SIZE, build_pipeline, size_mib
from duet.train.tiny.scenes import draw_scene
from duet.train.tiny.world import draw, sample_card

ROOT = Path(__file__).resolve().parents[2] / "configs" / "tiny"
MODEL, PROMPTS, JUDGES = ROOT / "model", ROOT / "prompts", ROOT / "judges"


def build_codebook(
    seed: int = 0, cards: int = 1500, styled: int = 1000, iterations: int = 25
) -> None:
    """Fresh parts; the codebook is k-means over the vision tower's random features.

    A third of the codes is for styles and emblems alone: in one pool with cards they would take
    codes by which the cards' colours are told apart.
    """
    torch.manual_seed(seed)
    pipeline = build_pipeline()
    model = pipeline.vision_language_encoder.eval()
    rng = random.Random(seed)
    drawn = [sample_card(rng, any_pair=True) for _ in range(cards)]
    preview = vision_features(pipeline, (draw_preview(c) for c in tqdm(drawn, "codebook cards")))
    own = torch.randint(preview.shape[1], (cards, 2, 1)).expand(-1, -1, preview.shape[2])
    of_cards = _blocks(vision_features(pipeline, map(draw, drawn)))
    of_cards = torch.cat([of_cards, preview.gather(1, own).flatten(0, 1)])
    scenes = (draw_scene(sample_styled(rng)) for _ in trange(styled, desc="codebook styles"))
    pools = of_cards, _blocks(vision_features(pipeline, scenes))
    counts = CODEBOOK_SIZE - CODEBOOK_SIZE // 3, CODEBOOK_SIZE // 3
    codes = []
    for pool, count in zip(pools, counts, strict=True):
        mapped = model.model.vqmodel.quant_conv(_as_map(pool))[0].flatten(1).T
        codes.append(_spherical_k_means(F.normalize(mapped), count, iterations))
    model.model.vqmodel.quantize.embedding.weight.data = torch.cat(codes)
    pipeline.save_pretrained(MODEL)


def _blocks(features: torch.Tensor) -> torch.Tensor:
    """Features [N, 6, C] of pictures -> [M, C]: shapes stand in the upper row, and need codes of
    their own, so of the lower one there is half.
    """
    lower = features[:, 3:][torch.rand(len(features), 3) < 0.5]
    return torch.cat([features[:, :3].flatten(0, 1), lower])


def _as_map(features):
    return features.T[None, :, :, None]  # [N, C] -> [1, C, N, 1]


@torch.no_grad()
def _spherical_k_means(points, count: int, iterations: int):
    """k-means++ start, then Lloyd's steps on the unit sphere; [N, C] -> [count, C]."""
    centres = points[:1]
    distance = 1 - points @ centres[0]
    for _ in range(count - 1):
        pick = torch.multinomial(distance.clamp(min=0) + 1e-12, 1)
        centres = torch.cat([centres, points[pick]])
        distance = torch.minimum(distance, 1 - points @ centres[-1])
    for _ in range(iterations):
        nearest = (points @ centres.T).argmax(-1)
        sums = torch.zeros_like(centres).index_add_(0, nearest, points)
        used = torch.bincount(nearest, minlength=count) > 0
        centres = torch.where(used[:, None], F.normalize(sums), centres)
    return centres.contiguous()


def write_prompts(seed: int = 5, train: int = 256, evaluation: int = 96) -> None:
    """Prompt rows with their reference pictures; evaluation words and pairs are held out."""
    for name, count, held_out in (("train", train, False), ("eval", evaluation, True)):
        rng = random.Random(f"{seed}/{name}")
        (PROMPTS / name).mkdir(parents=True, exist_ok=True)
        rows = []
        while len(rows) < count:
            card = sample_card(rng, held_out)
            if not card.shapes:
                continue
            image = f"{name}/{len(rows):03d}.png"
            draw(card).save(PROMPTS / image, optimize=True)
            rows.append(
                {"prompt": card.prompt, "text": card.word, "image": image, "card": card.to_row()}
            )
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (PROMPTS / f"{name}.jsonl").write_text(lines)


STAGES = {
    "codebook": build_codebook,
    "vae": lambda: decoder_pretraining.train_vae(MODEL),
    "vae_decoder": lambda: decoder_pretraining.refine_vae_decoder(MODEL),
    "vae_styles": lambda: decoder_pretraining.train_vae_styles(MODEL),
    "dit": lambda: dit_pretraining.train_dit(MODEL),
    "dit_annealed": lambda: dit_pretraining.anneal_dit(MODEL),
    "ar": lambda: ar_pretraining.train_ar(MODEL),
    "judges": lambda: judges.train(JUDGES),
    "prompts": write_prompts,
    "edits": lambda: edit_rows.write_edits(PROMPTS),
}
_BESIDE = "ar"


def _run(names: Iterable[str]) -> None:
    for name in names:
        start = time.perf_counter()
        STAGES[name]()
        print(f"{name}: {time.perf_counter() - start:.0f} seconds", flush=True)


def _run_all() -> None:
    """The AR learns beside the decoder's parts: they read of it what it does not change."""
    first, *others = [name for name in STAGES if name != _BESIDE]
    _run([first])
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    beside = subprocess.Popen([sys.executable, "-m", __spec__.name, _BESIDE], env=one_thread)
    try:
        _run(others)
    except BaseException:
        beside.terminate()
        raise
    if status := beside.wait():
        raise SystemExit(status)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("stages", nargs="*", help=f"of {', '.join(STAGES)}; all in order if none")
    names = parser.parse_args().stages
    unknown = set(names) - set(STAGES)
    if unknown:
        parser.error(f"unknown stage {sorted(unknown)}: allowed are {', '.join(STAGES)}")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2" if names else "1")))
    if names:
        _run(names)
    else:
        _run_all()
    print(f"{MODEL}: {size_mib(MODEL):.1f} MiB; judges {size_mib(JUDGES):.1f} MiB")


if __name__ == "__main__":
    main()
