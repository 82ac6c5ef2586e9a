"""What the tests of swap share: equal results of a model and its swapped copy."""

import copy
import gc

import torch
from devices import put
from families import ids_of

import longlora.torch

KERNELS = ("rms_norm", "swiglu", "lora_linear", "rope", "linear_cross_entropy")


def own_rotary():
    """Give every family its own rotary function again, also where other tests left a swapped model behind."""
    gc.collect()
    longlora.torch.unswap(torch.nn.Identity())


def tokens():
    return ids_of(2, 24)


def disturbed(model, size=0.05, seed=0):
    """The model with every parameter moved: LoRA's B off zero, norms off one, biases off zero."""
    generator = torch.Generator().manual_seed(seed)  # on the CPU: the same numbers everywhere
    with torch.no_grad():
        for p in model.parameters():
            if p.is_floating_point():
                p.add_(put(torch.randn(p.shape, generator=generator)).to(p.dtype) * size)
    return model


def step(model, **inputs):
    """A training step's forward and backward -> what forward gives, the gradients by name."""
    inputs = dict(input_ids=tokens(), labels=tokens(), use_cache=False) | inputs
    torch.manual_seed(1)  # for dropout
    model.zero_grad(set_to_none=True)
    output = model(**inputs)
    (output[0] if isinstance(output, tuple) else output["loss"]).backward()
    return output, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def near(ours, theirs, limit, what=""):
    """Tensors, and nested tuples of them, of one dtype and within limit of the largest number."""
    if isinstance(theirs, (tuple, list)):
        assert len(ours) == len(theirs), what
        for a, b in zip(ours, theirs):
            near(a, b, limit, what)
    elif isinstance(theirs, torch.Tensor):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape, what
        ours, theirs = ours.detach().double(), theirs.detach().double()
        assert (ours - theirs).abs().max() <= limit * theirs.abs().max() + 1e-30, what
    else:
        assert type(ours) is type(theirs), what


def agree(model, swapped, limit=1e-4, logits=None, **inputs):
    """A training step and evaluation of `swapped` are those of `model`.

    logits: whether the training step gives them; None for either.
    """
    theirs, want = step(model.train(), **inputs)
    ours, found = step(swapped.train(), **inputs)
    same_output(ours, theirs, limit, logits)
    assert found.keys() == want.keys(), found.keys() ^ want.keys()
    largest = max(grad.norm() for grad in want.values())
    for name, grad in want.items():
        assert found[name].dtype == grad.dtype
        assert (found[name] - grad).norm() <= limit * (grad.norm() + 0.01 * largest), name
    with torch.no_grad():
        inputs = dict(input_ids=tokens(), use_cache=False) | inputs
        same_output(swapped.eval()(**inputs), model.eval()(**inputs), limit, True)


def same_output(ours, theirs, limit=1e-4, logits=True):
    if isinstance(theirs, tuple):
        near(ours, theirs, limit)
        return
    assert type(ours) is type(theirs)
    if logits is not None:
        assert ("logits" in ours) == logits and (ours.logits is not None) == logits
    for name in theirs:
        if name in ours or name != "logits":
            near(ours[name], theirs[name], limit, name)


def swapped_copy(model, **expected):
    """A swapped copy of the model. expected: the numbers of parts, 0 for those left out."""
    made = copy.deepcopy(model)
    counts = longlora.torch.swap(made)
    assert counts == dict.fromkeys(KERNELS, 0) | expected
    return made
