"""Any history of a paged cache against plain lists of rows: append, fork, truncate, free, reorder, in any order, on dirty pages."""

from __future__ import annotations

import itertools

import pytest
import torch

from fused_attention import PagedKVCache, attention_with_cache
from fused_attention.testing import Inputs, check

hypothesis = pytest.importorskip("hypothesis", reason="hypothesis is not installed: it belongs to the [test] extra")
from hypothesis import strategies as st  # noqa: E402
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule  # noqa: E402

MEMBERS, KV_HEADS, HEADS, HEAD_DIM = 4, 2, 4, 16
sizes = st.integers(0, 9)


class Paging(RuleBasedStateMachine):
    """The model: for each member its padding, and the numbers of its tokens; token n has the rows that the generator draws n-th."""

    @initialize(pages=st.integers(3, 14), page_size=st.sampled_from([1, 2, 3, 7, 16]))
    def begin(self, pages, page_size):
        self.cache = PagedKVCache(MEMBERS, pages, KV_HEADS, HEAD_DIM, page_size=page_size)
        for x in (self.cache.k, self.cache.v):
            x.fill_(torch.nan)
        self.tokens = [[] for _ in range(MEMBERS)]
        self.padding = [0] * MEMBERS
        self.rows, self.numbers = [], itertools.count()
        self.generator = torch.Generator().manual_seed(0)

    def new_tokens(self, shape):
        drawn = torch.randn(3, len(shape), HEADS, max(shape, default=0), HEAD_DIM, generator=self.generator)
        q, k, v = drawn[0], drawn[1, :, :KV_HEADS], drawn[2, :, :KV_HEADS]
        numbers = []
        for place, count in enumerate(shape):
            numbers.append([next(self.numbers) for _ in range(count)])
            self.rows += [(k[place, :, row], v[place, :, row]) for row in range(count)]
        return q, k, v, numbers

    def of(self, tokens):
        k, v = (torch.stack([self.rows[number][part] for number in tokens], 1)[None] for part in (0, 1))
        return k, v

    def some(self, data, **limits):
        return data.draw(st.lists(st.integers(0, self.cache.batch - 1), **limits))

    @rule(even=st.booleans(), data=st.data())
    def append_and_attend(self, even, data):
        """Chunks of a prompt, single steps and nothing, to some members at once; each sees its own tokens alone."""
        chosen = self.some(data, unique=True)
        counts = [data.draw(sizes)] * len(chosen) if even else data.draw(st.lists(sizes, min_size=len(chosen), max_size=len(chosen)))
        lengths = {} if even else {"new_lengths": counts}
        before = self.snapshot()
        free = self.cache.free_pages
        known = len(self.rows)
        q, k, v, numbers = self.new_tokens(counts)
        out, refusal = None, ""
        try:
            out = attention_with_cache(q, self.cache, k=k, v=v, members=chosen, causal=True, **lengths)
        except ValueError as error:
            refusal = str(error)
        if out is None:
            assert f"pages are needed for {sum(counts)} new rows, and {free} of " in refusal
            assert self.snapshot() == before
            del self.rows[known:]
            self.numbers = itertools.count(known)
            return
        for place, (member, count) in enumerate(zip(chosen, counts, strict=True)):
            self.tokens[member] += numbers[place]
            if count:
                seen = torch.tensor([[self.padding[member], len(self.tokens[member])]])
                options = {"causal": True, "kv_lengths": seen}
                inputs = Inputs(q[place : place + 1, :, :count], *self.of(self.tokens[member]), options, out, None)
                check(out[place : place + 1, :, :count], inputs.truth(backward=False))

    @rule(pads=st.lists(sizes, min_size=MEMBERS, max_size=MEMBERS), data=st.data())
    def pad(self, pads, data):
        chosen = self.some(data, unique=True, max_size=MEMBERS)
        self.cache.pad_left(torch.tensor(pads[: len(chosen)], dtype=torch.int64), chosen)
        for member, padding in zip(chosen, pads, strict=False):
            self.padding[member] = padding

    @precondition(lambda self: self.cache.batch > 1)
    @rule(share=st.floats(0, 1), data=st.data())
    def fork(self, share, data):
        source, target = self.some(data, unique=True, min_size=2, max_size=2)
        self.empty(target)
        length = round(share * len(self.tokens[source]))
        self.cache.fork(source, target, length)
        self.tokens[target], self.padding[target] = self.tokens[source][:length], self.padding[source]

    @rule(length=sizes, data=st.data())
    def truncate(self, length, data):
        chosen = self.some(data, unique=True)
        self.cache.truncate(length, chosen)
        for member in chosen:
            del self.tokens[member][length:]
            self.padding[member] = min(self.padding[member], len(self.tokens[member]))

    @rule(data=st.data())
    def free(self, data):
        (member,) = self.some(data, min_size=1, max_size=1)
        self.empty(member)

    def empty(self, member):
        self.cache.free(member)
        self.tokens[member], self.padding[member] = [], 0

    @rule(data=st.data())
    def reorder(self, data):
        index = self.some(data, min_size=1, max_size=MEMBERS + 1)
        self.cache.reorder(index)
        self.tokens, self.padding = [list(self.tokens[each]) for each in index], [self.padding[each] for each in index]

    @precondition(lambda self: self.cache.free_pages == 0)
    @rule(data=st.data())
    def no_room(self, data):
        (member,) = self.some(data, min_size=1, max_size=1)
        if len(self.tokens[member]) % self.cache.page_size == 0:
            row = torch.zeros(1, KV_HEADS, 1, HEAD_DIM)
            with pytest.raises(ValueError, match=r"1 pages are needed for 1 new rows, and 0 of \d+ are free"):
                self.cache.append(row, row, members=[member])

    def snapshot(self):
        return self.cache.lengths.tolist(), self.cache.page_table.tolist(), self.cache.free_pages

    @invariant()
    def every_member_holds_its_tokens(self):
        if not hasattr(self, "cache"):
            return
        assert self.cache.lengths.tolist() == [len(tokens) for tokens in self.tokens]
        assert self.cache.starts.tolist() == self.padding
        k, v = self.cache.keys_of(range(self.cache.batch))
        for member, tokens in enumerate(self.tokens):
            if tokens:
                expected = self.of(tokens)
                for x, rows in zip((k, v), expected, strict=True):
                    assert torch.equal(x[member : member + 1, :, : len(tokens)], rows)

    @invariant()
    def no_page_is_lost_or_held_for_nothing(self):
        if hasattr(self, "cache"):
            size = self.cache.page_size
            held = {
                page
                for row, tokens in zip(self.cache.page_table.tolist(), self.tokens, strict=True)
                for page in row[: -(-len(tokens) // size)]
            }
            assert len(held) + self.cache.free_pages == self.cache.pages


def test_any_history_equals_plain_lists():
    settings = hypothesis.settings(max_examples=40, stateful_step_count=25, deadline=None, derandomize=True, database=None)
    hypothesis.stateful.run_state_machine_as_test(Paging, settings=settings)


def test_the_copy_of_a_shared_page_needs_a_free_one_too():
    cache = PagedKVCache(2, 2, 1, 8, page_size=4)
    rows = torch.randn(1, 1, 5, 8)
    cache.append(rows, rows, members=[0])
    cache.fork(0, 1)
    with pytest.raises(ValueError, match="1 pages are needed for 1 new rows, and 0 of 2 are free"):
        cache.append(rows[:, :, :1], rows[:, :, :1], members=[1])
    cache.free(0)
    cache.append(rows[:, :, :1], rows[:, :, :1], members=[1])


def test_padding_goes_along_with_a_fork_and_is_cut_with_its_rows():
    cache = PagedKVCache(2, 4, 1, 8, page_size=4)
    rows = torch.randn(1, 1, 5, 8)
    cache.pad_left(torch.tensor([3, 0]))
    cache.append(rows, rows, members=[0])
    cache.fork(0, 1)
    assert cache.starts.tolist() == [3, 3]
    cache.truncate([2], [1])
    assert cache.starts.tolist() == [3, 2]


def test_forks_share_pages_until_one_of_them_writes():
    cache = PagedKVCache(3, 6, 1, 8, page_size=4)
    rows = torch.randn(1, 1, 6, 8)
    cache.append(rows, rows, members=[0])
    cache.fork(0, 1)
    cache.fork(0, 2, 5)
    assert cache.free_pages == 4, "both live on the two pages of the first"
    cache.append(rows[:, :, :1], rows[:, :, :1], members=[1])
    assert cache.free_pages == 3, "a copy of the last page"
    assert torch.equal(cache.keys_of([0])[0][:, :, :6], rows)
    cache.append(rows[:, :, :1], rows[:, :, :1], members=[2])
    cache.append(rows[:, :, :1], rows[:, :, :1], members=[0])
    assert cache.free_pages == 2, "who is left alone on a page writes to it"
    cache.free(0)
    cache.free(1)
    assert cache.free_pages == 4
    assert torch.equal(cache.keys_of([2])[0][:, :, :6], torch.cat([rows[:, :, :5], rows[:, :, :1]], 2))
