"""What is timed on a GPU: shapes of real models, long enough to fill it, in the order in which they matter should time run out."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .workloads import Workload


@dataclass(frozen=True)
class DeviceItem:
    """One group of rows."""

    workload: Workload
    dtype: str = "bf16"

    @property
    def name(self) -> str:
        return f"{self.workload.name} {self.dtype}"


LLAMA = Workload("llama", "Llama 3 70B, grouped heads", 1, 64, 4096, 4096, 128, kv_heads=8, causal=True)
GPT2 = Workload("gpt2-1k", "GPT-2 small", 8, 12, 1024, 1024, 64, causal=True)
PACKED = (2048, 1031, 517, 1500, 129, 1919, 800, 248)


def _llama(seqlen: int) -> Workload:
    name, batch = f"llama-{seqlen // 1024}k" if seqlen >= 1024 else f"llama-{seqlen}", max(1, 4096 // seqlen)
    return replace(LLAMA, name=name, batch=batch, seqlen_q=seqlen, seqlen_k=seqlen)


ITEMS = (
    DeviceItem(GPT2),
    DeviceItem(_llama(4096)),
    DeviceItem(_llama(8192)),
    DeviceItem(_llama(2048)),
    DeviceItem(replace(LLAMA, name="full-4k", title="full attention", causal=False)),
    DeviceItem(Workload("window-8k", "sliding window", 2, 64, 8192, 8192, 64, kv_heads=8, causal=True, window=1023)),
    DeviceItem(Workload("decode-8k", "decode, grouped heads", 16, 64, 1, 8192, 128, kv_heads=8, backward=False)),
    DeviceItem(Workload("bias-1k", "T5 or pair bias, with its gradient", 4, 16, 1024, 1024, 64, bias=True)),
    DeviceItem(Workload("packed-8k", "packed sequences", 1, 16, sum(PACKED), sum(PACKED), 128, causal=True, lengths=PACKED)),
    DeviceItem(Workload("d256-4k", "head_dim 256", 2, 16, 4096, 4096, 256, causal=True)),
    DeviceItem(_llama(1024)),
    DeviceItem(_llama(16384)),
    DeviceItem(_llama(512)),
    DeviceItem(Workload("padded-512", "BERT-base, padded", 16, 12, 512, 512, 64, kv_lengths=(512, 317, 128, 411) * 4)),
    DeviceItem(Workload("vit-197", "ViT-B/16", 64, 12, 197, 197, 64)),
    DeviceItem(Workload("gemma-4k", "Gemma 2, softcap", 1, 16, 4096, 4096, 256, kv_heads=8, causal=True, window=2047, softcap=50.0)),
    DeviceItem(Workload("decode-64k", "decode, one long sequence", 1, 64, 1, 65536, 128, kv_heads=8, backward=False)),
    DeviceItem(GPT2, "fp16"),
    DeviceItem(replace(GPT2, name="gpt2-1k-fp32", batch=2), "fp32"),
)  # fmt: skip
HOST = Workload("host", "a call with nothing to compute", 1, 12, 128, 128, 64, causal=True)


def rehearsal(item: DeviceItem) -> DeviceItem:
    """The same item, small enough for a CPU: every option stays, lengths shrink alike."""
    workload = item.workload
    divisor = max(1, workload.seqlen_k // 32)
    lengths = None if workload.lengths is None else tuple(max(1, length // divisor) for length in workload.lengths)
    small = replace(
        workload,
        batch=min(workload.batch, 2),
        heads=2 * workload.group,
        kv_heads=None if workload.kv_heads is None else 2,
        seqlen_q=max(1, workload.seqlen_q // divisor) if lengths is None else sum(lengths),
        seqlen_k=max(1, workload.seqlen_k // divisor) if lengths is None else sum(lengths),
        head_dim=16,
        window=None if workload.window is None else workload.window // divisor,
        kv_lengths=None if workload.kv_lengths is None else tuple(max(1, length // divisor) for length in workload.kv_lengths[:2]),
        lengths=lengths,
    )
    return replace(item, workload=small)
