"""For which GPUs a build of the CUDA kernels holds code, from the list that it was built for, such as 80+PTX,90.

    90        machine code, for compute capability 9.0 and the later ones of 9        90a    for 9.0 alone
    90+PTX    besides that what the driver compiles, for everything from 9.0 on

Source: CUDA C++ Programming Guide, "Binary Compatibility" and "PTX Compatibility".
"""

from __future__ import annotations

Capability = tuple[int, int]


def missing_code(built_for: str, capability: Capability) -> str | None:
    """Why a build can't compute on a GPU of this compute capability, in a sentence; None where it can."""
    if any(_serves(entry, capability) for entry in built_for.split(",")):
        return None
    gpu, number = f"the GPU has compute capability {capability[0]}.{capability[1]}", f"{capability[0]}{capability[1]}"
    remedy = f"install fused-attention again with FUSED_ATTENTION_CUDA_ARCHS={built_for},{number}"
    return f"{gpu}, and fused_attention._cuda was built for {built_for} (FUSED_ATTENTION_CUDA_ARCHS): {remedy}"


def _serves(entry: str, capability: Capability) -> bool:
    name, _, portable = entry.partition("+")
    number = name.rstrip("af")
    oldest = int(number[:-1]), int(number[-1])
    if name.endswith("a"):
        return capability == oldest
    # Code for a family (f) is bound to its major version, and so is its PTX.
    return capability >= oldest and (capability[0] == oldest[0] or (portable == "PTX" and not name.endswith("f")))
