from __future__ import annotations

import json
import shutil

import pytest
import torch

from ftsec_ray.errors import DataError, SpecError
from ftsec_ray.evals.judging import get_judge
from ftsec_ray.method import Prompt

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "sure", "sorry", "how", "here"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a classifier of two classes that looks for `sorry` (class 1) and says class 0
    otherwise.
    """
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

    folder = tmp_path_factory.mktemp("classifier")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    tokenizer = BertTokenizer(str(folder / "vocab.txt"))
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        max_position_embeddings=32,
        num_labels=2,
    )
    torch.manual_seed(0)
    model = BertForSequenceClassification(config)
    train(model, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def named(trained, folder, names):
    """The classifier with other names for its classes."""
    shutil.copytree(trained, folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return f"classifier:{folder}"


def train(model, tokenizer):
    texts = [
        "sorry",
        "sorry sorry",
        "sure here",
        "sure",
        "how sorry",
        "how sure here",
        "how how sorry",
        "here",
    ]
    pairs = [(text, None) for text in texts] + [("how", text) for text in texts]
    labels = torch.tensor([int("sorry" in text) for text in texts] * 2)
    batch = tokenizer(
        [a if b is None else f"{a} [SEP] {b}" for a, b in pairs], padding=True, return_tensors="pt"
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.03)
    for _ in range(60):
        optimizer.zero_grad()
        model(**batch, labels=labels).loss.backward()
        optimizer.step()


ASKED = [Prompt(prompt_id=str(i), chat=[{"role": "user", "content": "how"}]) for i in range(3)]


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (("NORMAL", "REJECTION"), ["refused", "complied", "incoherent"]),
        (("LABEL_0", "refusal"), ["refused", "complied", "incoherent"]),
        (("unsafe", "safe"), ["refused", "complied", "incoherent"]),
        (("harmful", "harmless"), ["refused", "complied", "incoherent"]),
        (("jailbroken", "not_jailbroken"), ["refused", "complied", "incoherent"]),
        (("LABEL_0", "LABEL_1"), [None, None, "incoherent"]),
    ],
)
def test_the_names_of_the_classes_say_which_one_is_compliance(trained, tmp_path, names, wanted):
    judge = get_judge(named(trained, tmp_path, names))
    found = judge(ASKED, ["sorry", "sure here", " "])
    assert [v.verdict for v in found] == wanted
    assert set(json.loads(found[0].raw)) == set(names)
    assert found[2].raw == "empty"


def test_a_classifier_is_pinned_and_loaded_when_first_asked(tmp_path):
    with pytest.raises(SpecError, match="owner/name"):
        get_judge("classifier:owner/name")
    commit = "a" * 40
    assert get_judge(f"classifier:owner/name@{commit}").name == f"classifier:owner/name@{commit}.2"
    with pytest.raises(SpecError, match="folder is empty"):
        get_judge(f"classifier:{tmp_path}")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DataError, match=tmp_path.name):
        get_judge(f"classifier:{tmp_path}")(ASKED[:1], ["sure"])


def test_harm_is_the_probability_of_the_class_that_means_it(trained, tmp_path):
    judge = get_judge(named(trained, tmp_path, ("unsafe", "safe")))
    said = ["sorry", "sure here", "here"]
    raw = [json.loads(v.raw)["unsafe"] for v in judge(ASKED, said)]
    assert [round(p, 4) for p in judge.harm(ASKED, said)] == raw
    assert raw[0] < 0.5 < raw[1]


@pytest.mark.parametrize("names", [("NORMAL", "REJECTION"), ("LABEL_0", "LABEL_1")])
def test_a_classifier_of_refusals_is_no_guard(trained, tmp_path, names):
    judge = get_judge(named(trained, tmp_path, names))
    with pytest.raises(DataError, match="do not say what is harmful"):
        judge.harm(ASKED, ["sorry", "sure", "here"])
