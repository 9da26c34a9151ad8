"""`python -m tinyvlm.toy.train_weights --out DIR`: make everything that lies in `toy/weights`, from a seed alone.

    tokenizer (seconds) ──▶ clip (drawn pictures and captions) ──▶ llm (text only: answers from described scenes)

`--only clip` and `--only llm` read the tokenizer that is already in DIR.  How long it took and what came out is in
`weights/README.md`; `python -m tinyvlm.toy.probe` measures the result.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from tinyvlm.toy.tokenizer import load_tokenizer, train_tokenizer
from tinyvlm.toy.train_clip import ClipRun, save_clip, train_clip
from tinyvlm.toy.train_llm import LlmRun, save_llm, train_llm

PARTS = ("tokenizer", "clip", "llm")


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and train the parts that were asked for, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="folder for tokenizer/, clip/ and llm/")
    parser.add_argument("--only", choices=PARTS, help="train this part alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--clip-steps", type=int, default=ClipRun.steps)
    parser.add_argument("--llm-steps", type=int, default=LlmRun.steps)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    torch.set_num_threads(options.threads)
    parts = (options.only,) if options.only else PARTS
    if "tokenizer" in parts:
        train_tokenizer(options.seed).save_pretrained(options.out / "tokenizer")
    tokenizer = load_tokenizer(options.out / "tokenizer")
    if "clip" in parts:
        keep = partial(save_clip, tokenizer=tokenizer, folder=options.out / "clip")
        keep(train_clip(tokenizer, replace(ClipRun(), steps=options.clip_steps, seed=options.seed), keep))
    if "llm" in parts:
        save = partial(save_llm, tokenizer=tokenizer, folder=options.out / "llm")
        save(train_llm(tokenizer, replace(LlmRun(), steps=options.llm_steps, seed=options.seed), save))


if __name__ == "__main__":
    main()
