"""Model folders from strangers that would read what is not theirs, or ask for what no machine has:
each is refused before anything is loaded.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from ftsec_ray.errors import DataError, SpecError
from ftsec_ray.identity.content import content_hash
from ftsec_ray.models.convert import check_config, checked_folder, load_source, refuse_adapter
from ftsec_ray.models.published_folder import check_folder

CONFIG = {
    "model_type": "llama",
    "vocab_size": 16,
    "hidden_size": 4,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "intermediate_size": 8,
    "max_position_embeddings": 10_000_000,
    "rope_theta": 1e9,
}


def weights(path: Path, shape: list[int]) -> None:
    """A safetensors file of one weight."""
    size = 4 * shape[0] * shape[1]
    header = json.dumps({"w": {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(size))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder without a fault."""
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG))
    weights(path / "model.safetensors", [16, 4])
    check_folder(path)
    return path


def change(folder: Path, name: str, **values: object) -> None:
    file = folder / name
    known = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(known | values))


def index(folder: Path, named: object) -> None:
    (folder / "model.safetensors").unlink()
    change(folder, "model.safetensors.index.json", weight_map={"w": named})


@pytest.mark.parametrize(
    "named",
    [
        "../w.safetensors",
        "/w.safetensors",
        ".w.safetensors",
        ".h/w.safetensors",
        "gone.safetensors",
    ],
)
def test_an_index_names_files_of_the_folder_that_are_hashed(folder, named):
    for path in (folder.parent / "w.safetensors", folder / ".w.safetensors"):
        weights(path, [16, 4])
    index(folder, named)
    with pytest.raises(SpecError, match="names a file outside its folder") as caught:
        check_folder(folder)
    assert "weight_map" in str(caught.value)


@pytest.mark.parametrize("named", [3, None, ["a"], {}])
def test_an_index_that_names_no_files_is_refused(folder, named):
    index(folder, named)
    with pytest.raises(SpecError, match="no valid weight_map"):
        check_folder(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model.bin.index.json", "m.pt"])
def test_weights_that_would_be_unpickled_are_refused(folder, name):
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(SpecError, match="not safetensors"):
        check_folder(folder)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("config.json", {"transformers_weights": "../w.safetensors"}),
        ("tokenizer_config.json", {"fast_tokenizer_files": ["../tokenizer.4.0.0.json"]}),
        ("tokenizer_config.json", {"vocab_file": "/etc/hostname"}),
    ],
)
def test_configurations_name_files_of_the_folder(folder, name, values):
    change(folder, name, **values)
    with pytest.raises(SpecError, match="names a file outside its folder"):
        check_folder(folder)


def test_a_path_that_the_author_left_behind_is_no_fault(folder):
    change(folder, "tokenizer_config.json", vocab_file="/admin/home/somebody/vocab.json")
    check_folder(folder)


@pytest.mark.parametrize("code", ["other/repo--m.Class", "/tmp/m.Class", "gone.Class", "m", 3])
def test_code_that_runs_lies_in_the_folder(folder, code):
    change(folder, "config.json", auto_map={"AutoModelForCausalLM": code})
    check_folder(folder)
    with pytest.raises(SpecError, match="names code that is not in its folder"):
        check_folder(folder, runs_code=True)


def test_an_adapter_beside_a_model_is_refused(folder):
    change(folder, "adapter_config.json", base_model_name_or_path="../other")
    with pytest.raises(SpecError, match="adapter"):
        check_folder(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja", "sub"])
def test_a_link_out_of_the_folder_is_refused_by_the_check_and_by_the_hash(folder, name):
    (folder.parent / "outside").mkdir()
    (folder.parent / "outside/a").write_text("{}")
    (folder / name).symlink_to("../outside" if name == "sub" else "../outside/a")
    for read in (check_folder, content_hash):
        with pytest.raises(SpecError, match="leads out of the folder") as caught:
            read(folder)
        assert f"{name} -> ../outside" in str(caught.value)


def test_links_in_a_circle_to_nothing_and_pipes_are_refused(folder):
    (folder / "a").symlink_to("b")
    with pytest.raises(SpecError, match="broken link"):
        content_hash(folder)
    (folder / "b").symlink_to("a")
    with pytest.raises(SpecError, match="broken link"):
        content_hash(folder)
    for name in "ab":
        (folder / name).unlink()
    os.mkfifo(folder / "pipe")
    with pytest.raises(SpecError, match="neither a file nor a folder"):
        content_hash(folder)


def test_a_snapshot_of_the_hubs_cache_may_link_to_its_own_blobs_alone(folder):
    repository = folder.parent / "models--owner--name"
    snapshot = repository / "snapshots" / ("0" * 40)
    (repository / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in folder.iterdir():
        (repository / "blobs" / file.name).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    check_folder(snapshot)
    assert content_hash(snapshot) == content_hash(folder)
    (snapshot / "more.json").symlink_to("../../../model/config.json")
    with pytest.raises(SpecError, match="leads out of the folder"):
        check_folder(snapshot)


SIZES = [
    *({"vocab_size": 10**12}, {"vocab_size": 10**30}, {"vocab_size": 0}, {"vocab_size": 1e400}),
    *({"num_hidden_layers": 10**7}, {"num_hidden_layers": 1000}, {"num_hidden_layers": -1}),
    *({"hidden_size": -4}, {"hidden_size": 10**6}, {"hidden_size": "4"}, {"hidden_size": 4.5}),
    *({"intermediate_size": 10**9}, {"num_attention_heads": 10**6}, {"n_positions": 10**9}),
    *({"num_local_experts": 10**6}, {"head_dim": 10**9}, {"image_size": 10**13}),
    *({"text_config": {"vocab_size": 10**12, "hidden_size": 4}}, {"hidden_size": True}),
]


@pytest.mark.parametrize("sizes", SIZES)
def test_sizes_that_the_weights_do_not_have_are_refused(folder, sizes):
    change(folder, "config.json", **sizes)
    with pytest.raises(SpecError, match="impossible sizes") as caught:
        check_folder(folder)
    assert caught.value.want
    assert caught.value.fix


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
        ('{"a":' * 80 + "1" + "}" * 80, "nested too deeply"),
        ("[1]", "not an object"),
        ("{", "not JSON"),
        ('{"vocab_size": ' + "1" * 5000 + "}", "not JSON"),
    ],
)
def test_a_configuration_is_an_object_of_few_levels(folder, text, match):
    (folder / "config.json").write_text(text)
    with pytest.raises(SpecError, match=match):
        check_folder(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "chat_template.jinja"])
def test_files_of_hundreds_of_megabytes_are_refused_with_the_variable_that_allows_them(
    folder, name
):
    with (folder / name).open("ab") as file:
        file.truncate(300 * 2**20)
    with pytest.raises(SpecError, match=r"FTSEC_MAX_(TOKENIZER|MODEL_JSON)_BYTES"):
        check_folder(folder)


@pytest.mark.parametrize(
    "name", ["checkpoint-5/tokenizer.json", "tekken.json", "trainer_state.json"]
)
def test_files_that_are_large_in_honest_folders_are_no_fault(folder, name):
    (folder / name).parent.mkdir(exist_ok=True)
    with (folder / name).open("ab") as file:
        file.truncate(17 * 2**20)
    check_folder(folder)


@pytest.mark.parametrize("name", ["sub/a.jinja", "sub/a.index.json", "sub/tokenizer.1.0.0.json"])
def test_files_of_subfolders_that_can_be_loaded_are_limited(folder, name):
    (folder / "sub").mkdir()
    with (folder / name).open("ab") as file:
        file.truncate(300 * 2**20)
    change(folder, "tokenizer_config.json", fast_tokenizer_files=["sub/tokenizer.1.0.0.json"])
    (folder / "sub/tokenizer.1.0.0.json").touch()
    with pytest.raises(SpecError, match=r"FTSEC_MAX_(TOKENIZER|MODEL_JSON)_BYTES"):
        check_folder(folder)


@pytest.mark.parametrize(
    ("key", "name"),
    [("tokenizer_file", "tokenizer.json"), ("vocab_file", "vocab.json"), ("a_file", "vocab.json")],
)
def test_a_path_of_the_authors_machine_gives_way_to_the_folders_own_file(folder, key, name):
    cached = folder.parent / "cache" / name
    cached.parent.mkdir()
    cached.write_text("{}")
    change(folder, "tokenizer_config.json", **{key: str(cached)})
    with pytest.raises(SpecError, match="names a file outside its folder"):
        check_folder(folder)
    (folder / name).write_text("{}")
    if key == "a_file":
        with pytest.raises(SpecError, match="names a file outside its folder"):
            check_folder(folder)
    else:
        check_folder(folder)


def test_a_snapshot_may_be_named_by_one_of_its_subfolders(folder):
    repository = folder.parent / "models--owner--name"
    part = repository / "snapshots" / ("0" * 40) / "fp16"
    (repository / "blobs").mkdir(parents=True)
    part.mkdir(parents=True)
    for file in folder.iterdir():
        (repository / "blobs" / file.name).write_bytes(file.read_bytes())
        (part / file.name).symlink_to(f"../../../blobs/{file.name}")
    check_folder(part)


@pytest.mark.parametrize(
    "sizes",
    [
        {"a": {"b": {"vocab_size": 10**9, "hidden_size": 4}}},
        {"vocab_size": 1e9},
        {"intermediate_size": 1e9},
    ],
)
def test_sizes_two_levels_down_and_floats_count(folder, sizes):
    change(folder, "config.json", **sizes)
    with pytest.raises(SpecError, match="impossible sizes"):
        check_folder(folder)


def test_a_header_that_claims_more_than_its_file_lifts_no_limit(folder):
    header = json.dumps({"w": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"1234")
    change(folder, "config.json", vocab_size=10**9)
    with pytest.raises(SpecError, match="its weights have no more"):
        check_folder(folder)


@pytest.mark.parametrize(
    "sizes",
    [{"num_experts": 16384, "is_moe": False}, {"num_hidden_layers": {"vision": 1, "language": 1}}],
)
def test_sizes_that_some_published_models_have_are_taken(folder, sizes):
    change(folder, "config.json", **sizes)
    check_folder(folder)


def test_sizes_that_are_left_to_defaults_are_those_of_the_weights(tmp_path):
    from transformers import AutoConfig

    (tmp_path / "config.json").write_text('{"model_type": "llama", "vocab_size": 900000000}')
    weights(tmp_path / "model.safetensors", [1, 1])
    config = AutoConfig.from_pretrained(str(tmp_path))
    with pytest.raises(DataError, match="impossible sizes"):
        check_config(config, checked_folder(tmp_path), "m")


def test_an_adapter_beside_a_gguf_file_or_on_the_hub_is_refused_before_it_is_loaded(
    tmp_path, monkeypatch
):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    change(tmp_path, "adapter_config.json", base_model_name_or_path="other/base")
    given = {"name": "m", "family": "m", "aligned": False}
    with pytest.raises(DataError, match="contains an adapter"):
        load_source(str(tmp_path / "m.gguf"), **given)
    finder = "transformers.utils.find_adapter_config_file"
    monkeypatch.setattr(finder, lambda place, revision: f"{place}@{revision}")
    with pytest.raises(DataError, match="contains an adapter"):
        load_source("owner/name", revision="0" * 40, **given)

    def offline(place: str, revision: str | None) -> str:
        raise OSError(place, revision)

    monkeypatch.setattr(finder, offline)
    refuse_adapter("owner/name", "owner/name")
