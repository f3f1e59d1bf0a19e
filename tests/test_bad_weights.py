"Checkpoints and saved models of another kind, and pickled weights, which are never opened."

import json
import os

import pytest
import torch
from program import EXTRACT, NAMES

STABLE_DIFFUSION = {
    "_class_name": "StableDiffusionPipeline",
    "vae": ["diffusers", "AutoencoderKL"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "text_encoder": ["transformers", "CLIPTextModel"],
}
SANA = {
    "_class_name": "SanaPipeline",
    "vae": ["diffusers", "AutoencoderDC"],
    "transformer": ["diffusers", "SanaTransformer2DModel"],
    "text_encoder": ["transformers", "Gemma2Model"],
}


class Trap:
    "A pickle that makes a folder when it is opened."

    def __reduce__(self):
        return (os.mkdir, ("sprung",))


@pytest.fixture
def folder(program, photos):
    (program.folder / "in").mkdir()
    photos[0].save(program.folder / "in/0.png")
    yield program.folder
    assert not (program.folder / "sprung").exists(), "a pickle was opened"


def checkpoint(folder, model_index):
    folder.mkdir()
    (folder / "model_index.json").write_text(json.dumps(model_index))


def pickles(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        torch.save(Trap(), folder / name)


def test_the_trap_works(tmp_path, monkeypatch):
    pickles(tmp_path, "model.bin")
    monkeypatch.chdir(tmp_path)
    torch.load(tmp_path / "model.bin", weights_only=False)
    assert (tmp_path / "sprung").exists()


def test_a_checkpoint_of_another_kind_is_named(program, folder):
    checkpoint(folder / "sana", SANA)
    sentence = "holds a SanaPipeline whose transformer is SanaTransformer2DModel"
    program.refuses(*EXTRACT, "--model", "sana", says=sentence)


def test_a_checkpoint_in_one_file_is_refused(program, folder):
    (folder / "sd.safetensors").touch()
    program.refuses(*EXTRACT, "--model", "sd.safetensors", says="no model_index.json in it")


def test_a_checkpoint_of_another_kind_is_no_model_either(program, folder):
    checkpoint(folder / "sana", SANA)
    program.refuses("classify", "in", *NAMES, "--model", "sana", says="holds a SanaPipeline whose transformer is Sana")
    (folder / "sana/model_index.json").unlink()
    missing = "vermouth.json is missing, as are model_index.json"
    program.refuses("classify", "in", *NAMES, "--model", "sana", says=missing)


def test_pickled_weights_of_a_backbone_are_refused(program, folder):
    checkpoint(folder / "sd", STABLE_DIFFUSION)
    for part in ("vae", "unet", "text_encoder", "tokenizer", "scheduler"):
        (folder / "sd" / part).mkdir()
    pickles(folder / "sd", "vae/diffusion_pytorch_model.bin")
    program.refuses(*EXTRACT, "--model", "sd", says="pickled .bin files are not read")


def test_pickled_weights_of_a_trained_model_are_refused(program, folder):
    pickles(folder / "model", "pytorch_model.bin")
    sentence = "vermouth.json is missing (pytorch_model.bin is there, but pickled weights are not read)"
    program.refuses("classify", "in", *NAMES, "--model", "model", says=sentence)


def test_a_pickle_that_is_called_safetensors_is_refused(program, folder, toybox):
    toybox.save(folder / "model")
    [weights] = (folder / "model").glob("*.safetensors")
    pickles(folder, weights.relative_to(folder))
    sentence = "is not a whole file in safetensors format"
    program.refuses("classify", "in", *NAMES, "--model", "model", says=sentence)


def test_pickled_weights_of_a_captioner_are_refused(program, folder):
    pickles(folder / "blip", "pytorch_model.bin")
    program.refuses(*EXTRACT, "--captioner", "blip", says="pickled ones are not read")
