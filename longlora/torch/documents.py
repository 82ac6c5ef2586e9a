"""What longlora_s2 passes to the layers of a transformers model in place of a mask: Documents.

Documents come from a mask function of transformers with its padding, from position_ids that start again, or
from a 4-D mask. None of them is a matrix [T,T]: a mask function is asked for three pairs of each token.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

# The types of layers, as configs name them, that have a state or a convolution in place of attention, and of
# those that have it beside attention.
RECURRENT = {"linear_attention", "conv", "mamba", "recurrent"}
BESIDE = {"hybrid", "hybrid_sliding"}
# What 4-D float masks add to a score that is hidden. exp(-1e4) is 0 in every dtype.
HIDDEN = -1e4


class Misread(ValueError, AttributeError):
    """A model reads Documents as if they were a tensor. hasattr takes it for a missing attribute."""


class Documents:
    """Causal attention within documents, for each of B sequences of `length` tokens.

    cu_seqlens: [B,S] or, for one sequence, [S] int32: the boundaries 0 ... length, where a short row repeats
    the last; None for one document. seen: [B,T] bool, false where a token is padding; None without padding.
    packed: whether there are several documents besides padding.

    It is not a tensor. A model that reads its mask itself would take a tensor of boundaries for a mask, and
    None for a mask that hides nothing. So everything but the attributes above and `to` raises Misread.
    """

    def __init__(
        self,
        length: int,
        cu_seqlens: Tensor | None = None,
        seen: Tensor | None = None,
        packed: Tensor | bool = False,
        model: str = "this",
    ) -> None:
        self.length, self.cu_seqlens, self.seen, self.packed = length, cu_seqlens, seen, packed
        self.model = model
        self.restarts: tuple[Tensor, int, Documents | None] | None = None  # what `restarted` has found

    def to(self, *where: Any, **how: Any) -> "Documents":
        """The same on another device: accelerate moves what it passes to a layer."""
        device = torch.empty(0).to(*where, **how).device

        def moved(x):
            return x.to(device) if isinstance(x, Tensor) else x

        return Documents(
            self.length, moved(self.cu_seqlens), moved(self.seen), moved(self.packed), self.model
        )

    def restarted(self, position_ids: Tensor, B: int) -> "Documents":
        """The documents that also begin where position_ids [B,T] start again.

        The masks of transformers have those only where there is no padding mask. Positions of padding do not
        count. The answer is kept, because every layer asks.
        """
        if torch.compiler.is_compiling():
            # Here transformers' own mask always has the restarts, unless it was given a padding mask.
            return (
                self if self.seen is None else self._with(restarts(position_ids, self.seen, B, self.length))
            )
        kept, version = self.restarts, _version(position_ids)
        if kept is None or kept[0] is not position_ids or kept[1] != version:
            again = restarts(position_ids, self.seen, B, self.length)
            found = None
            if bool((again & ~self.starts(B, again.device)).any()):
                found = self._with(again)
                found.restarts = position_ids, version, None
            kept = self.restarts = position_ids, version, found
        return self if kept[2] is None else kept[2]

    def starts(self, B: int, device: torch.device) -> Tensor:
        """[B,T] bool: where a document, or padding, begins."""
        found = torch.zeros(B, self.length + 1, dtype=torch.bool, device=device)
        found[:, 0] = True
        if self.cu_seqlens is not None:
            found.scatter_(1, self.cu_seqlens.to(device).long().expand(B, -1), True)
        return found[:, : self.length]

    def _with(self, again):
        starts = self.starts(again.shape[0], again.device) | again
        return Documents(self.length, boundaries(starts), self.seen, self.packed | again.any(), self.model)

    def _misread(self, what):
        return Misread(
            f"longlora_s2: a {self.model} model computes with its attention mask by itself ({what}), not by "
            "the attention function alone, and S2-Attn cannot attend for it; use another attn_implementation"
        )

    def __getattr__(self, name: str) -> Any:
        raise self._misread(name)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = next(x for x in [*args, *(kwargs or {}).values()] if isinstance(x, cls))
        raise given._misread(getattr(function, "__name__", "a function of torch"))


def _refuse(name):
    def operator(self, *unused):
        raise self._misread(name)

    return operator


for _name in "getitem len bool iter invert neg add radd sub rsub mul rmul and rand or ror".split():
    setattr(Documents, f"__{_name}__", _refuse(f"__{_name}__"))


# ---- tensors of the form [B,T], and boundaries


def boundaries(starts: Tensor) -> Tensor | None:
    """starts [B,T] bool, true where a document begins -> cu_seqlens [B,S]; None for one document."""
    B, T = starts.shape
    at = torch.where(starts, torch.arange(T, device=starts.device), T).sort(1).values
    if not torch.compiler.is_compiling():
        at = at[:, : int(starts.sum(1).max())]
        if at.shape[1] == 1:
            return None
    return torch.cat([at, at.new_full((B, 1), T)], 1).to(torch.int32)


def restarts(position_ids: Tensor, seen: Tensor | None, B: int, T: int) -> Tensor:
    """Where position_ids start again -> [B,T] bool. Positions of padding, where `seen` is false, do not
    count."""
    p = position_ids.expand(B, T)
    again = p[:, 1:] <= p[:, :-1]
    if seen is not None:
        again = again & seen[:, 1:] & seen[:, :-1]
    return torch.nn.functional.pad(again, (1, 0))


def _version(x):
    """A number that changes when x is written to."""
    return 0 if x.is_inference() else x._version


def _at_pairs(function, b, q, k):
    """What a mask function of transformers gives at the pairs (q, k) of every sequence -> bool [B,T]."""
    return function(b, torch.zeros((), dtype=torch.long, device=b.device), q, k).expand(
        b.shape[0], q.shape[1]
    )


def of_function(
    function: Any, padding: Tensor | None, B: int, T: int, device: torch.device, model: str
) -> Documents | None:
    """The documents that equal mask `function` with `padding` [B,T] bool, or None where none do.

    A token sees its own document up to itself, and nothing else. Padding is a document that no token reads.
    While torch compiles, a mask that no documents equal stops the run of the compiled model.
    """
    b, t = torch.arange(B, device=device)[:, None], torch.arange(T, device=device)[None]
    apart = ~_at_pairs(function, b, t, (t - 1).clamp(min=0))
    apart[:, :1] = True
    starts, exact = apart, torch.ones((), dtype=torch.bool, device=device)
    if padding is not None:
        change = torch.zeros_like(apart)
        change[:, 1:] = padding[:, 1:] != padding[:, :-1]
        starts = apart | change
        # Tokens after a gap of padding would see those before it.
        exact = ((change & padding).sum(1) + padding[:, 0] <= 1).all()
    # Three pairs of each token stand for the whole mask [T,T]: with the first token of its document, the next
    # token, and the last token of the document before.
    first = torch.where(starts, t, 0).cummax(1).values
    before = _at_pairs(function, b, t, (first - 1).clamp(min=0)) & apart.gather(1, first) & (first > 0)
    after = _at_pairs(function, b, t, (t + 1).clamp(max=T - 1)) & (t < T - 1)
    exact = exact & _at_pairs(function, b, t, first).all() & ~before.any() & ~after.any()
    if torch.compiler.is_compiling():
        torch._assert_async(exact, "longlora_s2: this mask is not causal attention within documents")
    elif not exact:
        return None
    return Documents(T, boundaries(starts), padding, apart[:, 1:].any(), model)


def of_4d(given: Tensor, B: int, T: int, name: str, model: str) -> Documents:
    """The documents that equal a 4-D mask [B,1,T,T] or [1,1,T,T]; ValueError where none do.

    name: that of the attention module. The answer is kept on the mask, because every layer asks.
    """
    kept, version = getattr(given, "longlora_documents", None), _version(given)
    if kept is None or kept[0] != version:
        if given.shape[1] != 1 or given.shape[0] not in (1, B) or given.shape[2:] != (T, T):
            raise ValueError(
                f"longlora_s2: the 4-D attention mask of {name} should be [{B},1,{T},{T}], got "
                f"{list(given.shape)}; S2-Attn has one mask for all heads"
            )
        seen = given if given.dtype == torch.bool else given == 0
        seen = seen[:, 0]
        starts = torch.ones(seen.shape[:2], dtype=torch.bool, device=seen.device)
        starts[:, 1:] = ~seen.diagonal(-1, 1, 2)
        number = starts.cumsum(1)
        causal = torch.ones(T, T, dtype=torch.bool, device=seen.device).tril()
        if not torch.equal(seen, (number[:, :, None] == number[:, None]) & causal):
            raise ValueError(
                f"longlora_s2: the 4-D attention mask of {name} is not causal attention within documents, "
                "and S2-Attn cannot train with it (transformers makes one of a 2-D mask that hides tokens "
                "between others); give padding at the ends, position_ids, or another attn_implementation"
            )
        if given.dtype != torch.bool and not bool((given[:, 0][~seen] <= HIDDEN).all()):
            raise ValueError(
                f"longlora_s2: the 4-D attention mask of {name}, {given.dtype}, should be 0 where a token is "
                f"seen and at most {HIDDEN:g} where it is not; S2-Attn adds no bias to scores"
            )
        found = Documents(T, boundaries(starts.expand(B, T)), None, starts[:, 1:].any(), model)
        kept = given.longlora_documents = version, found  # type: ignore[attr-defined]
    return kept[1]


# ---- what documents cannot keep apart


def carries_state(config: Any) -> bool:
    """Whether a model has layers that carry something from token to token besides attention."""
    if config is None:
        return False
    config = config.get_text_config() if isinstance(config, PretrainedConfig) else config
    types = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ()
    return not (RECURRENT | BESIDE).isdisjoint(types) or any(
        name.startswith("mamba_") for name in vars(config)
    )


def keep_apart(documents: Documents, config: Any) -> Documents:
    """ValueError for several documents in a sequence of a model that carries state -> documents."""
    if documents.packed is not False and carries_state(config):
        message = (
            f"longlora_s2: packed documents are not supported for {documents.model}: its linear attention or "
            "convolutions carry a state from one document to the next; give each its own row"
        )
        if torch.compiler.is_compiling():
            torch._assert_async(~torch.as_tensor(documents.packed), message)
        elif documents.packed:
            raise ValueError(message)
    return documents
