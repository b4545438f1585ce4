"""The compiled module under a sanitizer, in build/sanitize/<name>/; the installed one stays as it is.

    address     AddressSanitizer and UndefinedBehaviorSanitizer        thread      ThreadSanitizer

Compiled by g++ or clang++, as the installed module is, from the same sources.
"""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path

from build_tools.cpu_extension import FLAGS, compile_cpu, cpu_extension, find_compiler

FOLDER = Path("build/sanitize")

# Loops run on std::thread, for libgomp synchronises where no sanitizer looks. Calls instead of inlined checks: the
# kernels are inlined whole, and a compiler takes five times as long over checks in line.
COMMON = (
    *(flag for flag in FLAGS if flag not in ("-O3", "-g0", "-fopenmp")),
    *("-O1", "-g1", "-fno-omit-frame-pointer", "-pthread", "-DPARALLEL_ON_STD_THREADS"),
    "-fno-sanitize-recover=all",
)


@dataclass(frozen=True)
class Sanitizer:
    """How to build with a sanitizer, and how a process that loads the result has to be started."""

    name: str
    flags: tuple[str, ...]
    runtime: str  # the library that must be loaded before all others, for Python knows nothing of it
    options: dict[str, str]  # environment variables

    @property
    def module(self) -> Path:
        return FOLDER / self.name / "_cpu.so"

    def build(self) -> Path:
        folder = FOLDER / self.name
        link = (*self.flags, "-pthread")
        compile_cpu(cpu_extension().sources, self.module, folder / "objects", (*COMMON, *self.flags), link)
        return self.module

    def environment(self) -> dict[str, str]:
        answer = subprocess.run([*find_compiler().command, f"-print-file-name={self.runtime}"], capture_output=True, text=True, check=True)
        return os.environ | self.options | {"LD_PRELOAD": answer.stdout.strip(), "OMP_NUM_THREADS": "1"}

    def command(self, *arguments: str) -> list[str]:
        return [*self.prefix, *arguments]

    @property
    def prefix(self) -> list[str]:
        # ThreadSanitizer keeps its shadow at fixed addresses, which the kernel's random layout may have taken.
        return ["setarch", platform.machine(), "-R"] if self.name == "thread" else []


SANITIZERS = {
    sanitizer.name: sanitizer
    for sanitizer in (
        Sanitizer(
            "address",
            ("-fsanitize=address,undefined", "--param", "asan-instrumentation-with-call-threshold=0"),
            "libasan.so",
            # Python and PyTorch keep memory until the process ends.
            {"ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0", "UBSAN_OPTIONS": "print_stacktrace=1"},
        ),
        Sanitizer(
            "thread",
            ("-fsanitize=thread",),
            "libtsan.so",
            # Python and PyTorch are not instrumented: what they lock is unknown, and what they access is not judged.
            {"TSAN_OPTIONS": "halt_on_error=1:ignore_noninstrumented_modules=1"},
        ),
    )
}
