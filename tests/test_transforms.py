"""Every transform of PyTorch around attention: higher derivatives, forward mode, torch.func, checkpoint, compile, opcheck, meta."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jacrev, jvp, vmap
from torch.utils.checkpoint import checkpoint

import fused_attention
from fused_attention import attention, attention_with_lse, blockwise, ops
from fused_attention.validation import check

OPTION_SETS = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window": (2, 1), "offset": 1},
    "lengths": {"kv_lengths": torch.tensor([[0, 5], [2, 7]])},
    "mask": {"mask": torch.rand(2, 1, 5, 7, generator=torch.Generator().manual_seed(1)) > 0.3},
    "softcap": {"softcap": 1.5},
    "dropout": {"dropout_p": 0.4, "dropout_seed": torch.tensor([3, 4])},
    "all": {
        "causal": True,
        "window": (4, None),
        "kv_lengths": torch.tensor([5, 7]),
        "softcap": 2.0,
        "dropout_p": 0.3,
        "dropout_seed": torch.tensor([3, 4]),
        "scale": -0.7,
    },
}


def operands(dtype=torch.float64, seed=0):
    """q, k, v, bias, alibi_slopes, sinks: batch 2, heads 4 over 2, 5 queries, 7 keys, head_dim 3 and 6."""
    draw = torch.Generator().manual_seed(seed)
    shapes = ((2, 4, 5, 3), (2, 2, 7, 3), (2, 2, 7, 6), (1, 4, 5, 7), (2, 4), (4,))
    return tuple(torch.randn(shape, generator=draw, dtype=dtype).requires_grad_() for shape in shapes)


def call(options, backend="torch"):
    def function(q, k, v, bias, slopes, sinks):
        return tuple(attention_with_lse(q, k, v, bias=bias, alibi_slopes=slopes, sinks=sinks, backend=backend, **options))

    return function


@pytest.fixture(params=(512, 2), ids=("one-tile", "many-tiles"))
def tile_size(request, monkeypatch):
    monkeypatch.setattr(blockwise, "BLOCK", request.param)
    return request.param


@pytest.mark.parametrize("name", OPTION_SETS)
def test_first_derivative(name, tile_size):
    assert gradcheck(call(OPTION_SETS[name]), operands(), fast_mode=True)


@pytest.mark.parametrize("name", OPTION_SETS)
def test_second_derivative(name, tile_size):
    assert gradgradcheck(call(OPTION_SETS[name]), operands(), fast_mode=True)


@pytest.mark.parametrize("name", OPTION_SETS)
def test_forward_mode_derivative(name):
    assert gradcheck(call(OPTION_SETS[name]), operands(), fast_mode=True, check_forward_ad=True, check_backward_ad=False)


def test_every_entry_of_the_jacobians():
    assert gradcheck(call(OPTION_SETS["all"]), operands(), check_batched_grad=True)
    assert gradgradcheck(call(OPTION_SETS["causal"]), operands())


@pytest.mark.parametrize("backend", ["torch", "reference", None])
def test_second_derivative_of_plain_attention(backend):
    q, k, v, *_ = operands()
    assert gradgradcheck(lambda *qkv: attention(*qkv, causal=True, backend=backend), (q, k, v), fast_mode=True)


def test_packed_derivatives(tile_size):
    draw = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(8, heads, 3, generator=draw, dtype=torch.float64).requires_grad_() for heads in (4, 2, 2))
    slopes = torch.rand(3, 4, generator=draw, dtype=torch.float64).requires_grad_()
    cu_seqlens = torch.tensor([0, 3, 3, 7])

    def packed(q, k, v, slopes):
        return fused_attention.attention_varlen(q, k, v, cu_seqlens, causal=True, alibi_slopes=slopes, backend="torch")

    assert gradcheck(packed, (q, k, v, slopes), fast_mode=True)
    assert gradgradcheck(packed, (q, k, v, slopes), fast_mode=True)


def both(transform):
    """A transform of a scalar function of attention, on the torch backend and on the reference."""
    return tuple(
        transform(lambda *args, name=name: attention(*args, causal=True, backend=name).square().sum()) for name in ("torch", "reference")
    )


def detached(*tensors):
    return tuple(tensor.detach() for tensor in tensors)


def test_func_grad_equals_the_reference():
    q, k, v = detached(*operands()[:3])
    ours, theirs = both(lambda f: grad(f, (0, 1, 2))(q, k, v))
    torch.testing.assert_close(ours, theirs)


def test_grad_of_grad():
    q, k, v = detached(*operands()[:3])
    ours, theirs = both(lambda f: grad(lambda q: grad(f)(q, k, v).square().sum())(q))
    torch.testing.assert_close(ours, theirs)


def test_func_grad_under_an_outer_tape():
    q, k, v = operands()[:3]
    ours, theirs = both(lambda f: torch.autograd.grad(grad(f)(q, k, v).square().sum(), (q, k, v)))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("mapped", [(0, None, None), (0, 0, 0), (None, 1, None)])
def test_vmap_and_vmap_of_grad(mapped):
    q, k, v = (
        torch.stack((x, 2 * x, -x), dim=dim) if dim is not None else x for x, dim in zip(detached(*operands()[:3]), mapped, strict=True)
    )
    for ours, theirs in (both(lambda f: vmap(f, mapped)(q, k, v)), both(lambda f: vmap(grad(f, (0, 1, 2)), mapped)(q, k, v))):
        torch.testing.assert_close(ours, theirs)


def test_vmap_with_a_bias_that_is_not_mapped_gives_its_gradient_an_element():
    q, k, v, bias = detached(*operands()[:4])
    many = torch.stack((q, 2 * q))

    def loss(q, bias, backend):
        return attention(q, k, v, bias=bias, backend=backend).square().sum()

    results = [vmap(grad(loss, (0, 1)), (0, None, None))(many, bias, name) for name in ("torch", "reference")]
    torch.testing.assert_close(*results)


def test_jvp_jacobian_and_hessian_equal_the_reference():
    q, k, v = detached(*operands()[:3])
    q, k, v = q[:1, :2, :3], k[:1, :, :3], v[:1, :, :3]
    for ours, theirs in (
        both(lambda f: jvp(lambda q: f(q, k, v), (q,), (q.cos(),))),
        both(lambda f: jacrev(f)(q, k, v)),
        both(lambda f: hessian(f)(q, k, v)),
    ):
        torch.testing.assert_close(ours, theirs)


def test_checkpointing_draws_the_same_dropout():
    q, k, v = operands()[:3]

    def loss(q):
        return attention(q, k, v, dropout_p=0.5).square().sum()

    torch.manual_seed(5)
    (plain,) = torch.autograd.grad(loss(q), q)
    torch.manual_seed(5)
    (recomputed,) = torch.autograd.grad(checkpoint(loss, q, use_reentrant=False), q)
    assert torch.equal(plain, recomputed)
    torch.manual_seed(6)
    assert not torch.equal(plain, torch.autograd.grad(loss(q), q)[0])


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_whole_equals_eager(dynamic, compiler):
    torch._dynamo.reset()

    def loss(q, k, v, bias, lengths):
        out, lse = attention_with_lse(q, k, v, causal=True, bias=bias, kv_lengths=lengths, softcap=3.0)
        return out.square().sum() + lse.exp().sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend=compiler)
    for length in (5, 8, 13) if dynamic else (6,):
        shapes = (2, 4, length, 8), (2, 2, length + 2, 8), (2, 2, length + 2, 6), (1, 4, length, length + 2)
        inputs = tuple(torch.randn(shape).requires_grad_() for shape in shapes)
        lengths = torch.tensor([length, length + 1])
        eager = torch.autograd.grad(loss(*inputs, lengths), inputs)
        torch.testing.assert_close(torch.autograd.grad(compiled(*inputs, lengths), inputs), eager, atol=1e-5, rtol=1e-4)


def test_compiled_plain_attention_takes_the_automatic_backend():
    torch._dynamo.reset()
    q, k, v = (torch.randn(2, 3, 17, 8).requires_grad_() for _ in range(3))
    compiled = torch.compile(lambda q, k, v: attention(q, k.clone(), v, causal=True), fullgraph=True, dynamic=True)
    eager = attention(q, k, v, causal=True)
    torch.testing.assert_close(compiled(q, k, v), eager)
    torch.testing.assert_close(
        torch.autograd.grad(compiled(q, k, v).sum(), (q, k, v)), torch.autograd.grad(eager.sum(), (q, k, v)), atol=1e-5, rtol=1e-4
    )


LAYOUTS = {
    "contiguous": lambda x: x,
    "heads-last": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "strided": lambda x: torch.cat((x, x), -1)[..., ::2],
    "expanded": lambda x: x[:1].expand_as(x),
    "offset": lambda x: torch.cat((x[:, :, :1], x), 2)[:, :, 1:],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("head_dim_v", [8, 6])
def test_opcheck(layout, backend, head_dim_v):
    """Fake kernels promise a layout, so all are checked; that a graph can be traced takes seconds, and two are enough."""
    reason = fused_attention.backends()[backend]
    if reason is not None:
        pytest.skip(reason)
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if head_dim_v == 6 and (backend, layout) in (("torch", "contiguous"), ("cpu", "strided")):
        checks.append("test_aot_dispatch_dynamic")
    move = LAYOUTS[layout]
    q, k, v = (move(torch.randn(shape)).detach().requires_grad_() for shape in ((2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, head_dim_v)))
    arguments = (q, k, v, *ops._options(check(q, k, v, causal=True)), backend)
    torch.library.opcheck(ops.forward_op, arguments, test_utils=checks)
    out, lse = (x.detach() for x in ops.forward_op(*arguments))
    needed = (True, True, True, False, False, False)
    for dlse in (None, torch.randn_like(lse)):
        derivative = (torch.randn_like(out), dlse, q, k, v, out, lse, *arguments[3:], needed)
        torch.library.opcheck(ops.backward_op, derivative, test_utils=checks)


def test_the_operator_called_directly_has_right_gradients():
    q, k, v = operands(torch.float32)[:3]
    out, _ = ops.forward_op(q, k, v, *ops._options(check(q, k, v)), "torch")
    expected = torch.autograd.grad(attention(q, k, v, backend="reference").square().sum(), (q, k, v))
    torch.testing.assert_close(torch.autograd.grad(out.square().sum(), (q, k, v)), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_out_is_laid_out_as_empty_like_q(layout):
    q = LAYOUTS[layout](torch.randn(2, 4, 5, 8))
    k = torch.randn(2, 4, 7, 8)
    for backend in ("torch", None):
        assert attention(q, k, k, causal=True, backend=backend).stride() == torch.empty_like(q).stride()
    assert attention(q.to("meta"), k.to("meta"), k.to("meta")).stride() == torch.empty_like(q).stride()


def test_meta_device_knows_shapes_and_dtypes():
    q, k, v = (torch.empty(shape, device="meta", dtype=torch.bfloat16) for shape in ((2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 3)))
    for backend in (None, "reference"):
        out, lse = attention_with_lse(q, k, v, causal=True, backend=backend)
        assert (out.shape, out.dtype, lse.shape, lse.dtype) == ((2, 4, 5, 3), torch.bfloat16, (2, 4, 5), torch.float32)


def test_inference_mode_and_no_grad_record_nothing():
    q, k, v = operands(torch.float32)[:3]
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            out = attention(q, k, v)
            assert not out.requires_grad
    torch.testing.assert_close(out, attention(q, k, v).detach())


def test_any_subset_of_inputs_may_need_a_gradient():
    inputs = operands()
    reference = torch.autograd.grad(sum(x.sum() for x in call({}, "reference")(*inputs)), inputs)
    for subset in range(1, 2 ** len(inputs)):
        chosen = [bool(subset >> index & 1) for index in range(len(inputs))]
        given = [x.detach().requires_grad_(need) for x, need in zip(inputs, chosen, strict=True)]
        wanted = [x for x in given if x.requires_grad]
        found = torch.autograd.grad(sum(x.sum() for x in call({})(*given)), wanted)
        expected = [g for g, need in zip(reference, chosen, strict=True) if need]
        torch.testing.assert_close(list(found), expected)


def test_flops_are_counted_as_pytorch_counts_its_own():
    from torch.utils.flop_counter import FlopCounterMode

    q = torch.randn(2, 4, 64, 32, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        attention(q, q, q).sum().backward()
    forward = 2 * 2 * 4 * 64 * 64 * (32 + 32)
    assert counter.get_total_flops() == forward + forward * 5 // 2
