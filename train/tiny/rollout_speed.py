"""An AR rollout against transformers' own batched `generate`: processor time, one thread.

    python -m duet.train.tiny.rollout_speed [--dtype bfloat16] [--pairs 7]

A group of 16 by the policy that the AR config trains (its adapter and arithmetic), sdpa
attention, the same top-p, alternating in one process.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from duet.inference.decoding import TokenJob, sample_tokens
from duet.inference.prompt import text_prompt
from duet.inference.request import Request
from duet.train.tiny.gaps import PRECISIONS, make_bench

_PROMPT = 'a red card with the white word "CAT"'
_GROUP = 16


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", default="float32", choices=tuple(PRECISIONS))
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--top-p", type=float, default=0.9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    bench = make_bench("ar", options.dtype, "rollout.prompts_per_step=1")
    engine, pipeline, model = bench.stage.engine, bench.stage.engine.pipeline, bench.module
    sampling = replace(bench.config.sampling, temperature=1.0, top_p=options.top_p)
    prompt = text_prompt(pipeline.processor, Request(_PROMPT, (0,), bench.stage.size))
    jobs = [TokenJob(prompt, seed) for seed in range(_GROUP)]

    def ours() -> None:
        sample_tokens(model, jobs, engine.codebook_size, sampling)

    def stock() -> None:
        tokens = pipeline.processor.apply_chat_template(
            [[{"role": "user", "content": [{"type": "text", "text": _PROMPT}]}]] * _GROUP,
            tokenize=True,
            return_dict=True,
            processor_kwargs={"target_h": 64, "target_w": 96, "return_tensors": "pt"},
        )
        with torch.no_grad():
            model.generate(
                **tokens,
                min_new_tokens=prompt.count,
                max_new_tokens=prompt.count,
                do_sample=True,
                top_k=0,
                top_p=options.top_p,
                temperature=1.0,
            )

    with engine.arithmetic():
        ours(), stock()
        ratios = [_seconds(ours) / _seconds(stock) for _ in range(options.pairs)]
    print(
        f"{options.dtype}: {statistics.median(ratios):.2f} of generate's processor time "
        f"({min(ratios):.2f} to {max(ratios):.2f}, {options.pairs} pairs)"
    )


def _seconds(work: Callable[[], None]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


if __name__ == "__main__":
    main()
