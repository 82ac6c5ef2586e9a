"""lm-evaluation-harness against the server, as one of its clients."""

import numpy as np
import pytest
import served

from longlora.serving.open import open_engine

for name in ("lm_eval", "tenacity"):
    pytest.importorskip(name, reason="pip install 'lm-eval[api]' runs the harness")


def test_local_completions_get_log_likelihoods_and_texts(tmp_path):
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    path = tmp_path / "tiny"
    with served.serving(path) as running:
        model = LocalCompletionsAPI(
            model="tiny",
            base_url=f"{running.url}/v1/completions",
            tokenizer=str(path),
            max_length=512,
            batch_size=2,
            max_retries=1,
        )
        pairs = [("the shift", " group"), ("a", " b"), ("long", " context")]
        asked = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
        found = model.loglikelihood(asked, disable_tqdm=True)
        until = Instance("generate_until", {}, ("the shift", dict(until=["\n"], max_gen_toks=8)), 0)
        (text,) = model.generate_until([until], disable_tqdm=True)
    opened = open_engine(path)
    for (context, continuation), (value, greedy) in zip(pairs, found):
        ids = opened.tokenizer.encode(context + continuation)
        logs = []
        opened.engine.abort("")
        for token in ids[:-1]:
            logits = opened.engine.generator.extend(0, np.array([token], np.int32)).astype(np.float64)
            logs.append(logits - np.log(np.exp(logits).sum()))
        places = range(len(opened.tokenizer.encode(context)) - 1, len(ids) - 1)
        assert value == pytest.approx(sum(logs[i][ids[i + 1]] for i in places), abs=1e-4)
        assert greedy == all(logs[i].argmax() == ids[i + 1] for i in places)
    assert isinstance(text, str) and "\n" not in text
