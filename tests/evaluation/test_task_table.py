"""longlora eval tasks: arguments, lm-eval's index and settings, the table."""

import inspect
import random
from types import SimpleNamespace

import numpy as np
import pytest
import tiny

from longlora.errors import UserError

pytest.importorskip("lm_eval", reason="pip install 'longlora[eval]'")

from longlora.evaluation import harness, tasks  # noqa: E402

YAML = """\
task: local_{name}
test_split: test
output_type: generate_until
doc_to_text: "{{{{q}}}}"
doc_to_target: ""
metric_list:
  - {{metric: exact_match}}
"""


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "tasks"
    path.mkdir()
    for name in ("one", "two"):
        (path / f"{name}.yaml").write_text(YAML.format(name=name))
    return path


# ---- arguments -----------------------------------------------------------------------------------


def test_names_and_numbers_at_their_limits_are_accepted():
    tasks._check(["a", "b"], [1, 4096], limit=1, num_fewshot=0)
    tasks._check(["a"], [], limit=None, num_fewshot=None)


def test_a_length_above_the_context_is_an_error():
    prepared = SimpleNamespace(planned=SimpleNamespace(context=64))
    tasks._check_lengths([], prepared)
    tasks._check_lengths([64, 1], prepared)
    words = "length 65 is more than the 64 tokens of the model's context; --context 65 makes it read them"
    with pytest.raises(UserError, match=words):
        tasks._check_lengths([1, 65], prepared)


# ---- lm-eval's index -----------------------------------------------------------------------------


def test_the_users_directory_is_the_index_if_it_has_all_names(folder, monkeypatch):
    """lm-eval's own directory, here a fake, is read only for names that the user's directory lacks."""
    (folder.parent / "other").mkdir()
    (folder.parent / "other/three.yaml").write_text(YAML.format(name="three"))
    monkeypatch.setattr("lm_eval.tasks.manager.__file__", str(folder.parent / "other/manager.py"))
    manager = tasks._manager(["local_*"], folder, [64], "there")
    assert list(manager.all_tasks) == ["local_one", "local_two"]
    assert manager.metadata == dict(tokenizer="there", max_seq_lengths=[64])
    assert tasks._manager(["local_one"], folder, [], "there").metadata == dict(tokenizer="there")
    assert tasks._matches(manager, "local_*") == ["local_one", "local_two"]
    assert tasks._matches(manager, str(folder / "one.yaml")) == [str(folder / "one.yaml")]
    assert tasks._matches(manager, str(folder / "no.yaml")) == []


def test_the_index_has_lm_evals_tasks_and_those_of_the_users_directory(folder, monkeypatch):
    own = folder.parent / "own"
    own.mkdir()
    for name in ("other", "others", "otter"):
        (own / f"{name}.yaml").write_text(YAML.format(name=name))
    monkeypatch.setattr("lm_eval.tasks.manager.__file__", str(own / "manager.py"))
    manager = tasks._manager(["local_one", "local_other"], folder, [8], "there")
    assert {"local_one", "local_two", "local_other"} <= set(manager.all_tasks)
    assert manager.metadata == dict(tokenizer="there", max_seq_lengths=[8])
    assert "local_one" not in tasks._manager(["local_other"], None, [], "there").all_tasks
    near = "local_other, local_others, local_otter"
    with pytest.raises(UserError, match=f"^lm-eval has no task 'local_othe'; near: {near}$"):
        tasks._manager(["local_othe"], folder, [], "there")
    with pytest.raises(UserError, match="^lm-eval has no task 'zzzz'$"):
        tasks._manager(["local_one", "zzzz"], folder, [], "there")
    with pytest.raises(UserError, match="nothing: no such directory"):
        tasks._manager(["local_one"], folder / "nothing", [], "there")


class Manager:
    """A fake of lm-eval's index. Group s has group g and task c; group g has tasks a and b.

    fails: the call of load, from 1, that raises `error`. fields: attributes of task a.
    """

    def __init__(self, fails=0, error=None, **fields):
        self.fails, self.error, self.loaded = fails, error, []
        self.task = SimpleNamespace(**{"OUTPUT_TYPE": "generate_until", **fields})

    def match_tasks(self, names):
        return ["a", "g"] if names == ["*"] else names

    def load(self, items):
        self.loaded.append(items)
        if len(self.loaded) == self.fails:
            raise self.error
        if items[0].startswith(("task", "group")):
            return dict(tasks={"a": self.task}, groups={}, group_map={})
        members, names = {"s": ["g", "c"], "g": ["a", "b"]}, list(items)
        for name in names:
            names += members.get(name, [])
        groups = [name for name in names if name in members]
        return dict(
            tasks={name: f"task {name}" for name in names if name not in groups},
            groups={name: f"group {name}" for name in groups},
            group_map={name: members[name] for name in groups},
        )


def test_each_task_is_loaded_once_and_with_its_group():
    manager = Manager()
    loaded = tasks._load(manager, ["s", "a", "s", "*"])
    assert manager.loaded == [["s"], ["a"], ["g"], ["group s", "task a", "group g"]]
    assert loaded == dict(tasks={"a": manager.task}, groups={}, group_map={})


@pytest.mark.parametrize(
    "error, words",
    [
        (
            ImportError("No module named 'x'"),
            "task a needs a library that is not installed: No module named 'x'$",
        ),
        (OSError("no network"), "task a has data that cannot be loaded: no network$"),
        (KeyError("x"), "task a has data that cannot be loaded: 'x'$"),
        (RuntimeError("\n **** \n  first \nsecond"), "task a cannot be loaded: RuntimeError: first$"),
        (RuntimeError("* *\n~\nsecond"), "task a cannot be loaded: RuntimeError: ~$"),
        (ValueError(), "task a cannot be loaded: ValueError: $"),
    ],
)
def test_a_task_that_cannot_be_loaded_is_an_error_of_one_line(error, words):
    with pytest.raises(UserError, match=f"^{words}"):
        tasks._load(Manager(fails=1, error=error), ["a"])


def test_tasks_that_exclude_each_other_are_an_error_of_one_line():
    with pytest.raises(UserError, match="^tasks: two of one name$"):
        tasks._load(Manager(fails=2, error=ValueError("two of one name")), ["a"])


@pytest.mark.parametrize(
    "kind", ["loglikelihood", "loglikelihood_rolling", "generate_until", "multiple_choice"]
)
def test_only_tasks_of_plain_text_are_accepted(kind):
    """MULTIMODAL and UNSAFE_CODE are names of lm-eval's tasks."""
    tasks._load(Manager(OUTPUT_TYPE=kind), ["a"])
    tasks._load(Manager(OUTPUT_TYPE=kind, MULTIMODAL=False, UNSAFE_CODE=False), ["a"])
    with pytest.raises(UserError, match=f"task a needs {kind} or more than text, which longlora does not"):
        tasks._load(Manager(OUTPUT_TYPE=kind, MULTIMODAL=True), ["a"])
    with pytest.raises(UserError, match="task a runs code that the model writes"):
        tasks._load(Manager(OUTPUT_TYPE=kind, UNSAFE_CODE=True), ["a"])
    with pytest.raises(UserError, match="task a needs images or more than text"):
        tasks._load(Manager(OUTPUT_TYPE="images"), ["a"])


# ---- lm-eval's settings --------------------------------------------------------------------------


class Task:
    """A fake task of lm-eval. shots: its num_fewshot, or None."""

    def __init__(self, shots):
        self.shots, self.seeds = shots, []

    def get_config(self, key):
        assert key == "num_fewshot"
        return self.shots

    def set_config(self, *, key, value):
        assert key == "num_fewshot"
        self.shots = value

    def set_fewshot_seed(self, *, seed):
        self.seeds.append(seed)


@pytest.mark.parametrize(
    "num_fewshot, wanted", [(None, [0, 0, 1, 5]), (2, [2, 0, 2, 2]), (0, [0, 0, 0, 0]), (1, [1, 0, 1, 1])]
)
def test_settings_are_those_of_simple_evaluate(monkeypatch, num_fewshot, wanted):
    """num_fewshot does not replace a task's own 0. The seeds are the defaults of simple_evaluate."""
    from lm_eval.evaluator import simple_evaluate

    seeds = {name: p.default for name, p in inspect.signature(simple_evaluate).parameters.items()}
    given, four = [], [Task(shots) for shots in (None, 0, 1, 5)]

    def evaluate(**how):
        given.append((how, random.random(), np.random.rand()))
        return {"results": {"a": {"acc,none": np.float64(0.5)}}, "samples": 1, "n-shot": {"a": 2}}

    monkeypatch.setattr("lm_eval.evaluator.evaluate", evaluate)
    loaded = dict(tasks=dict(enumerate(four)))
    found = tasks._evaluate("model", loaded, 7, num_fewshot, True)
    how = dict(lm="model", task_dict=loaded, limit=7, log_samples=False)
    random.seed(seeds["random_seed"])
    np.random.seed(seeds["numpy_random_seed"])
    chats = dict(apply_chat_template=True, fewshot_as_multiturn=True)
    assert given == [(how | chats, random.random(), np.random.rand())]
    assert [task.shots for task in four] == wanted
    assert [task.seeds for task in four] == [[seeds["fewshot_random_seed"]]] * 4
    assert found == {"results": {"a": {"acc,none": 0.5}}, "n-shot": {"a": 2}}
    tasks._evaluate("model", loaded, None, None, False)
    assert given[1][0] == dict(how, limit=None, apply_chat_template=False, fewshot_as_multiturn=False)


def test_lm_evals_results_are_kept_without_its_configs(monkeypatch):
    kept = ("results", "groups", "group_subtasks", "versions", "n-shot", "higher_is_better", "n-samples")
    monkeypatch.setattr("lm_eval.evaluator.evaluate", lambda **_: dict.fromkeys([*kept, "configs"], 1))
    assert tasks._evaluate("model", dict(tasks={}), None, None, False) == dict.fromkeys(kept, 1)


def test_only_the_error_of_too_few_examples_becomes_a_user_error(monkeypatch):
    def fail(**_):
        raise ValueError(said)

    monkeypatch.setattr("lm_eval.evaluator.evaluate", fail)
    said = "Sample larger than population or is negative"
    with pytest.raises(UserError, match="^num_fewshot: a task has fewer than 9 other examples$"):
        tasks._evaluate("model", dict(tasks={}), None, 9, False)
    said = "something else"
    with pytest.raises(ValueError, match="^something else$"):
        tasks._evaluate("model", dict(tasks={}), None, 9, False)


def test_numpy_values_become_python_values():
    found = tasks._plain({1: (np.float64(0.5), [np.int64(2)]), "b": {"c": np.bool_(True)}, "d": None})
    assert found == {"1": [0.5, [2]], "b": {"c": True}, "d": None}
    assert [type(x) for x in (found["1"][0], found["1"][1][0], found["b"]["c"])] == [float, int, bool]


def test_a_group_has_the_mean_of_each_length_that_all_its_tasks_have():
    rows = dict(
        g={"alias": "g"},
        a={"64,none": 1.0, "8,none": 1},
        b={"64,none": 0.5},
        c={"64,none": 9.0, "32,none": 9.0},
    )
    found = dict(results=rows, groups={"g": {}}, group_subtasks={"g": ["a", "b"], "h": ["c"]})
    tasks._aggregate_lengths(found, [64, 8, 32])
    assert found["groups"] == {"g": {"64,none": 0.75}}
    assert found["results"]["g"] == {"alias": "g", "64,none": 0.75}
    alone = dict(results={})
    tasks._aggregate_lengths(alone, [64])
    assert alone == dict(results={})


# ---- a run ---------------------------------------------------------------------------------------


@pytest.fixture
def steps(monkeypatch):
    """A dict that records the calls of a run. lm-eval's part is faked."""
    steps = {}

    def prepared(*what, **how):
        steps["prepare"] = (what, how)
        return prepare(*what, **how)

    prepare = tasks.prepare
    monkeypatch.setattr(tasks, "prepare", prepared)
    monkeypatch.setattr(tasks, "_manager", lambda *what: steps.setdefault("manager", what) and "index")
    monkeypatch.setattr(tasks, "_load", lambda *what: steps.setdefault("load", what) and "loaded")

    def evaluate(model, *what):
        assert isinstance(model, harness.HarnessModel)
        steps["model"], steps["evaluate"], model.cut = model, what, 5
        return dict(results=dict(g={}, a={"8,none": 0.5}), groups=dict(g={}), group_subtasks=dict(g=["a"]))

    monkeypatch.setattr(tasks, "_evaluate", evaluate)
    return steps


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.model(tmp_path_factory.mktemp("table") / "base")


def test_a_result_has_its_settings(steps, base):
    said = []
    found = tasks.run(base, " a, b", lengths=8, limit=2, num_fewshot=1, device="cpu", say=said.append)
    assert steps["manager"] == (["a", "b"], None, [8], str(base)) and steps["load"] == ("index", ["a", "b"])
    how = dict(dtype="auto", cache_dtype="auto", device="cpu")
    assert steps["prepare"] == ((base, None), dict(how, context=None, rows=16, fewest_rows=1))
    assert steps["evaluate"] == ("loaded", 2, 1, False) and steps["model"]._template is None
    assert found == dict(
        results=dict(g={"8,none": 0.5}, a={"8,none": 0.5}),
        groups=dict(g={"8,none": 0.5}),
        group_subtasks=dict(g=["a"]),
        model=str(base),
        adapter=None,
        cut=5,
        context=64,
        device="cpu",
    )
    assert len(said) == 1 and "cpu" in said[0].lower()


def test_run_passes_its_arguments_on(steps, base, tmp_path):
    (tmp_path / "chat.jinja").write_text("{{ messages[0].content }}")
    template = dict(apply_chat_template=True, chat_template=tmp_path / "chat.jinja")
    how = dict(dtype="float32", cache_dtype="bfloat16", context=32)
    tasks.run(base, ["a"], lengths=(8, 16), task_dir="there", device="cpu", say=len, **how, **template)
    assert steps["manager"] == (["a"], "there", [8, 16], str(base))
    wanted = dict(how, device="cpu", rows=16, fewest_rows=1)
    assert steps["prepare"] == ((base, None), wanted)
    assert steps["evaluate"] == ("loaded", None, None, True)
    assert steps["model"].apply_chat_template([dict(role="user", content="hi")]) == "hi"
    with pytest.raises(UserError, match="length 33 is more than the 32 tokens"):
        tasks.run(base, "a", lengths=33, context=32, say=len)


@pytest.mark.parametrize("whole", [True, False])
def test_the_tokenizer_of_a_gguf_is_saved_for_tasks_that_read_it(steps, monkeypatch, tmp_path, whole):
    """Such tasks read the tokenizer from a directory: that of the model, or a temporary one for a GGUF."""
    saved, model = [], tmp_path if whole else tmp_path / "m.gguf"
    tokenizer = SimpleNamespace(save=saved.append)
    base, planned = SimpleNamespace(tokenizer=lambda: tokenizer), SimpleNamespace(context=64)
    monkeypatch.setattr(tasks, "prepare", lambda *_, **__: SimpleNamespace(base=base, planned=planned))
    tasks.run(model, "a", device="cpu", say=len)
    assert (saved, steps["manager"][3]) == (([], str(model)) if whole else (saved[:1], saved[0]))


# ---- the table -----------------------------------------------------------------------------------


def test_the_table_has_groups_above_their_tasks():
    results = {
        "a": {"alias": "a", "sample_len": 9, "acc,none": 0.5, "acc_stderr,none": 0.125, "f1,strict": 1},
        "g": {"alias": "g", "acc,none": 0.25, "acc_stderr,none": "N/A"},
        "h": {"alias": "h"},
        "b": {"64,none": -1, "8,none": 0.75, "16,none": 1, "bits,none": -1.0, "perplexity,none": 123456.7},
    }
    found = {
        "results": results,
        "group_subtasks": {"g": ["h", "b"], "h": ["a"]},
        "n-samples": {"a": dict(original=9, effective=5), "b": dict(original=7, effective=7)},
        "n-shot": {"a": 2, "b": 0},
        "cut": 0,
        "context": 64,
    }
    head, *lines = tasks.text(found).split("\n")
    assert head.split() == ["task", "shots", "samples", "metric", "value", "standard", "error"]
    assert [line.rstrip() for line in lines] == [
        "g                                               acc                          0.2500",
        "    a                                2       5  acc                          0.5000   0.1250",
        "                                                f1, strict                   1.0000",
        "  b                                  0       7  8                            0.7500",
        "                                                16                           1.0000",
        "                                                bits                        -1.0000",
        "                                                perplexity                1.235e+05",
    ]
    note = "3 requests were longer than the context of 64 tokens; their beginnings were left out"
    assert tasks.text(dict(found, results={}, cut=3)).split("\n")[1:] == [note]


def test_a_number_has_four_places_or_four_digits():
    assert [tasks._number(x) for x in (0.5, -2, 99999.0)] == ["0.5000", "-2.0000", "99999.0000"]
    assert [tasks._number(x) for x in (100000.0, -123456.0)] == ["1e+05", "-1.235e+05"]
    assert tasks._number("N/A") == "N/A"  # of a task's own aggregation
