"A LoRA that PEFT and diffusers have written, against PEFT's own way of running it."

import pytest
import torch

from vermouth.backbone import load_backbone


def test_a_lora_is_merged_as_peft_runs_it(backbone, tmp_path):
    peft = pytest.importorskip("peft")
    from copy import deepcopy

    from diffusers import StableDiffusionPipeline
    from peft.utils import get_peft_model_state_dict

    torch.manual_seed(0)
    unet = deepcopy(backbone.unet)
    layers = ["to_q", "to_k", "to_v", "to_out.0"]
    unet.add_adapter(peft.LoraConfig(r=4, lora_alpha=4, init_lora_weights=False, target_modules=layers))
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=get_peft_model_state_dict(unet))
    tuned = load_backbone("toybox", "cpu", lora=tmp_path)
    latents, context = torch.randn(2, 4, 16, 16), backbone.encode_text(["a cat", "a red fish"])
    with torch.inference_mode():
        theirs = unet(latents, 200, encoder_hidden_states=context).sample
    plain, ours = backbone.predict(latents, 200, context), tuned.predict(latents, 200, context)
    assert (ours - plain).abs().max() > 0.01
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert tuned.fingerprint != backbone.fingerprint
