"What stands on the processed pages of the site."

import re

import yaml


def front_matter(cells):
    return yaml.safe_load(cells[0].source.strip().strip("-"))


def outputs(cells):
    "Each output of code cells with what it shows as text, by kind."
    for cell in cells:
        for output in cell.get("outputs", ()):
            yield cell, output, {kind: "".join(text) for kind, text in output.get("data", {}).items()}


def sections(cells):
    "Each heading with its level, and what follows: the level of the next one, code or a table, or nothing."
    parts = []
    for cell in cells:
        if cell.cell_type == "code":
            parts.append("code")
        elif cell.cell_type == "markdown":
            text = re.sub(r"^```.*?^```", "| code", cell.source, flags=re.M | re.S)
            found = re.findall(r"^(#{2,4}) (.+)|^\|", text, re.M)
            parts += [(title, len(marks)) if marks else "table" for marks, title in found]
    for part, following in zip(parts, [*parts[1:], None], strict=True):
        if isinstance(part, tuple):
            yield *part, following[1] if isinstance(following, tuple) else following


def words_shown(cells, plain="text/plain"):
    "All words of a page: prose and what code shows, without fences; with `plain=\"\"` what Quarto reads as Markdown."
    shown = [cell.source for cell in cells if cell.cell_type == "markdown"]
    shown += [kinds.get("text/markdown", kinds.get(plain, "")) for *_, kinds in outputs(cells)]
    return re.sub(r"^```.*?^```", "", "\n".join(shown), flags=re.M | re.S)


def tables(text):
    "The tables of a Markdown text as lists of rows."
    for block in re.findall(r"(?:^\|.*\|[ ]*\n?)+", text, re.M):
        rows = [re.split(r"(?<!\\)\|", line.strip())[1:-1] for line in block.splitlines()]
        if len(rows) > 1 and re.fullmatch(r"[ :-]+", rows[1][0]):
            yield rows


def longest_word(cell):
    "Of a cell as it is shown: without the address of a link or the marks of code."
    shown = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", cell).replace("`", "").replace("*", "").replace("<br>", " ")
    return max(map(len, re.split(r"[\s/\-]+", shown)), default=0)


def letters_shown(line):
    "About as many characters of a line of an equation as are shown side by side."
    line = re.sub(r"\\tag\{[^}]*\}|\\(begin|end)\{\w+\}", "", line)
    line = re.sub(r"\\(?:text|texttt|math\w+|operatorname)\{([^{}]*)\}", r"\1", line)
    line = re.sub(r"\\(?:[dt]?frac|sqrt|bar|left|right|[bB]igg?[lr]?|underbrace)\b", "", line)
    return len(re.sub(r"\\[a-zA-Z]+", "x", re.sub(r"\\[^a-zA-Z]|[{}$&_^\s]", "", line)))
