"""The options of a training run. One table gives flags, YAML keys and Python keywords the same names.

The names are those of transformers' TrainingArguments and PEFT's LoraConfig where these have the option.
"""

import argparse
import functools
import math
import os
import types
import typing
from collections.abc import Collection, Iterable
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any

from longlora.errors import UserError, did_you_mean, shown

LONGEST = 1 << 24  # tokens of a sequence, and of a batch


def option(
    default: Any,
    help: str,
    choices: tuple[str, ...] | None = None,
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    alias: tuple[str, ...] = (),
    metavar: str | None = None,
    resolved: bool = False,
) -> Any:
    """A field of TrainOptions.

    It has a default, a text and a metavar for --help, choices or a range (low and high included, above not),
    and other spellings. resolved: it may be left open, and TrainOptions.resolve fills it in.
    """
    meta = dict(help=help, choices=choices, low=low, above=above, high=high, alias=alias)
    meta.update(metavar=metavar, resolved=resolved)
    if isinstance(default, (list, tuple)):
        return field(default_factory=lambda: tuple(default), metadata=meta)
    return field(default=default, metadata=meta)


@dataclass
class TrainOptions:
    """All options of a run. Every way to make them ends in `check`, and `resolve` completes them.

    dtype is float32 by default: a CPU without bfloat16 instructions is no faster in bfloat16, and the tests
    compare float32 with other implementations. adam_beta2 is the paper's 0.95, not the 0.999 of
    TrainingArguments.
    """

    model: str | None = option(
        None, "the base model: a Hugging Face directory or a .gguf file", alias=("model_name_or_path",)
    )
    init: str | None = option(
        None, "instead of --model: a config.json, or a directory with one; the weights start random"
    )
    adapter: str | None = option(
        None,
        "an adapter to train further; its rank, alpha, modules and positions are kept (default: a new one)",
    )
    data: str = option(
        None,
        "training text: .txt, .jsonl with a field text, a directory of these, or token .bin; or records of "
        "questions and answers: .jsonl, .jsonl.gz, .json, .parquet, or a dataset's name",
    )
    output_dir: str = option(None, "directory for the adapter, the checkpoints and the metrics")
    target_length: int | None = option(
        None, "extend the positions to this many tokens (default: the base model's)", low=1, high=LONGEST
    )
    sequence_length: int = option(
        None,
        "tokens of a training sequence (default: the target length)",
        resolved=True,
        low=2,
        high=LONGEST,
        alias=("model_max_length", "max_length"),
    )
    rope_type: str = option(
        "linear", "how positions are extended", choices=("linear", "ntk", "yarn", "llama3")
    )
    attention: str = option(
        "s2", "attention in training; evaluation is always dense", choices=("s2", "dense")
    )
    group_size: int | None = option(
        None, "tokens of an S2-Attn group, even (default: a quarter of the sequence)", low=2
    )
    boundary: str = option(
        "split",
        "shifted groups at the ends of a sequence: split (no leak), wrap (the paper's Algorithm 1, which "
        "leaks the future) or swap",
        choices=("split", "wrap", "swap"),
    )
    shift: str = option("half", "which heads are shifted", choices=("half", "none", "all"))
    r: int = option(8, "rank of LoRA", low=1, alias=("lora_r", "lora_rank"))
    lora_alpha: float = option(16.0, "LoRA's product is scaled by alpha / r", above=0)
    target_modules: tuple = option(
        ("q_proj", "k_proj", "v_proj", "o_proj"), "linears that get LoRA; all-linear means every one"
    )
    modules_to_save: tuple = option(
        ("embed_tokens", "input_layernorm", "post_attention_layernorm", "norm"),
        "modules that are trained whole; none means LoRA alone",
    )
    full: bool = option(False, "train every weight instead of LoRA, and write a whole model")
    dtype: str = option(
        "float32",
        "storage of weights and activations; arithmetic is float32",
        choices=("float32", "bfloat16"),
    )
    checkpointing: str = option(
        "auto",
        "what the backward pass recomputes: none, minimal or full; auto is the fastest that fits in memory",
        choices=("auto", "none", "minimal", "full"),
    )
    per_device_train_batch_size: int = option(1, "sequences in a batch", low=1, alias=("batch_size",))
    gradient_accumulation_steps: int = option(1, "batches in a step", low=1, high=1 << 16)
    max_steps: int = option(-1, "steps to train; -1 means as num_train_epochs says", low=-1)
    num_train_epochs: float = option(1.0, "passes over the data when max_steps is -1", above=0)
    learning_rate: float = option(
        2e-4, "peak rate of LoRA; with --full, of everything but embedding, head and norms", above=0
    )
    embedding_learning_rate: float = option(
        None, "peak rate of embedding, head and norms (default: learning_rate)", above=0, resolved=True
    )
    lr_scheduler_type: str = option(
        "constant",
        "the learning rate after the warm-up; constant_with_warmup means constant",
        choices=("constant", "cosine", "linear"),
    )
    warmup_steps: float = option(
        0, "steps of linear warm-up; below 1, a share of the run", low=0, alias=("warmup_ratio",)
    )
    weight_decay: float = option(0.0, "weight decay of AdamW, on matrices only", low=0)
    adam_beta1: float = option(0.9, "beta1 of AdamW", low=0, high=0.99999)
    adam_beta2: float = option(0.95, "beta2 of AdamW; 0.95 is the paper's", low=0, high=0.99999)
    adam_epsilon: float = option(1e-8, "epsilon of AdamW", low=1e-38)
    max_grad_norm: float = option(1.0, "clip gradients to this global norm; 0 never clips", low=0)
    long_documents: str = option(
        None,
        "what to do with documents longer than a sequence (default: split; refuse for questions and answers)",
        choices=("split", "refuse", "truncate", "drop"),
        resolved=True,
    )
    packing_boundaries: str = option(
        None,
        "documents packed into one sequence: none (they form one text) or document (they do not see each "
        "other) (default: none; document for questions and answers)",
        choices=("none", "document"),
        resolved=True,
    )
    chat_template: str | None = option(
        None,
        "a file with a Jinja chat template for questions and answers (default: the model's)",
        alias=("chat_template_path",),
    )
    train_on_inputs: bool = option(False, "learn the questions too, not only the answers")
    eval_data: str | None = option(None, "held-out text, in the same forms as data (default: none)")
    eval_fraction: float = option(
        0.0, "share of the sequences to hold out when there is no eval_data", low=0, high=0.5
    )
    max_eval_samples: int | None = option(None, "evaluate at most N held-out sequences (default: all)", low=1)
    eval_steps: int = option(
        0, "evaluate every N steps, besides at the start and the end; 0 means only there", low=0
    )
    eval_passkey: int = option(
        0,
        "at the end, ask the result for N passkeys at each of five depths, at the old and the new length, "
        "and measure its perplexity there on eval_data; 0 asks for none",
        low=0,
        high=1000,
    )
    save_steps: int = option(0, "write a checkpoint every N steps; 0 means at the end only", low=0)
    save_total_limit: int | None = option(None, "keep only the newest N checkpoints (default: all)", low=1)
    load_best_model_at_end: bool = option(
        False, "the result is the checkpoint with the lowest held-out loss, which save_total_limit keeps"
    )
    metric_for_best_model: str = option(
        "eval_loss", "the metric that is lowest in the best checkpoint", choices=("eval_loss", "loss")
    )
    logging_steps: int = option(1, "log metrics every N steps", low=1)
    report_to: tuple = option(
        (),
        "programs that get the metrics too: tensorboard, wandb, all that are installed, or none",
        choices=("tensorboard", "wandb", "all", "none"),
    )
    run_name: str | None = option(
        None, "the name of the run in wandb (default: wandb chooses)", metavar="NAME"
    )
    profile: bool = option(
        False, "report the time of a step op by op: a table at the end and profile.json; CPU only"
    )
    resume_from_checkpoint: str | None = option(
        None, "a checkpoint directory, or latest: the newest in output_dir, if any (default: start anew)"
    )
    seed: int = option(42, "seed of the initial weights and of the order of the data", low=0, high=2**63 - 1)
    device: str = option(
        "auto",
        "where to compute; auto is the first usable GPU, or else the CPU",
        metavar="auto|cpu|cuda|cuda:N",
    )
    num_threads: int | None = option(
        None, "threads of the CPU (default: OMP_NUM_THREADS, or else all processors)", low=1, high=4096
    )
    max_memory: float | None = option(
        None,
        "GiB that the run may use (default: what the machine or the GPU has available)",
        above=0,
        high=2**30,
    )
    cache_dir: str | None = option(
        None, "directory for tokenised text (default: the directory cache in output_dir)"
    )

    given = frozenset[str]()  # the names of the options that somebody has set

    def check(self, planning: bool = False) -> "TrainOptions":
        """Check each value and how the values fit each other -> self; UserError names the option.

        With planning, data and output_dir may be missing.
        """
        for f in fields(self):
            if not (planning and f.name in ("data", "output_dir") and getattr(self, f.name) is None):
                setattr(self, f.name, _checked(f, getattr(self, f.name)))
        from longlora.device import check_device  # it imports NumPy, which --help does not need

        check_device(self.device)
        if (self.model is None) == (self.init is None):
            raise UserError("wanted one of model and init, got " + ("both" if self.model else "neither"))
        if self.init is not None and self.target_length is not None:
            raise UserError("target_length extends a pretrained model; with init the length is the config's")
        if self.init is not None and not self.full:
            raise UserError("init needs full: LoRA on random weights trains nothing of use")
        if self.adapter is not None and self.full:
            raise UserError("adapter and full exclude each other: full trains no adapter")
        if self.warmup_steps > 1 and self.warmup_steps % 1:
            raise UserError(
                "warmup_steps should be a whole number of steps or a share below 1, "
                f"got {self.warmup_steps:g}"
            )
        if self.max_steps == 0:
            raise UserError("max_steps should be at least 1, or -1 to go by num_train_epochs, got 0")
        if self.eval_data is not None and self.eval_fraction:
            raise UserError("wanted one of eval_data and eval_fraction, got both")
        if self.profile and self.device not in ("auto", "cpu"):
            raise UserError("profile supports the CPU only; on a GPU use Nsight Systems")
        self._check_attention()
        self._check_best()
        return self

    def _check_best(self) -> None:
        if not self.load_best_model_at_end:
            return
        if self.eval_data is None and not self.eval_fraction:
            raise UserError("load_best_model_at_end needs eval_data or eval_fraction")
        if not self.eval_steps or self.save_steps % self.eval_steps or not self.save_steps:
            raise UserError(
                "load_best_model_at_end needs eval_steps, and save_steps that is a multiple of it, "
                f"got {self.eval_steps} and {self.save_steps}"
            )

    def _check_attention(self) -> None:
        group, length, target = self.group_size, self.sequence_length, self.target_length
        if group is not None and group % 2:
            raise UserError(f"group_size should be even, half of it is the shift, got {group}")
        if group is not None and self.attention == "dense":
            raise UserError("group_size needs attention s2, got attention dense")
        if length is not None and target is not None and length > target:
            raise UserError(f"sequence_length should be at most target_length {target}, got {length}")
        if self.packing_boundaries == "document" and self.attention == "s2" and self.boundary != "split":
            raise UserError(
                "packing_boundaries document needs boundary split; "
                f"boundary {self.boundary} would need every document to be a multiple of group_size"
            )

    def resolve(self, config: Any, instructs: bool = False) -> "TrainOptions":
        """Fill in what was left open -> self; UserError for a misfit.

        config: the base's ModelConfig. instructs: whether the data are questions and answers.
        """
        for name, value in (OF_ANSWERS if instructs else OF_TEXT).items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        self._check_attention()
        length, longest = self.sequence_length, self.target_length or config.max_position_embeddings
        if length is None:
            length = self.sequence_length = longest
        if length > longest:
            limit = "base model unless target_length extends it" if self.adapter is None else "adapter"
            raise UserError(
                f"sequence_length should be at most the {longest} tokens of the {limit}, got {length}"
            )
        if length * self.per_device_train_batch_size > LONGEST:
            raise UserError(
                f"per_device_train_batch_size should be at most {LONGEST // length} with {length} tokens in "
                f"a sequence, got {self.per_device_train_batch_size}"
            )
        if self.attention == "s2":
            self.group_size = self._group(length)
        if self.embedding_learning_rate is None:
            self.embedding_learning_rate = self.learning_rate
        return self

    def _group(self, length: int) -> int:
        from longlora.ops import quarter_group

        group = self.group_size or quarter_group(length)
        if group > length:
            raise UserError(f"group_size should be at most sequence_length {length}, got {group}")
        if self.boundary != "split" and length % group:
            raise UserError(
                f"boundary {self.boundary} needs sequence_length to be a multiple of group_size, "
                f"got {length} and {group}"
            )
        return group

    def to_dict(self) -> dict[str, Any]:
        """The options as YAML and JSON hold them, with lists for tuples."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


# The defaults that depend on the data: text, or questions and answers. What is cut from an instruction could
# be its question.
OF_TEXT = {"long_documents": "split", "packing_boundaries": "none"}
OF_ANSWERS = {"long_documents": "refuse", "packing_boundaries": "document"}
# The options that `longlora plan` depends on. It accepts the others too, so that the flags and the YAML file
# of a run can be planned as they are.
PLANNED = (
    "model",
    "init",
    "adapter",
    "target_length",
    "sequence_length",
    "attention",
    "group_size",
    "boundary",
    "shift",
    "rope_type",
    "r",
    "target_modules",
    "modules_to_save",
    "full",
    "dtype",
    "checkpointing",
    "per_device_train_batch_size",
    "device",
    "num_threads",
    "max_memory",
)
# The option that starts a section of --help, and the title of the section.
SECTIONS = {
    "model": "model and data",
    "target_length": "context and attention",
    "r": "what is trained",
    "dtype": "memory and batches",
    "max_steps": "optimisation",
    "long_documents": "data and evaluation",
    "save_steps": "run",
}


@functools.cache
def _hints() -> dict[str, Any]:
    return typing.get_type_hints(TrainOptions)


def _types(f: Field) -> list[Any]:
    hint = _hints()[f.name]
    return list(typing.get_args(hint)) if isinstance(hint, types.UnionType) else [hint]


def _kind(f: Field) -> Any:
    """The type of an option's values other than None."""
    return next(t for t in _types(f) if t is not type(None))


def _checked(f: Field, value: Any) -> Any:
    """The value of a field in the field's type; UserError names the option if it is none."""
    name, meta, kind = f.name, f.metadata, _kind(f)
    if value is None:
        if type(None) in _types(f) or meta["resolved"]:
            return None
        raise UserError(f"{name} is missing")
    value = _path(name, value) if _is_path(f) else _converted(name, kind, value)
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        raise UserError(f"{name} should be {kind.__name__}, got {shown(value)}")
    for one in value if kind is tuple else (value,):
        if meta["choices"] and one not in meta["choices"]:
            raise UserError(f"{name} should be one of {', '.join(meta['choices'])}, got {shown(one)}")
    if kind is float and not math.isfinite(value):
        raise UserError(f"{name} should be finite, got {shown(value)}")
    if meta["low"] is not None and value < meta["low"]:
        raise UserError(f"{name} should be at least {meta['low']}, got {shown(value)}")
    if meta["above"] is not None and not value > meta["above"]:
        raise UserError(f"{name} should be above {meta['above']}, got {shown(value)}")
    if meta["high"] is not None and value > meta["high"]:
        raise UserError(f"{name} should be at most {meta['high']}, got {shown(value)}")
    return value


def _converted(name: str, kind: Any, value: Any) -> Any:
    """The value in the type of the field, if it was given in another spelling."""
    if kind is tuple:
        if isinstance(value, str):
            value = [value]
        if not isinstance(value, (list, tuple)) or not all(isinstance(v, str) for v in value):
            raise UserError(f"{name} should be a list of names, got {shown(value)}")
        return tuple(v for part in value for v in part.replace(",", " ").split() if v != "none")
    if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 1e-4 as a string
        except (ValueError, OverflowError):  # OverflowError: an integer of more than 300 digits
            raise UserError(f"{name} should be a number, got {shown(value)}") from None
    if name == "lr_scheduler_type" and value == "constant_with_warmup":
        return "constant"
    return value


def _is_path(f: Field) -> bool:
    return _kind(f) is str and not f.metadata["choices"] and not f.metadata["metavar"]


def _path(name: str, value: Any) -> str:
    """A path as the system knows it; a shell expands ~, YAML and --model=~/base do not."""
    if name == "resume_from_checkpoint" and value in (True, "true", "True"):
        return "latest"  # as in transformers
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not isinstance(value, str):
        raise UserError(f"{name} should be a path, got {shown(value)}")
    if not value or "\0" in value:
        raise UserError(f"{name} should be the name of a file or directory, got {shown(value)}")
    return os.path.expanduser(value) if value == "~" or value.startswith("~/") else value


def aliases() -> dict[str, str]:
    """Other spellings of the options -> their own names."""
    return {alias: f.name for f in fields(TrainOptions) for alias in f.metadata["alias"]}


def from_dict(values: dict[str, Any], where: str = "options", planning: bool = False) -> TrainOptions:
    """Keywords or YAML keys -> checked TrainOptions. UserError names the option nearest to an unknown key."""
    names, other = [f.name for f in fields(TrainOptions)], aliases()
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = other.get(key, key)
        if name not in names:
            hint = did_you_mean(shown(key).strip("'"), names + list(other))
            raise UserError(f"{where}: unknown option {shown(key)}{hint}")
        if name in found:
            raise UserError(f"{where}: {name} is given twice")
        found[name] = value
    made = TrainOptions(**found)
    made.given = frozenset(name for name, value in found.items() if value is not None)
    return made.check(planning)


def dashed(arguments: Iterable[str]) -> list[str]:
    """Command-line arguments with --some-flag for every --some_flag."""
    return [
        name.replace("_", "-") + equals + value if name.startswith("--") else name + equals + value
        for name, equals, value in (argument.partition("=") for argument in arguments)
    ]


def _default(f: Field) -> str:
    """The default as --help shows it. Where it is None, the help text says in words what happens."""
    default = f.default if f.default_factory is MISSING else f.default_factory()
    if default is None:
        return ""
    shown = (" ".join(default) or "none") if isinstance(default, tuple) else str(default)
    return f" [{shown.lower() if isinstance(default, bool) else shown}]"


def add_flags(parser: argparse.ArgumentParser, listed: Collection[str] | None = None) -> None:
    """Add a flag for every option; flags that are not given stay out of the namespace.

    listed: the options that --help lists, by default all.
    """
    parser.add_argument(
        "--config", metavar="FILE", help="a YAML file of options; flags take precedence over it"
    )
    for f in fields(TrainOptions):
        if f.name in SECTIONS:
            section = parser.add_argument_group(SECTIONS[f.name])
        kind, choices = _kind(f), f.metadata["choices"]
        flag, *other = (f"--{name.replace('_', '-')}" for name in (f.name, *f.metadata["alias"]))
        how: dict[str, Any] = dict(dest=f.name, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        if kind is bool:
            how["action"] = argparse.BooleanOptionalAction
        else:
            value = f.metadata["metavar"] or {int: "N", float: "X", str: "PATH", tuple: "NAME"}[kind]
            how.update(
                type=kind if kind in (int, float) else str,
                nargs="+" if kind is tuple else None,
                metavar="|".join(choices) if choices else value,
            )
        if other:
            section.add_argument(*other, **how)
        if listed is None or f.name in listed:
            how["help"] = f.metadata["help"].replace("%", "%%") + _default(f)
        section.add_argument(flag, **how)


def from_flags(namespace: argparse.Namespace, planning: bool = False) -> TrainOptions:
    """The parsed flags, over the YAML file of --config -> checked TrainOptions; UserError for an error in
    it."""
    given = {f.name: getattr(namespace, f.name) for f in fields(TrainOptions) if hasattr(namespace, f.name)}
    if not namespace.config:
        return from_dict(given, "command line", planning)
    from longlora.training import config_file

    values = config_file.read(namespace.config)
    known = aliases()
    for name in given:
        for key in [key for key in values if known.get(key, key) == name]:
            del values[key]
    # YAML's null, ~, leaves an option open. For a list it could mean none of them, so it is refused.
    open_ = [f.name for f in fields(TrainOptions) if _kind(f) is not tuple]
    values = {key: v for key, v in values.items() if v is not None or known.get(key, key) not in open_}
    return from_dict({**values, **given}, namespace.config, planning)
