"""`push_to_hub`, and `save_pretrained(push_to_hub=True)`, over HTTP: what goes up, what stays, what is refused."""

import subprocess
import sys

import pytest
from huggingface_hub import ModelCard

from helpers import tiny_model
from hub_server import HubServer
from paths import TESTS
from proscale_hf import ProScaleMask2FormerImageProcessorPil
from proscale_hf.hub.card_mark import is_own_card


HAND_WRITTEN = "---\nlicense: mit\n---\n\n# Mine\r\n\nHands off: é\n"

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
    ProScaleMask2FormerImageProcessorPil(size={"height": 64, "width": 96}).save_pretrained(folder)
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
