"""Generated problems by the thousand, with the small tiles of the tests; under TRITON_INTERPRET=1 the Triton kernels take part.

[TRITON_INTERPRET=1] python -m tests.fuzz --count N [--first SEED] [--backend NAME]        --seed N runs one again
"""

from __future__ import annotations

import os

import tests.conftest  # noqa: F401  # the corrected interpreter, and tiles that divide small problems
from fused_attention import blockwise
from fused_attention.testing import generator

if __name__ == "__main__":
    blockwise.BLOCK = 16
    interpreted = "TRITON_INTERPRET=1 " if os.environ.get("TRITON_INTERPRET") == "1" else ""
    raise SystemExit(generator.main(command=f"{interpreted}python -m tests.fuzz"))
