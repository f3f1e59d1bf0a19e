"What is public says what it does, what each argument is, and what it raises."

import ast
import io
import re
import tokenize
from functools import cache

import pytest
from house import MODULES, public, short, tree


@cache
def commented_lines(module):
    tokens = tokenize.generate_tokens(io.StringIO(MODULES[module].read_text(encoding="utf-8")).readline)
    return {token.start[0]: token.line.strip().startswith("#") for token in tokens if token.type == tokenize.COMMENT}


def said_of_fields(module, names):
    "Which fields have a comment, beside them or on the line above."
    comments = commented_lines(module)
    return {name: node.end_lineno in comments or comments.get(node.lineno - 1, False) for name, node in names.items()}


def said_of(module, function, method=False):
    "Which arguments have one. Beside a `def` on one line it is of what is returned, or else of the only argument."
    a = function.args
    every = [*a.posonlyargs, *a.args, *filter(None, [a.vararg]), *a.kwonlyargs, *filter(None, [a.kwarg])]
    every = every[method and not any(ast.unparse(d) == "staticmethod" for d in function.decorator_list) :]
    said = said_of_fields(module, {arg.arg: arg for arg in every})
    shared = function.returns or len(every) > 1
    return said | {arg.arg: False for arg in every if arg.lineno == function.lineno and shared}


def entries():
    "Public functions, classes with fields, and methods: module, name, what is said of each part, the syntax."
    classes, patched = {}, []
    for module in MODULES:
        names = set(public(module))
        for node in tree(module).body:
            if isinstance(node, ast.ClassDef):
                classes[node.name] = module, node, node.name in names
            elif isinstance(node, ast.FunctionDef) and any("patch" in ast.unparse(d) for d in node.decorator_list):
                patched.append((module, ast.unparse(node.args.args[0].annotation), node))
            elif isinstance(node, ast.FunctionDef) and node.name in names:
                yield module, node.name, said_of(module, node), node
    methods = {name: [] for name in classes}
    for name, (module, node, _) in classes.items():
        methods[name] += [(module, f) for f in node.body if isinstance(f, ast.FunctionDef)]
    for module, name, node in patched:
        methods[name].append((module, node))

    def inherited(name, method):
        "What the classes above say of a method's arguments."
        above = [ast.unparse(base) for base in classes[name][1].bases if ast.unparse(base) in classes]
        found = [said_of(m, f, True) for base in above for m, f in methods[base] if f.name == method]
        return [*found, *(said for base in above for said in inherited(base, method))]

    for name, (module, node, shown) in classes.items():
        if not shown:
            continue
        fields = {b.target.id: b for b in node.body if isinstance(b, ast.AnnAssign)}
        yield module, name, said_of_fields(module, {k: b for k, b in fields.items() if not k.startswith("_")}), node
        for where, f in methods[name]:
            if not f.name.startswith("_") or f.name in ("__init__", "__call__"):
                said, above = said_of(where, f, True), inherited(name, f.name)
                said = {arg: ok or any(other.get(arg) for other in above) for arg, ok in said.items()}
                yield where, f"{name}.{f.name}", said, f


@pytest.fixture(scope="module")
def documented():
    return list(entries())


def test_public_names_are_documented(documented):
    own = [(m, name, node) for m, name, _, node in documented if "." not in name]
    assert len(own) > 200
    assert not (bare := [f"{short(m)}.{name}" for m, name, node in own if not ast.get_docstring(node)]), bare


def test_every_argument_says_what_it_is(documented):
    "In shapes, units, ranges or words: a comment beside it, or beside that of the method which it replaces."
    bare = [f"{short(m)}.{name}: {arg}" for m, name, said, _ in documented for arg, ok in said.items() if not ok]
    assert sum(len(said) for _, _, said, _ in documented) > 800
    assert not bare, "\n".join(bare)


def test_what_raises_says_so(documented):
    "A function whose own lines raise a VermouthError names it in its docstring, `__init__` in that of its class."

    def raises(function):
        return any(
            isinstance(node, ast.Raise) and node.exc and ast.unparse(node.exc).startswith("VermouthError(")
            for node in ast.walk(function)
        )

    docs = {name: ast.get_docstring(node) or "" for _, name, _, node in documented}
    said = re.compile(r"Raise VermouthError|.*Raises VermouthError", re.S)
    functions = [(m, name) for m, name, _, node in documented if isinstance(node, ast.FunctionDef) and raises(node)]
    assert len(functions) > 60
    silent = [f"{short(m)}.{n}" for m, n in functions if not said.match(docs[n.removesuffix(".__init__")])]
    assert not silent, silent
