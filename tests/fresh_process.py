"""What test_reproducible asks of a new process: python fresh_process.py FOLDER SETTING …

The folder holds a Stable Diffusion `sd1`, a trained model `model` and images `x.pt`, and gets what is found.
"""

import gc
import sys
import warnings
from pathlib import Path

if __name__ == "__main__":
    folder, settings = Path(sys.argv[1]), sys.argv[2:]
    gc.disable()  # it would take a quarter of the imports' time
    import torch

    from vermouth.backbone import load_backbone

    torch.set_num_threads(1)
    features = load_backbone(folder / "sd1", device="cpu").features(torch.load(folder / "x.pt"), "cat", size="keep")
    print("features", file=sys.stderr, flush=True)

    warnings.simplefilter("ignore")
    from small_tables import tables

    from vermouth.data.toybox import Toybox
    from vermouth.model import Vermouth

    gc.enable()
    photos = [x.image for x in Toybox("photo", n=3, seed=5)]
    models = [Vermouth.load(str(path), "cpu") for path in (folder / "model", "toybox")]
    embedded = [model.embed(photos) for model in models]
    found = {"features": features, "embedded": embedded, "tables": tables(models[0], *settings)}
    torch.save(found, folder / "found.pt")
