"Random class names, captions, prompts and values typed in a shell."

import json
from functools import cache

import pytest
import torch
from fuzz import ANYTHING, REFUSED, TEXT, attempt, often
from hypothesis import strategies as st

from vermouth.app.run import parse_value
from vermouth.backbone import prompt_list
from vermouth.core import is_text
from vermouth.text import class_prompts, class_words, load_clip, text_embeddings


@often(100, names=st.lists(TEXT, max_size=4), template=TEXT | st.just("a photo of {}"))
def test_class_names(names, template):
    words, prompts = attempt(class_words, names), attempt(class_prompts, names, template)
    if words is not REFUSED:
        assert len(words) == len(names) == len(set(words)) and all(
            w and w == " ".join(w.split()) for group in words for w in group
        )
    if prompts is not REFUSED:
        assert len(prompts) == len(names) == len(set(prompts)) and template.count("{}") == 1


@cache
def clip():
    return load_clip("toybox", "cpu")


@often(60, texts=st.lists(TEXT, max_size=3) | TEXT)
@pytest.mark.filterwarnings("ignore:texts")
def test_texts_are_unit_vectors(texts):
    found = attempt(text_embeddings, texts, clip())
    texts = [texts] if isinstance(texts, str) else texts
    assert (found is REFUSED) == (not texts or not all(map(is_text, texts)))
    if found is not REFUSED:
        assert torch.allclose(found.norm(dim=1), torch.ones(len(texts)), atol=1e-5)


@often(100, prompts=ANYTHING | st.lists(TEXT | st.none(), max_size=3), count=st.none() | st.integers(1, 3))
def test_prompts(prompts, count):
    found = attempt(prompt_list, prompts, count)
    if found is not REFUSED:
        assert len(found) == (count or len(found)) and all(map(is_text, found))


@often(
    200,
    text=st.text(max_size=20)
    | st.builds(
        lambda a, b: a + b,
        st.sampled_from(["[", "{", "[[", "{a: ", "[!!", "[0x", "[2001-", "- ", "'", "[&a "]),
        st.text("[]{}:,'\"-_xX01239 \n&*!|>%@`a", max_size=12),
    ),
)
def test_values_from_a_shell(text):
    attempt(parse_value, text)


@often(
    60,
    value=st.recursive(
        st.integers(-(10**12), 10**12) | st.booleans() | st.none() | st.text("abc xyz", max_size=6),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", min_size=1, max_size=3), inner, max_size=2)
        ),
        max_leaves=5,
    ).filter(lambda v: not isinstance(v, str)),
)
def test_json_from_a_shell_is_what_it_says(value):
    assert parse_value(json.dumps(value)) == value
