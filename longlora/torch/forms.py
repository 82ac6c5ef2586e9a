"""What the source of a function of transformers or PEFT says: whether it is one that swap knows.

A function is known by its text. Names of variables, annotations and docstrings do not matter. A function
whose source cannot be read, or that a decorator wraps, is unknown.
"""

import ast
import functools
import inspect
import os
import textwrap
import types
from typing import Any, NamedTuple

import torch

# ---- texts


@functools.cache
def _tree(function):
    """The definition of a plain function; None where there is no source, or it sees another function's
    variables."""
    if not isinstance(function, types.FunctionType) or function.__code__.co_freevars:
        return None
    try:
        body = ast.parse(textwrap.dedent(inspect.getsource(function.__code__))).body
    except (OSError, SyntaxError, TypeError):
        return None
    return body[0] if isinstance(body[0], ast.FunctionDef) else None


class _Plain(ast.NodeTransformer):
    """Takes annotations out and gives variables their numbers as names."""

    def __init__(self, names):
        self.names = {name: f"v{number}" for number, name in enumerate(names)}

    def visit_Name(self, node):
        return ast.Name(self.names.get(node.id, node.id), node.ctx)

    def visit_arg(self, node):
        return ast.arg(self.names[node.arg])

    def visit_AnnAssign(self, node):
        return self.visit(ast.Assign([node.target], node.value, lineno=node.lineno))


def _text(tree):
    """The text of a definition without what does not matter."""
    tree = ast.parse(ast.unparse(tree)).body[0]
    tree.name, tree.returns, tree.decorator_list = "", None, []
    if ast.get_docstring(tree, clean=False) is not None:
        tree.body = tree.body[1:]
    arguments = [node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)]
    stored = [n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
    return ast.unparse(_Plain(dict.fromkeys(arguments + stored)).visit(tree))


@functools.cache
def _known(text):
    return _text(ast.parse(textwrap.dedent(text)).body[0])


@functools.cache
def _text_of(function):
    tree = _tree(function)
    return None if tree is None or hasattr(function, "__wrapped__") else _text(tree)


def same(function: Any, text: str) -> bool:
    """Whether a function, as it is defined and without a decorator that wraps it, has the source `text`."""
    return _text_of(function) == _known(text)


# ---- norms


class NormForm(NamedTuple):
    """forward and _norm (or None): their sources. keeps: whether the result has the dtype of x."""

    forward: str
    norm: str | None
    keeps: bool


def _norm_form(result, keeps):
    text = f"""
        def forward(self, x):
            dtype = x.dtype
            x = x.to(torch.float32)
            variance = x.pow(2).mean(-1, keepdim=True)
            x = x * torch.rsqrt(variance + self.variance_epsilon)
            return {result}
        """
    return NormForm(text, None, keeps)


_RSQRT = """
    def _norm(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
    """
_POW = """
    def _norm(self, x):
        mean = x.pow(2).mean(-1, keepdim=True) + self.eps
        return x * torch.pow(mean, -0.5)
    """
_SCALED = """
    def forward(self, x):
        out = self._norm(x.float())
        if self.with_scale:
            out = out * self.weight.float()
        return out.type_as(x)
    """
_MOSHI = """
    def forward(self, x):
        out = self._norm(x.float())
        out = out * self.weight.float()
        return out.type_as(x)
    """
_LLAMA4 = """
    def forward(self, x):
        out = self._norm(x.float()).type_as(x)
        return out * self.weight
    """
_NORMS = (
    _norm_form("self.weight * x.to(dtype)", keeps=False),  # Llama and most others
    _norm_form("(self.weight * x).to(dtype)", keeps=True),  # OLMo-2, GPT-OSS
    _norm_form("(self.weight.to(torch.float32) * x).to(dtype)", keeps=True),  # Helium
    NormForm(_SCALED, _POW, True),  # Gemma 4
    NormForm(_MOSHI, _RSQRT, True),
    NormForm(_LLAMA4, _RSQRT, False),
)


@functools.cache
def norm(base: Any) -> NormForm | None:
    """The form of a class that computes x / sqrt(mean(x²) + eps) weight; None for another class."""
    for form in _NORMS:
        helper = form.norm is None or same(getattr(base, "_norm", None), form.norm)
        if helper and same(getattr(base, "forward", None), form.forward):
            return form
    return None


# ---- MLPs

_MLPS = (
    """
    def forward(self, x):
        out = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return out
    """,
    """
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
    """,
)
_SILU = """
    def forward(self, x):
        return nn.functional.silu(x)
    """


@functools.cache
def mlp(base: Any) -> bool:
    """Whether a class computes down_proj(act_fn(gate_proj(x)) up_proj(x))."""
    return any(same(base.forward, text) for text in _MLPS)


def silu(base: Any) -> bool:
    """Whether a class of modules computes x sigmoid(x)."""
    return base.forward is torch.nn.SiLU.forward or same(base.forward, _SILU)


# ---- LoRA

_LORA = """
    def forward(self, x, *args, **kwargs):
        self._check_forward_args(x, *args, **kwargs)
        adapter_names = kwargs.pop("adapter_names", None)
        variant_kwargs = {k: kwargs.pop(k, None) for k in VARIANT_KWARG_KEYS}
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            result = self.base_layer(x, *args, **kwargs)
        elif adapter_names is not None:
            result = self._mixed_batch_forward(
                x, *args, adapter_names=adapter_names, **variant_kwargs, **kwargs
            )
        elif self.merged:
            result = self.base_layer(x, *args, **kwargs)
        else:
            result = self.base_layer(x, *args, **kwargs)
            dtype = result.dtype
            names = self.lora_A.keys()
            for name in self.active_adapters:
                if name not in names:
                    continue
                a = self.lora_A[name]
                b = self.lora_B[name]
                dropout = self.lora_dropout[name]
                scaling = self.scaling[name]
                x = self._cast_input_dtype(x, a.weight.dtype)
                if name not in self.lora_variant:
                    result = result + b(a(dropout(x))) * scaling
                else:
                    result = self.lora_variant[name].forward(
                        self, active_adapter=name, x=x, result=result, **variant_kwargs, **kwargs
                    )
            result = result.to(dtype)
        return result
    """


@functools.cache
def lora_linear(base: Any) -> bool:
    """Whether a class is the LoRA linear of PEFT."""
    return same(base.forward, _LORA)


# ---- the rotary embedding

_HALF = """
    def rotate_half(x):
        x1 = x[..., : x.shape[-1] // 2]
        x2 = x[..., x.shape[-1] // 2 :]
        return torch.cat((-x2, x1), dim=-1)
    """
_WHOLE = """
    def rotate(q, k, cos, sin{more}, unsqueeze_dim=1):
        cos = cos.unsqueeze(unsqueeze_dim)
        sin = sin.unsqueeze(unsqueeze_dim)
        q_embed = q * cos + rotate_half(q) * sin
        k_embed = k * cos + rotate_half(k) * sin
        return q_embed, k_embed
    """
_TYPED = """
    def rotate(q, k, cos, sin{more}, unsqueeze_dim=1):
        q_type, k_type = q.dtype, k.dtype
        cos = cos.unsqueeze(unsqueeze_dim)
        sin = sin.unsqueeze(unsqueeze_dim)
        q_embed = q * cos + rotate_half(q) * sin
        k_embed = k * cos + rotate_half(k) * sin
        return q_embed.to(q_type), k_embed.to(k_type)
    """
_PART = """
    def rotate(q, k, cos, sin{more}, unsqueeze_dim=1):
        cos = cos.unsqueeze(unsqueeze_dim)
        sin = sin.unsqueeze(unsqueeze_dim)
        rotary_dim = cos.shape[-1]
        q_rot, q_pass = q[..., :rotary_dim], q[..., rotary_dim:]
        k_rot, k_pass = k[..., :rotary_dim], k[..., rotary_dim:]
        q_embed = q_rot * cos + rotate_half(q_rot) * sin
        k_embed = k_rot * cos + rotate_half(k_rot) * sin
        q_embed = torch.cat([q_embed, q_pass], dim=-1)
        k_embed = torch.cat([k_embed, k_pass], dim=-1)
        return q_embed, k_embed
    """
_PHI3 = """
    def rotate(q, k, cos, sin{more}, unsqueeze_dim=1):
        cos = cos.unsqueeze(unsqueeze_dim)
        sin = sin.unsqueeze(unsqueeze_dim)
        rotary_dim = cos.shape[-1]
        q_rot, q_pass = q[..., :rotary_dim], q[..., rotary_dim:]
        k_rot, k_pass = k[..., :rotary_dim], k[..., rotary_dim:]
        q_embed = torch.cat([(q_rot * cos) + (rotate_half(q_rot) * sin), q_pass], dim=-1)
        k_embed = torch.cat([(k_rot * cos) + (rotate_half(k_rot) * sin), k_pass], dim=-1)
        return q_embed, k_embed
    """


def _doubled(forward):
    """Whether a rotary embedding's forward makes cos and sin of angles that it wrote twice, one after the
    other."""
    tree = _tree(inspect.unwrap(forward))
    made: dict[str, list[str]] = {}
    for node in ast.walk(tree) if tree is not None else ():
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            made.setdefault(node.targets[0].id, []).append(ast.unparse(node.value).partition(" * ")[0])
    wanted = {"emb": "torch.cat((freqs, freqs), dim=-1)", "cos": "emb.cos()", "sin": "emb.sin()"}
    return all(made.get(name) == [value] for name, value in wanted.items())


def rotation(module: Any) -> bool | None:
    """Whether apply_rotary_pos_emb of a Python module of models gives results of q's dtype, else of q's and
    cos's together; None where it is not known to rotate halves.

    The halves of cos and sin are equal then: all rotary embeddings of the module make them so.
    """
    function = getattr(module, "apply_rotary_pos_emb", None)
    embeddings = [c for name, c in vars(module).items() if name.endswith("RotaryEmbedding")]
    half = getattr(function, "__globals__", {}).get("rotate_half")
    if not (
        same(half, _HALF) and embeddings and all(_doubled(embedding.forward) for embedding in embeddings)
    ):
        return None
    for text in (_TYPED, _WHOLE, _PART, _PHI3):
        for more in ("", ", position_ids=None"):  # transformers 4 has an argument that nobody reads
            if same(function, text.format(more=more)):
                return text is _TYPED
    return None


# ---- the loss

_CROSS_ENTROPY = """
    def fixed_cross_entropy(source, target, num_items_in_batch=None, ignore_index=-100, **kwargs):
        reduction = "sum" if num_items_in_batch is not None else "mean"
        loss = nn.functional.cross_entropy(source, target, ignore_index=ignore_index, reduction=reduction)
        if reduction == "sum":
            if torch.is_tensor(num_items_in_batch):
                num_items_in_batch = num_items_in_batch.to(loss.device)
            loss = loss / num_items_in_batch
        return loss
    """
_CAUSAL_LOSS = """
    def ForCausalLMLoss(
        logits, labels, vocab_size, num_items_in_batch=None, ignore_index=-100, shift_labels=None, **kwargs
    ):
        logits = logits.float()
        if shift_labels is None:
            labels = nn.functional.pad(labels, (0, 1), value=ignore_index)
            shift_labels = labels[..., 1:].contiguous()
        logits = logits.view(-1, vocab_size)
        shift_labels = shift_labels.view(-1)
        shift_labels = shift_labels.to(logits.device)
        loss = fixed_cross_entropy(logits, shift_labels, num_items_in_batch, ignore_index, **kwargs)
        return loss
    """


def causal_loss(function: Any) -> bool:
    """Whether a function is the loss that transformers gives causal models."""
    names = getattr(function, "__globals__", {})
    return same(function, _CAUSAL_LOSS) and same(names.get("fixed_cross_entropy"), _CROSS_ENTROPY)


_OPTIONS = {"num_items_in_batch", "ignore_index", "shift_labels"}  # it reads no other keywords


class LossFlow(NamedTuple):
    """How a causal model's forward makes its loss. head: the attribute whose module makes the logits. names:
    the arguments of forward. keywords: whether the loss gets its other keywords. unset: attributes of the
    config that have to be None."""

    head: str
    names: tuple[str, ...]
    keywords: bool
    unset: tuple[str, ...]


def _is_call(node, text):
    return isinstance(node, ast.Call) and ast.unparse(node.func) == text


class _Reader:
    """Reads the forward of a causal model; see loss_flow."""

    def __init__(self, tree):
        self.tree, self.unset = tree, set[str]()
        self.above: dict[Any, Any] = {
            child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)
        }
        self.uses: dict[str, list[ast.Name]] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Name):
                self.uses.setdefault(node.id, []).append(node)

    def skipped(self, node):
        """Whether node is in a branch that is not taken: config.unset is None then, and the result is no
        tuple."""
        while node is not self.tree:
            branch, node = node, self.above[node]
            if isinstance(node, ast.If) and branch in node.body:
                test = ast.unparse(node.test)
                if test == "not return_dict":
                    return True
                name = test.removeprefix("self.config.").removesuffix(" is not None")
                if name.isidentifier() and test == f"self.config.{name} is not None":
                    self.unset.add(name)
                    return True
        return False

    def head(self, node):
        """The NAME in `node = self.NAME(x)`, or None. .float() and .contiguous() do nothing to a loss."""
        node = self.above[node]
        if not (isinstance(node, ast.Assign) and len(node.targets) == 1):
            return None
        value = node.value
        while (
            isinstance(value, ast.Call)
            and not value.args
            and isinstance(value.func, ast.Attribute)
            and value.func.attr in ("float", "contiguous")
        ):
            value = value.func.value
        if isinstance(value, ast.Call) and len(value.args) == 1 and not value.keywords:
            name = ast.unparse(value.func).removeprefix("self.")
            return name if name.isidentifier() and _is_call(value, f"self.{name}") else None
        return None

    def returned(self, node):
        """Whether node is `return Output(logits=node, ...)`."""
        keyword = self.above[node]
        call = self.above[keyword]
        return (
            isinstance(keyword, ast.keyword)
            and keyword.arg == "logits"
            and isinstance(self.above[call], ast.Return)
        )


@functools.cache
def loss_flow(forward: Any) -> LossFlow | None:
    """How a causal model's forward makes its loss, if its logits go from the head to the loss function and to
    the result, and nowhere else; else None.

    So the head may give the loss in place of logits.
    """
    function = _unwrapped(forward)
    tree = _tree(function)
    if tree is None or function is None:
        return None
    code, read = function.__code__, _Reader(tree)
    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    losses: list[Any] = [node for node in ast.walk(tree) if _is_call(node, "self.loss_function")]
    if len(losses) != 1 or "labels" not in names:
        return None
    loss = losses[0]
    given = dict(zip(("logits", "labels", "vocab_size"), loss.args)) | {k.arg: k.value for k in loss.keywords}
    logits, rest = given.get("logits"), given.pop(None, None)
    if (
        not isinstance(logits, ast.Name)
        or not {"labels", "vocab_size"} <= given.keys()
        or given.keys() & _OPTIONS
    ):
        return None
    heads = []
    for node in read.uses[logits.id]:
        if isinstance(node.ctx, ast.Store) and not read.skipped(node):
            heads.append(read.head(node))
        elif node is not logits and not read.returned(node) and not read.skipped(node):
            return None
    labels = read.uses["labels"]
    others = read.uses.get(tree.args.kwarg.arg, []) if tree.args.kwarg else []
    if (
        len(heads) != 1
        or heads[0] is None
        or sum(_is_call(node, f"self.{heads[0]}") for node in ast.walk(tree)) != 1
        or ast.unparse(given["labels"]) != "labels"
        or any(isinstance(node.ctx, ast.Store) for node in labels)
        or not all(isinstance(read.above[n], ast.keyword) and read.above[n].arg is None for n in others)
        or (rest is not None and rest not in others)
    ):
        return None
    return LossFlow(heads[0], names, rest is not None, tuple(sorted(read.unset)))


def _unwrapped(function: Any) -> types.FunctionType | None:
    """The function inside decorators; None where one is not transformers' own."""
    import transformers

    own = os.path.dirname(transformers.__file__) + os.sep
    while hasattr(function, "__wrapped__"):
        if not getattr(function, "__code__", None) or not function.__code__.co_filename.startswith(own):
            return None
        function = function.__wrapped__
    return function
