"""Transformers that learn from real data in minutes: gpt, bert, vit, translate, speech and matching.

python -m fused_attention.examples.gpt

They need `pip install fused-attention[examples]`.
"""
