"""The model card: valid metadata, what is measured, and nothing lost that somebody wrote."""

import pytest
import yaml
from huggingface_hub import ModelCard

from flr.report.model_card import FILE, Evaluation, Measured, ModelFacts, drop_metrics, has_model_part, write_card

FACTS = ModelFacts(
    "A recommender",
    {"Items": 40, "Data": "cds"},
    ("a 1", "b-2"),
    "flr sft",
    {"learning_rate": 0.001},
    {"flr": "0.1.0"},
    "user/base",
)
VALID = Evaluation("cds", "valid", [Measured("ndcg@10", 0.25, 0.2, 0.3), Measured("mrr", 0.125)], {"scoring": "full"})


def text_of(folder):
    return (folder / FILE).read_text()


def test_a_new_card_says_what_the_model_is(tmp_path):
    write_card(tmp_path, FACTS, VALID)
    text, card = text_of(tmp_path), ModelCard.load(tmp_path / FILE)
    assert (card.data.library_name, card.data.base_model) == ("flr", "user/base")
    assert {(r.dataset_split, r.metric_name, r.metric_value) for r in card.data.eval_results} == {
        ("valid", "ndcg@10", 0.25),
        ("valid", "mrr", 0.125),
    }
    assert card.data.eval_results[0].metric_args == {"interval": [0.2, 0.3], "level": 0.95}
    for part in (
        "# A recommender",
        "| Items | 40 |",
        "import flr",
        "['a 1', 'b-2']",
        "| learning_rate | 0.001 |",
        "| flr | 0.1.0 |",
        "| cds | valid | ndcg@10 | 0.2500 | 0.2000 to 0.3000 |",
        "| cds | valid | mrr | 0.1250 |  |",
        "cds, valid: scoring full.",
    ):
        assert part in text, part
    assert has_model_part(tmp_path)
    write_card(tmp_path, FACTS, VALID)
    assert text_of(tmp_path) == text  # the same again changes nothing


def test_what_stands_outside_the_marks_is_kept(tmp_path):
    by_hand = "---\nlicense: mit\ntags:\n- mine\nextra: {deep: [1, 2]}\n---\n# My words\n\nabove\n"
    (tmp_path / FILE).write_text(by_hand)
    assert not has_model_part(tmp_path)
    write_card(tmp_path, FACTS, VALID)
    (tmp_path / FILE).write_text(
        text_of(tmp_path).replace("<!-- flr:metrics", "between\n\n<!-- flr:metrics") + "below\n"
    )
    test = Evaluation("cds", "test", [Measured("mrr", 0.5, 0.4, 0.6)])
    write_card(tmp_path, evaluation=test)
    write_card(tmp_path, evaluation=Evaluation("cds", "valid", [Measured("ndcg@10", 0.75, 0.7, 0.8)]))
    text = text_of(tmp_path)
    head, words, above, between, below = (text.index(x) for x in ("license", "# My words", "above", "between", "below"))
    assert head < words < above < text.index("# A recommender") < between < text.index("## Metrics") < below
    metadata = yaml.safe_load(text.split("---")[1])
    assert metadata["license"] == "mit"
    assert metadata["extra"] == {"deep": [1, 2]}
    assert metadata["tags"][0] == "mine"
    assert "| cds | test | mrr | 0.5000 | 0.4000 to 0.6000 |" in text
    assert "| cds | valid | ndcg@10 | 0.7500 | 0.7000 to 0.8000 |" in text
    assert "0.2500" not in text
    assert "| valid | mrr" not in text  # the newer evaluation of a split stands for the whole of it
    assert text.count("## Metrics") == text.count("# A recommender") == 1


def test_metrics_of_others_stay_in_the_metadata(tmp_path):
    other = (
        "  - task: {type: text-generation}\n    dataset: {name: x, type: x}\n    metrics: [{type: bleu, value: 9}]\n"
    )
    (tmp_path / FILE).write_text(f"---\nmodel-index:\n- name: theirs\n  results:\n{other}---\nwords\n")
    write_card(tmp_path, evaluation=VALID)
    data = ModelCard.load(tmp_path / FILE).data
    assert data.model_name == "theirs"
    assert {r.metric_type for r in data.eval_results} == {"bleu", "ndcg", "mrr"}
    assert "bleu" not in text_of(tmp_path).split("---", 2)[2]


def test_metrics_are_taken_out_and_nothing_else(tmp_path):
    assert not drop_metrics(tmp_path)
    assert not (tmp_path / FILE).exists()
    other = (
        "  - task: {type: text-generation}\n    dataset: {name: x, type: x}\n    metrics: [{type: bleu, value: 9}]\n"
    )
    (tmp_path / FILE).write_text(f"---\nmodel-index:\n- name: theirs\n  results:\n{other}---\nwords\n")
    write_card(tmp_path, FACTS, VALID)
    (tmp_path / FILE).write_text(f"{text_of(tmp_path)}below\n")
    assert drop_metrics(tmp_path)
    text = text_of(tmp_path)
    assert [r.metric_type for r in ModelCard.load(tmp_path / FILE).data.eval_results] == ["bleu"]
    assert "ndcg" not in text
    assert text.index("words") < text.index("# A recommender") < text.index("below")
    assert not drop_metrics(tmp_path)
    write_card(tmp_path, evaluation=VALID)
    assert "| cds | valid | ndcg@10 |" in text_of(tmp_path)


def test_text_from_data_is_text(tmp_path):
    odd = "a|b `c` <!-- /flr:model -->\n# head [x](y)"
    write_card(tmp_path, ModelFacts(odd, {odd: odd}, ('"]); import os', odd)), Evaluation(odd, odd, VALID.metrics))
    before = ModelCard.load(tmp_path / FILE).text
    write_card(tmp_path, ModelFacts("Second", {"Items": 1}))
    text = ModelCard.load(tmp_path / FILE).text
    assert before.count("<!-- /flr:model -->") == text.count("<!-- /flr:model -->") == 1
    assert "Second" in text
    assert "head" not in text.split("## Metrics")[0]
    assert "import os" not in before
    assert len(ModelCard.load(tmp_path / FILE).data.eval_results) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"---\n a: [\n---\n", r"README\.md: expected a model card with valid metadata"),
        (b"---\nmodel-index: 7\n---\n", r"README\.md: expected a model card with valid metadata"),
        (b"---\n- a\n---\n", r"README\.md: expected a model card with valid metadata"),
        (b"\xff\xfe", r"README\.md: expected UTF-8 text"),
        (b"x" * ((1 << 20) + 1), r"README\.md: expected at most 1048576 bytes"),
    ],
)
def test_a_readme_that_is_no_card_is_named_and_kept(tmp_path, content, message):
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        write_card(tmp_path, FACTS)
    assert (tmp_path / FILE).read_bytes() == content


def test_a_readme_without_metadata_gets_some(tmp_path):
    (tmp_path / FILE).write_text("only words\n\n---\n\nmore\n---\n")
    write_card(tmp_path, FACTS)
    assert ModelCard.load(tmp_path / FILE).data.library_name == "flr"
    assert "only words\n\n---\n\nmore\n---\n" in text_of(tmp_path)
