"""Streamed text equals decoding at once: 10,000 random, 2,000 multilingual texts per tokenizer."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from sl_serve.tokenizer import Tokenizer
from tests.streamed_text import KINDS, check, multilingual_texts, random_texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--random", type=int, default=10_000)
    parser.add_argument("--multilingual", type=int, default=2_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    for name, train in KINDS.items():
        backend = train()
        tokenizer = Tokenizer(backend)
        texts = [
            *random_texts(options.random, options.seed),
            *multilingual_texts(options.multilingual, options.seed),
        ]
        n_tokens = sum(check(tokenizer, backend, text) for text in texts)
        print(f"{name}: {len(texts)} texts, {n_tokens} tokens, all equal")


if __name__ == "__main__":
    main()
