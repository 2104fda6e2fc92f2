"""Twenty seeded pictures, and what an independent implementation of BRISQUE says of them.

    pip install 'brisque[opencv-python-headless]==0.2.0' 'numpy<2.3'
    python tests/brisque_reference.py > tests/brisque_reference.json

made the JSON file (numpy 2.2.6, libsvm-official 3.37.0, opencv 5.0.0). The package
is no test dependency: under numpy 2.4 it raises TypeError.
"""

import json

import numpy as np


def photograph(seed: int, steepness: float = 1.4, height: int = 96, width: int = 128) -> np.ndarray:
    """[H, W, 3] uint8 whose spectrum falls as a photograph's does: by frequency ** steepness."""
    random = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width))
    frequency[0, 0] = 1
    channels = [
        np.fft.ifft2(np.fft.fft2(random.standard_normal((height, width))) / frequency**steepness)
        for _ in range(3)
    ]
    pixels = np.stack(channels, -1).real
    pixels += 2 * pixels.mean(-1, keepdims=True)  # channels of a photograph go together
    return _bytes(128 + 50 * (pixels - pixels.mean()) / pixels.std())


def pictures() -> list[np.ndarray]:
    """Photographs of five steepnesses: as they are, noisy, blurred, and of few levels."""
    made = []
    for seed in range(20):
        picture = photograph(seed, 0.8 + 0.2 * (seed // 4)).astype(float)
        if seed % 4 == 1:
            picture += np.random.default_rng(seed).normal(0, 4 * (seed + 1), picture.shape)
        elif seed % 4 == 2:
            picture = (picture + np.roll(picture, 1, 0) + np.roll(picture, 1, 1)) / 3
        elif seed % 4 == 3:
            picture = np.round(picture / (seed + 5)) * (seed + 5)
        made.append(_bytes(picture))
    return made


def _bytes(pixels: np.ndarray) -> np.ndarray:
    return pixels.clip(0, 255).astype(np.uint8)


if __name__ == "__main__":
    from brisque import BRISQUE

    judge = BRISQUE()
    print(json.dumps([round(float(judge.score(p)), 6) for p in pictures()], indent=1))
