"Seeded random input for the tests: there is a right result or a VermouthError, and nothing else is raised."

from conftest import COUNTS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vermouth.core import VermouthError

REFUSED = object()


def often(cases, **draws):
    "Run a test on so many draws, the same ones every time, and count them."

    def wrap(test):
        def counted(**drawn):
            COUNTS["fuzz cases"] += 1
            test(**drawn)

        counted.__name__, counted.__doc__ = test.__name__, test.__doc__
        quiet = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
        return settings(
            max_examples=cases, derandomize=True, database=None, deadline=None, suppress_health_check=quiet
        )(given(**draws)(counted))

    return wrap


def attempt(function, *args, **more):
    "The result, or REFUSED for a VermouthError of one sentence. Anything else that is raised fails the test."
    try:
        return function(*args, **more)
    except VermouthError as e:
        assert "\n" not in str(e) and str(e)[-1] in ".!?", e
        return REFUSED


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.tuples(inner, inner) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
    max_leaves=4,
)

TEXT = (
    st.text(max_size=12)
    | st.text(st.characters(categories=["Cs", "Cc", "Zs", "Lo", "So"]), max_size=6)
    | st.sampled_from(["", " ", "_", "a,b", "{}", "cat", "Cat"])
)
