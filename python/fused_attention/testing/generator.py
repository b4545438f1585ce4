"""Random problems over all options, each from one number:  python -m fused_attention.testing.generator --seed N  runs one again.

The choices come from random.Random, so hypothesis can make them too and shrink a failure: st.randoms(use_true_random=False).map(draw).
"""

from __future__ import annotations

import argparse
from random import Random
from typing import Any

import torch

from .bounds import measure
from .inputs import Case

LENGTHS = (0, 1, 2, 3, 5, 7, 15, 16, 17, 31, 33, 63, 65, 97)
HEAD_DIMS = (1, 3, 8, 16, 17, 24, 32, 33, 40, 64, 72)
LAYOUTS = ("contiguous", "contiguous", "transposed", "interleaved", "strided", "column", "expanded", "offset")
PATTERNS = ("qk", "1111", "11qk", "b11k", "1h1k", "b1qk", "1hqk", "bhq1", "bhqk")
DTYPES = (torch.float32,) * 6 + (torch.float64, torch.bfloat16, torch.float16)


def random_case(seed: int) -> Case:
    """The case of a seed, named by it; the same on every machine."""
    return draw(Random(seed), f"seed-{seed}")


def draw(random: Random, name: str = "drawn") -> Case:
    """A case from a source of choices; every option is on in about one of three."""

    def maybe(*values: Any, chance: float = 0.3) -> Any:
        return random.choice(values) if random.random() < chance else None

    packed = random.random() < 0.25
    kv_heads = random.choice((1, 1, 2, 3))
    members = random.choice((1, 2, 3)) if packed else random.choice((0, 1, 1, 2, 2, 3))
    facts: dict[str, Any] = {
        "heads": kv_heads * random.choice((1, 1, 2, 3, 5)),
        "kv_heads": kv_heads,
        "head_dim": random.choice(HEAD_DIMS),
        "head_dim_v": maybe(*HEAD_DIMS),
        "causal": random.random() < 0.4,
        "softcap": maybe(0.7, 2.0, 30.0),
        "sinks": random.random() < 0.25,
        "scale": maybe(0.0, 1.0, -0.3, 0.05),
        "alibi_slopes": maybe("h", "bh"),
        "dropout_p": maybe(0.1, 0.5, 0.9) or 0.0,
        "layout": random.choice(LAYOUTS),
        "magnitude": random.choice((1.0, 1.0, 1.0, 5.0)),
        "dtype": random.choice(DTYPES),
    }
    if packed:
        facts["lengths_q"] = tuple(random.choice(LENGTHS[:9]) for _ in range(members))
        facts["lengths_k"] = maybe(tuple(random.choice(LENGTHS[:9]) for _ in range(members)), chance=0.6)
        longest = max(facts["lengths_q"] + (facts["lengths_k"] or ()))
        facts["unused"] = maybe(1, 3) or 0
    else:
        facts |= {"batch": members, "seqlen_q": random.choice(LENGTHS), "seqlen_k": random.choice(LENGTHS)}
        facts |= {"mask": maybe(*PATTERNS), "bias": maybe(*PATTERNS), "hiding_bias": random.random() < 0.3}
        longest = max(facts["seqlen_q"], facts["seqlen_k"])
    left, right = maybe(0, 1, 5, longest, 2**31), 0 if facts["causal"] else maybe(0, 1, 3, longest)
    facts["window"] = maybe((left, right), (left, None), chance=0.5)
    facts["offset"] = maybe(0, 1, -2, longest, tuple(random.randint(-3, longest) for _ in range(members)))
    lengths = tuple(random.randint(-1, longest + 2) for _ in range(members))
    facts["kv_lengths"] = maybe(lengths, tuple((random.randint(-1, max(length, 0)), length) for length in lengths)) if members else None
    if not members and isinstance(facts["offset"], tuple):
        facts["offset"] = None
    return Case(name, **facts)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fused_attention.testing.generator", description="Run one generated problem again.")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--backend", default=None, help="one backend; default: each that can run it")
    options = parser.parse_args(arguments)
    inputs = (case := random_case(options.seed)).make(seed=options.seed)
    print(case)
    reasons = inputs.explain().reasons
    names = [options.backend] if options.backend else [name for name, reason in reasons.items() if reason is None]
    truth, failed = inputs.truth(), False
    for name in names:
        report = measure(inputs.run(name), truth)
        failed |= bool(report.failures)
        print(f"\n{name}: {'FAILED' if report.failures else 'passed'}\n{report}")
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
