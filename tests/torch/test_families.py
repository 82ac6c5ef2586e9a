"""Every family of transformers works from extend to a merged model, or is refused by name: docs/families.md.

The suite tries a dozen families. LONGLORA_FAMILIES=all tries all of them (minutes), LONGLORA_FAMILIES=write
also writes the page.
"""

import os

import pytest

torch = pytest.importorskip("torch", reason="longlora.torch is for torch")
transformers = pytest.importorskip("transformers", reason="its families are tried")
pytest.importorskip("peft", reason="extend makes a PeftModel")
import family_matrix  # noqa: E402

QUICK = """llama mistral qwen2 qwen3 phi3 gpt_neox gemma olmo2 cohere granite mixtral dbrx qwen3_next
falcon_h1 fuyu gemma2 gemma3_text gpt2 gpt_oss phimoe recurrent_gemma""".split()
WHOLE = os.environ.get("LONGLORA_FAMILIES")
FAMILIES = family_matrix.families() if WHOLE else QUICK
rows: dict[str, family_matrix.Row] = {}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_works_or_is_refused_by_name(tmp_path, family):
    row = rows[family] = family_matrix.check(family, tmp_path)
    assert row.verdict != "fault", row.reason
    if WHOLE == "write":
        return
    version, known = family_matrix.recorded()
    if version == transformers.__version__:
        assert row == known[family]


@pytest.mark.skipif(WHOLE != "write", reason="LONGLORA_FAMILIES=write writes the page")
def test_the_page_is_written():
    assert sorted(rows) == family_matrix.families(), "tests of families were left out"
    family_matrix.write_page(rows)


def test_the_page_has_every_family():
    version, known = family_matrix.recorded()
    if version == transformers.__version__:
        assert sorted(known) == family_matrix.families()
    assert {"works", "refused"} <= {row.verdict for row in known.values()}
