"""Shifted sparse attention on torch tensors with autograd, against torch's own attention group by group."""

import torch
from torch.nn.functional import scaled_dot_product_attention

from longlora.torch.ops import s2_attention

B, T, H, D, G = 2, 64, 4, 16, 16
torch.manual_seed(0)
q, k, v = (torch.randn(B, T, H, D, requires_grad=True) for _ in range(3))
dout = torch.randn(B, T, H, D)
out = s2_attention(q, k, v, group_size=G)
gradients = torch.autograd.grad(out, (q, k, v), dout)


def by_groups(q, k, v, first):
    """Dense causal attention in each group; the first group has `first` tokens, the others G."""
    sizes = [first] + [G] * ((T - first) // G) + ([(T - first) % G] if (T - first) % G else [])
    groups = zip(*(x.transpose(1, 2).split(sizes, 2) for x in (q, k, v)))
    return torch.cat([scaled_dot_product_attention(*group, is_causal=True) for group in groups], 2).transpose(
        1, 2
    )


plain, shifted = slice(0, H // 2), slice(H // 2, H)  # halves of the heads
halves = [by_groups(*(x[:, :, heads] for x in (q, k, v)), n) for heads, n in ((plain, G), (shifted, G // 2))]
wanted = torch.cat(halves, 2)
torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-5)
torch.testing.assert_close(gradients, torch.autograd.grad(wanted, (q, k, v), dout), rtol=1e-4, atol=1e-5)
print("out and the gradients of q, k and v equal those of scaled_dot_product_attention in groups")
