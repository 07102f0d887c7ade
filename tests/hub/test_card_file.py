"""The model card that `save_pretrained` writes: whose it is, what it follows, and when it is kept."""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from helpers import tiny_config, tiny_model
from proscale_hf import (
    ProScaleMask2FormerConfig,
    ProScaleMask2FormerForUniversalSegmentation,
    ProScaleMask2FormerImageProcessorPil,
    ProScaleMask2FormerModel,
)
from proscale_hf.hub.card_file import section
from proscale_hf.hub.card_mark import is_own_card, sign


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
    costs = section(card_in(tmp_path), "## Cost")
    make_processor().save_pretrained(tmp_path)
    assert "| Input | images are resized to 64 x 96 |" in card_in(tmp_path)
    assert section(card_in(tmp_path), "## Cost") == costs  # an image processor cannot measure them
    tiny_model(num_queries=5).save_pretrained(tmp_path)
    assert "| Queries | 5 |" in card_in(tmp_path) and "One image of 64 x 96" in card_in(tmp_path)
    assert is_own_card(card_in(tmp_path))
    assert not list(tmp_path.glob(".*"))


def test_the_order_of_saving_makes_no_difference_but_for_the_costs(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    tiny_model().save_pretrained(first)
    make_processor().save_pretrained(first)
    make_processor().save_pretrained(second)
    tiny_model().save_pretrained(second)
    cards = [card_in(folder) for folder in (first, second)]
    assert "One image of 800 x 1333" in cards[0] and "One image of 64 x 96" in cards[1]
    without_costs = [card.replace(section(card, "## Cost"), "").rpartition("<!--")[0] for card in cards]
    assert without_costs[0] == without_costs[1]


def test_a_cost_that_cannot_be_measured_is_left_out(tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise RuntimeError("this backbone looks at the pixels")

    monkeypatch.setattr(ProScaleMask2FormerForUniversalSegmentation, "measure_cost", fail)
    tiny_model().save_pretrained(tmp_path)
    assert "## Cost" not in card_in(tmp_path) and "## Use it" in card_in(tmp_path)


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
