"""Attention and layer kernels in Triton; they know torch and triton alone."""

if __name__ == "triton_kernels":
    raise ImportError(
        "this folder is fused_attention.triton_kernels: import it by that name, with fused-attention installed; "
        "the top-level name triton_kernels belongs to another package"
    )
