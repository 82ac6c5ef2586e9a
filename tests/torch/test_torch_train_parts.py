"""Units of longlora.torch.train, without training: options, processes, threads and the command line."""

import contextlib
import math
import os
import re
from types import SimpleNamespace

import pytest

from longlora.errors import UserError
from longlora.training import options

torch = pytest.importorskip("torch", reason="longlora.torch is for torch")
pytest.importorskip("accelerate", reason="Trainer needs accelerate")
ours = pytest.importorskip("longlora.torch.train", reason="longlora.torch.train needs transformers and peft")


def asked(**fields):
    return options.from_dict(dict(model="base", data="text.txt", output_dir="out", device="cpu") | fields)


# ---- options -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields, words",
    [
        (dict(init="x"), "init is not available with torch: a pretrained model is extended"),
        (dict(full=True), "full is not available with torch: LoRA, embedding and norms are trained"),
        (dict(max_memory=1.0), "max_memory is not available with torch: the memory of torch is not planned"),
        (dict(profile=True), "profile is not available with torch: use torch.profiler"),
        (dict(eval_passkey=[8]), "eval_passkey is not available with torch: use longlora eval passkey"),
        (dict(device="cuda"), "device cuda is not available with torch: wanted auto or cpu"),
        (dict(checkpointing="minimal"), "checkpointing minimal is not available with torch: wanted none"),
    ],
)
def test_unsupported_options_are_refused(fields, words):
    none = dict(init=None, full=False, max_memory=None, profile=False, eval_passkey=())
    plain = none | dict(device="auto", checkpointing="auto")
    with pytest.raises(UserError, match=words):
        ours.refuse(SimpleNamespace(**plain | fields))
    for device in ("auto", "cpu"):
        for checkpointing in ("auto", "none", "full"):
            ours.refuse(SimpleNamespace(**plain | dict(device=device, checkpointing=checkpointing)))


def test_training_arguments():
    """Trainer gets the options of batches and optimizer. The rest that it would do by itself is off."""
    given = dict(
        per_device_train_batch_size=3,
        gradient_accumulation_steps=5,
        max_grad_norm=0.7,
        learning_rate=0.03,
        weight_decay=0.2,
        adam_beta1=0.8,
        adam_beta2=0.9,
        adam_epsilon=1e-5,
    )
    args = ours.arguments(asked(**given, seed=2**32 + 5))
    want = given | dict(
        output_dir="out",
        max_steps=1,
        lr_scheduler_type="constant",
        bf16=False,
        seed=5,  # NumPy takes 32 bits
        logging_strategy="steps",
        logging_steps=1,
        save_strategy="no",
        eval_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        average_tokens_across_devices=True,
        ddp_find_unused_parameters=False,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    assert {name: getattr(args, name) for name in want} == want
    assert ours.arguments(asked(max_grad_norm=0)).max_grad_norm == math.inf


@pytest.mark.parametrize("name", ["activation_checkpointing", "gradient_checkpointing"])
def test_training_arguments_of_machines_and_versions(monkeypatch, name):
    def arguments(gpu, **fields):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        return ours.arguments(asked(**fields))

    fields = {"__dataclass_fields__": {name: None}, "__init__": lambda self, **how: vars(self).update(how)}
    monkeypatch.setattr(ours, "TrainingArguments", type("Arguments", (), fields))
    for gpu, device, cpu in ((True, "auto", False), (True, "cpu", True), (False, "auto", True)):
        args = arguments(gpu, device=device)
        assert args.use_cpu is cpu and args.dataloader_pin_memory is not cpu
        assert not hasattr(args, name) and not hasattr(args, f"{name}_kwargs")
    args = arguments(False, checkpointing="full", dtype="bfloat16")
    assert getattr(args, name) is True and getattr(args, f"{name}_kwargs") == {"use_reentrant": False}
    assert args.bf16 is True


# ---- processes -----------------------------------------------------------------------------------


def test_the_line_about_the_device(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"A GPU ({device})")

    def place(device, processes):
        return ours.place(SimpleNamespace(device=torch.device(device), world_size=processes))

    assert place("cpu", 1) == "device: cpu, 3 threads"
    assert place("cpu:1", 2) == "device: cpu, 3 threads, in the first of 2 processes"
    assert place("cuda:1", 1) == "device: cuda:1, A GPU (cuda:1)"
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert place("cpu", 1) == "device: cpu, 1 thread"


def test_one_process_calls_and_all_raise_its_error(monkeypatch):
    called, sent = [], []

    def once(index, size, function=lambda: called.append(1)):
        ours.once(SimpleNamespace(process_index=index, world_size=size), function)

    def fails():
        raise UserError("no such file")

    monkeypatch.setattr(ours, "broadcast_object_list", lambda said: sent.append(list(said)))
    once(0, 1)
    assert called == [1] and sent == []
    once(0, 2)
    assert called == [1, 1] and sent == [[None]]
    once(1, 2)
    assert called == [1, 1] and sent == [[None], [None]]
    for size in (1, 2):
        with pytest.raises(UserError, match="no such file"):
            once(0, size, fails)
    assert sent[2:] == [["no such file"]]
    monkeypatch.setattr(ours, "broadcast_object_list", lambda said: said.__setitem__(0, "the first says"))
    with pytest.raises(UserError, match="the first says"):
        once(1, 2, fails)


@pytest.fixture
def stubbed(monkeypatch):
    """Fakes for everything in `run` that reads files or trains. did: the calls, in order. args: Trainer's."""
    did = []
    monkeypatch.setenv(ours.PRECISION, "no")  # so that monkeypatch takes away what a test leaves
    monkeypatch.delenv(ours.PRECISION)
    args = SimpleNamespace(n_gpu=0, process_index=0, world_size=1, device=torch.device("cpu"))

    def noted(name, result=None):
        return lambda *given, **more: did.append((name, given)) or result

    class Held(contextlib.nullcontext):
        def __exit__(self, *error):
            did.append(("released", ()))

    def arguments(o):
        os.environ[ours.PRECISION] = "no"  # as accelerate does
        return args

    source = SimpleNamespace(config="the config")
    monkeypatch.setattr(ours, "arguments", arguments)
    monkeypatch.setattr(ours, "use_threads", noted("use_threads"))
    monkeypatch.setattr(ours, "Source", noted("source", source))
    monkeypatch.setattr(ours, "instructs", lambda o: "instructs")
    monkeypatch.setattr(ours, "Setup", noted("setup", "the setup"))
    monkeypatch.setattr(ours, "read_data", noted("read_data"))
    monkeypatch.setattr(ours.resume, "refuse_taken", noted("refuse_taken"))
    monkeypatch.setattr(ours.resume, "sweep", noted("sweep"))
    monkeypatch.setattr(ours.reporters, "chosen", noted("reporters"))
    monkeypatch.setattr(ours.disk, "alone", noted("alone", Held()))
    monkeypatch.setattr(ours, "Run", noted("run", "the run"))
    engine = SimpleNamespace(train=noted("train", "the result"))
    monkeypatch.setattr(ours, "TorchEngine", noted("engine", engine))
    monkeypatch.setattr(torch, "set_num_threads", lambda n: did.append(("threads", (n,))))
    return SimpleNamespace(did=did, args=args)


def names(did):
    return [name for name, _ in did]


def test_the_order_of_a_run(stubbed, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    said = []
    o = asked(report_to="none", resume_from_checkpoint="checkpoint-2")
    assert ours.run(o, said.append) == "the result"
    before = ["reporters", "use_threads", "source", "setup"]
    first = ["refuse_taken", "alone", "sweep", "read_data"]
    assert names(stubbed.did) == [*before, *first, "run", "engine", "train", "released"]
    calls = dict(stubbed.did)
    assert len(said) == 1 and said[0].startswith("device: cpu, ")
    assert calls["refuse_taken"] == ("out", "checkpoint-2") and calls["alone"] == calls["sweep"] == ("out",)
    assert ours.PRECISION not in os.environ


def test_other_processes_neither_print_nor_write(stubbed, monkeypatch):
    monkeypatch.setattr(ours, "broadcast_object_list", lambda said: None)
    stubbed.args.process_index, stubbed.args.world_size = 1, 2
    monkeypatch.setenv(ours.PRECISION, "no")
    said = []
    ours.run(asked(), said.append)
    assert not said and "read_data" not in names(stubbed.did)
    run = dict(stubbed.did)["run"]
    assert run[4:6] == (2, False)
    run[3]("a sentence")
    assert not said and os.environ[ours.PRECISION] == "no"  # the user's


def test_the_threads_of_torch(stubbed, monkeypatch):
    def threads():
        found = [given for name, given in stubbed.did if name == "threads"]
        stubbed.did.clear()
        return found

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    for quota, wanted in ((2, 2), (16, 8)):
        monkeypatch.setattr(ours, "processors", lambda quota=quota: quota)
        ours.run(asked(), lambda line: None)
        assert threads() == [(wanted,)]
    ours.run(asked(num_threads=3), lambda line: None)
    assert threads() == [(3,)]
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    ours.run(asked(), lambda line: None)
    assert threads() == []


def test_a_process_has_one_gpu(stubbed):
    stubbed.args.n_gpu = 2
    with pytest.raises(UserError, match="one process sees 2 GPUs; .*--nproc-per-node 2 "):
        ours.run(asked(), lambda line: None)
    stubbed.args.n_gpu = 1
    assert ours.run(asked(), lambda line: None) == "the result"


def test_keywords_are_the_options_of_a_run(monkeypatch):
    ran = []
    monkeypatch.setattr(ours, "run", lambda o, say: ran.append((o.model, o.max_steps, say)) or "the result")
    given = dict(model="base", data="text.txt", output_dir="out", max_steps=3)
    assert ours.train("say", **given) == ours.train(**given) == "the result"
    assert ran == [("base", 3, "say"), ("base", 3, print)]


# ---- the command line ----------------------------------------------------------------------------

FLAGS = ["--model", "base", "--data", "text.txt", "--output_dir", "out"]


@pytest.mark.parametrize("stopped, code", [(None, 0), (15, 143)])
def test_the_exit_code_is_that_of_the_signal(monkeypatch, stopped, code):
    seen, destroyed = [], []
    monkeypatch.setattr(ours, "run", lambda o: seen.append(o) or SimpleNamespace(stopped=stopped))
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: destroyed.append(1))
    for initialized in (False, True):
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda initialized=initialized: initialized)
        assert ours.main([*FLAGS, "--max-steps=3"]) == code
        assert seen[-1].max_steps == 3 and seen[-1].output_dir == "out" and destroyed == [1] * initialized
    monkeypatch.setattr("sys.argv", ["train", *FLAGS, "--max_steps", "4"])
    assert ours.main() == code and seen[-1].max_steps == 4


def test_unsupported_options_are_not_flags(capsys):
    with pytest.raises(SystemExit) as ended:
        ours.main(["--help"])
    out = capsys.readouterr().out
    help = " ".join(out.split())
    assert ended.value.code == 0 and help.startswith("usage: python -m longlora.torch.train ")
    assert "extend a model with longlora's kernels in torch" in help
    assert "--checkpointing auto means none here; minimal, and a --device other than auto and cpu" in help
    flags = set(re.findall(r"^  (?:-\w, )?(--[\w-]+)", out, re.M))
    assert "--output-dir" in flags
    assert flags.isdisjoint(("--init", "--full", "--max-memory", "--profile", "--eval-passkey"))
    with pytest.raises(SystemExit):
        ours.main([*FLAGS, "--max-step", "3"])  # no abbreviations
    assert "--max-step" in capsys.readouterr().err


def test_only_the_first_process_prints_an_error(monkeypatch, capsys):
    def fails(o):
        raise UserError("no such file")

    slept = []
    monkeypatch.setattr(ours, "run", fails)
    monkeypatch.setattr(ours.time, "sleep", slept.append)
    for rank, printed, waits in ((None, True, []), ("0", True, []), ("1", False, [2])):
        monkeypatch.delenv("RANK", raising=False)
        if rank is not None:
            monkeypatch.setenv("RANK", rank)
        assert ours.main(FLAGS) == 2
        assert ("no such file" in capsys.readouterr().err) == printed and slept == waits
    slept.clear()
    monkeypatch.setattr(ours, "run", lambda o: SimpleNamespace(stopped=None))
    assert ours.main(FLAGS) == 0 and slept == []


def test_a_process_of_a_group_ends_at_once(monkeypatch):
    ended = []
    monkeypatch.setattr(ours.os, "_exit", ended.append)
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(SystemExit):
        ours.leave(5)  # after the fake _exit, which returns
    assert ended == [5]
    monkeypatch.delenv("RANK")
    with pytest.raises(SystemExit) as left:
        ours.leave(6)
    assert left.value.code == 6 and ended == [5]
