"""To the Hub and back over real HTTP: `hub_server.py` is the Hub, `huggingface_hub` in other processes the client."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from helpers import pixels, tiny_model
from hub_server import HubServer
from paths import ROOT
from proscale_hf import ProScaleMask2FormerForUniversalSegmentation, ProScaleMask2FormerImageProcessorPil
from proscale_hf.hub.errors import HubError
from proscale_hf.hub.names import MODEL_NAMES
from proscale_hf.hub.push import push_folder


NO_REDISTRIBUTION = "other: non-commercial evaluation, without redistribution"
SHORT_NAME = "proscale-swin-t-coco"


def save(folder, max_shard_size="50GB", **changes):
    """A complete model folder."""
    tiny_model(**changes).save_pretrained(folder, max_shard_size=max_shard_size)
    ProScaleMask2FormerImageProcessorPil(size={"height": 64, "width": 96}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    return save(tmp_path_factory.mktemp("models") / "sharded", max_shard_size="100KB")


@pytest.fixture(scope="module")
def licensed(tmp_path_factory):
    return save(tmp_path_factory.mktemp("models") / "licensed", weights_license=NO_REDISTRIBUTION)


@pytest.fixture
def hub():
    with HubServer({"hf_alice": "alice"}, {"acme": {"alice"}}) as server:
        yield server


@pytest.fixture
def folder_copy(folder, tmp_path):
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def run(script, environment, *arguments, folder):
    """Run Python code in a new process; what it prints last, as JSON."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    environment = {**environment, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


class TestBeforeAnythingIsSent:
    @pytest.fixture(autouse=True)
    def no_network(self, monkeypatch):
        def refuse(*_, **__):
            raise AssertionError("the Hub was asked")

        monkeypatch.setattr("socket.socket.connect", refuse)

    def test_dry_run(self, folder):
        text = push_folder(folder, "acme/model", dry_run=True)
        for path in folder.iterdir():
            assert re.search(rf"^{re.escape(path.name)} +{path.stat().st_size / 1e6:.3f} MB$", text, re.MULTILINE)
        assert "the public repository acme/model" in text
        assert (folder / "README.md").read_text().rstrip() in text
        assert "the private repository acme/model" in push_folder(folder, "acme/model", private=True, dry_run=True)

    def test_dry_run_of_shards(self, sharded):
        assert "model-00001-of-0000" in push_folder(sharded, "acme/model", dry_run=True)

    @pytest.mark.parametrize(
        "name",
        [
            "config.json",
            "preprocessor_config.json",
            "model.safetensors",
            "modeling_proscale_mask2former.py",
            "layers_ms_deform_attn.py",  # which the model imports
        ],
    )
    def test_missing_file(self, folder_copy, name):
        (folder_copy / name).unlink()
        self.refused(folder_copy, f"{re.escape(name)} (is )?missing")

    def test_missing_shard(self, sharded, tmp_path):
        copy = Path(shutil.copytree(sharded, tmp_path / "copy"))
        (copy / sorted(path.name for path in copy.glob("model-00002*"))[0]).unlink()
        self.refused(copy, r"model-00002-of-\d+\.safetensors is missing")

    @pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "nothing.safetensors"])
    def test_shards_elsewhere(self, sharded, tmp_path, name):
        copy = Path(shutil.copytree(sharded, tmp_path / "copy"))
        index = {"metadata": {}, "weight_map": {"a": name}}
        (copy / "model.safetensors.index.json").write_text(json.dumps(index))
        self.refused(copy, f"{name} is missing")

    @pytest.mark.parametrize(
        "name",
        ["training_args.bin", "pytorch_model.bin", ".env", "notes.py", "photo.png", "model-00001-of-00002.safetensors"],
    )
    def test_files_that_do_not_belong_there(self, folder_copy, name):
        (folder_copy / name).write_text("secret")
        self.refused(folder_copy, f"do not belong to a model: {re.escape(name)}")

    def test_license_may_be_there(self, folder_copy):
        (folder_copy / "LICENSE").write_text("Apache-2.0")
        assert "LICENSE" in push_folder(folder_copy, "acme/model", dry_run=True)

    @pytest.mark.parametrize("name", [".git", "checkpoint-100", "__pycache__"])
    def test_folders(self, folder_copy, name):
        (folder_copy / name).mkdir()
        self.refused(folder_copy, "no plain file")

    def test_links(self, folder_copy, tmp_path):
        (tmp_path / "id_rsa").write_text("secret")
        (folder_copy / "LICENSE").symlink_to(tmp_path / "id_rsa")
        self.refused(folder_copy, "no plain file")

    def test_truncated_weights(self, folder_copy):
        weights = folder_copy / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1])
        self.refused(folder_copy, "damaged or incomplete")

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            ("", "cannot be read as JSON"),
            ("{", "cannot be read as JSON"),
            ("[]", "JSON object"),
            ("{}", "another kind of model"),
            ('{"model_type": "proscale_mask2former"}', "names no code"),
        ],
    )
    def test_bad_config(self, folder_copy, content, reason):
        (folder_copy / "config.json").write_text(content)
        self.refused(folder_copy, reason)

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"model_type": "mask2former"}, "another kind of model"),
            ({"num_queries": -1}, "no configuration of this model"),
            ({"auto_map": {"AutoModel": "../../outside.Model"}}, "is missing"),
            ({"auto_map": {"AutoModel": "someone/else--modeling.Model"}}, "is missing"),
        ],
    )
    def test_changed_config(self, folder_copy, changes, reason):
        config = json.loads((folder_copy / "config.json").read_text())
        (folder_copy / "config.json").write_text(json.dumps(config | changes))
        self.refused(folder_copy, reason)

    def test_bad_card(self, folder_copy):
        (folder_copy / "README.md").write_text("---\nlicense: [\n---\n")
        self.refused(folder_copy, "metadata at the top")

    def test_no_folder(self, tmp_path):
        self.refused(tmp_path / "nothing", "no folder")

    @pytest.mark.parametrize("repo_id", ["", "a/b/c", "../x", "acme/two words", "acme/", "https://huggingface.co/a/b"])
    def test_repository_names(self, folder, repo_id):
        with pytest.raises(HubError, match="cannot be a repository") as error:
            push_folder(folder, repo_id)
        assert "\n" not in str(error.value)

    def test_weights_that_may_not_be_published(self, licensed):
        self.refused(licensed, "forbids to publish")
        for allowed in ({"private": True}, {"i_have_the_right_to_publish": True}):
            assert "config.json" in push_folder(licensed, "acme/model", dry_run=True, **allowed)

    def refused(self, folder, reason):
        for dry_run in (True, False):
            with pytest.raises(HubError, match=reason) as error:
                push_folder(folder, "acme/model", dry_run=dry_run)
            assert "\n" not in str(error.value)


PUBLISH = """
import json, os, sys, time
from huggingface_hub import HfApi
time.sleep = lambda seconds: None  # the client waits before it tries again
from proscale_hf import ProScaleMask2FormerForUniversalSegmentation, ProScaleMask2FormerImageProcessorPil
from proscale_hf.hub.errors import explain
from proscale_hf.hub.push import push_folder

folder, sharded, licensed = sys.argv[1:]
answers = {}

def attempt(name, function, *arguments, **options):
    try:
        answers[name] = str(function(*arguments, **options))
    except Exception as error:
        answers[name] = f"{type(error).__name__}: {error}"

attempt("private", push_folder, folder, "acme/private", private=True)
attempt("own", push_folder, folder, "own")
attempt("again", push_folder, folder, "own")
attempt("shards", push_folder, sharded, "acme/shards-now")
attempt("licensed", push_folder, licensed, "acme/licensed", private=True)
attempt("licensed to public", push_folder, licensed, "acme/public", private=True)
attempt("with the right", push_folder, licensed, "acme/right", i_have_the_right_to_publish=True)
attempt("busy", push_folder, folder, "acme/busy")
attempt("nowhere", push_folder, folder, "nowhere/model")
for name in ("broken", "refused", "raced"):
    attempt(name, push_folder, folder, f"acme/{name}")
model = ProScaleMask2FormerForUniversalSegmentation.from_pretrained(folder)
attempt("push_to_hub", model.push_to_hub, "acme/pushed")
attempt("processor", ProScaleMask2FormerImageProcessorPil.from_pretrained(folder).push_to_hub, "acme/pushed")
model.config.weights_license = "other: no redistribution"
attempt("push_to_hub licensed", model.push_to_hub, "acme/pushed-licensed")
attempt("push_to_hub licensed to public", model.push_to_hub, "acme/public", private=True)
attempt("push_to_hub licensed, private", model.push_to_hub, "acme/pushed-private", private=True)
os.environ["HF_TOKEN"] = "hf_wrong"
attempt("wrong token", push_folder, folder, "acme/wrong-token")
del os.environ["HF_TOKEN"]
attempt("no token", push_folder, folder, "acme/no-token")
try:
    HfApi(endpoint="http://127.0.0.1:9").model_info("acme/model")
except Exception as error:
    answers["no network"] = explain(error)
print(json.dumps(answers))
"""


def test_upload(hub, folder, sharded, licensed, tmp_path):
    hub.create("acme/shards-now", contents(folder))
    hub.create("acme/public", {"README.md": b"hello"})
    hub.fail("POST /acme/busy.git/info/lfs/objects/batch", 503, times=1)
    hub.fail("POST /api/models/acme/broken/commit", 500)
    hub.fail("POST /api/models/acme/refused/commit", 403, message="storage limit")
    hub.fail("POST /api/models/acme/raced/commit", 412)
    answers = run(PUBLISH, hub.environment(tmp_path, "hf_alice"), folder, sharded, licensed, folder=tmp_path)

    git = {".gitattributes"}
    assert answers["private"] == f"{hub.url}/acme/private"
    uploaded = hub.files("acme/private")
    assert b'model="acme/private"' in uploaded["README.md"]  # the card's examples name the repository
    assert {**uploaded, "README.md": b""}.items() >= {**contents(folder), "README.md": b""}.items()
    assert set(uploaded) == set(contents(folder)) | git
    assert hub.repositories["model", "acme/private"].private
    own = hub.repositories["model", "alice/own"]
    assert answers["own"] == answers["again"] == f"{hub.url}/alice/own" and not own.private
    first_commit = own.branches["main"].parent
    assert first_commit.title == "initial commit"  # all in one commit, and the second time nothing was new
    assert set(hub.files("acme/shards-now")) == set(contents(sharded)) | git  # not the single file that was there
    assert hub.repositories["model", "acme/licensed"].private and len(hub.files("acme/licensed")) > 5
    assert len(hub.files("acme/right")) > 5 and len(hub.files("acme/busy")) > 5

    for name, reason in {
        "licensed to public": "acme/public exists already and is public",
        "nowhere": "your token does not allow that (403: ",
        "broken": "the Hub has a fault of its own (500); try again later",
        "refused": "your token does not allow that (403: storage limit",
        "raced": "somebody else changed the repository",
        "wrong token": "the Hub does not accept the token (401); run hf auth login",
        "no token": "the Hub does not accept the token (401); run hf auth login",
    }.items():
        assert answers[name].startswith("HubError: The upload to "), answers[name]
        assert reason in answers[name] and "\n" not in answers[name], answers[name]
    assert answers["no network"].endswith("check the network")
    assert set(hub.files("acme/public")) == {"README.md"} | git
    for name in ("broken", "refused", "raced"):
        assert set(hub.files(f"acme/{name}")) == git
    assert not {id for _, id in hub.repositories} & {"nowhere/model", "acme/wrong-token", "acme/no-token"}

    pushed = hub.files("acme/pushed")
    assert set(pushed) == set(contents(folder)) | git
    assert pushed["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert "forbids to publish" in answers["push_to_hub licensed"]
    assert "exists already and is public" in answers["push_to_hub licensed to public"]
    assert ("model", "acme/pushed-licensed") not in hub.repositories
    assert hub.repositories["model", "acme/pushed-private"].private


DOWNLOAD = """
import contextlib, io, json, os, sys, time
import torch
from huggingface_hub import constants
time.sleep = lambda seconds: None  # the client waits before it tries again
constants.DOWNLOAD_CHUNK_SIZE = 2**12  # the client keeps whole chunks of a cut download, and this model is small
from transformers import AutoModelForUniversalSegmentation
from proscale_hf import (
    ProScaleMask2FormerConfig, ProScaleMask2FormerForUniversalSegmentation, ProScaleMask2FormerImageProcessorPil
)
from proscale_hf.cli import main
from proscale_hf.hub.names import resolve

inputs, commit, *models = sys.argv[1:]
given, expected = torch.load(inputs)
answers = {}

def check(model):
    with torch.no_grad():
        torch.testing.assert_close(model(given).masks_queries_logits, expected, rtol=1e-4, atol=1e-5)

short = "proscale-swin-t-coco"
assert ProScaleMask2FormerConfig.from_pretrained(short).num_queries == 7
for attempt in range(2):
    try:
        model = ProScaleMask2FormerForUniversalSegmentation.from_pretrained(short)
        break
    except Exception as error:  # older clients give up when they are cut off, and go on there when asked again
        assert attempt == 0, error
check(model)
check(ProScaleMask2FormerForUniversalSegmentation.from_pretrained("acme/" + short))
check(ProScaleMask2FormerForUniversalSegmentation.from_pretrained(short, revision=commit))
check(AutoModelForUniversalSegmentation.from_pretrained(resolve(short)))
processor = ProScaleMask2FormerImageProcessorPil.from_pretrained(short)
assert dict(processor.size) == {"height": 64, "width": 96}, processor
assert ProScaleMask2FormerConfig.from_pretrained(short, revision="older").num_queries == 11

for name in ("proscale-r50-coco", "proscale-swin-t"):
    try:
        ProScaleMask2FormerForUniversalSegmentation.from_pretrained(name)
    except Exception as error:
        answers["model " + name] = f"{type(error).__name__}: {error}"
for model in models:
    if model == "acme/wrong-token":
        os.environ["HF_TOKEN"] = "hf_wrong"
    with contextlib.redirect_stderr(io.StringIO()) as output:
        status = main(["segment", "photo.png", "--model", model, "--output", "overlay.png"])
    answers[model] = [status, output.getvalue()]
print(json.dumps(answers))
"""

OFFLINE = """
import contextlib, io, json, sys
import torch
from proscale_hf import ProScaleMask2FormerForUniversalSegmentation, ProScaleMask2FormerImageProcessorPil
from proscale_hf.cli import main

given, expected = torch.load(sys.argv[1])
model = ProScaleMask2FormerForUniversalSegmentation.from_pretrained("proscale-swin-t-coco")
ProScaleMask2FormerImageProcessorPil.from_pretrained("proscale-swin-t-coco")
with torch.no_grad():
    torch.testing.assert_close(model(given).masks_queries_logits, expected, rtol=1e-4, atol=1e-5)
answers = {}
for name in ("proscale-swin-t-coco", "acme/never-seen"):
    with contextlib.redirect_stderr(io.StringIO()) as output:
        status = main(["segment", "photo.png", "--model", name, "--output", "offline.png"])
    answers[name] = [status, output.getvalue()]
print(json.dumps(answers))
"""

CLEAN_PROCESS = """
import json, sys
sys.modules["proscale_hf"] = None  # importing it is an error from here on
import torch
from transformers import AutoImageProcessor, AutoModelForUniversalSegmentation, pipeline

given, expected = torch.load(sys.argv[1])
name = "acme/proscale-swin-t-coco"
model = AutoModelForUniversalSegmentation.from_pretrained(name, trust_remote_code=True)
with torch.no_grad():
    torch.testing.assert_close(model(given).masks_queries_logits, expected, rtol=1e-4, atol=1e-5)
modules = [type(model).__module__]
segmenter = pipeline("image-segmentation", model=name, trust_remote_code=True)
assert isinstance(segmenter("photo.png", threshold=0.1), list)
modules += [type(segmenter.model).__module__, type(segmenter.image_processor).__module__]
modules += [type(AutoImageProcessor.from_pretrained(name, trust_remote_code=True)).__module__]
print(json.dumps(modules))
"""


def one_line(message):
    """The only line of a message, but for what says that a step takes long."""
    lines = [line for line in message.splitlines() if not line.endswith("...")]
    assert len(lines) == 1, message
    return lines[0]


@pytest.fixture
def given(folder, tmp_path):
    """A batch and the masks that the model makes of it, in a file, and a photo."""
    Image.new("RGB", (50, 40), "teal").save(tmp_path / "photo.png")
    model = ProScaleMask2FormerForUniversalSegmentation.from_pretrained(folder)
    with torch.no_grad():
        torch.save((pixels(), model(pixels()).masks_queries_logits), tmp_path / "inputs.pt")
    return tmp_path / "inputs.pt"


def test_download_and_offline_reload(hub, folder, given, tmp_path):
    config = (folder / "config.json").read_bytes()
    older = config.replace(b'"num_queries": 7', b'"num_queries": 11')
    assert older != config
    repository = hub.create(f"acme/{SHORT_NAME}", {**contents(folder), "config.json": older})
    repository.branches["older"] = repository.branches["main"]
    commit = hub.commit(f"acme/{SHORT_NAME}", contents(folder))
    for name in ("broken", "hidden", "gated", "wrong-token"):
        hub.create(f"acme/{name}", contents(folder), private=name == "hidden", gated=name == "gated")
    hub.create("acme/empty")
    hub.create("acme/half", {"config.json": config, "model.safetensors": contents(folder)["model.safetensors"]})
    hub.fail("acme/broken", 500)
    hub.cut("GET /lfs/", after=50_000)

    reasons = {
        SHORT_NAME: None,
        "acme/hidden": "no such repository, or none that your token may see",
        "acme/nothing": "no such repository, or none that your token may see",
        "acme/empty": "acme/empty does not appear to have",
        "acme/half": "image processor for 'acme/half'",
        "acme/gated": "grants access one by one",
        "acme/broken": "the Hub has a fault of its own (500)",
        "proscale-r50-coco": "proscale-r50-coco is not on the Hub as acme/proscale-r50-coco",
        "proscale-swin-t": "closest first): proscale-swin-t-coco, proscale-r50-coco",
        "acme/wrong-token": "the Hub does not accept the token (401)",  # last: the token stays
    }
    environment = hub.environment(tmp_path / "cache", PROSCALE_HUB_NAMESPACE="acme")
    answers = run(DOWNLOAD, environment, given, commit, *reasons, folder=tmp_path)

    resumed = [int(request.headers["Range"][6:-1]) for request in hub.requests if request.status == 206]
    assert len(resumed) == 1 and 0 < resumed[0] <= 50_000
    for model, reason in reasons.items():
        status, message = answers[model]
        if reason is None:
            assert status == 0 and (tmp_path / "overlay.png").exists()
        else:
            assert status == (2 if model == "proscale-swin-t" else 1)
            last = one_line(message)
            assert last.startswith("error: ") and reason in last
    assert answers["model proscale-r50-coco"].startswith(
        "NotOnTheHubError: proscale-r50-coco is not on the Hub as acme/"
    )
    assert "convert.detectron2" in answers["model proscale-r50-coco"]
    assert "PROSCALE_HUB_NAMESPACE" in answers["model proscale-r50-coco"]
    listed = answers["model proscale-swin-t"]
    assert listed.startswith("ValueError: ") and all(name in listed for name in MODEL_NAMES)

    hub.requests.clear()
    answers = run(OFFLINE, {**environment, "HF_HUB_OFFLINE": "1"}, given, folder=tmp_path)
    assert not hub.requests
    assert answers[SHORT_NAME][0] == 0 and (tmp_path / "offline.png").exists()
    status, message = answers["acme/never-seen"]
    assert status == 1 and "HF_HUB_OFFLINE is set" in one_line(message)


DATA_SET = """
import json
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

api, at = HfApi(), {"repo_id": "acme/scenes", "repo_type": "dataset"}
assert api.whoami()["name"] == "alice"
api.create_repo(**at, private=True)
files = {"README.md": b"scenes", "train/a.parquet": b"a" * 1000, "train/b.json": b"{}"}
first = api.create_commit(
    **at, commit_message="first", operations=[CommitOperationAdd(path, content) for path, content in files.items()]
).oid
api.create_tag(**at, tag="v1")
api.create_branch(**at, branch="dev", revision=first)
api.create_commit(**at, commit_message="less", operations=[CommitOperationDelete("train/b.json")])
assert [commit.title for commit in api.list_repo_commits(**at)] == ["less", "first", "initial commit"]
refs = api.list_repo_refs(**at)
assert [ref.name for ref in refs.branches] == ["main", "dev"] and refs.tags[0].target_commit == first
assert [entry.path for entry in api.list_repo_tree(**at)] == [".gitattributes", "README.md", "train"]
assert [entry.path for entry in api.list_repo_tree(**at, path_in_repo="train")] == ["train/a.parquet"]
assert [entry.size for entry in api.get_paths_info(**at, paths=["train/a.parquet", "none"])] == [1000]
folder = snapshot_download(**at, revision="v1")
assert {path: open(f"{folder}/{path}", "rb").read() for path in files} == files
api.update_repo_settings(**at, private=False)
assert not HfApi(token=False).repo_info(**at).private
for error, wrong in (
    (RevisionNotFoundError, lambda: api.repo_info(**at, revision="none")),
    (EntryNotFoundError, lambda: api.hf_hub_download(**at, filename="none")),
    (RepositoryNotFoundError, lambda: api.model_info("acme/scenes")),
):
    try:
        wrong()
    except error:
        continue
    raise AssertionError(error)
api.delete_repo(**at)
print(json.dumps(api.repo_exists(**at)))
"""


def test_the_server_is_what_the_client_expects(hub, tmp_path):
    assert run(DATA_SET, hub.environment(tmp_path / "cache", "hf_alice"), folder=tmp_path) is False


def test_clean_process(hub, folder, given, tmp_path):
    pytest.importorskip("torchvision")  # transformers' AutoImageProcessor needs it
    hub.create(f"acme/{SHORT_NAME}", contents(folder))
    modules = run(CLEAN_PROCESS, hub.environment(tmp_path / "cache", PYTHONPATH=""), given, folder=tmp_path)
    assert len(modules) == 4 and all(module.startswith("transformers_modules.") for module in modules), modules
