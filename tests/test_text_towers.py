"CLIPs of other kinds, and class embeddings as the paper's code makes them."

import copy
import json

import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from vermouth.core import VermouthError
from vermouth.model import Vermouth
from vermouth.text import (
    check_distinct,
    class_embeddings,
    class_prompts,
    image_embeddings,
    label_embeddings,
    load_clip,
    raw_text_embeddings,
    templates_for,
)

NAMES = ["fish", "truck", "tree", "house"]


@pytest.fixture(scope="module")
def clip(toybox):
    return toybox.clip


def hidden_states(backbone, texts):
    "What the released code takes of a text: the text encoder's last hidden state at end-of-text."
    padding = {"padding": "max_length", "max_length": backbone.tokens, "truncation": True}
    ids = backbone.tokenizer(texts, return_tensors="pt", **padding).input_ids
    with torch.inference_mode():
        return backbone.text_encoder(ids).last_hidden_state[torch.arange(len(ids)), ids.argmax(1)]


def test_unprojected_embeddings_are_those_of_the_text_encoder(backbone, clip):
    prompts = class_prompts(NAMES)
    made = raw_text_embeddings(prompts, clip, project=False)
    assert torch.allclose(made, hidden_states(backbone, prompts), atol=1e-3)


@pytest.mark.parametrize("project", [True, False])
def test_class_embeddings_equal_a_plain_loop(project, clip):
    templates = ["a photo of {}", "a red {}", "{}"]
    rows = {"before": [], "after": []}
    for name in NAMES:
        one = [raw_text_embeddings(t.format(name), clip, project=project)[0] for t in templates]
        rows["before"].append(F.normalize(sum(one), dim=0))
        rows["after"].append(F.normalize(sum(F.normalize(x, dim=0) for x in one), dim=0))
    for average, want in rows.items():
        made = class_embeddings(NAMES, clip, templates, average, project)
        assert torch.allclose(made, torch.stack(want), atol=1e-5)
    words = [raw_text_embeddings(t.format(n), clip, project=project)[0] for n in NAMES[:2] for t in templates]
    made = label_embeddings([", ".join(NAMES[:2])], clip, templates, "before", project)
    assert torch.allclose(made[0], F.normalize(sum(words), dim=0), atol=1e-5)


def test_leaving_the_projection_out_changes_nothing_for_others(clip):
    before = raw_text_embeddings(NAMES, clip)
    raw_text_embeddings(NAMES, clip, project=False)
    assert clip.model.text_projection is not None and torch.equal(raw_text_embeddings(NAMES, clip), before)


def test_every_template_takes_one_name():
    for dataset in ("oxford_pets", "food101", "sun397", "eurosat", "imagenet", "segmentation", "folder"):
        for template in templates_for(dataset):
            assert "cat" in class_prompts(["cat"], template)[0] and template.count("{}") == 1


def test_names_that_are_all_unknown_look_the_same(clip):
    with pytest.warns(UserWarning, match="CLIP does not know"):
        rows = class_embeddings(["Leopards", "Motorbikes"], clip)
    with pytest.raises(VermouthError, match="names: 'Leopards' and 'Motorbikes' look the same to this CLIP"):
        check_distinct(["Leopards", "Motorbikes"], rows)
    check_distinct(NAMES, class_embeddings(NAMES, clip))


TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
SIGLIP_TEXT = TEXT | {"no_causal_mask": True, "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6}}
MAP = {"timm_model_name": "test_vit", "timm_pool": "map", "timm_proj": "none"}
TOWERS = {
    "siglip": (MAP, SIGLIP_TEXT, {"custom_text": 1}),
    "convnext": ({"timm_model_name": "test_convnext", "timm_pool": "", "timm_proj": "linear"}, TEXT, {}),
    "eva": ({"timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": None}, TEXT, {"custom_text": 1}),
    "mobileclip": ({"timm_model_name": "test_vit", "timm_pool": "avg", "timm_proj": None}, TEXT, {"quick_gelu": True}),
}


@pytest.mark.parametrize("vision, text, more", TOWERS.values(), ids=TOWERS)
def test_image_towers_of_timm(vision, text, more, tmp_path):
    width = 64 if vision["timm_proj"] is None or vision["timm_proj"] == "none" else 48
    config = {"embed_dim": width, "vision_cfg": vision | {"image_size": 160}, "text_cfg": text} | more
    made = copy.deepcopy(config)
    kind = open_clip.CustomTextCLIP if made.pop("custom_text", 0) else open_clip.CLIP
    torch.manual_seed(0)
    model = kind(**made).eval()
    save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    settings = {"model_cfg": config, "preprocess_cfg": {"mean": [0.5] * 3}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(settings))
    clip, image = load_clip(tmp_path, "cpu"), Image.effect_noise((200, 170), 90)
    assert clip.dim == width and image_embeddings(image, clip).shape == (1, width)
    with torch.inference_mode():
        want = F.normalize(model.encode_text(clip.tokenizer(["a photo of fish"])), dim=-1)
    assert torch.allclose(class_embeddings(["fish"], clip), want, atol=1e-6)
    assert class_embeddings(["fish"], clip, project=False).shape == (1, 32)


def test_a_saved_model_keeps_how_its_captions_are_made(toybox, tmp_path):
    toybox.save(tmp_path)
    parts = {part: getattr(toybox, part) for part in ("backbone", "clip", "expert")}
    card = json.loads((tmp_path / "vermouth.json").read_text())
    assert "captions" not in card["captioner"]
    card["captioner"]["captions"] = {"beams": 1, "prefix": "a photo of", "max_new_tokens": 4, "size": None}
    (tmp_path / "vermouth.json").write_text(json.dumps(card))
    again = Vermouth.load(tmp_path, "cpu", **parts)
    assert str(again.captioner.settings) == "beams=1 prefix='a photo of' max_new_tokens=4"
    assert again.card()["captioner"] == card["captioner"] and again.fingerprint != toybox.fingerprint
