"""How a number is printed, and a table as LaTeX and as HTML: pandas' Styler, booktabs and siunitx. No torch here."""

import math
import re
import textwrap
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
from pandas.io.formats.style import Styler

INTERVAL = "95 % CI"
NOTE_WIDTH = 98  # letters of a footnote that fit a thesis page
SYNTHETIC = "Data: the synthetic world, not the published sets."
BOLD = "Bold: the best value, whatever its interval."


def significant(value: float, digits: int = 3) -> str:
    """Return `value` with that many significant digits and no exponent: 0.0123, 1.23, 123, 1230."""
    for _ in range(2):  # the second time round 9.996 has become 10.0
        places = digits - 1 - (math.floor(math.log10(abs(value))) if value else 0)
        value = round(value, places)
    return f"{value:.{max(places, 0)}f}"


def percentage(share: float) -> str:
    """Return a share in per cent with one decimal, a half rounded as numpy rounds the columns of the tables."""
    return f"{np.round(100 * share, 1):.1f}"


def interval(low: float, high: float, *, digits: int | None = 1, scale: float = 1.0) -> str:
    """Return "[low, high]", or "" where there is none; `digits` decimals, or three significant digits for None."""
    ends = [scale * float(low), scale * float(high)]
    text = f"[{', '.join(map(_formatter(digits, ''), ends))}]" if np.isfinite(ends).all() else ""
    return text.replace("-", "\N{MINUS SIGN}")


def p_text(p: float) -> str:
    """Return a p-value as it is printed: two significant digits, "< 0.001" below that."""
    return "< 0.001" if p < 0.001 else significant(p, 2)


def _formatter(digits: int | None, missing: str) -> Callable[[float], str]:
    def show(value: float) -> str:
        if value is None or not np.isfinite(value):
            return missing
        return significant(value) if digits is None else f"{value:.{digits}f}"

    return show


def _typeset(text: str) -> str:
    """Spell what pandas' escaping leaves alone and LaTeX's default fonts lack."""
    signs = {
        "\N{MINUS SIGN}": "-",
        "<": "<",
        ">": ">",
        "≤": r"\le",
        "≥": r"\ge",
        "×": r"\times",
        "÷": r"\div",
        "α": r"\alpha",
    }
    for sign, spelt in signs.items():
        text = text.replace(sign, f"${spelt}$")
    text = re.sub(r"(?<!\{)-(?=-)", "-{}", text)  # blocks that are gone, not a dash; {--} is one
    return text.replace("–", "--")


def _write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


@dataclass(frozen=True)
class Table:
    """One table: LaTeX in a file, HTML in a notebook.

    `frame` holds what the reader sees; `digits` gives the decimals of each numeric column (None: three significant
    digits); `best` says which end of a column is bold; `group` names a column whose equal values part the table.
    `data`: values come from a data set, and `write` adds to the note where that is synthetic. It says what bold means,
    too.
    """

    frame: pd.DataFrame
    digits: Mapping = field(default_factory=dict)
    best: Mapping = field(default_factory=dict)
    note: str = ""
    group: object = None
    parts: Sequence = ()
    data: bool = True

    def styler(self, *, missing: str = "–", escape: str | None = None) -> Styler:
        """Return the pandas Styler that both renderings come from."""
        frame, parts = self.frame.copy(), [self.frame.index]
        if self.group is not None:
            parts = list(frame.groupby(self.group, sort=False).groups.values())
            frame[self.group] = frame[self.group].where(~frame[self.group].duplicated(), "")
        styler = frame.style.hide(axis="index").format(escape=escape).format_index(escape=escape, axis=1)
        for column, digits in self.digits.items():
            styler = styler.format(_formatter(digits, missing), subset=[column])
        for column, end in self.best.items():
            for part in parts:
                if frame.loc[part, column].nunique() > 1:  # a column of equals has no best
                    highlight = styler.highlight_max if end == "max" else styler.highlight_min
                    styler = highlight(subset=(part, [column]), props="font-weight: bold;")
        return styler

    def _repr_html_(self) -> str:
        return f"{self.styler().to_html()}<p style='max-width: 60em'><small>{self.note}</small></p>"

    def latex(self, source: str) -> str:
        """Return the tabular alone, for the thesis owns float and caption; `source` goes into its first line."""
        columns = self.frame.columns
        text = self.styler(missing="{--}", escape="latex").to_latex(
            hrules=True, siunitx=True, convert_css=True, multicol_align="c", column_format=self._column_format()
        )
        lines = _typeset(text).splitlines()
        labels = pd.Series(self.parts) if self.group is None else self.frame[self.group]
        if len(labels):
            starts = np.flatnonzero(~labels.duplicated())[1:]
            for start in reversed(starts + lines.index(r"\midrule") + 1):
                lines.insert(start, r"\addlinespace")
        if columns.nlevels > 1:
            groups = list(columns.get_level_values(0))
            spans = [
                (groups.index(name) + 1, groups.index(name) + groups.count(name))
                for name in dict.fromkeys(groups)
                if name
            ]
            rules = [rf"\cmidrule(lr){{{first}-{last}}}" for first, last in spans if last > first]
            lines.insert(lines.index(r"\toprule") + 2, " ".join(rules))
        lines[-1:] = [*self._note_lines(), lines[-1]]
        return "\n".join([f"% generated by {source}", "% needs booktabs, and siunitx with detect-weight", *lines, ""])

    def write(self, path: Path, *, source: str, synthetic: bool = False) -> Path:
        """Write the tabular to `path` and return it; synthetic: what it was measured on."""
        said = [self.note, *([BOLD] if self.best else []), *([SYNTHETIC] if synthetic and self.data else [])]
        return _write(path, replace(self, note=" ".join(filter(None, said))).latex(source))

    def _shown(self, column: object) -> list[str]:
        if column in self.digits:
            return [_formatter(self.digits[column], "")(value) for value in self.frame[column]]
        return [str(value) for value in self.frame[column]]

    def _column_format(self) -> str:
        formats = []
        for column in self.frame.columns:
            name = column[-1] if isinstance(column, tuple) else column
            formats.append(rf"@{{\hspace{{{0.4 if name == INTERVAL else 0.75}em}}}}" if formats else "@{}")
            if column in self.digits:
                whole, _, part = zip(*(text.lstrip("-").partition(".") for text in self._shown(column)), strict=True)
                sign = "-" if any(text.startswith("-") for text in self._shown(column)) else ""
                formats.append(f"S[table-format={sign}{max(1, *map(len, whole))}.{max(map(len, part))}]")
            else:
                formats.append("l")
        return "".join([*formats, "@{}"])

    def _note_lines(self) -> list[str]:
        columns, width = self.frame.columns, 0
        for group in dict.fromkeys(columns.get_level_values(0)):
            members = [column for column in columns if columns.nlevels == 1 and column == group or column[0] == group]
            heads = [column if columns.nlevels == 1 else column[-1] for column in members]
            texts = [max(map(len, [head, *self._shown(column)])) for head, column in zip(heads, members, strict=True)]
            width += max(sum(texts) + len(members), len(group)) + 2
        text = _typeset(re.sub(r"([%&#_$])", r"\\\1", self.note))
        lines = textwrap.wrap(text, width=min(int(1.1 * width), NOTE_WIDTH), break_long_words=False)
        return [rf"\multicolumn{{{len(columns)}}}{{@{{}}l@{{}}}}{{\footnotesize {line}}} \\" for line in lines]


def macro(*words: str) -> str:
    """Return a LaTeX command name, letters only: ("mha", "zero-shot") gives MhaZeroShot."""
    digits = dict(zip("0123456789", "Zero One Two Three Four Five Six Seven Eight Nine".split(), strict=True))
    name = "".join(part.capitalize() for word in words for part in re.split(r"[^A-Za-z0-9]+", word))
    return "".join(digits.get(letter, letter) for letter in name)


def write_numbers(found: Mapping[str, str], path: Path, *, source: str) -> Path:
    """Write one \\newcommand a number; raises ValueError for a name that LaTeX would not read as one command."""
    if wrong := [name for name in found if not re.fullmatch(r"[A-Za-z]+", name)]:
        raise ValueError(f"a macro's name is letters only, unlike {wrong}")
    # A hyphen that no word or number precedes is a minus.
    texts = {name: re.sub(r"(?<![\w-])-(?=\d)", "\N{MINUS SIGN}", value) for name, value in found.items()}
    texts = {name: _typeset(text.replace("%", r"\%")) for name, text in texts.items()}
    lines = [rf"\newcommand{{\{name}}}{{{text}}}" for name, text in texts.items()]
    return _write(path, "\n".join([f"% generated by {source}", *lines, ""]))


def write_items(captions: Mapping[str, str], tables: Collection[str], path: Path, *, source: str) -> Path:
    """Write one call a table or figure, \\thesistable{stem}{caption} or \\thesisfigure, for a document to input."""
    lines = [
        rf"\thesis{'table' if stem in tables else 'figure'}{{{stem}}}{{{text}}}" for stem, text in captions.items()
    ]
    return _write(path, "\n".join([f"% generated by {source}", *lines, ""]))
