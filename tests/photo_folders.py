"A folder of photos and its index, for tests."

import ctypes
import gc
import json
import os
import resource
import sys
import traceback
from contextlib import suppress
from functools import cache

import faiss
from odd_files import Grey

from vermouth.app.search import Index, build_index
from vermouth.data.toybox import Toybox


@cache
def drawn_photos(n=24):
    return [item.image for item in Toybox("photo", n=n, seed=3)]


def write_two_classes(folder, n):
    "Photos of unseen categories in two sub-folders."
    for i, item in enumerate(Toybox("photo", split="unseen", n=n, seed=4)):
        place = folder / ("boat", "fish")[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        item.image.save(place / f"{i}.png")


def write_photos(folder, n=24):
    "Photos in three sub-folders."
    for i, image in enumerate(drawn_photos(n)):
        (folder / f"{i % 3}").mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{i % 3}/{i:02}.png")
    return folder


def build(folder, out, model=None, **options):
    "Index a folder with a model that starts no threads."
    return build_index(folder, out, model or Grey(), quiet=True, **options)


def answers(out):
    "All that a reader can ask of an index: paths, scores and thumbnails of everything, best first."
    index = Index(out)
    query = Grey().embed([drawn_photos()[0]]).numpy()
    hits = index.nearest(query, len(index))
    return index.paths, index.skipped, [(hit.path, round(hit.score, 5), hit.thumbnail) for hit in hits]


def run_forked(work):
    "Run in a process that can be killed; return its id."
    if pid := os.fork():
        return pid
    faiss.omp_set_num_threads(1)  # a team of OpenMP threads does not survive a fork: the child would wait for it
    try:
        work()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def forget_ours(*packages):
    "For a fork of this process: no module of the package (or of these) is loaded, but all that they wait for."
    gc.disable()  # it would take a quarter of the imports' time
    for name in [name for name in sys.modules if name.split(".")[0] in (packages or ("vermouth",))]:
        del sys.modules[name]


def found_forked(work):
    "What work returns in a process of its own, as JSON carries it; that process begins without memory freed here."
    with suppress(AttributeError):  # glibc's
        ctypes.CDLL(None).malloc_trim(0)
    read, write = os.pipe()
    pid = run_forked(lambda: os.write(write, json.dumps(work()).encode()))
    os.close(write)
    with open(read) as f:
        found = f.read()
    assert os.waitpid(pid, 0)[1] == 0, "the reason is printed above"
    return json.loads(found)


def peak_memory():
    "The most bytes that this process has had in memory since it began."
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
