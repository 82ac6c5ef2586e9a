"""The parts of longlora.torch.train, without a training: options, processes, threads and the command line."""

import contextlib
import math
import os
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
def test_an_option_that_does_not_apply_is_refused(fields, words):
    none = dict(init=None, full=False, max_memory=None, profile=False, eval_passkey=())
    plain = none | dict(device="auto", checkpointing="auto")
    with pytest.raises(UserError, match=words):
        ours.refuse(SimpleNamespace(**plain | fields))
    for device in ("auto", "cpu"):
        for checkpointing in ("auto", "none", "full"):
            ours.refuse(SimpleNamespace(**plain | dict(device=device, checkpointing=checkpointing)))


def test_what_trainer_is_told():
    o = asked(
        per_device_train_batch_size=3,
        gradient_accumulation_steps=5,
        max_grad_norm=0.7,
        learning_rate=0.03,
        weight_decay=0.2,
        adam_beta1=0.8,
        adam_beta2=0.9,
        adam_epsilon=1e-5,
        seed=2**32 + 5,
    )
    args = ours.arguments(o)
    told = dict(
        output_dir="out",
        per_device_train_batch_size=3,
        gradient_accumulation_steps=5,
        max_steps=1,
        max_grad_norm=0.7,
        learning_rate=0.03,
        weight_decay=0.2,
        adam_beta1=0.8,
        adam_beta2=0.9,
        adam_epsilon=1e-5,
        lr_scheduler_type="constant",
        bf16=False,
        seed=5,
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
    assert {name: getattr(args, name) for name in told} == told
    assert ours.arguments(asked(max_grad_norm=0)).max_grad_norm == math.inf


@pytest.mark.parametrize("name", ["activation_checkpointing", "gradient_checkpointing"])
def test_what_depends_on_the_machine_and_the_version(monkeypatch, name):
    def told(gpu, **fields):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        return ours.arguments(asked(**fields))

    made = SimpleNamespace(__dataclass_fields__={name: None})
    monkeypatch.setattr(ours, "TrainingArguments", made)
    with pytest.raises(TypeError):
        told(False)
    fields = {"__dataclass_fields__": {name: None}, "__init__": lambda self, **how: vars(self).update(how)}
    monkeypatch.setattr(ours, "TrainingArguments", type("Told", (), fields))
    for gpu, device, cpu in ((True, "auto", False), (True, "cpu", True), (False, "auto", True)):
        args = told(gpu, device=device)
        assert args.use_cpu is cpu and args.dataloader_pin_memory is not cpu
        assert not hasattr(args, name) and not hasattr(args, f"{name}_kwargs")
    args = told(False, checkpointing="full", dtype="bfloat16")
    assert getattr(args, name) is True and getattr(args, f"{name}_kwargs") == {"use_reentrant": False}
    assert args.bf16 is True


# ---- processes -----------------------------------------------------------------------------------


def test_a_place_in_words(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"A GPU ({device})")

    def place(device, processes):
        return ours.place(SimpleNamespace(device=torch.device(device), world_size=processes))

    assert place("cpu", 1) == "device: cpu, 3 threads"
    assert place("cpu:1", 2) == "device: cpu, 3 threads, in the first of 2 processes"
    assert place("cuda:1", 1) == "device: cuda:1, A GPU (cuda:1)"
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert place("cpu", 1) == "device: cpu, 1 thread"


def test_the_first_process_calls_and_its_error_is_everyones(monkeypatch):
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
    """`run` with everything that reads files or trains replaced -> a function that runs it, what it did."""
    did = []
    monkeypatch.delenv(ours.PRECISION, raising=False)
    args = SimpleNamespace(n_gpu=0, process_index=0, world_size=1, device=torch.device("cpu"))

    def noted(name, result=None):
        return lambda *given, **more: did.append((name, given, more)) or result

    class Held(contextlib.nullcontext):
        def __exit__(self, *error):
            did.append(("released", (), {}))

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
    monkeypatch.setattr(torch, "set_num_threads", lambda n: did.append(("threads", (n,), {})))
    return SimpleNamespace(did=did, args=args)


def names(did):
    return [name for name, *_ in did]


def test_a_run_in_its_order(stubbed, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    said = []
    o = asked(report_to="none", resume_from_checkpoint="checkpoint-2")
    assert ours.run(o, said.append) == "the result"
    before = ["reporters", "use_threads", "source", "setup"]
    first = ["refuse_taken", "alone", "sweep", "read_data"]
    assert names(stubbed.did) == [*before, *first, "run", "engine", "train", "released"]
    calls = {name: (given, more) for name, given, more in stubbed.did}
    assert len(said) == 1 and said[0].startswith("device: cpu, ")
    assert calls["setup"] == ((o, "the config"), {"instructs": "instructs"})
    assert calls["refuse_taken"][0] == ("out", "checkpoint-2") and calls["alone"][0] == ("out",)
    assert calls["sweep"][0] == ("out",) and calls["use_threads"][0] == (o,)
    assert calls["read_data"][0][2] == "the setup" and calls["engine"][0] == ("the run", stubbed.args)
    o_, _, setup, _, processes, writes, by_one = calls["run"][0]
    assert (o_, setup, processes, writes) == (o, "the setup", 1, True)
    assert by_one.func is ours.once and by_one.args == (stubbed.args,)
    assert ours.PRECISION not in os.environ


def test_another_process_neither_speaks_nor_writes(stubbed, monkeypatch):
    monkeypatch.setattr(ours, "broadcast_object_list", lambda said: None)
    stubbed.args.process_index, stubbed.args.world_size = 1, 2
    monkeypatch.setenv(ours.PRECISION, "no")
    said = []
    ours.run(asked(), said.append)
    assert not said and "read_data" not in names(stubbed.did)
    run = next(given for name, given, _ in stubbed.did if name == "run")
    assert run[4:6] == (2, False)
    run[3]("a sentence")
    assert not said and os.environ[ours.PRECISION] == "no"  # it was there before


def test_the_threads_of_torch(stubbed, monkeypatch):
    def threads():
        found = [given for name, given, _ in stubbed.did if name == "threads"]
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


def test_keywords_are_options(monkeypatch):
    seen = []
    monkeypatch.setattr(ours, "run", lambda o, say: seen.append((o, say)) or "the result")
    fields = dict(model="base", data="text.txt", output_dir="out", max_steps=7)
    assert ours.train(print, **fields) == "the result"
    assert seen[0][0].max_steps == 7 and seen[0][1] is print
    with pytest.raises(UserError, match="max_step"):
        ours.train(max_step=7)


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


def test_options_that_torch_lacks_are_no_flags(capsys):
    with pytest.raises(SystemExit) as ended:
        ours.main(["--help"])
    help = capsys.readouterr().out
    assert ended.value.code == 0 and help.startswith("usage: python -m longlora.torch.train ")
    assert "--output-dir" in help and "extend a model with longlora's kernels in torch" in help
    assert "--checkpointing minimal and a --device other than auto and cpu are refused here" in " ".join(
        help.split()
    )
    assert not any(f"--{name.replace('_', '-')} " in help for name in ours.REFUSED)
    with pytest.raises(SystemExit):
        ours.main([*FLAGS, "--max-step", "3"])  # no abbreviations
    assert "--max-step" in capsys.readouterr().err


def test_one_process_of_a_group_tells_an_error(monkeypatch, capsys):
    def fails(o):
        raise UserError("no such file")

    slept = []
    monkeypatch.setattr(ours, "run", fails)
    monkeypatch.setattr(ours.time, "sleep", slept.append)
    for rank, told, waits in ((None, True, []), ("0", True, []), ("1", False, [2])):
        monkeypatch.delenv("RANK", raising=False)
        if rank is not None:
            monkeypatch.setenv("RANK", rank)
        assert ours.main(FLAGS) == 2
        assert ("no such file" in capsys.readouterr().err) == told and slept == waits
    slept.clear()
    monkeypatch.setattr(ours, "run", lambda o: SimpleNamespace(stopped=None))
    assert ours.main(FLAGS) == 0 and slept == []


def test_a_process_of_a_group_ends_at_once(monkeypatch):
    ended = []
    monkeypatch.setattr(ours.os, "_exit", ended.append)
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(SystemExit):
        ours.leave(5)  # the real _exit does not come back
    assert ended == [5]
    monkeypatch.delenv("RANK")
    with pytest.raises(SystemExit) as left:
        ours.leave(6)
    assert left.value.code == 6 and ended == [5]
