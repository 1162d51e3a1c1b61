"""The pages that people read, in parts."""

import re
import shlex

from tools import ROOT

PAGES = {path.name: path.read_text() for path in
         [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]}


def blocks(text, language):
    """What stands between the fences of this language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


def lines(text):
    """Each command in the text's blocks of shell as it is typed, on one line and without comments."""
    joined = "\n".join(blocks(text, "sh")).replace("\\\n", " ")
    joined = re.sub(r"\$\(\n(.*?)\)", r"$(\1)", joined, flags=re.S).splitlines()
    bare = [re.sub(r"(^|\s+)#\s.*", "", line).strip() for line in joined]
    return [line for line in bare if line]


def commands(text):
    """The words of each of these commands."""
    return [shlex.split(line) for line in lines(text)]


def section(text, heading):
    """What stands under a heading, up to the next one of its level or above."""
    level = re.match("#+", heading)[0]
    after = re.split(rf"^{re.escape(heading)}$", text, maxsplit=1, flags=re.M)[1]
    return re.split(rf"^#{{1,{len(level)}}} ", after, maxsplit=1, flags=re.M)[0]


def tables(text):
    """The cells of each row of the text's tables, without those that head them."""
    found = []
    for table in re.findall(r"(?:^\|.*\|\n)+", text + "\n", re.M):
        for line in table.splitlines()[2:]:
            found.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip())[1:-1]])
    return found


def spans(cell):
    """What stands in a cell as code."""
    return re.findall(r"`([^`]+)`", cell)
