"""Tasks of lm-eval over local files: requests, answers and scores are those of lm-eval's own `hf` model."""

import json
import random
import subprocess
import sys

import pytest
import tiny

import longlora
from longlora import cli
from longlora.data.chat_template import ChatTemplate
from longlora.errors import UserError
from longlora.training import driver

pytest.importorskip("lm_eval", reason="pip install 'longlora[eval]'")

from longlora.evaluation import harness, tasks  # noqa: E402
from longlora.serving.open import prepare  # noqa: E402

WORDS = "shift group long context token of the attention model layer head key value".split()
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
KINDS = {
    "choice": """\
output_type: multiple_choice
fewshot_split: test
doc_to_text: "Question: {{q}}\\nAnswer:"
doc_to_choice: "{{a}}"
doc_to_target: y
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
""",
    "rolling": """\
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
""",
    "needle": """\
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{key}}"
process_results: !function needle.results
generation_kwargs: {do_sample: false, max_gen_toks: 12, until: ["Y", "un"]}
metric_list:
  - {metric: "64", aggregation: !function needle.mean, higher_is_better: true}
  - {metric: "128", aggregation: !function needle.mean, higher_is_better: true}
  - {metric: "4096", aggregation: !function needle.mean, higher_is_better: true}
""",
}
# As RULER: texts are made for the lengths that the user asks for, and the other metrics are -1.
NEEDLE = """\
import datasets
from tokenizers import Tokenizer

def make(max_seq_lengths=(64,), tokenizer=None, **other):
    if tokenizer is not None:
        assert len(Tokenizer.from_file(f"{tokenizer}/tokenizer.json").encode("the key").ids) in (6, 7)
    rows = [dict(text="the " * (length // 8) + key + " is", key=key, length=length)
            for length in max_seq_lengths for key in "abcde"]
    return {"test": datasets.Dataset.from_list(rows)}

def results(doc, answers):
    return {str(size): len(answers[0]) if size == doc["length"] else -1 for size in (64, 128, 4096)}

def mean(values):
    found = [value for value in values if value != -1]
    return sum(found) / len(found) if found else -1
"""


def words(generator, count):
    return " ".join(generator.choice(WORDS) for _ in range(count))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A directory of tasks."""
    path, generator = tmp_path_factory.mktemp("tasks"), random.Random(0)
    rows = {
        "choice": [
            dict(
                q=words(generator, 5),
                a=[words(generator, generator.randint(1, 2)) for _ in range(4)],
                y=generator.randint(0, 3),
            )
            for _ in range(6)
        ],
        "rolling": [dict(text=words(generator, size)) for size in (3, 20, 60)],
    }
    for name, kind in KINDS.items():
        text = f"task: local_{name}\ntag: local_tag\ntest_split: test\n" + kind
        if name in rows:
            data = path / f"{name}.jsonl"
            data.write_text("".join(json.dumps(row) + "\n" for row in rows[name]))
            text += f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\n"
        else:
            text += "custom_dataset: !function needle.make\n"
        (path / f"{name}.yaml").write_text(text)
    (path / "needle.py").write_text(NEEDLE)
    (path / "group.yaml").write_text(
        "group: local\ntask: [local_needle]\naggregate_metric_list: [{metric: '64', weight_by_size: false}]\n"
    )
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / "base"
    tiny.model(path, seed=3, tie_word_embeddings=False, max_position_embeddings=256)
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    """Nothing is fetched or kept, and lm-eval does not describe the machine, which takes seconds."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")


def hf(path, **how):
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=path, device="cpu", dtype="float32", **{"batch_size": 4, **how})


def evaluated(model, folder, names, chats=False):
    """lm-eval's own way to run tasks -> what it gives, with the samples."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(
        include_path=str(folder), include_defaults=False, metadata={"max_seq_lengths": [64, 128]}
    )
    return simple_evaluate(
        model=model,
        tasks=names,
        task_manager=manager,
        num_fewshot=2,
        bootstrap_iters=0,
        apply_chat_template=chats,
    )


def same(ours, theirs):
    """Equal requests, texts and judgements; log-likelihoods within the noise of float32.

    A sum of up to 350 log-probabilities of up to 20, each 1e-6 off: 1e-6 of the sum is what both may err.
    """
    assert ours["samples"].keys() == theirs["samples"].keys()
    for name, samples in theirs["samples"].items():
        for one, other in zip(ours["samples"][name], samples, strict=True):
            assert one["arguments"] == other["arguments"]
            for found, wanted in zip(one["resps"], other["resps"], strict=True):
                if isinstance(wanted[0], tuple):
                    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]
                    found, wanted = ([logs for logs, _ in pairs] for pairs in (found, wanted))
                if isinstance(wanted[0], float):
                    assert found == pytest.approx(wanted, rel=1e-6)
                else:
                    assert found == wanted
        for key, value in theirs["results"][name].items():
            if isinstance(value, float):
                # the perplexity is the exponential of a mean
                rel = 1e-4 if "perplexity" in key else 1e-12
                assert ours["results"][name][key] == pytest.approx(value, rel=rel), key


@pytest.mark.parametrize("context", [256, 100])
def test_scores_are_those_of_lm_eval_s_own_model(folder, base, context):
    """With a context of 100 tokens prompts lose their beginnings, and rolling texts have several windows."""
    ours = harness.HarnessModel(prepare(base, context=context, rows=4))
    names = ["local_choice", "local_rolling", "local_needle"]
    found = evaluated(ours, folder, names)
    same(found, evaluated(hf(str(base), max_length=context), folder, names))
    answers = {sample["resps"][0][0] for sample in found["samples"]["local_needle"]}
    assert len(answers) > 3 and not any(stop in text for text in answers for stop in ("Y", "un"))
    assert max(map(len, answers)) == 12 and min(map(len, answers)) < 6
    assert (ours.cut > 0) == (context == 100)


def test_special_tokens_are_those_of_lm_eval_s_own_model(tmp_path):
    """A tokenizer that begins each text with a token; texts that have it already, and without context.

    "<|end|>" and "<|stop|>" end an answer, and are not part of it. In a batch `hf` keeps what comes after the
    second, because it looks for stop strings in a text without special tokens.
    """
    from lm_eval.api.instance import Instance

    path = tiny.model(tmp_path / "base", seed=3, tie_word_embeddings=False, max_position_embeddings=256)
    raw = json.loads((path / "tokenizer.json").read_text())
    begin, stop = (
        raw["added_tokens"][0] | dict(id=257 + i, content=x) for i, x in enumerate(("<s>", "<|stop|>"))
    )
    raw["added_tokens"] += [begin, stop]
    single = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    special = {"<s>": {"id": "<s>", "ids": [257], "tokens": ["<s>"]}}
    raw["post_processor"] = dict(
        type="TemplateProcessing", single=single, pair=single, special_tokens=special
    )
    (path / "tokenizer.json").write_text(json.dumps(raw))
    named = dict(eos_token="<|end|>", bos_token="<s>", tokenizer_class="PreTrainedTokenizerFast")
    (path / "tokenizer_config.json").write_text(json.dumps(named))
    pairs = [("", "shift"), ("", "<s>shift"), ("<s>the", " group"), ("the ", "group"), ("the", " g")]
    prompts = [(f"{'the ' * i}key is", dict(until=["<|stop|>", "q"], max_gen_toks=40)) for i in range(12)]
    found = []
    for model in (harness.HarnessModel(prepare(path, rows=4)), hf(str(path), batch_size=1)):
        assert model.tok_encode("ab") == [257, 97, 98] and model.tok_encode("<s>ab") == [257, 97, 98]
        ask = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
        rolling = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in ("the long " * 40, "", "a")]
        until = [Instance("generate_until", {}, prompt, i) for i, prompt in enumerate(prompts)]
        logs = model.loglikelihood(ask, disable_tqdm=True)
        values = [value for value, _ in logs] + model.loglikelihood_rolling(rolling)
        found.append(([greedy for _, greedy in logs], model.generate_until(until), values))
    assert found[0][:2] == found[1][:2] and found[0][2] == pytest.approx(found[1][2], rel=1e-6)
    assert len({len(text) for text in found[0][1]}) > 1


def test_chats_are_those_of_lm_eval_s_own_model(folder, base):
    names = ["local_choice", "local_needle"]
    template = tasks.find_template(prepare(base).base.tokenizer())
    ours = harness.HarnessModel(prepare(base, rows=4), template)
    found = evaluated(ours, folder, names, chats=True)
    assert found["samples"]["local_choice"][0]["arguments"][0][0].startswith("<user>Question")
    same(found, evaluated(hf(str(base)), folder, names, chats=True))


@pytest.mark.parametrize("content", ["m.content", "m.content | trim"])
def test_a_last_message_goes_on_as_in_transformers(base, content):
    from transformers import AutoTokenizer

    theirs, source = AutoTokenizer.from_pretrained(base), TEMPLATE.replace("m.content", content)
    ours = harness.HarnessModel(prepare(base), ChatTemplate(source, {}, "here"))
    talk = [dict(role=role, content=f" {role} ") for role in ("user", "assistant")]
    for prompt in (True, False):
        how = dict(add_generation_prompt=prompt, continue_final_message=not prompt, chat_template=source)
        wanted = theirs.apply_chat_template(talk, tokenize=False, **how)
        assert ours.apply_chat_template([dict(role="system", content="s"), *talk], prompt) == wanted


def test_an_adapter_is_in_the_scores(tmp_path, folder):
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer

    driver.train(lambda line: None, **tiny.options(tmp_path, target_length=256, max_steps=3))
    base, out = tmp_path / "base", tmp_path / "out"
    adapted = AutoPeftModelForCausalLM.from_pretrained(out).merge_and_unload()
    theirs = hf(adapted, tokenizer=AutoTokenizer.from_pretrained(base))
    same(
        evaluated(harness.HarnessModel(prepare(base, out, rows=4)), folder, ["local_choice"]),
        evaluated(theirs, folder, ["local_choice"]),
    )


def test_the_command_prints_what_the_function_gives(folder, base, capsys):
    given = ["eval", "tasks", "--model", str(base), "--task-dir", str(folder), "--device", "cpu"]
    given += ["--tasks", "local,local_choice", "--lengths", "64,128", "--limit", "8", "--num-fewshot", "1"]
    assert cli.main([*given, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    how = dict(lengths=[64, 128], limit=8, num_fewshot=1, task_dir=folder, device="cpu")
    assert found == tasks.run(base, ["local", "local_choice"], **how)
    # Of the eight prompts five have 64 tokens. lm-eval gives the group a mean for 64 alone.
    needle = found["results"]["local_needle"]
    assert found["groups"]["local"]["128,none"] == needle["128,none"] >= 0 == found["cut"]
    assert found["n-samples"]["local_choice"] == dict(original=6, effective=6)
    assert found["n-shot"]["local_choice"] == 1 and found["context"] == 256
    assert cli.main(given) == 0
    lines = capsys.readouterr().out.splitlines()
    assert ["local", "1", "64", f"{found['groups']['local']['64,none']:.4f}"] in map(str.split, lines)
    row = next(line.split() for line in lines if "acc_norm" in line)
    assert row[:2] == ["acc_norm", f"{found['results']['local_choice']['acc_norm,none']:.4f}"]
    assert not any("4096" in line or "-1" in line for line in lines)


def test_requests_are_those_of_simple_evaluate(folder, base, monkeypatch):
    """The same examples before the same questions; a task's own number of examples counts without ours."""
    asked = []

    def record(self, requests, **how):
        asked.append([texts for texts, _, _ in requests])
        return [(0.0, False)] * len(requests)

    monkeypatch.setattr(harness.HarnessModel, "_loglikelihood_tokens", record)
    evaluated(harness.HarnessModel(prepare(base)), folder, ["local_choice"])
    tasks.run(base, " local_choice", num_fewshot=2, task_dir=folder)
    assert asked[0] == asked[1] and asked[0][0][0].count("Question") == 3
    tasks.run(base, "local_choice", task_dir=folder)
    assert asked[2][0][0].count("Question") == 1


def test_more_examples_than_there_are_is_a_line(folder, base):
    with pytest.raises(UserError, match="num_fewshot"):
        tasks.run(base, "local_choice", num_fewshot=50, task_dir=folder)


def test_a_gguf_is_scored_as_its_directory(tmp_path, folder):
    """Its tokenizer, with a merge, is a directory for tasks that make their own texts."""
    path = tiny.model(tmp_path / "whole", vocab_size=258)
    raw = json.loads((path / "tokenizer.json").read_text())
    raw["model"] |= {"merges": [["t", "h"]], "vocab": raw["model"]["vocab"] | {"th": 257}}
    (path / "tokenizer.json").write_text(json.dumps(raw))
    gguf = longlora.merge(path, None, tmp_path / "gguf", format="gguf", dtype="f32")
    how = dict(tasks=["local_needle", "local_choice"], lengths=64, task_dir=folder, limit=2)
    assert tasks.run(gguf, **how)["results"] == tasks.run(path, **how)["results"]


def test_requests_that_are_cut_are_told(folder, base):
    found = tasks.run(base, "local_needle", lengths=[128], context=128, task_dir=folder)
    assert found["cut"] == 0
    found = tasks.run(base, "local_choice", num_fewshot=5, context=100, task_dir=folder)
    assert found["cut"] == 24
    assert tasks.text(found).endswith(
        "24 requests were longer than the context of 100 tokens; their beginnings were left out"
    )


def test_torch_is_not_needed(folder, base):
    script = (
        "import sys; from longlora import cli\n"
        f"code = cli.main(['eval', 'tasks', '--model', {str(base)!r}, '--task-dir', {str(folder)!r},"
        " '--tasks', 'local_tag', '--limit', '1'])\n"
        "sys.exit(code or 3 * ('torch' in sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "fields, words",
    [
        (dict(tasks=[]), "tasks should be names of tasks, got []"),
        (dict(tasks=["local_choice", 3]), "tasks should be names of tasks"),
        (dict(tasks=["local_choice", ""]), "tasks should be names of tasks"),
        (dict(lengths=[0]), "lengths should be an integer of at least 1, got 0"),
        (dict(lengths=[4, 0]), "lengths should be an integer of at least 1, got 0"),
        (dict(lengths=[4.0]), "lengths should be an integer of at least 1, got 4.0"),
        (dict(lengths=[64, 512]), "length 512 is more than the 256 tokens of the model's context"),
        (dict(limit=0), "limit should be an integer of at least 1, got 0"),
        (dict(limit=0.5), "limit should be an integer of at least 1, got 0.5"),
        (dict(limit=True), "limit should be an integer of at least 1, got True"),
        (dict(num_fewshot=-1), "num_fewshot should be an integer of at least 0, got -1"),
        (dict(context=0), "context should be an integer from 1"),
        (dict(task_dir="no"), "no: no such directory"),
        (dict(chat_template="no.jinja"), "chat_template needs apply_chat_template"),
        (dict(apply_chat_template=True, chat_template="no.jinja"), "no.jinja: No such file or directory"),
        (dict(model="no"), "no: no such file or directory"),
        (dict(dtype="int8"), "dtype should be one of"),
        (dict(device="tpu"), "device"),
    ],
)
def test_what_is_wrong_is_named_before_anything_is_loaded(folder, base, monkeypatch, fields, words):
    refuse(monkeypatch)
    given = dict(model=base, tasks=["local_choice"], task_dir=folder)
    with pytest.raises(UserError) as caught:
        tasks.run(**{**given, **fields})
    assert words in str(caught.value)


def refuse(monkeypatch):
    """Let no data and no weights be read."""

    def never(*_, **__):
        raise AssertionError("loaded")

    monkeypatch.setattr("lm_eval.tasks.TaskManager.load", never)
    monkeypatch.setattr("longlora.decoder.model.Model.load", never)


def test_an_adapter_of_another_base_is_named_before_anything_is_loaded(tmp_path, folder, base, monkeypatch):
    driver.train(lambda line: None, **tiny.options(tmp_path, max_steps=1))
    other = tiny.model(tmp_path / "other", hidden_size=48, head_dim=12)
    refuse(monkeypatch)
    with pytest.raises(UserError, match="adapter|out"):
        tasks.run(other, "local_choice", tmp_path / "out", task_dir=folder)


def test_lengths_over_the_memory_are_named_before_anything_is_loaded(folder, base, monkeypatch):
    refuse(monkeypatch)
    monkeypatch.setattr("longlora.job.memory", lambda own: own)
    with pytest.raises(UserError, match="does not fit in memory: with 1 x 256 tokens"):
        tasks.run(base, "local_needle", lengths=256, task_dir=folder)


def test_a_task_that_lm_eval_does_not_have_is_named_with_the_nearest(folder, base, monkeypatch):
    """`folder` stands for lm-eval's own directory of tasks, which takes seconds to read."""
    refuse(monkeypatch)
    monkeypatch.setattr("lm_eval.tasks.manager.__file__", str(folder / "manager.py"))
    with pytest.raises(UserError, match="lm-eval has no task 'local_chioce'; near: local_choice"):
        tasks.run(base, "local,local_chioce")
    with pytest.raises(UserError, match="lm-eval has no task 'zzzz'$"):
        tasks.run(base, ["zzzz"])


@pytest.mark.parametrize(
    "lines, words",
    [
        (
            "dataset_path: json\ndataset_kwargs: {data_files: {test: none.jsonl}}",
            "has data that cannot be loaded",
        ),
        ("dataset_path: nobody/nothing", "has data that cannot be loaded: .*nobody/nothing"),
        ("custom_dataset: !function broken.make", "needs a library that is not installed: .*no_such_library"),
        ("custom_dataset: !function needle.make\nunsafe_code: true", "runs code that the model writes"),
        ("custom_dataset: !function needle.make\noutput_type: images", "output_type"),
    ],
)
def test_a_task_that_cannot_be_loaded_is_named_with_the_reason(tmp_path, base, monkeypatch, lines, words):
    monkeypatch.setattr("longlora.decoder.model.Model.load", None)
    (tmp_path / "needle.py").write_text(NEEDLE)
    (tmp_path / "broken.py").write_text("import no_such_library\n")
    kind = KINDS["needle"] if "output_type" not in lines else KINDS["needle"].partition("\n")[2]
    (tmp_path / "t.yaml").write_text(f"task: local_broken\ntest_split: test\n{lines}\n{kind}")
    with pytest.raises(UserError, match=words) as caught:
        tasks.run(base, "local_broken", task_dir=tmp_path)
    assert "task local_broken" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "options, words",
    [
        ("num_beams: 4", "num_beams=4, which longlora cannot compute"),
        ("max_gen_toks: 300", "asks for 300 new tokens, the context is 256"),
    ],
)
def test_an_answer_that_we_do_not_compute_is_refused(tmp_path, base, options, words):
    (tmp_path / "needle.py").write_text(NEEDLE)
    text = "task: local_odd\ntest_split: test\ncustom_dataset: !function needle.make\n" + KINDS["needle"]
    (tmp_path / "t.yaml").write_text(text.replace("max_gen_toks: 12", options))
    with pytest.raises(UserError, match=words):
        tasks.run(base, "local_odd", task_dir=tmp_path)


def test_drawn_answers_follow_from_the_request(tmp_path, folder, base):
    (tmp_path / "needle.py").write_text(NEEDLE)
    text = "task: local_drawn\ntest_split: test\ncustom_dataset: !function needle.make\n" + KINDS["needle"]
    (tmp_path / "t.yaml").write_text(
        text.replace("do_sample: false", "do_sample: true, temperature: 5.0, num_beams: 1")
    )
    model = harness.HarnessModel(prepare(base, rows=4))
    one, two = (evaluated(model, tmp_path, ["local_drawn"])["samples"]["local_drawn"] for _ in range(2))
    assert [sample["resps"] for sample in one] == [sample["resps"] for sample in two]
    greedy = evaluated(model, folder, ["local_needle"])["samples"]["local_needle"]
    assert [sample["resps"] for sample in one] != [sample["resps"] for sample in greedy]


def test_without_lm_eval_a_line_says_how_to_get_it(base, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError) as caught:
        tasks.run(base, "hellaswag")
    assert str(caught.value) == "eval tasks needs lm-eval: pip install 'longlora[eval]'"
