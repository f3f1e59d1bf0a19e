"The feature store under abuse: kill -9 at every step, cut files, two writers, stale settings, full disks, bad images. Kills at random moments are in test_abuse, random damage in test_fuzz."
import json
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from torch.utils.data import DataLoader

from vermouth.app.files import image_paths, packed_images, unpacked
from vermouth.backbone import load_backbone
from vermouth.baselines import read_items, store_items
from vermouth.core import VermouthError
from vermouth.data.toybox import Toybox
from vermouth.expert import load_expert
from vermouth.model import Vermouth
from vermouth.parts import part_name
from vermouth.shards import FeatureStore, shard_name, sole_writer
from vermouth.store import extract
from vermouth.text import load_clip
from vermouth.train import train_head

FEW = {"stages": "mid", "attention": (), "shard_size": 4, "batch_size": 4, "quiet": True}  # 18 items, 5 shards
PROCESSES = multiprocessing.get_context("forkserver")  # each child is a process of its own; the imports are paid once
PROCESSES.set_forkserver_preload(["vermouth.store", "vermouth.baselines", "vermouth.data.toybox"])


def items(): return Toybox("photo", n=18)


@pytest.fixture(scope="module")
def backbone(): return load_backbone("toybox", "cpu")


@pytest.fixture(scope="module")
def whole(backbone, tmp_path_factory):
    "A store that nobody disturbed; not to be changed."
    return extract(backbone, items(), tmp_path_factory.mktemp("stores") / "whole", **FEW)


@pytest.fixture
def copy(whole, tmp_path):
    "The same, to be damaged."
    return Path(shutil.copytree(whole.out, tmp_path / "copy"))


# Crashes


def writer(out, die_at=-1, before=True):
    "In a child: extract; die at the n-th renaming of a file, just before or just after it."
    rename, count = os.replace, iter(range(1000))

    def replace(*names):
        here = next(count) == die_at
        if here and before: os.kill(os.getpid(), signal.SIGKILL)
        rename(*names)
        if here: os.kill(os.getpid(), signal.SIGKILL)

    os.replace = replace
    extract(load_backbone("toybox", "cpu"), items(), out, **FEW)


def child(target, *args):
    process = PROCESSES.Process(target=target, args=args)
    process.start()
    return process


@pytest.mark.parametrize("before", [True, False])
def test_killed_at_every_step_it_ends_with_the_same_bytes(whole, backbone, tmp_path, before):
    "A run renames 12 files: the manifest, five shards with a note each, the manifest again. Each run dies at the first or at a later one of those it has left."
    out, deaths = tmp_path / "store", 0
    for die_at in (0, 0, 1, 2, 0, 3, 1, 2, 4, 6, 1, 0):
        process = child(writer, out, die_at, before)
        process.join()
        deaths += process.exitcode == -signal.SIGKILL
        if process.exitcode == 0: break
        assert (out / ".lock").exists()
    assert deaths >= 5
    store = extract(backbone, items(), out, **FEW)
    assert store.checksum() == whole.checksum()
    assert sorted(p.name for p in out.iterdir() if p.name != ".lock") == ["manifest.json", *map(shard_name, range(5))]
    assert (out / "manifest.json").read_bytes() == (whole.out / "manifest.json").read_bytes()


class Counting:
    "A backbone that counts the images it reads, and gets a signal in the batch that goes beyond `enough`."

    def __init__(self, backbone, enough=10**9, sign=signal.SIGKILL): self.backbone, self.enough, self.sign, self.seen = backbone, enough, sign, 0
    def __getattr__(self, name): return getattr(self.backbone, name)

    def features(self, images, *args, **more):
        self.seen += len(images)
        if self.seen > self.enough: os.kill(os.getpid(), self.sign)
        return self.backbone.features(images, *args, **more)


ONE = FEW | {"shard_size": 18, "batch_size": 4}  # one shard of five batches


def dying_writer(out, enough): extract(Counting(load_backbone("toybox", "cpu"), enough), items(), out, **ONE)


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    "A store whose writer was killed in the fourth of five batches, after the first image for its size; not to be changed."
    out = tmp_path_factory.mktemp("stores") / "begun"
    process = child(dying_writer, out, 1 + 3 * 4)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert {p.name for p in out.iterdir()} == {".lock", "manifest.json", *(part_name(0, i) for i in (0, 4, 8))}
    return out


@pytest.fixture(scope="module")
def undisturbed(backbone, tmp_path_factory): return extract(backbone, items(), tmp_path_factory.mktemp("stores") / "one", **ONE)


def gone_on(backbone, out, **change):
    "Images that the second run has read, without the one for the size; its store."
    counting = Counting(backbone)
    store = extract(counting, items(), out, **ONE | change)
    assert {p.name for p in store.out.iterdir()} - {".lock"} == {"manifest.json", shard_name(0)}, "a part was left"
    return counting.seen - 1, store


@pytest.mark.parametrize("batch_size", [4, 5, 32])
def test_a_killed_process_loses_only_its_unfinished_batch(backbone, begun, undisturbed, tmp_path, batch_size):
    seen, store = gone_on(backbone, shutil.copytree(begun, tmp_path / "store"), batch_size=batch_size)
    assert seen == 18 - 12
    for new, old in zip(store.batch(range(18)), undisturbed.batch(range(18))): torch.testing.assert_close(new, old)
    if batch_size == 4:
        for name in ("manifest.json", shard_name(0)): assert (store.out / name).read_bytes() == (undisturbed.out / name).read_bytes()


def interrupted(backbone, out, toys=None, **settings):
    "A store like `begun` of something else, stopped with Ctrl-C."
    with pytest.raises(KeyboardInterrupt): extract(Counting(backbone, 1 + 3 * 4, signal.SIGINT), toys or items(), out, **ONE, **settings)
    return out


@pytest.mark.parametrize("damage", ["cut", "empty", "changed", "linked", "moved", "of other settings", "of other items"])
def test_a_part_that_is_not_ours_is_made_again(backbone, begun, undisturbed, tmp_path, damage):
    out = Path(shutil.copytree(begun, tmp_path / "store"))
    path, mine = out / part_name(0, 4), tmp_path / "mine.txt"
    data = path.read_bytes()
    mine.write_text("mine")
    if damage == "cut": path.write_bytes(data[:-5])
    if damage == "empty": path.write_bytes(b"")
    if damage == "changed": path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    if damage == "linked": path.unlink(), path.symlink_to(mine)
    if damage == "moved": path.write_bytes((out / part_name(0, 8)).read_bytes())
    if damage == "of other settings": shutil.copy(interrupted(backbone, tmp_path / "other", seed=1) / path.name, path)
    if damage == "of other items": shutil.copy(interrupted(backbone, tmp_path / "other", Toybox("photo", n=18, seed=1)) / path.name, path)
    seen, store = gone_on(backbone, out)
    assert seen == 18 - 12 + 4 and mine.read_text() == "mine"
    assert store.checksum() == undisturbed.checksum()


def test_an_unfinished_store_says_so_and_goes_on(whole, backbone, tmp_path):
    process = child(writer, tmp_path / "store", 5, False)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    with pytest.raises(VermouthError, match="unfinished. Run extract again"): FeatureStore(tmp_path / "store")
    kept = (tmp_path / "store" / shard_name(0)).stat().st_mtime_ns
    with pytest.raises(VermouthError, match="made with seed=8888, asked for seed=1"): extract(backbone, items(), tmp_path / "store", **FEW, seed=1)
    assert extract(backbone, items(), tmp_path / "store", **FEW).checksum() == whole.checksum()
    assert (tmp_path / "store" / shard_name(0)).stat().st_mtime_ns == kept, "a finished shard was made again"


def hold(out, ready):
    with sole_writer(Path(out)):
        ready.set()
        time.sleep(600)


def test_the_second_writer_is_refused_at_once_and_the_dead_free_the_lock(whole, backbone, tmp_path):
    ready = PROCESSES.Event()
    process = child(hold, tmp_path / "store", ready)
    assert ready.wait(60)
    started = time.time()
    with pytest.raises(VermouthError, match="another process is writing this store"): extract(backbone, items(), tmp_path / "store", **FEW)
    assert time.time() - started < 5
    process.kill(); process.join()
    assert extract(backbone, items(), tmp_path / "store", **FEW).checksum() == whole.checksum()


# Reading


def test_a_fresh_process_reads_what_was_written(whole):
    code = "import sys; from vermouth.store import FeatureStore; s = FeatureStore(sys.argv[1]); print(len(s), s.checksum(), float(s[7][0].double().sum()))"
    run = subprocess.run([sys.executable, "-c", code, str(whole.out)], capture_output=True, text=True, check=True, cwd=whole.out)
    assert run.stdout.split() == ["18", whole.checksum(), str(float(whole[7][0].double().sum()))]


def test_items_and_batches_in_any_order(whole):
    everything = whole.batch(range(18))
    order = [17, 0, 5, 4, 5, -1]
    for level, all_of_it in zip(whole.batch(order), everything): assert torch.equal(level, all_of_it[order])
    assert [m.shape for m in whole.batch([])] == [(0, 96, 2, 2)]
    assert len(list(whole)) == len(whole) == 18
    whole[3][0].zero_()
    assert torch.equal(whole[3][0], everything[0][3]), "what was handed out is not the file"
    with pytest.raises(IndexError): whole[18]


def test_loader_workers(whole):
    for store in (whole, pickle.loads(pickle.dumps(whole))):
        loader = DataLoader(store.dataset(range(18)), batch_size=5, num_workers=2)
        maps, labels = (torch.cat(parts) for parts in zip(*loader))
        assert labels.tolist() == list(range(18)) and torch.equal(maps, whole.batch(range(18))[0])
    with pytest.raises(VermouthError, match="labels: 3 for 18 stored items"): whole.dataset([1, 2, 3])


def test_the_store_holds_what_read_gives_and_trains_to_the_same_bits(backbone, tmp_path):
    clip, expert, toys, labels = load_clip("toybox", "cpu"), load_expert("toybox", device="cpu"), Toybox("sketch", "seen", n=72), [i % 36 for i in range(72)]
    names = torch.nn.functional.normalize(torch.randn(36, clip.dim, generator=torch.Generator().manual_seed(0)), dim=-1)
    def model(): return Vermouth.build(backbone=backbone, clip=clip, expert=expert, prompt="empty")

    store = store_items(model(), toys, tmp_path / "store", quiet=True)
    for level, read in zip(store.batch(range(64)), model().read([toys[i].image for i in range(64)]), strict=True): assert torch.equal(level, read.half())
    one, two = model(), model()
    history, again = [train_head(m, features, labels, names, epochs=3, batch_size=16, lr=1e-3, clip=1.0, quiet=True) for m, features in ((one, store), (two, read_items(two, toys, [""] * 72)))]
    assert len(store.shapes) == 4 + len(expert.dims)
    assert history.equals(again) and history.valid_loss.notna().all()
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values()))


# Damage


def test_a_truncated_shard_is_named_and_only_it_is_made_again(whole, backbone, copy):
    opened = FeatureStore(copy)
    path = copy / shard_name(2)
    os.truncate(path, 100)
    for reading in (lambda: FeatureStore(copy), lambda: opened[9], opened.checksum):
        with pytest.raises(VermouthError, match="shard-00002.safetensors has 100 bytes where .* Delete that file and run extract again: only it is made again"): reading()
    others = {p.name: p.stat().st_mtime_ns for p in copy.glob("shard-*") if p != path}
    path.unlink()
    with pytest.raises(VermouthError, match="shard-00002.safetensors is missing"): FeatureStore(copy)
    assert extract(backbone, items(), copy, **FEW).checksum() == whole.checksum()
    assert {p.name: p.stat().st_mtime_ns for p in copy.glob("shard-*") if p != path} == others


def test_a_manifest_from_elsewhere_is_read_with_a_schema(copy):
    manifest = json.loads((copy / "manifest.json").read_text())
    for change in ({"format": 2}, {"shards": [[]]}, {"shapes": ["a"]}, {"ids": None}, {"more": 1}, {"key": {}}):
        (copy / "manifest.json").write_text(json.dumps(manifest | change))
        with pytest.raises(VermouthError, match="manifest.json is damaged|format 2"): FeatureStore(copy)
    (copy / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(VermouthError, match="manifest.json is damaged"): FeatureStore(copy)


# What is refused


@pytest.mark.parametrize("name, value", [("timesteps", (100,)), ("stages", "up"), ("attention", "up_cross"), ("noise", "none"), ("seed", 1), ("trajectory", "independent"),
                                         ("ddim_steps", 5), ("size", 128), ("dtype", "bfloat16"), ("shard_size", 8)])
def test_a_stale_store_is_refused_by_name(backbone, copy, name, value):
    with pytest.raises(VermouthError, match=rf"made with {name}=.*, asked for {name}=.*{value if isinstance(value, (int, str)) else value[0]}"): extract(backbone, items(), copy, **FEW | {name: value})
    with pytest.raises(VermouthError, match=f"made with {name}="): FeatureStore(copy, {name: value})


def test_other_weights_prompts_and_items_are_refused(whole, backbone, copy):
    with pytest.raises(VermouthError, match="made with backbone='toybox [0-9a-f]{16}', asked for backbone='toybox, random U-Net 0"): extract(backbone.randomized(), items(), copy, **FEW)
    with pytest.raises(VermouthError, match="made with prompt='empty', asked for prompt='given"): extract(backbone, items(), copy, "a cat", **FEW)
    with pytest.raises(VermouthError, match="items: 17 of them"): extract(backbone, Toybox("photo", n=17), copy, **FEW)
    with pytest.raises(VermouthError, match="items: '0' "): extract(backbone, Toybox("photo", n=18, seed=1), copy, **FEW)
    assert FeatureStore(copy).checksum() == whole.checksum(), "a refusal changes nothing"


def test_a_small_disk_is_refused_with_both_numbers(backbone, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 12_345, 12_345))
    with pytest.raises(VermouthError, match="18 items take 3.18e-05 GB and 1.23e-05 GB are free"): extract(backbone, items(), tmp_path / "store", **FEW)
    assert not list((tmp_path / "store").glob("[!.]*"))


def test_a_disk_that_fills_up_costs_nothing(whole, backbone, tmp_path):
    "The kernel refuses long files here, as a full disk would."
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2500, limits[1]))  # a manifest fits, a shard does not
        with pytest.raises(VermouthError, match="shard-00000.safetensors cannot be written .*run extract again; finished shards stay"): extract(backbone, items(), tmp_path / "store", **FEW)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list((tmp_path / "store").glob("*.tmp"))
    assert extract(backbone, items(), tmp_path / "store", **FEW).checksum() == whole.checksum()


def test_foreign_folders_and_wrong_arguments(backbone, copy, tmp_path):
    (tmp_path / "file").write_text("")
    (copy / "notes.txt").write_text("mine")
    refused = [(dict(out=copy), "holds 'notes.txt'"), (dict(out=tmp_path / "file"), "cannot be written"), (dict(items=[]), "items: an empty list"), (dict(items="photos"), "one path"),
               (dict(batch_size=0), "batch_size=0"), (dict(dtype="float32"), "dtype='float32': unknown"), (dict(timestep=3), "timestep: no setting"), (dict(prompts=["a"]), "prompts: 1 of them for 18")]
    for change, message in refused:
        with pytest.raises(VermouthError, match=message): extract(backbone, **{"items": items(), "out": tmp_path / "store"} | FEW | change)
    assert (copy / "notes.txt").read_text() == "mine"
    (copy / "notes.txt").unlink(), (copy / "manifest.json").unlink()
    with pytest.raises(VermouthError, match="but no manifest.json"): extract(backbone, items(), copy, **FEW)


def test_numbers_too_large_for_half_precision(backbone, tmp_path, monkeypatch):
    features = type(backbone).features
    monkeypatch.setattr(type(backbone), "features", lambda *args, **more: [m * 1e6 for m in features(*args, **more)])
    with pytest.raises(VermouthError, match="dtype='float16': features reach .* Pass dtype='bfloat16'"): extract(backbone, items(), tmp_path / "half", **FEW)
    store = extract(backbone, items(), tmp_path / "brain", **FEW, dtype="bfloat16")
    assert store[0][0].dtype == torch.bfloat16 and store[0][0].isfinite().all()


# Bad images


def test_bad_files_are_set_aside_wherever_the_folder_lies(backbone, tmp_path, capsys):
    checksums = []
    for name in ("here", "elsewhere"):
        (tmp_path / name).mkdir()
        for i, toy in enumerate(items()): toy.image.resize((64, 64) if i != 6 else (128, 64)).save(tmp_path / name / f"{i:02}.png")
        (tmp_path / name / "00.png").write_bytes(b"")
        (tmp_path / name / "05.png").write_bytes(b"not an image")
        files = [*sorted((tmp_path / name).iterdir()), tmp_path / name / "gone.png"]
        store = extract(backbone, files, tmp_path / f"{name}.store", **FEW | {"quiet": False})
        said = capsys.readouterr().out
        assert "19 items take" in said and "4 of 19 set aside" in said and str(tmp_path) not in said
        assert dict(store.set_aside).keys() == {"00.png", "05.png", "06.png", "gone.png"} and len(store) == len(store.ids) == 15
        assert "128×64" in dict(store.set_aside)["06.png"] or "64×128" in dict(store.set_aside)["06.png"]
        assert [label for *_, label in store.dataset(range(19))] == store.kept, "labels of the whole list find their items"
        checksums.append(store.checksum())
        assert str(tmp_path) not in (store.out / "manifest.json").read_text()
    assert checksums[0] == checksums[1]
    with pytest.raises(VermouthError, match="none of 2 can be used. The first: image='00.png'"): extract(backbone, files[:1] + [files[5]], tmp_path / "none", **FEW)


def launched(processes, photos, out, kill_after=0):
    "extract under torchrun; with `kill_after` every process is killed after so many seconds."
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "-m", "vermouth.app.cli", "extract", str(photos), "--out", str(out), "--json"]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if kill_after:
        end = time.monotonic() + kill_after
        while run.poll() is None and time.monotonic() < end and not len(list(out.glob("shard-*.safetensors"))) > 1: time.sleep(0.02)
        for process in [*psutil.Process(run.pid).children(recursive=True), run]: process.kill()
    return run.communicate()


def test_processes_share_a_job_and_the_store_is_that_of_one(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for i, toy in enumerate(Toybox("photo", n=300)): toy.image.save(photos / f"{i:03d}.png")
    told = {n: json.loads(launched(n, photos, tmp_path / str(n))[0]) for n in (1, 2)}
    assert told[1]["items"] == told[2]["items"] == 300 and told[1]["checksum"] == told[2]["checksum"]
    launched(2, photos, tmp_path / "killed", kill_after=300)
    left = len(list((tmp_path / "killed").glob("shard-*.safetensors")))
    assert 2 <= left < 5, "killed in the middle"
    kept = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "killed").glob("shard-*.safetensors")}
    again = json.loads(launched(3, photos, tmp_path / "killed")[0])
    assert again["checksum"] == told[1]["checksum"]
    assert all((tmp_path / "killed" / name).stat().st_mtime_ns == at for name, at in kept.items()), "what was done stays done"


# Shards of a webdataset


def test_the_webdataset_librarys_own_shards_are_read_as_it_reads_them(backbone, tmp_path):
    webdataset = pytest.importorskip("webdataset")
    with webdataset.ShardWriter(str(tmp_path / "shard-%03d.tar"), maxcount=4, verbose=0) as shards:
        for i, toy in enumerate(Toybox("photo", n=10)): shards.write({"__key__": f"toys/{i:02}", "png": toy.image, "txt": toy.caption, "json": {"label": int(toy.label)}})
    named = str(tmp_path / "shard-{000..002}.tar")
    packed, streamed = unpacked(image_paths([named])), list(webdataset.WebDataset(named, shardshuffle=False).decode("rgb8"))
    assert [item.key.partition("/")[2] for item in packed] == [f"{sample['__key__']}.png" for sample in streamed] and len(packed) == 10
    for item, sample in zip(packed, streamed): assert np.array_equal(np.asarray(item.image), sample["png"])
    whole = extract(backbone, [item.image for item in packed], tmp_path / "images", **FEW)
    store = extract(backbone, packed, tmp_path / "shards", **FEW)
    assert store.ids[0] == "shard-000.tar/toys/00.png" and torch.equal(store.batch(range(10))[0], whole.batch(range(10))[0])


def test_links_and_folders_in_a_tar_are_no_images_and_a_damaged_one_is_refused(tmp_path):
    secret, tar = tmp_path / "secret.png", tmp_path / "a.tar"
    Toybox("photo", n=1)[0].image.save(secret)
    with tarfile.open(tar, "w") as f:
        for kind, name in ((tarfile.SYMTYPE, "link.png"), (tarfile.LNKTYPE, "hard.png"), (tarfile.DIRTYPE, "folder.png"), (tarfile.FIFOTYPE, "pipe.png")):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, str(secret)
            f.addfile(entry)
        f.add(secret, "../../odd name.png")
    assert [item.key for item in packed_images(tar)] == ["a.tar/../../odd name.png"]
    tar.write_bytes(b"no tar at all" * 100)
    with pytest.raises(VermouthError, match="not a plain tar file"): packed_images(tar)
