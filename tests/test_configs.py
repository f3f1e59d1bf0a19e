"The configurations for real weights: each fits its page, names what exists, and says truly what it takes."

import ast

import nbformat
import pytest
import yaml
from conftest import ROOT

from vermouth.backbone import FeatureSettings
from vermouth.core import PROTOCOLS
from vermouth.data.fewshot import LAYOUTS as FEW_SHOT
from vermouth.data.sbir import LAYOUTS as RETRIEVAL
from vermouth.experiments.costs import CLASSES_AND_TEST, PAGES, SKETCHES_AND_PHOTOS, TRAINING, VALIDATION, write_headers
from vermouth.uhead import ARCHS

CONFIGS = {p.stem: p for p in sorted((ROOT / "configs").glob("*.yaml"))}


def settings(name):
    return yaml.safe_load(CONFIGS[name].read_text(encoding="utf-8"))


def page(name):
    return ROOT / "nbs" / f"{PAGES[name.partition('_')[0]]}.ipynb"


def test_every_data_set_of_the_paper_has_a_configuration():
    assert set(SKETCHES_AND_PHOTOS) == set(RETRIEVAL) and set(CLASSES_AND_TEST) == set(FEW_SHOT)
    known = {"sbir": RETRIEVAL, "fewshot": FEW_SHOT, "segmentation": TRAINING}
    names = {f"{task}_{dataset}" for task, datasets in known.items() for dataset in datasets}
    # what the release leaves open has a configuration each
    other = {f"sbir_{dataset}_clean" for dataset in RETRIEVAL} | {f"segmentation_{d}_segmentor" for d in TRAINING}
    assert set(CONFIGS) == names | other


def test_configurations_say_which_protocol_and_which_noise():
    assert all(settings(name)["protocol"] == "paper" for name in CONFIGS)
    for name in CONFIGS:
        if name.startswith("sbir_"):
            assert settings(name)["noise"] == ("none" if name.endswith("_clean") else "ddpm")
            twin = name.removesuffix("_clean")
            assert {**settings(name), "noise": ""} == {**settings(twin), "noise": ""}
    first, second = settings("segmentation_coco_stuff171"), settings("segmentation_coco_stuff171_segmentor")
    assert (first["timesteps"], first["expert"]) == ([10], "resnet18")
    assert (second["timesteps"], second["expert"], second["scale"] / second["temperature"]) == ([50], "", 1)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_names_its_data_sets(name):
    dataset = settings(name)["dataset"]
    training, *others = [dataset] if isinstance(dataset, str) else dataset
    assert training == name.partition("_")[2].removesuffix("_clean").removesuffix("_segmentor")
    assert set(others) == (set(VALIDATION) if name.startswith("segmentation") else set())


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_fits_its_page(name):
    if not page(name).exists():
        pytest.skip(f"{page(name).name} is not written yet")
    [cell] = [c for c in nbformat.read(page(name), as_version=4).cells if "parameters" in c.metadata.get("tags", [])]
    known = {target.id for node in ast.parse(cell.source).body for target in node.targets}
    assert set(settings(name)) <= known, "papermill only warns of a name that the page would ignore"


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_can_be_read(name):
    config = settings(name)
    # raises what load_backbone would only say after the download
    FeatureSettings(config["timesteps"], config["stages"], config["attention"], config.get("noise", "ddpm"))
    assert config.get("uhead", "tiny") in ARCHS and config["device"] == "cuda" and config["protocol"] in PROTOCOLS


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_says_what_it_takes(name):
    text = CONFIGS[name].read_text(encoding="utf-8")
    assert text == write_headers(CONFIGS[name]), "run: python -m vermouth.experiments.costs"
