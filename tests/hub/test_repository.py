"""What `save_pretrained` and `push_to_hub` add: the model card, and the way to the Hub, over HTTP."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from helpers import tiny_config, tiny_model
from hub_server import HubServer
from paths import TESTS
from proscale_hf import (
    ProScaleMask2FormerConfig,
    ProScaleMask2FormerForUniversalSegmentation,
    ProScaleMask2FormerImageProcessorPil,
    ProScaleMask2FormerModel,
)
from proscale_hf.hub.card_file import is_own_card, sign


HAND_WRITTEN = "---\nlicense: mit\n---\n\n# Mine\r\n\nHands off: é\n"


def card_in(folder: Path) -> str:
    return (folder / "README.md").read_bytes().decode()


def make_processor() -> ProScaleMask2FormerImageProcessorPil:
    return ProScaleMask2FormerImageProcessorPil(size={"height": 64, "width": 96}, label_ids_to_fuse=[3])


def test_a_card_of_somebody_s_own_is_kept(tmp_path):
    (tmp_path / "README.md").write_bytes(HAND_WRITTEN.encode())
    tiny_model().save_pretrained(tmp_path)
    make_processor().save_pretrained(tmp_path)
    assert card_in(tmp_path) == HAND_WRITTEN


@pytest.mark.parametrize("content", [b"", b"\xff\xfe not text", b"short"])
def test_whatever_is_in_it(tmp_path, content):
    (tmp_path / "README.md").write_bytes(content)
    tiny_model().save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_bytes() == content


def test_an_edited_card_is_kept(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    edited = card_in(tmp_path).replace("# PRO-SCALE", "# My PRO-SCALE")
    (tmp_path / "README.md").write_bytes(edited.encode())
    tiny_model(num_queries=5).save_pretrained(tmp_path)
    assert card_in(tmp_path) == edited


def test_an_untouched_card_follows_the_model_and_its_image_processor(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    assert "| Queries | 7 |" in card_in(tmp_path) and "One image of 800 x 1333" in card_in(tmp_path)
    make_processor().save_pretrained(tmp_path)
    assert "One image of 64 x 96" in card_in(tmp_path) and "| Input | images are resized to 64 x 96 |" in card_in(
        tmp_path
    )
    tiny_model(num_queries=5).save_pretrained(tmp_path)
    assert "| Queries | 5 |" in card_in(tmp_path) and "One image of 64 x 96" in card_in(tmp_path)
    assert is_own_card(card_in(tmp_path))
    assert not list(tmp_path.glob(".*"))


def test_only_what_was_signed_is_a_card_of_ours():
    assert is_own_card(sign("# Title\n"))
    assert not is_own_card(sign("# Title\n").replace("Title", "Titel"))
    assert not is_own_card(sign("# Title\n") + "More\n")
    assert not is_own_card("# Title\n") and not is_own_card("")


def test_an_image_processor_alone_has_no_card(tmp_path):
    make_processor().save_pretrained(tmp_path)
    assert (tmp_path / "preprocessor_config.json").is_file() and not (tmp_path / "README.md").exists()
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    make_processor().save_pretrained(tmp_path)
    assert not (tmp_path / "README.md").exists()


def test_a_model_is_saved_although_its_card_cannot_be_written(tmp_path, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no card today")

    monkeypatch.setattr("proscale_hf.hub.card_file.model_card", fail)
    tiny_model().save_pretrained(tmp_path)
    ProScaleMask2FormerForUniversalSegmentation.from_pretrained(tmp_path)
    assert not (tmp_path / "README.md").exists()


def test_tags_of_the_model_come_into_the_card(tmp_path):
    model = tiny_model()
    model.add_model_tags(["one", "two"])
    model.save_pretrained(tmp_path)
    assert {"one", "two", "proscale"} <= set(ModelCard.load(tmp_path / "README.md").data.tags)
    ProScaleMask2FormerImageProcessorPil(label_ids_to_fuse=[0, 1, 2, 3]).save_pretrained(tmp_path)
    tags = ModelCard.load(tmp_path / "README.md").data.tags
    assert sorted(tags) == ["mask2former", "one", "proscale", "semantic-segmentation", "two"]


def test_arguments_reach_transformers(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "worker", is_main_process=False)
    assert not list((tmp_path / "worker").iterdir())
    state = {name: torch.full_like(tensor, 2) for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "whole", state_dict=state)
    assert all((tensor == 2).all() for tensor in load_file(tmp_path / "whole" / "model.safetensors").values())
    model.save_pretrained(tmp_path / "parts", max_shard_size="200KB")
    assert len(list((tmp_path / "parts").glob("model-*.safetensors"))) > 2
    reloaded = ProScaleMask2FormerForUniversalSegmentation.from_pretrained(tmp_path / "parts")
    torch.testing.assert_close(reloaded.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_saved_settings_are_those_in_memory(tmp_path):
    model, processor = tiny_model(), make_processor()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert ProScaleMask2FormerConfig.from_pretrained(tmp_path).auto_map == model.config.auto_map
    assert ProScaleMask2FormerImageProcessorPil.from_pretrained(tmp_path).to_dict() == processor.to_dict()


def test_the_model_without_heads_is_complete_too(tmp_path):
    ProScaleMask2FormerModel(tiny_config()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["auto_map"]["AutoModel"] == "modeling_proscale_mask2former.ProScaleMask2FormerModel"
    assert "ForUniversalSegmentation" in config["auto_map"]["AutoModelForUniversalSegmentation"]
    assert is_own_card(card_in(tmp_path))


PUSH = """
import sys
from pathlib import Path
import torch
from helpers import tiny_model
from proscale_hf import ProScaleMask2FormerForUniversalSegmentation, ProScaleMask2FormerImageProcessorPil

processor = ProScaleMask2FormerImageProcessorPil(size={"height": 64, "width": 96})
model = tiny_model()

model.push_to_hub("alice/both", tags="mine", commit_message="First")
processor.push_to_hub("alice/both")

processor.push_to_hub("alice/processor-first")
model.push_to_hub("alice/processor-first")

model.push_to_hub("alice/with-card")

model.push_to_hub("alice/again", max_shard_size="200KB")
tiny_model(num_queries=5).push_to_hub("alice/again")
model.push_to_hub("alice/again", max_shard_size="200KB", revision="parts")

folder = Path(sys.argv[1]) / "alice-saves"
folder.mkdir()
(folder / "secret.txt").write_text("not to be uploaded")
model.save_pretrained(folder, push_to_hub=True, repo_id="alice/saved", private=True, commit_message="Saved")
processor.save_pretrained(folder, push_to_hub=True, repo_id="alice/saved")
(folder / "README.md").write_text("# My own")
model.save_pretrained(folder, push_to_hub=True, repo_id="alice/saved-with-card")
model.save_pretrained(folder, push_to_hub=True)

restricted = tiny_model(weights_license="other: evaluation only, no redistribution")
try:
    restricted.push_to_hub("alice/restricted")
except ValueError as error:
    assert "no redistribution" in str(error)
else:
    raise AssertionError("published what must not be")
restricted.push_to_hub("alice/restricted-private", private=True)
restricted.push_to_hub("alice/restricted-but-allowed", i_have_the_right_to_publish=True)

loaded = ProScaleMask2FormerForUniversalSegmentation.from_pretrained("alice/again")
assert loaded.config.num_queries == 5
loaded = ProScaleMask2FormerForUniversalSegmentation.from_pretrained("alice/again", revision="parts")
torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A Hub after everything above was pushed to it."""
    workspace = tmp_path_factory.mktemp("pushing")
    with HubServer(tokens={"hf_alice": "alice"}) as hub:
        hub.create("alice/with-card", files={"README.md": HAND_WRITTEN.encode()})
        environment = hub.environment(workspace / "home", token="hf_alice", OMP_NUM_THREADS="1")
        environment["PYTHONPATH"] = f"{TESTS.parent}:{TESTS}"
        result = subprocess.run(
            [sys.executable, "-c", PUSH, str(workspace)], cwd=workspace, env=environment, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr[-3000:]
        yield hub


@pytest.fixture(scope="module")
def complete(tmp_path_factory) -> dict[str, bytes]:
    """The files of a complete folder."""
    folder = tmp_path_factory.mktemp("complete")
    tiny_model().save_pretrained(folder)
    make_processor().save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("repo_id", ["alice/both", "alice/processor-first", "alice/saved"])
def test_a_pushed_repository_is_complete(hub, complete, repo_id):
    files = hub.files(repo_id)
    assert set(files) - {".gitattributes"} == set(complete)
    assert files["model.safetensors"] == complete["model.safetensors"]
    card = files["README.md"].decode()
    assert is_own_card(card)
    if repo_id != "alice/saved":
        assert f'model="{repo_id}"' in card


@pytest.mark.slow
def test_what_is_pushed_says_so(hub):
    history = [commit.title for commit in commits(hub, "alice/both")]
    assert history[:2] == ["Upload image processor", "First"]
    assert "mine" in ModelCard(hub.files("alice/both")["README.md"].decode()).data.tags
    assert hub.repositories["model", "alice/saved"].private
    assert not hub.repositories["model", "alice/both"].private


@pytest.mark.slow
def test_a_card_on_the_hub_is_kept(hub):
    assert hub.files("alice/with-card")["README.md"].decode() == HAND_WRITTEN
    assert "model.safetensors" in hub.files("alice/with-card")


@pytest.mark.slow
def test_a_new_push_replaces_card_and_weights(hub):
    files = hub.files("alice/again")
    assert "| Queries | 5 |" in files["README.md"].decode()
    assert {name for name in files if "safetensors" in name} == {"model.safetensors"}
    parts = hub.files("alice/again", revision="parts")
    assert "model.safetensors" not in parts and "model.safetensors.index.json" in parts


@pytest.mark.slow
def test_what_was_in_the_folder_before_stays_there(hub):
    for repo_id in ("alice/saved", "alice/saved-with-card", "alice/alice-saves"):
        assert "secret.txt" not in hub.files(repo_id)
    assert hub.files("alice/saved-with-card")["README.md"] == b"# My own"


@pytest.mark.slow
def test_weights_that_must_not_be_passed_on_are_not(hub):
    assert ("model", "alice/restricted") not in hub.repositories
    assert hub.repositories["model", "alice/restricted-private"].private
    assert (
        "license_name: evaluation-only-no-redistribution" in hub.files("alice/restricted-private")["README.md"].decode()
    )
    assert "model.safetensors" in hub.files("alice/restricted-but-allowed")


def commits(hub: HubServer, repo_id: str) -> list:
    """Newest first."""
    commit, history = hub.repositories["model", repo_id].branches["main"], []
    while commit is not None:
        history.append(commit)
        commit = commit.parent
    return history
