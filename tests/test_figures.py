"Figures can be read: no type below 9 points, no name over another or over the curves, none wider than the column."

import re
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
import torch
from execnb.nbio import new_nb
from house import NBS, code_cells, code_texts
from matplotlib.figure import Figure
from matplotlib.text import Text
from page_runs import run_cells, shown_text

from vermouth.experiments.tables import with_intervals

# The site's column of text is 760 CSS pixels wide, of which an inch has 96: a wider figure is shown smaller.
WIDEST, SMALLEST = 760 / 96, 9


def shown_texts(figure):
    figure.draw_without_rendering()
    hidden = set(hidden_ticks(figure))
    for text in figure.findobj(Text):
        box = Text.get_window_extent(text)  # of a note without the line that leads to it
        if id(text) not in hidden and text.get_visible() and text.get_text().strip() and box.width > 0:
            yield text, box


def faults(figure):
    "What makes a figure hard to read, in words."
    found = [f"{figure.get_figwidth():.1f} inches wide"] if figure.get_figwidth() > WIDEST else []
    texts = list(shown_texts(figure))
    found += [f"{text.get_text()!r}: {text.get_size()} points" for text, _ in texts if text.get_size() < SMALLEST]
    for (a, first), (b, second) in combinations(texts, 2):
        across = min(first.x1, second.x1) - max(first.x0, second.x0)
        down = min(first.y1, second.y1) - max(first.y0, second.y0)
        if across > 1 and down > 2:  # a line of type is taller than its letters
            found.append(f"{a.get_text()!r} over {b.get_text()!r}")
    for ax in figure.axes:
        if ax.lines and (legend := ax.get_legend()) and legend.get_window_extent().overlaps(ax.get_window_extent()):
            found.append("a legend inside the axes")
    return found


def hidden_ticks(figure):
    "Labels of ticks outside of the limits, which Matplotlib keeps and does not draw, by id."
    for ax in figure.axes:
        for axis, limits in ((ax.xaxis, ax.get_xlim()), (ax.yaxis, ax.get_ylim())):
            low, high = sorted(limits)
            for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
                if not low <= tick.get_loc() <= high:
                    yield from (id(tick.label1), id(tick.label2))


def test_a_bad_figure_is_told():
    figure = Figure(figsize=(12, 3))
    ax = figure.subplots()
    ax.plot([0, 1], [0, 1], label="a")
    ax.legend(fontsize=7)
    for _ in range(2):
        ax.text(0.5, 0.2, "twice")
    text = "; ".join(faults(figure))
    assert all(part in text for part in ("12.0 inches", "7.0 points", "'twice' over 'twice'", "inside the axes")), text


def test_pages_ask_for_no_small_type_and_no_wide_figure():
    "Sizes that stand in the code of pages and modules; what helpers compute is drawn by the tests below."
    texts = [(name, text) for name, text in code_texts() if not name.startswith("tests/")]
    type_sizes = [(name, float(n)) for name, text in texts for n in re.findall(r"\bfontsize=([\d.]+)", text)]
    widths = [(name, float(n)) for name, text in texts for n in re.findall(r"figsize=\(([\d.]+),", text)]
    assert len(type_sizes) > 20 and len(widths) > 20
    assert not [f"{name}: {n:g} points" for name, n in type_sizes if n < SMALLEST]
    assert not [f"{name}: {n:g} inches" for name, n in widths if n > WIDEST]


def ablation_rows(settings, tasks, seeds=2):
    rng = np.random.default_rng(0)
    metrics = {"sbir": "mAP@all", "fewshot": "accuracy", "segmentation": "mIoU"}
    rows = []
    for task in tasks:
        for setting in settings:
            for seed in range(seeds):
                for method in ("pixel head",) if task == "segmentation" else ("U-head", "training-free"):
                    row = {"task": task, "method": method, "setting": setting, "metric": metrics[task], "seed": seed}
                    rows.append(row | {"dataset": "toybox", "n": 30, "scores": rng.random(30), "value": 0.0})
    rows = [row | {"value": row["scores"].mean()} for row in rows]
    return pd.DataFrame(with_intervals(rows))


def test_dots_and_curves_of_ablations():
    from vermouth.experiments.report import curves, dots

    names = ["down", "mid", "up", "down+mid", "mid+up", "down+mid+up"]
    settings = names + [f"{name}, empty prompt" for name in names]
    rows = ablation_rows(settings, ["sbir", "fewshot", "segmentation"])
    assert not faults(dots(rows))
    steps = {f"t={t}{mode}": t for t in range(0, 1000, 100) for mode in ("", ", empty prompt")}
    rows = ablation_rows(steps, ["sbir", "fewshot", "segmentation"])
    style = {name: "empty prompt" if "empty" in name else "caption" for name in steps}
    assert not faults(curves(rows, steps, "time step t", style))


def test_training_curves():
    from vermouth.experiments.report import training_curves

    methods = ["Vermouth", "Vermouth without expert", "U-head on random weights"]
    methods.append("U-head on random weights without expert")
    history = pd.DataFrame({"epoch": np.tile(np.arange(40), 4), "method": np.repeat(methods, 40)})
    history["valid_loss"] = 1 / (1 + history.epoch)
    history["accuracy"] = 1 - history.valid_loss
    figure = training_curves(history, {"valid_loss": "loss on held-back seen images", "accuracy": "accuracy"})
    assert not faults(figure)
    assert {text.get_text() for text, _ in shown_texts(figure)} >= set(methods)


def test_few_shot_curves_name_every_method_once():
    from vermouth.tasks.fewshot import study_curves

    table = pd.read_csv(NBS / "results/11_fewshot.csv")
    table = table[~table.setting.str.contains("protocol=paper") & (table.dataset == "toybox")]
    table = table.assign(shots=table.setting.str.extract(r"shots=(\d+)")[0].fillna(0).astype(int))
    table = table[~table.seed.astype(str).str.contains("+", regex=False)]
    rows = table.rename(columns={"value": "accuracy"})[["method", "shots", "seed", "accuracy"]]
    rows = rows.assign(hits=[np.arange(600) < 600 * share for share in rows.accuracy])
    rows = rows[rows.method.isin(rows.method.unique()[:14])]
    figure = study_curves(rows.to_dict("records"))
    assert not faults(figure)
    shown = [text.get_text() for text, _ in shown_texts(figure)]
    assert all(shown.count(name) == 1 for name in rows.method.unique())


def test_masks_have_a_legend_of_their_classes():
    from vermouth.data.masks import pair
    from vermouth.data.segmentation import load_segmentation
    from vermouth.tasks.segmentation import masks_panel

    split = load_segmentation("toybox", shots=1, limit=8)
    truths = [pair(item)[1] for item in split.test]
    figure = masks_panel(lambda *_: [truths], split, [""] * len(split.test), 8)
    assert not faults(figure)
    occur = {split.names[k] for truth in truths for k in np.unique(truth) if k < len(split.names)}
    legend = {text.get_text() for text in figure.legends[0].get_texts()}
    assert legend <= {name if isinstance(name, str) else name[0] for name in occur} and len(legend) >= min(
        len(occur), 24
    )


def test_masks_and_matches():
    from vermouth.data.correspondence import load_correspondence
    from vermouth.data.segmentation import load_segmentation, show_masks
    from vermouth.tasks.correspondence import matches_panel, pixel_reader

    assert not faults(show_masks(load_segmentation("toybox", shots=1, limit=8).test))
    assert not faults(matches_panel({"raw pixels": pixel_reader(64)}, load_correspondence("toybox", limit=4)))


def test_maps_of_the_atlas():
    from vermouth.experiments.atlas import heat_maps

    rows = pd.read_csv(NBS / "results/23_atlas.csv")
    steps = rows.setting.str.extract(r"t=(\d+)")[0].astype(int)
    for kind in ("photo", "sketch", "scene"):
        table = pd.DataFrame({"attribute": rows.metric, "tap": rows.method, "t": steps, "score": rows.value})
        table = table[rows.setting.str.startswith(kind)].drop_duplicates(["attribute", "tap", "t"])
        assert len(table) > 50 and not faults(heat_maps(table))


def test_hits_and_rows_of_classes():
    from vermouth.data.items import show_rows
    from vermouth.data.sbir import load_sbir
    from vermouth.tasks.sbir import hits_panel

    split = load_sbir("toybox", shots=1, limit=48)
    vectors = [torch.randn(len(items), 8) for items in (split.test_sketches, split.test_photos)]
    assert not faults(hits_panel(tuple(vectors), split))
    names = [item.name for item in split.test_photos][:12]
    assert not faults(show_rows([split.test_photos], names))


def test_names_of_clusters():
    from vermouth.visualize import scatter

    figure = Figure(figsize=(7.9, 4), layout="constrained")
    rng = np.random.default_rng(0)
    for ax, apart in zip(figure.subplots(1, 2), (0.1, 5.0)):
        names = np.repeat(["turtle", "duck", "truck", "sailboat", "palm tree", "tulip", "teapot", "umbrella"], 10)
        centres = np.repeat(rng.normal(size=(8, 2)) * apart, 10, 0)
        scatter(ax, centres + rng.normal(size=(80, 2)), list(names), ["photo", "sketch"] * 40, "vectors")
    assert not faults(figure)


def test_steps_below_their_rooflines():
    from vermouth.experiments.roofline import Roofline, steps_panel

    table = pd.read_csv(NBS / "results/30_benchmark.csv").query("metric in ('seconds', 'predicted')")
    table = table[table.seconds == table.seconds.iloc[-1]]
    weights = table.setting.str.split().str[0]
    table = table.assign(weights=weights).pivot_table("value", ["method", "weights"], "metric", sort=False).dropna()
    table = table.reset_index().rename(columns={"method": "step"}).assign(operations=4e11, bytes=5e9)
    assert len(table) > 6
    assert not faults(steps_panel(table, Roofline({"float32": 2e11, "bfloat16": 1e12}, 5e10)))


@pytest.fixture
def drawn(monkeypatch):
    "The figures that pages draw from here on."
    import matplotlib.pyplot as plt

    from vermouth import images

    kept, draw = [], images.figure_image

    def keep(figure, *options):
        kept.append(figure)
        return draw(figure, *options)

    monkeypatch.setattr(images, "figure_image", keep)
    yield kept
    plt.close("all")


def test_the_page_beside_the_paper_shows_what_the_results_files_hold(drawn, monkeypatch):
    "Its tables are those of the CSV files, and its figure can be read: the whole page runs again."
    monkeypatch.setenv("IN_TEST", "1")  # the figure goes elsewhere
    reading = code_cells("20_paper.ipynb")
    again = run_cells(new_nb([c.source for c in reading]), NBS)
    assert reading and shown_text(again) == shown_text(reading), (
        "run nbs/20_paper.ipynb again, then: python -m vermouth.app.docs"
    )
    [figure] = drawn
    assert not faults(figure)


def test_the_page_of_a_million_draws_for_itself(drawn, monkeypatch, tmp_path):
    "The cells of the page that read its results and draw them, without those that measure."
    monkeypatch.chdir(NBS)
    code = [c.source for c in code_cells("31_million.ipynb")]
    measured = pd.read_csv("results/31_million.csv")
    table = measured.pivot_table("value", ["n", "method"], "metric", sort=False)
    [drawing] = [source for source in code if "figure_image(" in source and "import" not in source]
    space = {"table": table, "limit": int(measured.n.max()), "out_dir": str(tmp_path)}
    for source in [source for source in code if "import tempfile" in source] + [drawing]:
        exec(source, space)
    [figure] = drawn
    assert not faults(figure)
