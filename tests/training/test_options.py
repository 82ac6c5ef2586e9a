"""The options of a run: the same names as flags, YAML keys and keywords, their limits, and --help."""

import argparse
import functools
import re
from pathlib import Path

import pytest
import tiny
import yaml

from longlora.decoder.config import read_config
from longlora.errors import UserError
from longlora.training import options

GIVEN = dict(model="m", data="d", output_dir="o")
HELD = dict(load_best_model_at_end=True, eval_fraction=0.1)


def parsed(*arguments):
    parser = argparse.ArgumentParser()
    options.add_flags(parser)
    return options.from_flags(parser.parse_args(options.dashed([*tiny.flags(GIVEN), *arguments])))


def refusal(**fields):
    with pytest.raises(UserError) as caught:
        options.from_dict({**GIVEN, **fields})
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_flags_yaml_and_keywords_are_the_same_words(tmp_path):
    fields = dict(
        learning_rate=1e-4,
        group_size=64,
        target_modules=["q_proj", "v_proj"],
        full=True,
        rope_type="yarn",
        gradient_accumulation_steps=3,
        warmup_steps=0.1,
        save_total_limit=2,
    )
    keywords = options.from_dict({**GIVEN, **fields})
    values = keywords.to_dict()
    assert {name: values[name] for name in (*GIVEN, *fields)} == {**GIVEN, **fields}
    assert parsed(*tiny.flags(fields)) == keywords
    dashed = [a.replace("_", "-") if a.startswith("--") else a for a in tiny.flags(fields)]
    assert (
        parsed(*dashed)
        == parsed(*(a.replace("--r", "--lora_r") if a == "--r" else a for a in dashed))
        == keywords
    )
    assert parsed(*tiny.flags(fields), "--eval_data=a_file--b_c.txt").eval_data == "a_file--b_c.txt"
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({**fields, "learning_rate": "1e-4"}))  # YAML 1.1 reads 1e-4 as a string
    assert parsed("--config", str(file)) == keywords
    assert parsed("--config", str(file), "--learning-rate", "2e-4", "--no-full").learning_rate == 2e-4
    file.write_text(yaml.safe_dump(keywords.to_dict()))  # a run writes its options in this form
    assert options.from_flags(argparse.Namespace(config=str(file))) == keywords


def test_defaults():
    """The defaults are those of the paper (arXiv 2309.12307) where it has them.

    LoRA on attention, trained embedding and norms, half of the heads shifted, AdamW with betas 0.9 and 0.95
    and no weight decay.
    """
    nothing = (
        "init adapter target_length sequence_length group_size embedding_learning_rate eval_data "
        "max_eval_samples save_total_limit resume_from_checkpoint num_threads max_memory "
        "cache_dir long_documents packing_boundaries chat_template run_name"
    ).split()
    assert options.from_dict(GIVEN).to_dict() == GIVEN | dict.fromkeys(nothing) | dict(
        rope_type="linear",
        attention="s2",
        boundary="split",
        shift="half",
        r=8,
        lora_alpha=16.0,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        modules_to_save=["embed_tokens", "input_layernorm", "post_attention_layernorm", "norm"],
        full=False,
        dtype="float32",
        checkpointing="auto",
        per_device_train_batch_size=1,
        gradient_accumulation_steps=1,
        max_steps=-1,
        num_train_epochs=1.0,
        learning_rate=2e-4,
        lr_scheduler_type="constant",
        warmup_steps=0,
        weight_decay=0.0,
        adam_beta1=0.9,
        adam_beta2=0.95,
        adam_epsilon=1e-8,
        max_grad_norm=1.0,
        train_on_inputs=False,
        eval_fraction=0.0,
        eval_steps=0,
        eval_passkey=0,
        save_steps=0,
        load_best_model_at_end=False,
        metric_for_best_model="eval_loss",
        logging_steps=1,
        report_to=[],
        profile=False,
        seed=42,
        device="auto",
    )


@pytest.mark.parametrize(
    "given, length, group",
    [
        (dict(), 64, 16),
        (dict(target_length=128), 128, 32),
        (dict(sequence_length=50), 50, 12),
        (dict(target_length=128, sequence_length=100), 100, 24),
        (dict(sequence_length=6), 6, 2),
        (dict(group_size=64), 64, 64),
        (dict(attention="dense"), 64, None),
    ],
)
def test_lengths_and_rates_that_are_left_open_are_resolved(tmp_path, given, length, group):
    """The sequence length is the target, or the base's 64 tokens; the group is a quarter of it, made even."""
    o = options.from_dict({**GIVEN, "learning_rate": 1e-3, **given})
    o.resolve(read_config(tiny.config(tmp_path / "base")))
    assert (o.sequence_length, o.group_size, o.embedding_learning_rate) == (length, group, 1e-3)


@pytest.mark.parametrize(
    "spelling, name, value",
    [
        ("model_name_or_path", "model", "m"),
        ("model_max_length", "sequence_length", 512),
        ("max_length", "sequence_length", 512),
        ("lora_r", "r", 4),
        ("lora_rank", "r", 4),
        ("batch_size", "per_device_train_batch_size", 2),
        ("warmup_ratio", "warmup_steps", 0.5),
        ("chat_template_path", "chat_template", "t.jinja"),
    ],
)
def test_names_of_transformers_and_upstream_are_accepted(spelling, name, value):
    given = {key: x for key, x in GIVEN.items() if key != name}
    assert getattr(options.from_dict({**given, spelling: value}), name) == value
    for flag in (f"--{spelling}", f"--{spelling.replace('_', '-')}"):
        assert getattr(parsed(flag, str(value)), name) == value


def test_other_spellings_of_values():
    assert parsed("--lr_scheduler_type", "constant_with_warmup").lr_scheduler_type == "constant"
    assert parsed("--target_modules", "q_proj,k_proj").target_modules == ("q_proj", "k_proj")
    assert parsed("--target_modules", "q_proj k_proj", "o_proj").target_modules == (
        "q_proj",
        "k_proj",
        "o_proj",
    )
    assert parsed("--modules-to-save", "none").modules_to_save == ()
    for latest in (True, "true", "True", "latest"):
        found = options.from_dict({**GIVEN, "resume_from_checkpoint": latest})
        assert found.resume_from_checkpoint == "latest"
    for rate in (1, "1", "1.0", 1.0):
        assert options.from_dict({**GIVEN, "learning_rate": rate}).to_dict()["learning_rate"] == 1.0


def test_a_flag_wins_over_the_yaml_under_any_name(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("lora_r: 4\nmodel: n\n")
    assert parsed("--config", str(file), "--r", "16").r == 16
    file.write_text("lora_r: 4\nr: 5\n")
    with pytest.raises(UserError, match="r is given twice"):
        parsed("--config", str(file))


@pytest.mark.parametrize(
    "fields, words",
    [
        (dict(lerning_rate=1), "unknown option 'lerning_rate'; did you mean learning_rate?"),
        (dict(learning_rate="fast"), "should be a number"),
        (dict(learning_rate=float("nan")), "should be finite"),
        (dict(learning_rate=float("inf")), "should be finite"),
        (dict(group_size=33), "group_size should be even"),
        (dict(group_size=16, attention="dense"), "group_size needs attention s2"),
        (dict(max_steps=1.5), "max_steps should be int"),
        (dict(max_steps=True), "max_steps should be int"),
        (dict(full=1), "full should be bool"),
        (dict(adam_beta2=1), "adam_beta2 should be at most"),
        (dict(model=None, init="x"), "init needs full"),
        (dict(model=None, init="x", full=True, target_length=9), "with init the length"),
        (dict(data=None), "data is missing"),
        (dict(output_dir=None), "output_dir is missing"),
        (dict(seed=None), "seed is missing"),
        (dict(eval_data="x", eval_fraction=0.1), "one of eval_data and eval_fraction"),
        (dict(packing_boundaries="document", boundary="wrap"), "document needs boundary split"),
        (dict(packing_boundaries="document", boundary="swap"), "document needs boundary split"),
        (dict(sequence_length=100, target_length=50), "sequence_length should be at most target_length 50"),
        (dict(device="gpu"), "device should be auto, cpu, cuda, or cuda:0 and so on, got 'gpu'"),
        (
            dict(device="cuda:" + "9" * 99),
            "device should be auto, cpu, cuda, or cuda:0 and so on, got 'cuda:9",
        ),
        (dict(device=0), "device should be str"),
        (dict(device="cuda:0", profile=True), "profile supports the CPU only"),
        (dict(target_modules=[3]), "target_modules should be a list of names"),
        (dict(lora_r=3, r=4), "r is given twice"),
        (dict(max_memory=1e300), "max_memory should be at most 1073741824"),
        (dict(weight_decay=10**400), "weight_decay should be a number, got 1000000"),
        (dict(lora_alpha=float("-inf")), "lora_alpha should be finite"),
        (dict(data=""), "data should be the name of a file or directory, got ''"),
        (dict(data="a\0b"), "data should be the name of a file or directory, got 'a\\x00b'"),
        (dict(data=3), "data should be a path, got 3"),
        (dict(data=True), "data should be a path, got True"),
        (dict(data="true", resume_from_checkpoint=False), "resume_from_checkpoint should be a path, got Fal"),
        (dict(lora_rnak=1), "unknown option 'lora_rnak'; did you mean lora_rank?"),
        (dict(attention=3), "attention should be str, got 3"),
        (dict(attention="constant_with_warmup"), "got 'constant_with_warmup'"),
        (dict(r="4"), "r should be int, got '4'"),
        (dict(learning_rate=True), "learning_rate should be float, got True"),
        (dict(learning_rate=[1]), "learning_rate should be float, got [1]"),
        (dict(target_modules=3), "target_modules should be a list of names, got 3"),
        (dict(adapter="a", full=True), "adapter and full exclude each other"),
    ],
)
def test_options_that_are_refused_are_named(fields, words):
    assert words in refusal(**fields)


def test_the_whole_message_of_some_errors():
    assert refusal(zzz=1) == "options: unknown option 'zzz'"
    assert refusal(model=None) == "wanted one of model and init, got neither"
    assert refusal(init="x") == "wanted one of model and init, got both"


@pytest.mark.parametrize(
    "fields",
    [
        dict(adapter="a"),
        dict(full=True),
        dict(model=None, init="c", full=True),
        dict(target_length=9),
        dict(eval_data="x"),
        dict(eval_fraction=0.1),
        dict(profile=True, device="auto"),
        dict(profile=True, device="cpu"),
        dict(device="cuda:0"),
        dict(attention="dense"),
        dict(group_size=64),
        dict(sequence_length=50),
        dict(sequence_length=50, target_length=50),
        dict(packing_boundaries="document"),
        dict(packing_boundaries="document", boundary="wrap", attention="dense"),
        dict(packing_boundaries="none", boundary="wrap"),
        dict(run_name=""),
        dict(run_name="~/x"),
        {**HELD, **dict(eval_steps=2, save_steps=4)},
        {**HELD, **dict(eval_steps=2, save_steps=2, eval_fraction=0.0, eval_data="x")},
    ],
    ids=lambda fields: "-".join(fields),
)
def test_options_that_fit_each_other(fields):
    found = options.from_dict({**GIVEN, **fields}).to_dict()
    assert {name: found[name] for name in fields} == fields


LONGEST = 16_777_216
# By option: the values at the limits, and the values beyond them with the words of the error.
LIMITS = dict(
    target_length=([1, LONGEST], {0: "at least 1", LONGEST + 1: f"at most {LONGEST}"}),
    sequence_length=([2, LONGEST], {1: "at least 2", LONGEST + 1: f"at most {LONGEST}"}),
    group_size=([2, 4, 6], {1: "at least 2"}),
    r=([1], {0: "at least 1"}),
    lora_alpha=([0.5], {0.0: "above 0"}),
    per_device_train_batch_size=([1], {0: "at least 1"}),
    gradient_accumulation_steps=([1, 65_536], {0: "at least 1", 65_537: "at most 65536"}),
    max_steps=([-1, 1], {-2: "at least -1", 0: "at least 1, or -1"}),
    num_train_epochs=([0.5], {0.0: "above 0"}),
    learning_rate=([1e-9], {0.0: "above 0"}),
    embedding_learning_rate=([1e-9], {0.0: "above 0"}),
    warmup_steps=([0.0, 0.5, 1.0, 3.0], {-1.0: "at least 0", 1.5: "a whole number of steps"}),
    weight_decay=([0.0], {-0.5: "at least 0"}),
    adam_beta1=([0.0, 0.99999], {-0.5: "at least 0", 1.0: "at most 0.99999"}),
    adam_beta2=([0.0, 0.99999], {-0.5: "at least 0", 1.0: "at most 0.99999"}),
    adam_epsilon=([1e-38], {9e-39: "at least 1e-38"}),
    max_grad_norm=([0.0], {-0.5: "at least 0"}),
    eval_fraction=([0.0, 0.5], {-0.5: "at least 0", 0.51: "at most 0.5"}),
    max_eval_samples=([1], {0: "at least 1"}),
    eval_steps=([0], {-1: "at least 0"}),
    eval_passkey=([0, 1000], {-1: "at least 0", 1001: "at most 1000"}),
    save_steps=([0], {-1: "at least 0"}),
    save_total_limit=([1], {0: "at least 1"}),
    logging_steps=([1], {0: "at least 1"}),
    seed=([0, 2**63 - 1], {-1: "at least 0", 2**63: "at most 9223372036854775807"}),
    num_threads=([1, 4096], {0: "at least 1", 4097: "at most 4096"}),
    max_memory=([0.5, 2.0**30], {0.0: "above 0", 2.0**30 + 1: "at most 1073741824"}),
)
CHOICES = dict(
    rope_type="linear ntk yarn llama3",
    attention="s2 dense",
    boundary="split wrap swap",
    shift="half none all",
    dtype="float32 bfloat16",
    checkpointing="auto none minimal full",
    lr_scheduler_type="constant cosine linear",
    long_documents="split refuse truncate drop",
    packing_boundaries="none document",
    metric_for_best_model="eval_loss loss",
)


@pytest.mark.parametrize("name", LIMITS)
def test_the_limits_of_a_number_are_allowed_and_nothing_beyond(name):
    allowed, refused = LIMITS[name]
    for value in allowed:
        found = getattr(options.from_dict({**GIVEN, name: value}), name)
        assert (found, type(found)) == (value, type(value))
    for value, words in refused.items():
        message = refusal(**{name: value})
        assert message.startswith(f"{name} should be {words}") and str(value)[:9] in message


def test_only_the_choices_of_an_option_are_allowed():
    for name, choices in CHOICES.items():
        for value in choices.split():
            assert getattr(options.from_dict({**GIVEN, name: value}), name) == value
        assert refusal(**{name: "x"}) == f"{name} should be one of {', '.join(choices.split())}, got 'x'"
    for value in ("tensorboard", "wandb", "all"):
        assert options.from_dict({**GIVEN, "report_to": value}).report_to == (value,)


def test_an_option_that_somebody_has_set_is_given():
    """None leaves an option open. A default value counts as set if somebody passes it."""
    o = options.from_dict({**GIVEN, "lora_r": 8, "eval_data": None})
    assert o.given == {"model", "data", "output_dir", "r"}
    assert parsed("--no-full").given == {"model", "data", "output_dir", "full"}


def test_a_plan_needs_no_data_and_no_output(tmp_path):
    (tmp_path / "c.yaml").write_text("model: m\n")
    file = argparse.Namespace(config=str(tmp_path / "c.yaml"))
    for make in (
        functools.partial(options.from_dict, dict(model="m")),
        functools.partial(options.from_flags, argparse.Namespace(config=None, model="m")),
        functools.partial(options.from_flags, file),
        options.TrainOptions(model="m").check,
    ):
        with pytest.raises(UserError, match="^data is missing$"):
            make()
        made = make(planning=True)
        assert (made.model, made.data, made.output_dir) == ("m", None, None)
    for fields, words in (
        (dict(model="m", data=3), "data should be a path"),
        (dict(model="m", output_dir=3), "output_dir should be a path"),
        (dict(model="m", seed=None), "seed is missing"),
        (dict(data="d"), "wanted one of model and init"),
    ):
        with pytest.raises(UserError, match=words):
            options.from_dict(fields, planning=True)


# ---- resolve -------------------------------------------------------------------------------------


def resolved(instructs=False, **fields):
    """Options that are resolved for a base of 64 tokens."""
    o = options.from_dict({**GIVEN, **fields})
    assert o.resolve(read_config(dict(tiny.CONFIG)), *([True] if instructs else [])) is o
    return o


def test_the_form_of_the_data_decides_about_long_documents():
    """Instructions are neither cut off nor do they see each other's answers."""
    names = ("long_documents", "packing_boundaries")
    for instructs, wanted in ((False, ("split", "none")), (True, ("refuse", "document"))):
        o = resolved(instructs)
        assert tuple(getattr(o, name) for name in names) == wanted
    o = resolved(True, long_documents="drop", packing_boundaries="none")
    assert (o.long_documents, o.packing_boundaries) == ("drop", "none")
    assert resolved(embedding_learning_rate=1e-3).embedding_learning_rate == 1e-3


@pytest.mark.parametrize(
    "fields, words",
    [
        (dict(sequence_length=65), "at most the 64 tokens of the base model unless target_length extends it"),
        (dict(sequence_length=65, adapter="a"), "at most the 64 tokens of the adapter, got 65"),
        (dict(group_size=66), "group_size should be at most sequence_length 64, got 66"),
        (dict(group_size=66, sequence_length=32), "group_size should be at most sequence_length 32, got 66"),
        (
            dict(group_size=48, boundary="swap"),
            "boundary swap needs sequence_length to be a multiple of group_size, got 64 and 48",
        ),
        (dict(sequence_length=50, boundary="wrap"), "multiple of group_size, got 50 and 12"),
        (dict(instructs=True, boundary="wrap"), "packing_boundaries document needs boundary split"),
    ],
)
def test_options_that_do_not_fit_the_base_are_named(fields, words):
    with pytest.raises(UserError) as caught:
        resolved(**fields)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "fields, group",
    [
        (dict(sequence_length=64), 16),
        (dict(sequence_length=64, adapter="a"), 16),
        (dict(group_size=48), 48),
        (dict(group_size=32, boundary="wrap"), 32),
        (dict(boundary="wrap", sequence_length=48), 12),
        (dict(attention="dense", boundary="wrap", sequence_length=50), None),
    ],
)
def test_options_that_fit_the_base(fields, group):
    assert resolved(**fields).group_size == group


def test_a_batch_has_a_limit(tmp_path):
    """16,777,216 tokens. A larger batch is a mistake, and its plan would take minutes."""
    config = read_config(tiny.config(tmp_path / "base"))
    options.from_dict({**GIVEN, "per_device_train_batch_size": 1 << 18}).resolve(config)
    with pytest.raises(
        UserError, match="per_device_train_batch_size should be at most 262144 with 64 tokens"
    ):
        options.from_dict({**GIVEN, "per_device_train_batch_size": (1 << 18) + 1}).resolve(config)


def test_paths_may_begin_at_home(tmp_path, monkeypatch):
    """No shell expands ~ in YAML, in keywords and in --model=~/base."""
    monkeypatch.setenv("HOME", "/home/me")
    file = tmp_path / "run.yaml"
    file.write_text("model: ~/base\ndata: d~/x\noutput_dir: ~user/x\ncache_dir: ~\ninit: ~\nseed: ~\n")
    found = options.from_flags(argparse.Namespace(config=str(file)))
    assert (found.model, found.data, found.output_dir) == ("/home/me/base", "d~/x", "~user/x")
    assert (found.cache_dir, found.init, found.seed) == (None, None, 42)  # ~ alone is YAML's null
    assert parsed("--model=~/base").model == "/home/me/base"
    assert options.from_dict({**GIVEN, "model": Path("~/base")}).model == "/home/me/base"
    assert options.from_dict({**GIVEN, "model": "~"}).model == "/home/me"


# ---- help ----------------------------------------------------------------------------------------


def help_lines(*listed):
    """The lines of --help, each with single spaces."""
    wide = functools.partial(argparse.HelpFormatter, max_help_position=100, width=1000)
    parser = argparse.ArgumentParser(formatter_class=wide)
    options.add_flags(parser, *listed)
    return [" ".join(line.split()) for line in parser.format_help().splitlines()]


def test_help_says_what_a_flag_takes_and_its_default():
    lines = help_lines()
    for begin, end in (
        ("--config FILE a YAML file", "take precedence over it"),
        ("--model PATH the base model", "or a .gguf file"),
        ("--attention s2|dense attention in training", "always dense [s2]"),
        ("--max-steps N steps to train", "num_train_epochs says [-1]"),
        ("--learning-rate X peak rate of LoRA", "head and norms [0.0002]"),
        ("--target-modules NAME [NAME ...] linears", "means every one [q_proj k_proj v_proj o_proj]"),
        ("--report-to tensorboard|wandb|all|none [", "or none [none]"),
        ("--full, --no-full train every weight", "write a whole model [false]"),
        ("--device auto|cpu|cuda|cuda:N where to compute", "or else the CPU [auto]"),
        ("--run-name NAME the name of the run", "(default: wandb chooses)"),
    ):
        (line,) = (line for line in lines if line.startswith(begin))
        assert line.endswith(end), line
    flags = {flag for line in lines for flag in re.findall("^--([a-z0-9-]+)", line)}
    names = {name.replace("_", "-") for name in options.TrainOptions.__dataclass_fields__}
    assert flags == names | {"config"}  # other spellings are not listed


def test_help_has_sections():
    lines = help_lines()
    found = {line: lines[i + 1].split()[0] for i, line in enumerate(lines) if line.endswith(":")}
    assert list(found.items())[1:] == [
        ("model and data:", "--model"),
        ("context and attention:", "--target-length"),
        ("what is trained:", "--r"),
        ("memory and batches:", "--dtype"),
        ("optimisation:", "--max-steps"),
        ("data and evaluation:", "--long-documents"),
        ("run:", "--save-steps"),
    ]


def test_help_can_list_some_options_only():
    lines = help_lines(["seed", "init"])
    assert [line.split()[0] for line in lines if line.startswith("--")] == ["--config", "--init", "--seed"]
    assert set(options.PLANNED) < set(options.TrainOptions.__dataclass_fields__)
