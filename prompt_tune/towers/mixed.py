"""Attention of few queries over keys of their own and keys that all images and classes share.

Scores and sums are those of `attention`, here with a backward written out: it takes about half the
operations of automatic differentiation, and keeps nothing twice. With q a query over sqrt(d), K, V
its own keys and values, k, v the shared ones, the last E of which are a basis that rows r count,

    t = q k^T,   scores = [q K^T, t of the others, (t of the basis) r^T],   a = softmax(scores),
    out = a_own V + [a_others, a_rows r] v.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable


class MixedAttention(torch.autograd.Function):
    """See above; products in the precision of the query, softmax in float32 or more."""

    @staticmethod
    def forward(  # noqa: PLR0917 - autograd passes by position
        ctx: Any,
        query: Float[Tensor, "b c heads n d"],
        own: Float[Tensor, "2 b c heads m d"],
        shared: Float[Tensor, "2 heads k d"],
        rows: Float[Tensor, "b c j e"],
        unseen: Bool[Tensor, "c n all"] | None,
    ) -> Float[Tensor, "b c heads n d"]:
        """The attended values; keys stand in the order own, others, rows."""
        b, c, heads, n, d = query.shape
        many, k, m, e = b * c, shared.shape[2], own.shape[4], rows.shape[3]
        ctx.scale, ctx.shape = d**-0.5, (b, c, heads, n, d)
        q = torch.mul(query, ctx.scale, out=query.new_empty(query.shape)).flatten(0, 2)
        own_key, own_value = own.reshape(2, -1, m, d).unbind()
        r, scaled, value = rows.reshape(many, -1, e), shared[0] * ctx.scale, shared[1]
        t = torch.bmm(_by_head(query), scaled.transpose(1, 2)).view(heads, many, n, k)
        t = t.transpose(0, 1).reshape(many, heads * n, k)
        of_own = torch.bmm(q, own_key.transpose(1, 2)).view(many, heads * n, m)
        of_rows = torch.bmm(t[..., k - e :], r.transpose(1, 2))
        scores = torch.cat([of_own, t[..., : k - e], of_rows], dim=-1)
        if unseen is not None:
            table = scores.view(b, c, heads, n, -1)
            table.masked_fill_(unseen[:, None], -torch.inf)
        a = scores.softmax(dim=-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
        others, last = a[..., m : m + k - e], a[..., m + k - e :]
        inner = torch.cat([others, torch.bmm(last, r)], dim=-1).view(many, heads, n, k)
        inner = inner.transpose(0, 1).reshape(heads, many * n, k)
        common = torch.bmm(inner, value).view(heads, b, c, n, d).permute(1, 2, 0, 3, 4)
        alone = torch.bmm(a.view(many * heads, n, -1)[..., :m], own_value)
        out = query.new_empty(b, c, n, heads, d).transpose(2, 3)
        torch.add(alone.view(b, c, heads, n, d), common, out=out)
        ctx.save_for_backward(q, own_key, own_value, scaled, value, r, t, a, inner)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of everything but the mask."""
        q, own_key, own_value, scaled, value, r, t, a, inner = ctx.saved_tensors
        (b, c, heads, n, d), many = ctx.shape, len(r)
        k, m, e = value.shape[1], own_key.shape[1], r.shape[2]
        of_own, of_rows = a.view(many * heads, n, -1)[..., :m], a[..., m + k - e :]
        g, by_head = grad.reshape(-1, n, d), _by_head(grad)

        grad_shared = grad.new_empty(2, *value.shape)
        torch.bmm(inner.transpose(1, 2), by_head, out=grad_shared[1])
        grad_inner = torch.bmm(by_head, value.transpose(1, 2)).view(heads, many, n, k)
        grad_inner = grad_inner.transpose(0, 1).reshape(many, heads * n, k)
        at_basis = grad_inner[..., k - e :]
        grad_a = torch.cat(
            [
                torch.bmm(g, own_value.transpose(1, 2)).view(many, heads * n, m),
                grad_inner[..., : k - e],
                torch.bmm(at_basis, r.transpose(1, 2)),
            ],
            dim=-1,
        )
        s = torch.ops.aten._softmax_backward_data(grad_a, a, -1, a.dtype)
        s_own, s_rows = s.view(many * heads, n, -1)[..., :m], s[..., m + k - e :]
        grad_t = torch.cat([s[..., m : m + k - e], torch.bmm(s_rows, r)], dim=-1)
        grad_t = grad_t.view(many, heads, n, k).transpose(0, 1).reshape(heads, many * n, k)

        of_common = torch.bmm(grad_t, scaled).view(heads, b, c, n, d).permute(1, 2, 0, 3, 4)
        of_alone = torch.bmm(s_own, own_key).view(b, c, heads, n, d)
        grad_query = grad.new_empty(b, c, n, heads, d).transpose(2, 3)
        torch.add(of_common, of_alone, alpha=ctx.scale, out=grad_query)
        grad_rows = torch.bmm(of_rows.transpose(1, 2), at_basis)
        grad_rows = torch.baddbmm(grad_rows, s_rows.transpose(1, 2), t[..., k - e :])
        torch.bmm(grad_t.transpose(1, 2), _by_head(q.view(b, c, heads, n, d)), out=grad_shared[0])
        grad_own = grad.new_empty(2, len(q), m, d)
        torch.bmm(s_own.transpose(1, 2), q, out=grad_own[0])
        torch.bmm(of_own.transpose(1, 2), g, out=grad_own[1])
        grad_own = grad_own.view(2, b, c, heads, m, d)
        return grad_query, grad_own, grad_shared, grad_rows.view(b, c, -1, e), None


def _by_head(x: Float[Tensor, "b c heads n d"]) -> Float[Tensor, "heads bcn d"]:
    """Every query of a head; no copy where positions stand before heads in memory."""
    return x.permute(2, 0, 1, 3, 4).flatten(1, 3)
