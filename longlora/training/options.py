"""The options of a training run: one table, from which flags, YAML keys and Python keywords come, all the same words.

Names are those of transformers' TrainingArguments and of PEFT's LoraConfig where those have the thing.
"""

import argparse
import difflib
import functools
import math
import os
import types
import typing
from dataclasses import MISSING, dataclass, field, fields

from longlora.errors import UserError

CHECKPOINTING = ("auto", "none", "minimal", "full")


def option(default, help, choices=None, low=None, above=None, high=None, alias=()):
    """A field of TrainOptions: its default, what it says in --help, and what values it takes."""
    meta = dict(help=help, choices=choices, low=low, above=above, high=high, alias=alias)
    if isinstance(default, (list, tuple)):
        return field(default_factory=lambda: tuple(default), metadata=meta)
    return field(default=default, metadata=meta)


@dataclass
class TrainOptions:
    """Everything a run can be told; `check` is called at the end of every way in.

    dtype is float32 unless told: a CPU without bfloat16 instructions is no faster in bfloat16, and float32 is what the
    tests hold against other implementations. adam_beta2 is the paper's 0.95, not the 0.999 of TrainingArguments.
    """

    model: str | None = option(
        None, "the base model: a Hugging Face directory or a .gguf file", alias=("model_name_or_path",)
    )
    init: str | None = option(
        None, "start from random weights: a config.json, or a directory with one and a tokenizer.json"
    )
    data: str | None = option(
        None, "training text: .txt, .jsonl with a text field, a directory of them, or token .bin"
    )
    output_dir: str | None = option(None, "where the adapter, the checkpoints and the metrics go")
    target_length: int | None = option(
        None, "tokens the model shall read, for the rope (default: as the base)", low=1
    )
    sequence_length: int | None = option(
        None,
        "tokens of a training sequence (default: the target length)",
        low=2,
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
        "shifted groups at the ends: split (no leak), wrap (the paper's Algorithm 1, leaks), swap",
        choices=("split", "wrap", "swap"),
    )
    shift: str = option("half", "which heads are shifted", choices=("half", "none", "all"))
    r: int = option(8, "rank of LoRA", low=1, alias=("lora_r", "lora_rank"))
    lora_alpha: float = option(16.0, "LoRA's scale is alpha / r", above=0)
    target_modules: tuple = option(("q_proj", "k_proj", "v_proj", "o_proj"), "linears that get LoRA")
    modules_to_save: tuple = option(
        ("embed_tokens", "input_layernorm", "post_attention_layernorm", "norm"),
        "modules trained whole; none for LoRA alone",
    )
    full: bool = option(False, "train every weight instead of LoRA, and write a whole model")
    dtype: str = option(
        "float32",
        "storage of weights and activations; arithmetic is float32",
        choices=("float32", "bfloat16"),
    )
    checkpointing: str = option(
        "auto",
        "what the forward pass keeps for the backward (auto: the fastest that fits in memory)",
        choices=CHECKPOINTING,
    )
    per_device_train_batch_size: int = option(1, "sequences at a time", low=1, alias=("batch_size",))
    gradient_accumulation_steps: int = option(1, "such batches in a step", low=1)
    max_steps: int = option(-1, "steps to train (-1: by num_train_epochs)", low=-1)
    num_train_epochs: float = option(1.0, "passes over the data when max_steps is -1", above=0)
    learning_rate: float = option(
        2e-4, "peak rate of LoRA; with full, of everything but embedding and norms", above=0
    )
    embedding_learning_rate: float | None = option(
        None, "peak rate of embedding, head, norms (default: the same)", above=0
    )
    lr_scheduler_type: str = option(
        "constant",
        "the rate after the warm-up; constant_with_warmup is constant",
        choices=("constant", "cosine", "linear"),
    )
    warmup_steps: float = option(
        0, "steps of linear warm-up; below 1 a share of the run", low=0, alias=("warmup_ratio",)
    )
    weight_decay: float = option(0.0, "AdamW's, on matrices only", low=0)
    adam_beta1: float = option(0.9, "AdamW's", low=0, high=0.99999)
    adam_beta2: float = option(0.95, "AdamW's; 0.95 is the paper's", low=0, high=0.99999)
    adam_epsilon: float = option(1e-8, "AdamW's", above=0)
    max_grad_norm: float = option(1.0, "gradients are clipped to this global norm (0: never)", low=0)
    long_documents: str = option(
        "split", "documents longer than a sequence", choices=("split", "refuse", "truncate", "drop")
    )
    packing_boundaries: str = option(
        "none",
        "documents packed into one sequence: none (they form one text) or document (they do not see each other)",
        choices=("none", "document"),
    )
    eval_data: str | None = option(None, "held-out text, in the same forms as data")
    eval_fraction: float = option(
        0.0, "share of the sequences held out when there is no eval_data", low=0, high=0.5
    )
    max_eval_samples: int | None = option(None, "evaluate no more than so many held-out sequences", low=1)
    eval_steps: int = option(0, "evaluate every so many steps, besides at the start and the end", low=0)
    save_steps: int = option(0, "write checkpoint-N every so many steps (0: at the end only)", low=0)
    save_total_limit: int | None = option(None, "keep this many checkpoints", low=1)
    logging_steps: int = option(1, "a line of metrics every so many steps", low=1)
    profile: bool = option(
        False, "say where the time of a step goes, op by op: a table at the end, profile.json in output_dir"
    )
    resume_from_checkpoint: str | None = option(
        None, "a checkpoint directory, or latest: the newest in output_dir, if any"
    )
    seed: int = option(42, "of the initial weights and of the order of the data", low=0)
    device: str = option(
        "auto",
        "where to compute: cpu, cuda, cuda:1, ...; auto is the first GPU where there is one, else the cpu",
    )
    num_threads: int | None = option(None, "threads (default: OMP_NUM_THREADS, else all processors)", low=1)
    max_memory: float | None = option(
        None, "GiB that the run may use (default: what the machine or the GPU has available)", above=0
    )
    cache_dir: str | None = option(
        None, "where tokenised text is kept (default: the folder cache in output_dir)"
    )

    def check(self, planning=False):
        """Every value against its field and the fields against each other -> self; UserError names the option.

        planning: data and output_dir are not asked for.
        """
        for f in fields(self):
            setattr(self, f.name, _checked(f, getattr(self, f.name)))
        from longlora.device import check_device  # brings NumPy, which --help does not need

        check_device(self.device)
        if (self.model is None) == (self.init is None):
            raise UserError("wanted one of model and init, got " + ("both" if self.model else "neither"))
        for name in () if planning else ("data", "output_dir"):
            if getattr(self, name) is None:
                raise UserError(f"{name} is missing")
        if self.group_size is not None and self.group_size % 2:
            raise UserError(f"group_size should be even, half of it is the shift, got {self.group_size}")
        if self.group_size is not None and self.attention == "dense":
            raise UserError("group_size is of s2 attention, got attention dense")
        if self.packing_boundaries == "document" and self.attention == "s2" and self.boundary != "split":
            raise UserError(
                f"packing_boundaries document needs boundary split; boundary {self.boundary} would need every "
                "document to be a multiple of group_size"
            )
        if self.init is not None and self.target_length is not None:
            raise UserError("target_length extends a pretrained model; with init the length is the config's")
        if (
            None not in (self.sequence_length, self.target_length)
            and self.sequence_length > self.target_length
        ):
            raise UserError(
                f"sequence_length should be at most target_length {self.target_length}, got {self.sequence_length}"
            )
        if self.init is not None and not self.full:
            raise UserError("init needs full: LoRA on random weights trains nothing of use")
        if self.warmup_steps > 1 and self.warmup_steps % 1:
            raise UserError(
                f"warmup_steps should be a whole number of steps or a share below 1, got {self.warmup_steps:g}"
            )
        if self.max_steps == 0:
            raise UserError("max_steps should be at least 1, or -1 to go by num_train_epochs, got 0")
        if self.eval_data is not None and self.eval_fraction:
            raise UserError("wanted one of eval_data and eval_fraction, got both")
        if self.profile and self.device not in ("auto", "cpu"):
            raise UserError(
                "profile times the ops of the CPU, which are waited for; on a GPU use Nsight Systems"
            )
        return self

    def resolve(self, config):
        """What was left open is filled in for a base of `config` (a ModelConfig) -> self; UserError where they do not fit."""
        if self.sequence_length is None:
            self.sequence_length = self.target_length or config.max_position_embeddings
        length = self.sequence_length
        if self.target_length is None and length > config.max_position_embeddings:
            raise UserError(
                f"sequence_length should be at most the {config.max_position_embeddings} tokens of the base model "
                f"unless target_length extends it, got {length}"
            )
        if self.group_size is None and self.attention == "s2":
            from longlora.ops import quarter_group

            self.group_size = quarter_group(length)
        if self.attention == "s2" and self.group_size > length:
            raise UserError(f"group_size should be at most sequence_length {length}, got {self.group_size}")
        if self.attention == "s2" and self.boundary != "split" and length % self.group_size:
            raise UserError(
                f"boundary {self.boundary} needs sequence_length to be a multiple of group_size, "
                f"got {length} and {self.group_size}"
            )
        if self.embedding_learning_rate is None:
            self.embedding_learning_rate = self.learning_rate
        return self

    def to_dict(self):
        """The options as YAML and JSON hold them: tuples are lists."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


@functools.cache
def _hints():
    return typing.get_type_hints(TrainOptions)


def _types(f):
    hint = _hints()[f.name]
    return [t for t in typing.get_args(hint)] if isinstance(hint, types.UnionType) else [hint]


def _checked(f, value):
    name, meta, allowed = f.name, f.metadata, _types(f)
    if value is None:
        if type(None) in allowed:
            return None
        raise UserError(f"{name} is missing")
    kind = next(t for t in allowed if t is not type(None))
    if kind is tuple:
        if isinstance(value, str):
            value = value.split(",")
        if not isinstance(value, (list, tuple)) or not all(isinstance(v, str) for v in value):
            raise UserError(f"{name} should be a list of names, got {value!r}")
        return tuple(v for part in value for v in part.replace(",", " ").split() if v != "none")
    if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            value = float(value)  # YAML reads 1e-4 as a string
        except ValueError:
            raise UserError(f"{name} should be a number, got {value!r}") from None
    if kind is str and name == "lr_scheduler_type" and value == "constant_with_warmup":
        value = "constant"
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if name == "resume_from_checkpoint" and value in (True, "true", "True"):
        value = "latest"  # as transformers spells it
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        raise UserError(f"{name} should be {kind.__name__}, got {value!r}")
    if meta["choices"] and value not in meta["choices"]:
        raise UserError(f"{name} should be one of {', '.join(meta['choices'])}, got {value!r}")
    if kind is float and not math.isfinite(value):
        raise UserError(f"{name} should be finite, got {value!r}")
    if meta["low"] is not None and value < meta["low"]:
        raise UserError(f"{name} should be at least {meta['low']}, got {value!r}")
    if meta["above"] is not None and not value > meta["above"]:
        raise UserError(f"{name} should be above {meta['above']}, got {value!r}")
    if meta["high"] is not None and value > meta["high"]:
        raise UserError(f"{name} should be at most {meta['high']}, got {value!r}")
    return value


def aliases():
    """Other spellings -> the option's own name."""
    return {alias: f.name for f in fields(TrainOptions) for alias in f.metadata["alias"]}


def from_dict(values, where="options", planning=False):
    """Keywords or YAML keys -> checked TrainOptions; an unknown key is an error that names the nearest one."""
    names, other, found = [f.name for f in fields(TrainOptions)], aliases(), {}
    for key, value in values.items():
        name = other.get(key, key)
        if name not in names:
            near = difflib.get_close_matches(str(key), names + list(other), 1)
            raise UserError(
                f"{where}: unknown option {key!r}" + (f"; did you mean {near[0]}?" if near else "")
            )
        if name in found:
            raise UserError(f"{where}: {name} is given twice")
        found[name] = value
    return TrainOptions(**found).check(planning)


# Where a section of --help starts, and what it is called.
SECTIONS = {
    "model": "model and data",
    "target_length": "context and attention",
    "r": "what is trained",
    "dtype": "memory and batches",
    "max_steps": "optimisation",
    "long_documents": "data and evaluation",
    "save_steps": "run",
}


def dashed(arguments):
    """Command-line arguments with every --some_flag spelled --some-flag."""
    return [
        name.replace("_", "-") + equals + value if name.startswith("--") else name + equals + value
        for name, equals, value in (argument.partition("=") for argument in arguments)
    ]


def add_flags(parser):
    """A flag for every option, --learning-rate for learning_rate; what was not given is absent from the namespace."""
    parser.add_argument("--config", metavar="FILE", help="a YAML file of these options; flags win over it")
    for f in fields(TrainOptions):
        if f.name in SECTIONS:
            section = parser.add_argument_group(SECTIONS[f.name])
        kind = next(t for t in _types(f) if t is not type(None))
        flag, *other = (f"--{name.replace('_', '-')}" for name in (f.name, *f.metadata["alias"]))
        default = f.default if f.default is not MISSING else f.default_factory()
        shown = " ".join(default) if isinstance(default, tuple) else default
        text = f.metadata["help"].replace("%", "%%") + (f" [{shown}]" if default not in (None, False) else "")
        how = dict(dest=f.name, default=argparse.SUPPRESS)
        if kind is bool:
            section.add_argument(flag, action=argparse.BooleanOptionalAction, help=text, **how)
            continue
        choices, shown = f.metadata["choices"], {int: "N", float: "X", str: "PATH", tuple: "NAME"}[kind]
        how.update(
            type={int: int, float: float}.get(kind, str),
            nargs="+" if kind is tuple else None,
            metavar="|".join(choices) if choices else shown,
        )
        section.add_argument(flag, help=text, **how)
        if other:
            section.add_argument(*other, help=argparse.SUPPRESS, **how)


def from_flags(namespace, planning=False):
    """The parsed flags, over the YAML file of --config -> checked TrainOptions."""
    given = {f.name: getattr(namespace, f.name) for f in fields(TrainOptions) if hasattr(namespace, f.name)}
    if not namespace.config:
        return from_dict(given, "command line", planning)
    import yaml

    try:
        with open(namespace.config, encoding="utf-8") as file:
            values = yaml.safe_load(file) or {}
    except OSError as error:
        raise UserError(f"{namespace.config}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{namespace.config}: is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{namespace.config}: should be a mapping of options, got {type(values).__name__}")
    known = aliases()
    for name in given:
        for key in [key for key in values if known.get(key, key) == name]:
            del values[key]
    return from_dict({**values, **given}, namespace.config, planning)
