"""What `mkdocs.yml` adds to MkDocs, so that the pages of docs/ stay what GitHub shows, too.

- A link out of docs/, such as ``../configs/retinanet_poly1.py``, leads to a page with that file.
- Formulas, ``$...$`` and ``$$...$$``, become MathML, which browsers show by themselves.
- Docstrings, whose references and formulas are reStructuredText's, become Markdown.
"""

import html
import posixpath
import re
import textwrap
from pathlib import Path, PurePosixPath
from typing import Any

import griffe
from latex2mathml import converter
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent

_LINK = re.compile(r"\]\((?P<path>(?:\.\./)+[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")
_FORMULA = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">(?P<open>\\[(\[])(?P<tex>.*?)\\[)\]]</(?P=tag)>',
    re.DOTALL,
)
_LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".toml": "toml", ".csv": "text"}


def _outside(link: str, page: str) -> PurePosixPath | None:
    """The file or folder outside docs/ that a page links to, from the root; None for others."""
    target = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), link))
    if target.startswith(("docs/", "../")) or not (ROOT / target).exists():
        return None
    return PurePosixPath(target)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for each file outside docs/ that some page links to."""
    found: set[PurePosixPath] = set()
    for page in files.documentation_pages():
        links = _LINK.finditer(page.content_string)
        found |= {file for link in links if (file := _outside(link["path"], page.src_uri))}
    for file in sorted(found):
        if (ROOT / file).is_dir():
            text = "".join(f"{child.name}\n" for child in sorted((ROOT / file).iterdir()))
        else:
            text = (ROOT / file).read_text(encoding="utf-8")
        fence = f"````{_LANGUAGES.get(file.suffix, 'text')}\n{text}````\n"
        content = f"---\nsearch:\n  exclude: true\n---\n# {file}\n\n{fence}"
        files.append(File.generated(config, f"source/{file}.md", content=content))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links out of docs/ lead to the pages that :func:`on_files` made."""
    here = page.file.src_uri

    def inside(link: re.Match[str]) -> str:
        file = _outside(link["path"], here)
        if file is None:
            return link[0]
        return f"]({posixpath.relpath(f'source/{file}.md', posixpath.dirname(here) or '.')})"

    return _LINK.sub(inside, markdown)


def on_page_content(content: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn the formulas of a page into MathML."""

    def mathml(formula: re.Match[str]) -> str:
        tex = html.unescape(formula["tex"]).strip()
        tex = re.sub(r"\\(log|max|exp)(?=\s+[\w\\])", r"\\\1\\,", tex)  # log p, not logp
        try:
            display = "inline" if formula["tag"] == "span" else "block"
            return converter.convert(tex, display=display)
        except Exception as error:  # of many kinds, by what is wrong with the formula
            raise PluginError(
                f"{page.file.src_uri} has a formula that is not understood: {tex}"
                f" ({type(error).__name__}: {error})"
            ) from error

    return _FORMULA.sub(mathml, content)


def markdown_of(docstring: str) -> str:
    """A docstring with reStructuredText's references and formulas as Markdown has them."""
    text = re.sub(r":math:`([^`]+)`", r"$\1$", docstring)
    text = re.sub(r":\w+:`~([\w.]+)`", lambda role: f"`{role[1].rpartition('.')[2]}`", text)
    text = re.sub(r":\w+:`([\w.]+)`", r"`\1`", text)
    text = re.sub(r"^( *)Example:$", r"\1Examples:", text, flags=re.MULTILINE)
    text = text.replace(">= ", "≥ ").replace("<= ", "≤ ")  # a line that starts with > is a quote
    text = re.sub(r"^([\w, ]+)\n    (?=\S)", r"\n\1\n:   ", text, flags=re.MULTILINE)  # definitions
    # Arguments named together, and a source, may take more lines, which griffe does not expect.
    text = re.sub(r"^( +(?:\w+, )+\w+,)\n +", r"\1 ", text, flags=re.MULTILINE)
    text = re.sub(r"^( *Source: .+)\n +", r"\1 ", text, flags=re.MULTILINE)

    def formula(block: re.Match[str]) -> str:
        lines = f"$$\n{textwrap.dedent(block['inline'] or block['block']).strip()}\n$$\n"
        return textwrap.indent(lines, block["indent"])

    return re.sub(
        r"^(?P<indent> *)\.\. math::(?: (?P<inline>.+)\n|\n(?P<block>(?:(?P=indent) +.+\n)+))",
        formula,
        text + "\n",
        flags=re.MULTILINE,
    )


class MarkdownDocstrings(griffe.Extension):
    """Gives mkdocstrings the docstrings as Markdown."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite the docstring of a module, class or function, once it is loaded."""
        if obj.docstring:
            obj.docstring.value = markdown_of(obj.docstring.value)
