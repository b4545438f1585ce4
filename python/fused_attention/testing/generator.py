"""Random problems over all options, each from one number.

    python -m fused_attention.testing.generator --seed N [--backend NAME]                   one, with all its figures
    python -m fused_attention.testing.generator --count N [--first SEED] [--backend NAME]   many

The choices come from random.Random, so hypothesis can make them too and shrink a failure: st.randoms(use_true_random=False).map(draw).
"""

from __future__ import annotations

import argparse
import time
import traceback
from collections.abc import Iterator
from random import Random
from typing import Any, NamedTuple

import torch

from fused_attention import backends

from .bounds import Report, measure
from .inputs import Case

LENGTHS = (0, 1, 2, 3, 5, 7, 15, 16, 17, 31, 33, 63, 65, 97)
HEAD_DIMS = (1, 3, 8, 16, 17, 24, 32, 33, 40, 64, 72)
LAYOUTS = ("contiguous", "contiguous", "transposed", "interleaved", "strided", "column", "expanded", "offset")
PATTERNS = ("qk", "1111", "11qk", "b11k", "1h1k", "b1qk", "1hqk", "bhq1", "bhqk")
DTYPES = (torch.float32,) * 6 + (torch.float64, torch.bfloat16, torch.float16)

COMMAND = "python -m fused_attention.testing.generator"
PROGRESS = 100  # problems between two lines


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
    facts["mask_block"] = maybe(16) if facts.get("mask") else None
    return Case(name, **facts)


def main(arguments: list[str] | None = None, command: str = COMMAND) -> int:
    """command is what the reader has to type before --seed to see a failure again."""
    parser = argparse.ArgumentParser(prog=command, description="Generated problems against the float64 oracle; exit status 1 on a failure.")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--seed", type=int, help="run one problem and print how near each tensor is to its bound")
    which.add_argument("--count", type=int, help="run so many problems and print what fails")
    parser.add_argument("--first", type=int, default=0, help="the seed that --count begins with")
    parser.add_argument("--backend", choices=tuple(backends()), help="one backend; default: each that can run the problem")
    options = parser.parse_args(arguments)
    if options.seed is not None:
        return _one(options.seed, options.backend)
    return _many(range(options.first, options.first + options.count), options.backend, command)


def _one(seed: int, backend: str | None) -> int:
    print(case := random_case(seed))
    ran = failed = False
    for name, verdict in _judged(case, seed, backend):
        wrong = isinstance(verdict, str) or bool(verdict.failures)
        ran, failed = True, failed or wrong
        print(f"\n{name}: {'FAILED' if wrong else 'passed'}\n{verdict}")
    if not ran:
        print(f"\nnothing ran\n{case.make(seed=seed).explain()}")
    return int(failed or not ran)


def _many(seeds: range, backend: str | None, command: str) -> int:
    """Goes on after a failure: the next one may tell more."""
    again: list[str] = []
    runs, nearest, started = 0, Nearest(), time.perf_counter()
    for done, seed in enumerate(seeds, 1):
        case = random_case(seed)
        for name, verdict in _judged(case, seed, backend):
            runs += 1
            if isinstance(verdict, str) or verdict.failures:
                again.append(f"{command} --seed {seed} --backend {name}")
                print(f"\n{name} on {case}\n{verdict}\nagain: {again[-1]}", flush=True)
            elif verdict.used > nearest.used:
                nearest = Nearest(verdict.used, f"{name}, seed {seed}")
        if done % PROGRESS == 0 or done == len(seeds):
            seconds = time.perf_counter() - started
            print(f"{done} of {len(seeds)} problems, {runs} runs, {len(again)} failed, {nearest}, {seconds:.0f} s", flush=True)
    print(*again, sep="\n", end="\n" if again else "")
    return int(bool(again) or runs == 0)


class Nearest(NamedTuple):
    """The run that came nearest to a bound."""

    used: float = 0.0
    where: str = "none"

    def __str__(self) -> str:
        return f"at most {self.used:.1%} of a bound used ({self.where})"


def _judged(case: Case, seed: int, backend: str | None) -> Iterator[tuple[str, Report | str]]:
    """What each backend makes of a problem: its report, or what it raised. Those that refuse it are left out."""
    inputs = case.make(seed=seed)
    reasons = inputs.explain().reasons
    truth = inputs.truth()
    for name in reasons if backend is None else (backend,):
        if reasons[name] is not None:
            continue
        try:
            yield name, measure(inputs.run(name), truth)
        except Exception:  # noqa: BLE001  # a crash is a failure of its problem: the others still tell something
            yield name, traceback.format_exc()


if __name__ == "__main__":
    raise SystemExit(main())
